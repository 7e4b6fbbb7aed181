"""From losses at tokens to the loss of an optimiser step, by weights that follow from the GLOBAL batch alone.

A sum of weighted tokens is the same however they are cut into micro-batches or spread over ranks, and so is its
gradient. Averages of averages are not: EasyR1's `seq` mode first averages in a micro-batch and then scales by its
share of the tokens, so that the weight of a response depends on its neighbours.

Shape letters: S responses, T packed tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmr1_ds.config.user_files import load_function


@dataclass(frozen=True)
class Segments:
    """Cuts T packed tokens into S responses; one may be empty."""

    lengths: Tensor  # (S,) int64
    ids: Tensor  # (T,) int64: the response of each token

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Make the segments of responses of these lengths, in order, on the host."""
        lengths_S = torch.tensor(list(lengths), dtype=torch.int64)
        return cls(lengths_S, torch.repeat_interleave(torch.arange(len(lengths_S)), lengths_S))

    def sum(self, values_T: Tensor) -> Tensor:
        """The sum over the tokens of each response, (S,)."""
        return values_T.new_zeros(len(self.lengths)).index_add(0, self.ids, values_T)

    def mean(self, values_T: Tensor) -> Tensor:
        """The mean over the tokens of each response, (S,); 0 for an empty one."""
        return self.sum(values_T) / self.lengths.clamp(min=1)

    def spread(self, values_S: Tensor) -> Tensor:
        """Each response's value at all of its tokens, (T,)."""
        return values_S[self.ids]


@dataclass(frozen=True)
class GlobalBatch:
    """Sizes of one optimiser step, over all ranks and micro-batches."""

    num_tokens: float  # of responses
    num_responses: float  # that have a token


def token_weights(mode: str, segments: Segments, batch: GlobalBatch, scale_factor: float) -> Tensor:
    """The weight of each token in the loss, (T,) float64; those of the whole global batch give the mean.

    Args: mode: a name in AGGREGATIONS, or path/file.py:function.
    """
    function = AGGREGATIONS.get(mode) or load_function("worker.actor.loss_avg_mode", mode)
    weights_T: Tensor = function(segments, batch, scale_factor)
    return weights_T


def token(segments: Segments, batch: GlobalBatch, scale_factor: float) -> Tensor:
    """1 / tokens of the batch: the mean over its tokens (DAPO, arXiv 2503.14476; verl's token-mean)."""
    return torch.full_like(segments.ids, 1 / max(1.0, batch.num_tokens), dtype=torch.float64)


def seq(segments: Segments, batch: GlobalBatch, scale_factor: float) -> Tensor:
    """The mean over responses of the mean over their tokens (GRPO, arXiv 2402.03300; verl's seq-mean-token-mean)."""
    return 1 / (segments.spread(segments.lengths).double() * max(1.0, batch.num_responses))


def seq_sum(segments: Segments, batch: GlobalBatch, scale_factor: float) -> Tensor:
    """The mean over responses of the sum over their tokens / scale_factor (Dr. GRPO, arXiv 2503.20783; TRL's dr_grpo).

    Long responses weigh what they are long. verl's seq-mean-token-sum-norm is this times the number of responses, so
    that its gradient grows with the batch.
    """
    weight = 1 / (scale_factor * max(1.0, batch.num_responses))
    return torch.full_like(segments.ids, weight, dtype=torch.float64)


AGGREGATIONS: dict[str, Callable[[Segments, GlobalBatch, float], Any]] = {
    "token": token,
    "seq": seq,
    "seq_sum": seq_sum,
}
