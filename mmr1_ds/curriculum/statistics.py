"""What one group of responses says about its prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

import mmr1_kernels
import numpy as np

from mmr1_ds.curriculum.metric_names import needs_edit_distance
from mmr1_ds.records import ScoredGroup

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PromptStatistics:
    """Rewards and diversity of the responses to one prompt."""

    index: int  # of the prompt in the data set
    num_responses: int
    pass_rate: float  # [0, 1], of the responses whose accuracy is known; NaN when none is
    reward_mean: float
    reward_variance: float  # population variance; exactly 0 if and only if all rewards are equal
    self_bleu: float  # [0, 1], 1 = all the same
    distinct_3: float  # [0, 1]
    edit_distance: float = float("nan")  # [0, 1], over the longer response; NaN when not asked for
    num_unscored: int = 0  # responses whose accuracy is not known
    is_probe: bool = False  # rolled out for what it tells alone, not trained on
    num_tokens: int = 0  # of all its responses, as they were sampled; 0 = nobody counted

    @property
    def is_effective(self) -> bool:
        """Whether the group teaches anything: rewards all equal mean advantages all zero."""
        return self.reward_variance != 0.0


def score_batch(
    scored_groups: Sequence[ScoredGroup],
    eos_token_ids: Collection[int],
    metrics: Sequence[str],
    device: torch.device | None = None,
) -> list[PromptStatistics]:
    """The statistics of each group, in order; the edit distance only if `metrics` asks for it.

    Groups may differ in size. A trailing end-of-sequence is not scored: what a response says does not depend on
    whether it was cut off. device: where the Triton kernel runs; None = the C++ one, in this process.
    """
    if not scored_groups:
        return []
    sizes = [len(scored.group.responses) for scored in scored_groups]
    group_offsets = np.cumsum([0, *sizes], dtype=np.int64)
    token_ids, offsets = pack(scored_groups, eos_token_ids)
    rewards = np.concatenate([scored.rewards.overall for scored in scored_groups]).astype(np.float32)
    accuracies = np.concatenate([scored.rewards.accuracy for scored in scored_groups]).astype(np.float32)
    groups = _group_statistics(token_ids, offsets, rewards, accuracies, group_offsets, device)
    if needs_edit_distance(metrics):
        edit_distances = mmr1_kernels.mean_edit_distance(token_ids, offsets, None, group_offsets=group_offsets)
    else:
        edit_distances = np.full(len(scored_groups), np.nan)
    num_known = [int((~scored.rewards.is_unknown).sum()) for scored in scored_groups]
    return [
        PromptStatistics(
            index=scored.group.prompt.index,
            num_responses=sizes[position],
            pass_rate=float(groups.pass_rate[position]),
            reward_mean=float(groups.reward_mean[position]),
            # Unknown rewards are filled with the mean of the others: only the number of those is to be put right.
            reward_variance=float(groups.reward_variance[position]) * (sizes[position] / max(1, num_known[position])),
            self_bleu=float(groups.self_bleu[position]),
            distinct_3=float(groups.distinct[position, 2]),
            edit_distance=float(edit_distances[position]),
            num_unscored=int(np.isnan(scored.rewards.accuracy).sum()),
            num_tokens=sum(len(response.token_ids) for response in scored.group.responses),
        )
        for position, scored in enumerate(scored_groups)
    ]


def _group_statistics(
    token_ids: np.ndarray,
    offsets: np.ndarray,
    rewards: np.ndarray,
    accuracies: np.ndarray,
    group_offsets: np.ndarray,
    device: torch.device | None,
) -> mmr1_kernels.GroupStatistics:
    def placed(array: np.ndarray) -> Any:
        if device is None:
            return array
        import torch

        return torch.from_numpy(array).to(device)

    found = mmr1_kernels.group_statistics(
        placed(token_ids),
        placed(offsets),
        placed(rewards),
        placed(accuracies),
        group_size=None,
        group_offsets=placed(group_offsets),
        backend=None if device is None else "triton",
    )
    if device is None:
        return found
    return mmr1_kernels.GroupStatistics(**{name: values.cpu().numpy() for name, values in vars(found).items()})


def pack(scored_groups: Sequence[ScoredGroup], eos_token_ids: Collection[int]) -> tuple[np.ndarray, np.ndarray]:
    """Lay response tokens end to end, int32 (total,), and say where each response begins and ends, int64 (B + 1,)."""
    eos = frozenset(eos_token_ids)
    responses = [
        _without_trailing_eos(response.token_ids, eos)
        for scored in scored_groups
        for response in scored.group.responses
    ]
    return np.concatenate(responses), np.cumsum([0, *map(len, responses)], dtype=np.int64)


def _without_trailing_eos(token_ids: np.ndarray, eos_token_ids: frozenset[int]) -> np.ndarray:
    end = len(token_ids)
    while end and int(token_ids[end - 1]) in eos_token_ids:
        end -= 1
    return token_ids[:end]


def to_records(statistics: Sequence[PromptStatistics]) -> np.ndarray:
    """Turn statistics into float64 (K, number of fields), for a collective. Exact: an index stays below 2^53."""
    return np.array([astuple(prompt) for prompt in statistics], dtype=np.float64).reshape(-1, _NUM_FIELDS)


def from_records(records: np.ndarray) -> list[PromptStatistics]:
    """Turn the rows of `to_records` back into statistics."""
    exact = {"index": int, "num_responses": int, "num_unscored": int, "is_probe": bool, "num_tokens": int}
    convert = [exact.get(field.name, float) for field in fields(PromptStatistics)]
    return [PromptStatistics(*(kind(value) for kind, value in zip(convert, row, strict=True))) for row in records]


_NUM_FIELDS = len(fields(PromptStatistics))
