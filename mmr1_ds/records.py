"""The frozen records that cross a stage of the training step.

Shape letters: G groups, N responses a group, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of a video that a model sees. Equal to itself alone, as a response is."""

    frames: np.ndarray  # (F, height, width, 3) uint8, RGB, already inside the pixel limits; F is even
    places: tuple[int, ...]  # (F,) which frames of the video they are, ascending
    num_frames: int  # of the video
    fps: float  # frames a second of the video

    @property
    def metadata(self) -> dict[str, Any]:
        """What both transformers and vLLM ask of a video whose frames are chosen, by transformers' names."""
        return {
            "total_num_frames": self.num_frames,
            "fps": self.fps,
            "duration": self.num_frames / self.fps,
            "frames_indices": list(self.places),
        }


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready to be sampled from."""

    index: int  # position in the (filtered) data set, [0, P)
    prompt_id: str  # stable across runs and machines: the row's own id, or a digest of its content
    token_ids: tuple[int, ...]  # chat template applied; ONE placeholder an image or video, as vLLM takes it
    images: tuple[Image, ...]  # RGB, already inside the pixel limits
    ground_truth: str
    category: str = ""
    num_tokens: int = 0  # length with every image and video expanded, as the data set measured it
    # reads the row's columns that rewards see
    columns: Callable[[], Mapping[str, Any]] = field(default=dict, compare=False, repr=False)
    # reads the row's messages; empty where its prompt is a text
    messages: Callable[[], Sequence[Mapping[str, Any]]] = field(default=list, compare=False, repr=False)
    videos: tuple[Video, ...] = ()

    @property
    def has_vision(self) -> bool:
        """Whether there is something to see: an image or a video."""
        return bool(self.images or self.videos)


@dataclass(frozen=True)
class RolloutRequest:
    """A prompt to sample from."""

    prompt: Prompt
    num_responses: int
    seed: int  # response k is sampled with seed + k
    max_tokens: int | None = None  # of a response, in place of the sampling settings'
    can_wait: bool = False  # a probe: servers sample it behind all others, and it is given up where it holds those up
    expected_tokens: int = 0  # of a response; the longest are begun first. 0 = nothing is known


@dataclass(frozen=True, eq=False)
class Response:
    """One sampled continuation of a prompt. Equal to itself alone: two arrays do not compare to one answer."""

    token_ids: np.ndarray  # (T,) int32, the end-of-sequence token included when it was sampled
    logprobs: np.ndarray  # (T,) float32, natural log, of the distribution that was sampled from
    finished: bool  # False when cut off at the length limit
    policy_versions: tuple[tuple[int, int], ...] = ()  # (version, tokens sampled by it); () = the group's
    # of a mixture: the experts that each token of the sequence but the last went to, (prompt + T - 1, layers, chosen),
    # uint8 where there are at most 256, else of two bytes; None = nobody asked
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class RolloutGroup:
    """N responses to one prompt."""

    prompt: Prompt
    responses: tuple[Response, ...]
    policy_version: int  # optimiser steps that the sampling policy had seen; of several policies, the oldest


@dataclass(frozen=True)
class GroupRewards:
    """What the reward said of one group. Responses with an unknown reward count as the mean of the others."""

    overall: np.ndarray  # (N,) float32, finite
    accuracy: np.ndarray  # (N,) float32 in [0, 1]; 1 = correct, NaN = unknown: unscored, or failed and masked
    failed: np.ndarray  # (N,) bool: the reward hung, crashed or was not finite
    parts: Mapping[str, np.ndarray]  # every further key the reward returned, (N,) float32, NaN where unknown

    @property
    def is_unknown(self) -> np.ndarray:
        """Whether nothing is known of each response, (N,) bool: it trains nothing and counts in no statistic."""
        return np.isnan(self.accuracy)


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards: what the actor learns from and the curriculum observes."""

    group: RolloutGroup
    rewards: GroupRewards


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled."""

    temperature: float  # 0 = greedy
    top_p: float
    top_k: int  # -1 = all
    max_tokens: int
    raw_logprobs: bool = False  # log-probabilities of the whole distribution, not of the one that is left or bent below
    min_p: float = 0.0  # least probability of a token, as a share of the likeliest one's; 0 = no bound
    repetition_penalty: float = 1.0  # logits of tokens that occurred, prompt included, are moved down by it; 1 = none
    stop: tuple[str, ...] = ()  # a response ends with the token that completes one of these in its text
    with_experts: bool = False  # whether responses say which experts their tokens went to


Pair = tuple[Prompt, np.ndarray]  # a prompt, and the tokens of one response to it, (T,) int32


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One response with everything that the update learns from."""

    prompt: Prompt
    token_ids: np.ndarray  # (T,) int32, the response
    rollout_logprobs: np.ndarray  # (T,) float32, as the rollout engine sampled them
    advantages: np.ndarray  # (T,) float32
    reward: float = 0.0  # the KL taken off where it is taken off the reward; for inspection, no update reads it
    old_logprobs: np.ndarray | None = None  # (T,) float32; None = the policy that is updated is the old one
    old_entropies: np.ndarray | None = None  # (T,) float32, nats, of the old policy; None = no token is chosen by it
    is_chosen: np.ndarray | None = None  # (T,) bool: tokens that kl_cov holds; None = another loss
    trains: bool = True  # False: counts in no loss, as if it were not there
    ref_logprobs: np.ndarray | None = None  # (T,) float32; None = no KL in the loss
    values: np.ndarray | None = None  # (T,) float32, the critic's, before the update
    returns: np.ndarray | None = None  # (T,) float32, what the critic learns
    experts: np.ndarray | None = None  # as a response's: where the update sends the tokens; None = by its own router

    @property
    def pair(self) -> Pair:
        """The prompt and the response."""
        return self.prompt, self.token_ids


class WeightInfo(NamedTuple):
    """A weight that a sync will bring."""

    name: str  # transformers' own
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole weight

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the whole weight."""
        return math.prod(self.shape) * self.dtype.itemsize
