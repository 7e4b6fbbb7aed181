"""The rollout engine and the trainer compute one policy's log-probabilities by two implementations, which differ.

Training on samples of the one as if the other had drawn them is off-policy; truncated importance sampling corrects for
it (Yao et al., https://fengyao.notion.site/off-policy-rl, 2025). Shape letters: S responses, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmr1_ds.algorithm.aggregation import Segments

_MOST = 20.0  # of a log ratio: its exponential stays finite in fp32


@dataclass(frozen=True)
class ImportanceSampling:
    """Weighs the loss of each token by min(cap, trainer's probability / rollout's)."""

    level: str  # token: of the token alone | sequence: of its whole response, the product of its tokens' | none: 1
    cap: float
    mask: str = "none"  # which tokens weigh 0: see `_kept`
    low: float = 0.5
    high: float = 2.0

    @torch.no_grad()
    def __call__(
        self, trainer_logprobs_T: Tensor, rollout_logprobs_T: Tensor, segments: Segments
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights, (T,), without gradient, and measures of how far the two drift apart, each (T,).

        Args: natural-log probabilities, both of the policy that sampled, before any update.
        Returns: the weights; logprob_diff_mean (|trainer - rollout|, nats), kl (k3 of KL(rollout || trainer)), and,
            unless the level is none, is_weight_mean and is_truncated_fraction (1 where a weight is at its cap), and,
            unless the mask is none, is_masked_fraction (1 where a weight is 0).
        """
        log_ratio_T = (trainer_logprobs_T - rollout_logprobs_T).clamp(-_MOST, _MOST)
        figures = {
            "logprob_diff_mean": (trainer_logprobs_T - rollout_logprobs_T).abs(),
            "kl": log_ratio_T.exp() - 1 - log_ratio_T,
        }
        kept_T = torch.ones_like(log_ratio_T)
        if self.mask != "none":
            kept_T = self._kept(log_ratio_T, segments).to(log_ratio_T.dtype)
            figures["is_masked_fraction"] = 1 - kept_T
        if self.level == "none":
            return kept_T, figures
        if self.level == "sequence":
            log_ratio_T = segments.spread(segments.sum(log_ratio_T)).clamp(-_MOST, _MOST)
        else:
            assert self.level == "token", self.level
        ratio_T = log_ratio_T.exp()
        weights_T = ratio_T.clamp(max=self.cap) * kept_T
        figures |= {"is_weight_mean": weights_T, "is_truncated_fraction": (ratio_T > self.cap).to(weights_T.dtype)}
        return weights_T, figures

    def _kept(self, log_ratio_T: Tensor, segments: Segments) -> Tensor:
        """Where a token trains, (T,) bool: its measure lies between the bounds, both included.

        token: the token's ratio (IcePop, Ling Team, arXiv 2510.18855).
        sequence: the product of its response's ratios (masked importance sampling; k1 summed, as an exponential).
        geometric: their geometric mean (k1 averaged).
        k3: the mean over its response of k3, an estimate of KL(rollout || trainer) in nats; the upper bound alone.
        """
        if self.mask == "token":
            measure_T = log_ratio_T.exp()
        elif self.mask == "sequence":
            measure_T = segments.spread(segments.sum(log_ratio_T)).clamp(-_MOST, _MOST).exp()
        elif self.mask == "geometric":
            measure_T = segments.spread(segments.mean(log_ratio_T)).exp()
        else:
            assert self.mask == "k3", self.mask
            measure_T = segments.spread(segments.mean(log_ratio_T.exp() - 1 - log_ratio_T))
            return measure_T <= self.high
        return (measure_T >= self.low) & (measure_T <= self.high)
