"""Figures of a data set: order statistics and histograms, images, answers and what the reward says of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.config import RewardConfig
from mmr1_ds.preflight.reward import right_response
from mmr1_ds.rewards.pool import RewardItem, RewardPool
from mmr1_ds.rewards.truths import is_unclear, read_truth

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

NUM_BINS = 10
SHOWN = 3  # examples of anything
MOST_FREQUENT = 5
MOST_WORDS = 10  # of an answer that a response can be expected to match
NUM_SCORED = 1000  # at most so many answers are given to the reward
BY_RULE = ("math", "r1v", "openr1_wo_LMM")  # built-in rewards without a judge


@dataclass(frozen=True)
class Spread:
    """Order statistics by the nearest rank: each is one of the values."""

    minimum: float
    median: float
    p90: float  # 90 % of the values are not above it
    p99: float
    maximum: float


@dataclass(frozen=True)
class Bin:
    """A bin of the whole numbers from `low` to `high`, both included."""

    low: int
    high: int
    count: int


def spread(values: np.ndarray) -> Spread | None:
    """Return the order statistics of any number of values; None for no values."""
    if len(values) == 0:
        return None
    found = np.quantile(values, [0.0, 0.5, 0.9, 0.99, 1.0], method="inverted_cdf")
    return Spread(*(value.item() for value in found))


def histogram(values: np.ndarray, limit: int) -> list[Bin]:
    """Count whole numbers >= 1 by tenths of `limit`, and in one more bin beyond it. Empty ends are left out."""
    tenths = np.minimum((values - 1) * NUM_BINS // limit, NUM_BINS)
    counts = np.bincount(tenths, minlength=NUM_BINS + 1)
    edges = [-(-place * limit // NUM_BINS) + 1 for place in range(NUM_BINS + 1)]
    edges.append(max(int(values.max()), limit) + 1)
    filled = np.flatnonzero(counts)
    return [
        Bin(edges[place], edges[place + 1] - 1, int(counts[place]))
        for place in range(filled[0], filled[-1] + 1)
        if edges[place] < edges[place + 1]
    ]


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


@dataclass(frozen=True)
class AnswerSummary:
    """The answers of the rows that a run can use."""

    num_distinct: int  # compared as texts
    most_frequent: list[tuple[str, int]]  # answer, rows
    majority_fraction: float  # share of rows with the most frequent answer: the score of always giving it, [0, 1]
    longest: int  # characters


@dataclass(frozen=True)
class RewardCheck:
    """The reward's verdict on the distinct answers, each boxed as it is and given as a right response."""

    reward_function: str
    num_answers: int
    num_refused: int
    refused: list[str]  # the first few
    num_wrapped: int  # in <answer>, behind ####, or in a solution with a box: the answer inside is what counts
    wrapped: list[tuple[str, str]]  # the first few, and how each is read
    num_prose: int  # of so many words that a response will hardly match them
    prose: list[str]  # the first few
    num_unclear: int  # with tags, or words before a number: what is left of a wrapper that was not known
    unclear: list[str]  # the first few


def summarise_answers(answers: Sequence[str]) -> AnswerSummary | None:
    """Count the answers. Returns: None for no answers."""
    if not answers:
        return None
    counts = Counter(answers)
    most_frequent = counts.most_common(MOST_FREQUENT)
    return AnswerSummary(
        num_distinct=len(counts),
        most_frequent=most_frequent,
        majority_fraction=most_frequent[0][1] / len(answers),
        longest=max(map(len, counts)),
    )


def check_reward(answers: Sequence[str], reward: RewardConfig, seed: int) -> RewardCheck | None:
    """Check that a response which boxes the ground truth itself is right: if it is not, no response can be.

    Of more than NUM_SCORED distinct answers a seeded choice is checked. Returns: None where the form of a right
    response is not known: for a user's own reward, and for those that ask a judge.
    """
    distinct = list(dict.fromkeys(answers))
    if reward.functions or reward.reward_function not in BY_RULE or not distinct:
        return None
    if len(distinct) > NUM_SCORED:
        chosen = np.random.default_rng(seed).choice(len(distinct), NUM_SCORED, replace=False)
        distinct = [distinct[place] for place in sorted(chosen)]
    # In a process of its own with a time limit: comparing absurd formulas may take for ever.
    with RewardPool(dataclasses.replace(reward, num_workers=1)) as pool:
        results = pool.score([RewardItem(right_response(read_truth(answer)), 1, answer) for answer in distinct])
    refused = [answer for answer, result in zip(distinct, results, strict=True) if result.accuracy != 1.0]
    read = [(answer, read_truth(answer)) for answer in distinct]
    wrapped = [(answer, inside) for answer, inside in read if inside != answer.strip()]
    prose = [inside for _, inside in read if len(inside.split()) > MOST_WORDS or "\n" in inside.strip()]
    unclear = [inside for _, inside in read if is_unclear(inside) and inside not in prose]
    if {answer[:2] for answer in distinct if answer[1:2] == ":"} == {"A:"}:  # "answer", or an option without others
        unclear += [answer for answer in distinct if answer.startswith("A:")]
    return RewardCheck(
        reward.reward_function, len(distinct), len(refused), refused[:SHOWN],
        len(wrapped), wrapped[:SHOWN], len(prose), prose[:SHOWN],
        len(unclear), unclear[:SHOWN],
    )  # fmt: skip
