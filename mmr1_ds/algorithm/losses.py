"""Policy and value losses at each token, on packed response tokens. `aggregation` averages them.

Shape letters: S responses, T tokens of all of them, end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmr1_ds.algorithm.aggregation import Segments
from mmr1_ds.config.user_files import load_function

_MOST = 20.0  # a log ratio is clamped to this: its exponential stays finite in fp32


@dataclass(frozen=True)
class LossTokens:
    """The response tokens of a micro-batch, end to end: what a policy loss is computed from."""

    logprobs_T: Tensor  # natural-log probabilities under the policy, with gradient
    old_logprobs_T: Tensor  # under the policy before the update
    advantages_T: Tensor
    segments: Segments  # which tokens are one response

    @property
    def log_ratio_T(self) -> Tensor:
        """The log of the ratio of the two probabilities."""
        return self.logprobs_T - self.old_logprobs_T


@dataclass(frozen=True)
class PolicyLoss:
    """Which loss, and how tightly it holds the policy to the one that sampled."""

    kind: str  # a name in LOSSES, or path/file.py:function
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
        Returns: the loss; ppo_kl (the k1 divergence from the old policy), and the loss's own figures: of those built
            in, pg_clipfrac_higher (1 where the bounds around 1 hold a token back) and pg_clipfrac_lower (1 where the
            dual clip does).
        """
        tokens = LossTokens(logprobs_T, old_logprobs_T, advantages_T, segments)
        function = LOSSES.get(self.kind) or load_function("worker.actor.loss_type", self.kind)
        found = function(tokens, self)
        loss_T, figures = found if isinstance(found, tuple) else (found, {})
        figures = {name: values_T.detach().float() for name, values_T in figures.items()}
        return loss_T, figures | {"ppo_kl": -tokens.log_ratio_T.detach().clamp(-_MOST, _MOST)}


Found = tuple[Tensor, dict[str, Tensor]]  # the loss at each token, and figures, each (T,)


def clipped(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """Clipped PPO with bounds apart (DAPO, arXiv 2503.14476, eq. 10), and dual clip (arXiv 1912.09729)."""
    return _clipped(tokens.log_ratio_T, tokens.advantages_T, loss, loss.clip_dual)


def gspo(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """Clip the geometric mean of a response's ratios (GSPO, arXiv 2507.18071, eq. 7), with its own gradient.

    Each token moves the ratio of the whole response. No dual clip: the paper has none, and a mean hardly reaches it.
    """
    mean_T = tokens.segments.spread(tokens.segments.mean(tokens.log_ratio_T))
    return _clipped(mean_T, tokens.advantages_T, loss, math.inf)


def gspo_token(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """Clip the same number, but a token's gradient is its own (eq. 14), for advantages that differ by token."""
    mean_T = tokens.segments.spread(tokens.segments.mean(tokens.log_ratio_T))
    in_sequence_T = mean_T.detach() + tokens.logprobs_T - tokens.logprobs_T.detach()
    return _clipped(in_sequence_T, tokens.advantages_T, loss, math.inf)


def cispo(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4): the clipped ratio is a weight, so no token loses its gradient.

    Counts ratios over the upper bound as higher, and ratios under the lower one as lower.
    """
    ratio_T = tokens.log_ratio_T.detach().clamp(-_MOST, _MOST).exp()
    weight_T = ratio_T.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    loss_T = -weight_T * tokens.advantages_T * tokens.logprobs_T
    return loss_T, _shares(ratio_T > weight_T, ratio_T < weight_T)


def sapo(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """SAPO (arXiv 2511.20347, eq. 5 and 6): a sigmoid of the ratio in the clip's place. Nothing is clipped."""
    ratio_T = tokens.log_ratio_T.clamp(-_MOST, _MOST).exp()
    tau_T = torch.full_like(ratio_T, loss.tau_negative).masked_fill(tokens.advantages_T > 0, loss.tau_positive)
    gate_T = torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T
    nothing_T = torch.zeros_like(ratio_T)
    return -gate_T * tokens.advantages_T, _shares(nothing_T, nothing_T)


LOSSES: dict[str, Callable[[LossTokens, PolicyLoss], Any]] = {
    "default": clipped,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
}


def _clipped(log_ratio_T: Tensor, advantages_T: Tensor, loss: PolicyLoss, dual: float) -> Found:
    ratio_T = log_ratio_T.clamp(-_MOST, _MOST).exp()
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    bounded_T = torch.maximum(plain_T, clipped_T)
    if math.isinf(dual):
        return bounded_T, _shares(clipped_T > plain_T, torch.zeros_like(plain_T))
    most_T = -advantages_T * dual
    negative_T = advantages_T < 0
    loss_T = torch.where(negative_T, torch.minimum(bounded_T, most_T), bounded_T)
    return loss_T, _shares(clipped_T > plain_T, (bounded_T > most_T) & negative_T)


def _shares(higher_T: Tensor, lower_T: Tensor) -> dict[str, Tensor]:
    return {"pg_clipfrac_higher": higher_T, "pg_clipfrac_lower": lower_T}


def value_loss(values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic at each token, the larger of the plain and the clipped one (PPO).

    Args: values now and at the rollout, and returns, (T,); clip: how far a value may go from the old one.
    Returns: loss (T,), and where the clip holds it back (T,) bool.
    """
    clipped_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
    plain_error_T, clipped_error_T = (values_T - returns_T) ** 2, (clipped_T - returns_T) ** 2
    return 0.5 * torch.maximum(plain_error_T, clipped_error_T), clipped_error_T > plain_error_T
