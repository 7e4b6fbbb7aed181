"""The images of a data set, as they are stored and as the model gets them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.commands.data.numbers import Spread, spread

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

EXTREME_ASPECT = 10.0  # of the longer side to the shorter; the models refuse 200
MOST_FREQUENT = 5  # sizes


@dataclass(frozen=True)
class Size:
    """One size of image before and after the pixel limits."""

    width: int  # pixels as stored
    height: int
    model_width: int  # pixels, as the model gets it
    model_height: int
    num_tokens: int
    num_images: int  # images of this size


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
    largest_enlargement: float  # of a side, >= 1
    strongest_shrinking: float  # of a side, >= 1
    width: Spread | None  # pixels as stored; None without images, like the fields below
    height: Spread | None
    aspect: Spread | None  # longer side by shorter
    num_extreme: int  # images with an aspect over EXTREME_ASPECT
    tokens: Spread | None  # an image
    token_fraction: float  # share of all prompts' tokens that belong to images, [0, 1]
    most_frequent: list[Size]
    smallest: Size | None  # by pixels, as they came
    largest: Size | None
    longest: Size | None  # by aspect


def summarise_images(
    widths: np.ndarray, heights: np.ndarray, num_images: np.ndarray, num_tokens: int, encoder: PromptEncoder
) -> ImageSummary | None:
    """Summarise the images.

    Args: widths, heights: (I,) int, all images; num_images: (P,) int, of each prompt; num_tokens: of all prompts.

    Returns: None for a model that takes text alone.
    """
    if not encoder.is_multimodal:
        return None
    sizes, limits = _sizes(widths, heights, encoder), encoder.pixel_limits
    counts = np.array([size.num_images for size in sizes], dtype=np.int64)
    pixels = np.array([size.width * size.height for size in sizes], dtype=np.int64)
    enlarged, shrunk = pixels < limits.min_pixels, pixels > limits.max_pixels
    unchanged = ~enlarged & ~shrunk & np.array([_is_unchanged(size) for size in sizes], dtype=bool)
    scales = np.array([_scale(size) for size in sizes])
    tokens = np.repeat(np.array([size.num_tokens for size in sizes], dtype=np.int64), counts)
    aspects = np.repeat(np.array([_aspect(size) for size in sizes]), counts)
    per_prompt, prompts = np.unique(num_images, return_counts=True)
    return ImageSummary(
        num_images=len(widths),
        num_prompts_by_images=dict(zip(per_prompt.tolist(), prompts.tolist(), strict=True)),
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
        factor=limits.factor,
        num_enlarged=int(counts[enlarged].sum()),
        num_shrunk=int(counts[shrunk].sum()),
        num_rounded=int(counts[~enlarged & ~shrunk & ~unchanged].sum()),
        num_unchanged=int(counts[unchanged].sum()),
        largest_enlargement=float(scales[enlarged].max(initial=1.0)),
        strongest_shrinking=float((1 / scales[shrunk]).max(initial=1.0)),
        width=spread(widths),
        height=spread(heights),
        aspect=spread(aspects),
        num_extreme=int((aspects > EXTREME_ASPECT).sum()),
        tokens=spread(tokens),
        token_fraction=float(tokens.sum()) / num_tokens if num_tokens else 0.0,
        most_frequent=sorted(sizes, key=lambda size: -size.num_images)[:MOST_FREQUENT],
        smallest=min(sizes, key=lambda size: size.width * size.height, default=None),
        largest=max(sizes, key=lambda size: size.width * size.height, default=None),
        longest=max(sizes, key=_aspect, default=None),
    )


def _sizes(widths: np.ndarray, heights: np.ndarray, encoder: PromptEncoder) -> list[Size]:
    """Return every size that occurs, once."""
    found, counts = np.unique(np.stack([widths, heights], axis=1), axis=0, return_counts=True)
    sizes = []
    for (width, height), count in zip(found.tolist(), counts.tolist(), strict=True):
        target = encoder.pixel_limits.target(width, height, "an image")
        sizes.append(Size(width, height, *target, encoder.num_image_tokens(width, height), count))
    return sizes


def _is_unchanged(size: Size) -> bool:
    return (size.width, size.height) == (size.model_width, size.model_height)


def _aspect(size: Size) -> float:
    return max(size.width, size.height) / min(size.width, size.height)


def _scale(size: Size) -> float:
    """Return the mean scale of a side."""
    return math.sqrt(size.model_width * size.model_height / (size.width * size.height))
