"""Floating-point operations of the model, counted as torch counts them: 2 for a multiplication and its addition.

Only matrix products and attention count; norms, activations and rotations are under a percent. What is counted agrees
with torch.utils.flop_counter.FlopCounterMode, which takes attention as if every token saw every other one of its
sequence. A causal kernel skips half of that: `causal=0.5` is what a GPU does.

    layer       2 x matrix entries a token, and 4 x tokens^2 x query width for scores and their sum over values
    head        2 x vocabulary x hidden a response token; the blocks of log_probs.py once more in the backward
    backward    two products for one; of attention five for two, as its kernels compute the scores again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmr1_ds.engine.model.shapes import ModelShape, VisionShape

ATTENTION_BACKWARD = 2.5  # of its forward
CAUSAL = 0.5  # of the attention is computed by a causal kernel
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
    return Flops(matrices + causal * attention, sum(vision), _head(shape, work) if with_head else 0.0)


def backward(shape: ModelShape, work: Work, causal: float = 1.0, with_head: bool = True) -> Flops:
    """Count the FLOP of the backward alone, without what LoRA and frozen towers save."""
    products = 1.0 if shape.adapters else 2.0  # frozen matrices have no gradient of their own
    matrices, attention = _text(shape, work.lengths)
    text = products * matrices + ATTENTION_BACKWARD * causal * attention
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
    return Flops(matrices + causal * attention, vision, 0.0)


def model_flop(shape: ModelShape, work: Work) -> tuple[float, float]:
    """Return what counts for MFU, of a forward, and of a forward with its backward.

    The vision tower and what checkpointing computes again do not count.
    """
    once, back = forward(shape, work, CAUSAL), backward(shape, work, CAUSAL)
    return once.text + once.head, once.text + once.head + back.text + back.head


def decode_token(shape: ModelShape, context: float) -> float:
    """Count the FLOP of one sampled token after `context` others."""
    return 2.0 * (shape.layer_matrix + shape.vocabulary * shape.hidden) + (
        4.0 * shape.layers * shape.query_width * context
    )


_NONE = (0.0, 0.0, 0.0)


def _text(shape: ModelShape, lengths: Sequence[float]) -> tuple[float, float]:
    """Count the FLOP of matrices and attention."""
    squares = sum(length * length for length in lengths)
    return 2.0 * shape.layer_matrix * sum(lengths), 4.0 * shape.layers * shape.query_width * squares


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
