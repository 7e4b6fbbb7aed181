"""Floating-point operations of the model, counted as torch counts them: 2 for a multiplication and its addition.

Only matrix products and attention count; norms, activations and rotations are under a percent. What is counted agrees
with torch.utils.flop_counter.FlopCounterMode, which takes attention as if every token saw every other one of its
sequence. A causal kernel skips half of that: `causal=0.5` is what a GPU does.

    layer       2 x matrix entries a token, and 4 x tokens^2 x query width for scores and their sum over values
    delta net   in place of the latter, by chunks of C = 64 tokens: 2 C (2 C k + C v + 3 k v) a chunk and head, of keys
                k and values v wide, and its convolution; the triangular systems of a chunk are solved beside that
    head        2 x vocabulary x hidden a response token; the blocks of log_probs.py once more in the backward
    backward    two products for one; of attention five for two, as its kernels compute the scores again
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmr1_ds.engine.model.shapes import ModelShape, VisionShape

ATTENTION_BACKWARD = 2.5  # of its forward
CAUSAL = 0.5  # of the attention is computed by a causal kernel
_CHUNK = 64  # tokens that a delta net computes at once
# 1e12 FLOP a second of dense bf16 matrix products, by their makers' datasheets
PEAK_TFLOPS = {"a100": 312.0, "h100": 989.4, "h200": 989.4, "b200": 2250.0}


def peak_tflops(device: str) -> float | None:
    """Return the peak of the GPU that torch calls `device`; None for one that is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device.lower()), None)


@dataclass(frozen=True)
class Work:
    """Sequences to compute: tokens of each, response tokens of all, images as grids of patches (height, width)."""

    lengths: Sequence[float]
    response_tokens: float
    images: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Flops:
    """FLOP of a pass, by what computes them."""

    text: float
    vision: float
    head: float

    @property
    def total(self) -> float:
        return self.text + self.vision + self.head


def forward(shape: ModelShape, work: Work, causal: float = 1.0, with_head: bool = True) -> Flops:
    """Count the FLOP of one forward."""
    matrices, attention = _text(shape, work.lengths)
    vision = _vision_parts(shape.vision, work.images) if shape.vision is not None else _NONE
    text = matrices + causal * attention + sum(_delta_nets(shape, work.lengths))
    return Flops(text, sum(vision), _head(shape, work) if with_head else 0.0)


def backward(shape: ModelShape, work: Work, causal: float = 1.0, with_head: bool = True) -> Flops:
    """Count the FLOP of the backward alone, without what LoRA and frozen towers save."""
    products = 1.0 if shape.adapters else 2.0  # frozen matrices have no gradient of their own
    matrices, attention = _text(shape, work.lengths)
    text = products * matrices + ATTENTION_BACKWARD * causal * attention
    delta, convolution = _delta_nets(shape, work.lengths)
    text += 2 * delta + _delta_net_backward(shape, work.lengths) + products * convolution
    text += 3 * 2.0 * shape.adapters * sum(work.lengths)  # their forward too, which is small
    vision = 0.0
    if shape.vision is not None and shape.vision_is_trained:
        patches, rest, attended = _vision_parts(shape.vision, work.images)
        # The pixels need no gradient.
        vision = (products - 1) * patches + products * rest + ATTENTION_BACKWARD * attended
    head = _head(shape, work) * (2.0 if shape.adapters else 3.0) if with_head else 0.0  # blocks are computed again
    return Flops(text, vision, head)


def recomputed(shape: ModelShape, work: Work, causal: float = 1.0) -> Flops:
    """Count the FLOP that gradient checkpointing adds: the layers' forwards once more, without each one's last product,
    which no gradient of it needs (torch's non-reentrant kind stops before it)."""
    matrices, attention = _text(shape, work.lengths)
    matrices -= 2.0 * _last_matrices(shape) * sum(work.lengths)
    vision = 0.0
    if shape.vision is not None and shape.vision_is_trained:
        tower = shape.vision
        _, _, attended = _vision_parts(tower, work.images)
        last = tower.depth * tower.mlp_width * tower.width
        vision = 2.0 * (tower.block_matrix - last) * _patches(work.images) + attended
    text = matrices + causal * attention + sum(_delta_nets(shape, work.lengths))
    return Flops(text, vision, 0.0)


