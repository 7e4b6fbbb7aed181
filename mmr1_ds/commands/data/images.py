"""The images of a data set, as they are stored and as the model gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.commands.data.numbers import Spread, spread

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


@dataclass(frozen=True)
class ImageSummary:
    """All images of the prompts that could be measured."""

    num_images: int
    num_prompts_by_images: dict[int, int]  # images a prompt -> prompts
    min_pixels: int  # the limits as they hold: the run's inside the processor's
    max_pixels: int
    factor: int  # pixels: sides are multiples of it
    num_enlarged: int  # had fewer pixels than min_pixels
    num_shrunk: int  # had more than max_pixels
    num_rounded: int  # between the limits, but sides were no multiples of `factor`
    num_unchanged: int
    strongest_shrinking: float  # of a side, >= 1
    width: Spread | None  # pixels as stored; None without images, like the fields below
    height: Spread | None
    tokens: Spread | None  # an image
    token_fraction: float  # share of all prompts' tokens that belong to images, [0, 1]


def summarise_images(
    widths: np.ndarray, heights: np.ndarray, num_images: np.ndarray, num_tokens: int, encoder: PromptEncoder
) -> ImageSummary | None:
    """Summarise the images.

    Args: widths, heights: (I,) int, all images; num_images: (P,) int, of each prompt; num_tokens: of all prompts.

    Returns: None for a model that takes text alone.
    """
    if not encoder.is_multimodal:
        return None
    limits = encoder.pixel_limits
    sizes, counts = np.unique(np.stack([widths, heights], axis=1), axis=0, return_counts=True)
    found = [limits.target(width, height, "an image") for width, height in sizes.tolist()]
    targets = np.array(found, dtype=np.int64).reshape(-1, 2)
    pixels = sizes.prod(axis=1)
    enlarged, shrunk = pixels < limits.min_pixels, pixels > limits.max_pixels
    rounded = ~enlarged & ~shrunk & (sizes != targets).any(axis=1)
    tokens = np.array([encoder.num_image_tokens(*size) for size in sizes.tolist()], dtype=np.int64).repeat(counts)
    per_prompt, prompts = np.unique(num_images, return_counts=True)
    return ImageSummary(
        num_images=len(widths),
        num_prompts_by_images=dict(zip(per_prompt.tolist(), prompts.tolist(), strict=True)),
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
        factor=limits.factor,
        num_enlarged=int(counts[enlarged].sum()),
        num_shrunk=int(counts[shrunk].sum()),
        num_rounded=int(counts[rounded].sum()),
        num_unchanged=int(counts[~enlarged & ~shrunk & ~rounded].sum()),
        strongest_shrinking=float(np.sqrt(pixels[shrunk] / targets[shrunk].prod(axis=1)).max(initial=1.0)),
        width=spread(widths),
        height=spread(heights),
        tokens=spread(tokens),
        token_fraction=float(tokens.sum()) / num_tokens if num_tokens else 0.0,
    )
