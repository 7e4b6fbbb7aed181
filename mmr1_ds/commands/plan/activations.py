"""Bytes that a forward and backward hold beside the weights, from the model's shape and its tokens.

Of a text layer the backward keeps, for each token, with e bytes an element and float32 inside the norms:

    two norms     the states in float32, normalised, and scaled: 2 (4 + 2e) H
    attention     queries, keys, values, the result, and a float32 a head: e (2 Q + 2 K) + 4 heads
    gated MLP     gate, its activation, up, and their product: 4 e I
    delta net     in place of attention: the convolution's input, its result before and after the activation, queries
                  and keys for each head and normalised, the gate, 64 numbers a head of a chunk, and the gated norm over
                  values: e (3 channels + 4 heads k + 4 V + 64 heads) + 12 V. That is with the kernels of
                  flash-linear-attention; transformers' own functions in plain torch keep several times as much

    experts       each token once for each of its k experts, before and after them: 2 e k H; and 4 a probability

where H is the hidden size, Q and K are the widths of queries and keys, I the MLP's (of several experts: their sum), k a
delta net's keys and V all of its values. In float32 the norms' first copy is the states themselves. With gradient
checkpointing only each layer's input is kept, e H, and one layer's at a time. A vision block is the same by patch,
without grouped keys; a plain MLP keeps two in place of four, LayerNorm no copy.

Attention is that of flash-attention or of torch's own kernel: no scores are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmr1_ds.engine.model.shapes import LinearShape, ModelShape, VisionShape

EXACT_BYTES = 4  # of float32, inside norms and the log-probability head


@dataclass(frozen=True)
class MicroBatch:
    """The sequences that a rank computes at once."""

    tokens: float  # of all sequences, prompts included
    response_tokens: float
    patches: float  # of images


@dataclass(frozen=True)
class Activations:
    """Bytes, by what they are."""

    kept: float  # from the forward to the backward, over all layers
    layer: float  # while one layer is computed or goes backward, beside what is kept
    head: float  # while the log-probability head works, beside what is kept

    @property
    def peak(self) -> float:
        return self.kept + max(self.layer, self.head)


def training(shape: ModelShape, batch: MicroBatch, element: int, checkpointed: bool, device: str) -> Activations:
    """Return what a forward and backward hold. Args: element: its bytes; device: cuda or cpu, for the head's blocks."""
    text = batch.tokens * layer_bytes(
        shape.hidden, shape.query_width, shape.key_width, shape.heads, shape.mlp_width, element,
        qk_norm=shape.has_qk_norm,
    )  # fmt: skip
    text += batch.tokens * routed_bytes(shape, element)
    layer = temporaries(shape.hidden, shape.mlp_width, element) * batch.tokens
    kept = shape.attention_layers * text
    if shape.linear is not None:
        other = batch.tokens * (
            layer_bytes(shape.hidden, 0, 0, 0, shape.mlp_width, element) + delta_net_bytes(shape.linear, element)
        )
        kept += shape.linear.layers * other
        text = max(text, other)
    if checkpointed:
        kept = shape.layers * element * shape.hidden * batch.tokens
    kept += (EXACT_BYTES + 2 * element) * shape.hidden * batch.tokens  # the last norm, and the states of the responses
    if checkpointed:
        layer += text
    if shape.vision is not None and batch.patches:
        vision = shape.vision
        width, mlp_width = vision.width, vision.mlp_width
        block = batch.patches * layer_bytes(width, width, width, vision.heads, mlp_width, element, vision.is_gated)
        tower = element * vision.patch_elements * batch.patches
        if shape.vision_is_trained:
            tower += vision.depth * (element * vision.width * batch.patches if checkpointed else block)
            tower += merger(vision, shape.hidden, element) * batch.patches
        kept += tower
        own = temporaries(width, mlp_width, element) * batch.patches + (block if checkpointed else 0.0)
        layer = max(layer, own)
    return Activations(kept, layer, head(shape, batch, element, device, backward=True))


def scoring(shape: ModelShape, batch: MicroBatch, element: int, device: str) -> Activations:
    """Return what a forward without gradient holds: only the states that go from layer to layer are kept."""
    kept = 2 * element * shape.hidden * batch.tokens
    layer = (2 * EXACT_BYTES * shape.hidden + 3 * element * shape.mlp_width) * batch.tokens
    layer += batch.tokens * routed_bytes(shape, element)
    if shape.vision is not None and batch.patches:
        vision = shape.vision
        kept += element * vision.patch_elements * batch.patches
        layer = max(layer, (2 * EXACT_BYTES * vision.width + 3 * element * vision.mlp_width) * batch.patches)
    return Activations(kept, layer, head(shape, batch, element, device, backward=False))


def layer_bytes(
    width: int, queries: int, keys: int, heads: int, mlp: float, element: int, gated: bool = True, qk_norm: bool = False
) -> float:
    """Return the bytes a token, or a patch, that a layer keeps for its backward.

    Args: queries, keys: their widths; gated: its MLP, and then its norms are RMS; else LayerNorm.
    """
    norms = 2 * _norm(element, gated) * width
    if qk_norm:
        norms += (EXACT_BYTES + element) * (queries + keys)
    attention = element * (2 * queries + 2 * keys) + EXACT_BYTES * heads
    return norms + attention + (4 if gated else 2) * element * mlp


def delta_net_bytes(linear: LinearShape, element: int) -> float:
    """Return the bytes a token that a layer of linear attention keeps for its backward, beside norms and MLP."""
    values = linear.heads * linear.value_size
    heads = linear.heads * (4 * linear.key_size + 64)
    return element * (3 * linear.channels + heads + 4 * values) + 3 * EXACT_BYTES * values


def routed_bytes(shape: ModelShape, element: int) -> float:
    """Return the bytes a token that experts keep beside a gated MLP, the mean of all layers."""
    if shape.experts is None:
        return 0.0
    # The token once for each of its experts, before and after them; probabilities in float32.
    routed = 2 * element * shape.experts.chosen_each * shape.hidden + EXACT_BYTES * shape.experts.experts
    return routed * shape.experts.layers / shape.layers


def _norm(element: int, is_rms: bool) -> int:
    return (EXACT_BYTES if is_rms else 0) + 2 * element


def temporaries(width: int, mlp_width: float, element: int) -> float:
    """Return the bytes a token of gradients beside what is kept, at the MLP of a layer: the widest place."""
    return element * (2 * mlp_width + width)


def merger(vision: VisionShape, hidden: int, element: int) -> float:
    """Return the bytes a patch that the merger keeps: a norm, the wide states before and after GELU."""
    norm = _norm(element, vision.is_gated)
    return norm * vision.width + 2 * element * vision.width + element * hidden / vision.merge**2


def head(shape: ModelShape, batch: MicroBatch, element: int, device: str, backward: bool) -> float:
    """Return the bytes of the blocks of logits and what they need beside them, without the weight and its gradient."""
    from mmr1_ds.engine.model.log_probs import block_width  # imports torch

    tokens = max(1, int(batch.response_tokens))
    block = tokens * block_width(tokens, shape.vocabulary, EXACT_BYTES, device) * EXACT_BYTES
    low = element / EXACT_BYTES if element < EXACT_BYTES else 0.0  # a block in the model's own type
    if not backward:
        return block * (2 + low)  # logits and their exponentials
    states = shape.hidden * tokens
    # The states' gradient, scaled states, one block's product.
    return block * (1 + low) + states * (EXACT_BYTES + 2 * element)
