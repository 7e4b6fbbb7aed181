"""Policy and value losses at each token, on packed response tokens. `aggregation` averages them.

Shape letters: S responses, T tokens of all of them, end to end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr1_ds.algorithm.aggregation import Segments

_MOST = 20.0  # a log ratio is clamped to this: its exponential stays finite in fp32


@dataclass(frozen=True)
class PolicyLoss:
    """Which loss, and how tightly it holds the policy to the one that sampled."""

    kind: str  # default (clipped PPO) | gspo | gspo_token | cispo | sapo
    clip_low: float  # the ratio is clipped below at 1 - this
    clip_high: float  # and above at 1 + this
    clip_dual: float = math.inf  # default: bound of the loss, in units of -advantage, where the advantage is negative
    tau_positive: float = 1.0  # sapo: temperature of the gate for positive advantages
    tau_negative: float = 1.05  # sapo: for the others

    def __call__(
        self, logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, segments: Segments
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at each token, (T,), to be minimised, and what to watch, each (T,).

        Args: natural-log probabilities and advantages, (T,).
        Returns: the loss; pg_clipfrac_higher (1 where the bounds around 1 hold a token back), pg_clipfrac_lower (1
            where the dual clip does), ppo_kl (the k1 divergence from the old policy).
        """
        log_ratio_T = logprobs_T - old_logprobs_T
        if self.kind == "default":
            loss_T, higher_T, lower_T = self._clipped(log_ratio_T, advantages_T, self.clip_dual)
        elif self.kind in ("gspo", "gspo_token"):
            # No dual clip: the paper has none, and a mean over a response hardly reaches it.
            in_sequence_T = self._sequence_log_ratio(log_ratio_T, logprobs_T, segments)
            loss_T, higher_T, lower_T = self._clipped(in_sequence_T, advantages_T, math.inf)
        elif self.kind == "cispo":
            loss_T, higher_T, lower_T = self._weighted(log_ratio_T, logprobs_T, advantages_T)
        else:
            assert self.kind == "sapo", self.kind
            loss_T, higher_T, lower_T = self._gated(log_ratio_T, advantages_T)
        figures = {
            "pg_clipfrac_higher": higher_T.detach().float(),
            "pg_clipfrac_lower": lower_T.detach().float(),
            "ppo_kl": -log_ratio_T.detach().clamp(-_MOST, _MOST),
        }
        return loss_T, figures

    def _clipped(self, log_ratio_T: Tensor, advantages_T: Tensor, dual: float) -> tuple[Tensor, Tensor, Tensor]:
        """PPO's surrogate, its bounds apart (DAPO, arXiv 2503.14476, eq. 10), and dual clip (arXiv 1912.09729)."""
        ratio_T = log_ratio_T.clamp(-_MOST, _MOST).exp()
        plain_T = -advantages_T * ratio_T
        clipped_T = -advantages_T * ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high)
        bounded_T = torch.maximum(plain_T, clipped_T)
        if math.isinf(dual):
            return bounded_T, clipped_T > plain_T, torch.zeros_like(plain_T)
        most_T = -advantages_T * dual
        negative_T = advantages_T < 0
        loss_T = torch.where(negative_T, torch.minimum(bounded_T, most_T), bounded_T)
        return loss_T, clipped_T > plain_T, (bounded_T > most_T) & negative_T

    def _sequence_log_ratio(self, log_ratio_T: Tensor, logprobs_T: Tensor, segments: Segments) -> Tensor:
        """Log of the geometric mean of a response's ratios, at each of its tokens (GSPO, arXiv 2507.18071).

        gspo (eq. 7): with its own gradient, so that each token moves the ratio of the whole response.
        gspo_token (eq. 14): the same number, but a token's gradient is its own, for advantages that differ by token.
        """
        mean_T = segments.spread(segments.mean(log_ratio_T))
        return mean_T if self.kind == "gspo" else mean_T.detach() + logprobs_T - logprobs_T.detach()

    def _weighted(self, log_ratio_T: Tensor, logprobs_T: Tensor, advantages_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4): the clipped ratio is a weight, so no token loses its gradient.

        Counts ratios over the upper bound as higher, and ratios under the lower one as lower.
        """
        ratio_T = log_ratio_T.detach().clamp(-_MOST, _MOST).exp()
        weight_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -weight_T * advantages_T * logprobs_T, ratio_T > weight_T, ratio_T < weight_T

    def _gated(self, log_ratio_T: Tensor, advantages_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """SAPO (arXiv 2511.20347, eq. 5 and 6): a sigmoid of the ratio in the clip's place. Nothing is clipped."""
        ratio_T = log_ratio_T.clamp(-_MOST, _MOST).exp()
        tau_T = torch.full_like(ratio_T, self.tau_negative).masked_fill(advantages_T > 0, self.tau_positive)
        gate_T = torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T
        nothing_T = torch.zeros_like(ratio_T)
        return -gate_T * advantages_T, nothing_T, nothing_T


def value_loss(values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic at each token, the larger of the plain and the clipped one (PPO).

    Args: values now and at the rollout, and returns, (T,); clip: how far a value may go from the old one.
    Returns: loss (T,), and where the clip holds it back (T,) bool.
    """
    clipped_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
    plain_error_T, clipped_error_T = (values_T - returns_T) ** 2, (clipped_T - returns_T) ** 2
    return 0.5 * torch.maximum(plain_error_T, clipped_error_T), clipped_error_T > plain_error_T