def model_flop(shape: ModelShape, work: Work) -> tuple[float, float]:
    """Return what counts for MFU, of a forward, and of a forward with its backward.

    The vision tower and what checkpointing computes again do not count.
    """
    once, back = forward(shape, work, CAUSAL), backward(shape, work, CAUSAL)
    return once.text + once.head, once.text + once.head + back.text + back.head


def decode_token(shape: ModelShape, context: float) -> float:
    """Count the FLOP of one sampled token after `context` others."""
    delta = 0.0
    if (linear := shape.linear) is not None:  # what the state says of a key, what is added to it, and what it answers
        delta = 6.0 * linear.layers * linear.heads * linear.key_size * linear.value_size
    attention = 4.0 * shape.attention_layers * shape.query_width * context
    return 2.0 * (shape.layer_matrix + shape.vocabulary * shape.hidden) + attention + delta


_NONE = (0.0, 0.0, 0.0)


def _text(shape: ModelShape, lengths: Sequence[float]) -> tuple[float, float]:
    """Count the FLOP of matrices and attention."""
    squares = sum(length * length for length in lengths)
    return 2.0 * shape.layer_matrix * sum(lengths), 4.0 * shape.attention_layers * shape.query_width * squares


def _delta_nets(shape: ModelShape, lengths: Sequence[float]) -> tuple[float, float]:
    """Count the FLOP of the rule and of the convolution before it, in all layers of linear attention."""
    if (linear := shape.linear) is None:
        return 0.0, 0.0
    key, value = linear.key_size, linear.value_size
    a_token = 2.0 * (2 * _CHUNK * key + _CHUNK * value + 3 * key * value) * linear.heads
    # It sees its tokens and, at either end, one less than its kernel of zeros.
    seen = sum(length + linear.kernel - 1 for length in lengths)
    return linear.layers * a_token * _chunked(lengths), 2.0 * linear.layers * linear.channels * linear.kernel * seen


def _delta_net_backward(shape: ModelShape, lengths: Sequence[float]) -> float:
    """Count what the backward of the rule has beside two products for one.

    The triangular systems, whose solutions are k and v wide, have a product more each. A sequence's first state has no
    gradient, nor has its last one.
    """
    if (linear := shape.linear) is None:
        return 0.0
    key, value = linear.key_size, linear.value_size
    a_head = 2.0 * _CHUNK * (key + value) * _chunked(lengths) - 8.0 * _CHUNK * key * value * len(lengths)
    return linear.layers * linear.heads * a_head


def _chunked(lengths: Sequence[float]) -> float:
    return float(sum(_CHUNK * math.ceil(length / _CHUNK) for length in lengths))


def _last_matrices(shape: ModelShape) -> float:
    """Count the entries of the layers' last matrices. Those of experts have products after them: weights of routers."""
    layers, width = shape.layers, shape.mlp_width
    if shape.experts is not None:
        layers, width = layers - shape.experts.layers, shape.dense_width
    return layers * width * shape.hidden


def _head(shape: ModelShape, work: Work) -> float:
    return 2.0 * shape.vocabulary * shape.hidden * work.response_tokens


def _patches(images: Sequence[tuple[int, int]]) -> int:
    return sum(height * width for height, width in images)


def _vision_parts(vision: VisionShape, images: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Count the FLOP of the patches' embedding, the matrices after it, and attention."""
    patches = _patches(images)
    matrices = 2.0 * (vision.block_matrix * patches + vision.merger_matrix * patches / vision.merge**2)
    whole = sum((height * width) ** 2 for height, width in images)
    seen = vision.full_blocks * whole
    if vision.window_patches:
        side = vision.window_patches
        windows = sum(_squares(height, side) * _squares(width, side) for height, width in images)
        seen += (vision.depth - vision.full_blocks) * windows
    embedding = 2.0 * vision.patch_elements * vision.width * patches
    return embedding, matrices, 4.0 * vision.width * seen


def _squares(length: int, side: int) -> int:
    """Return the sum of the squares of the pieces of at most `side` that a length is cut into."""
    return length // side * side**2 + (length % side) ** 2
