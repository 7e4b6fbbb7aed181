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
_LEAST = 1e-6  # dppo_kl: nats below probability 1, where the other tokens' share would be nothing in fp32
_DPPO_MOST = 20.0  # dppo: the largest weight of a token


@dataclass(frozen=True)
class LossTokens:
    """The response tokens of a micro-batch, end to end: what a policy loss is computed from."""

    logprobs_T: Tensor  # natural-log probabilities under the policy, with gradient
    old_logprobs_T: Tensor  # under the policy before the update
    advantages_T: Tensor
    segments: Segments  # which tokens are one response
    is_chosen_T: Tensor | None = None  # kl_cov: the tokens that it holds; None = none

    @property
    def log_ratio_T(self) -> Tensor:
        """The log of the ratio of the two probabilities."""
        return self.logprobs_T - self.old_logprobs_T


@dataclass(frozen=True)
class PolicyLoss:
    """Which loss, and how tightly it holds the policy to the one that sampled."""

    kind: str  # a name in LOSSES, or path/file.py:function
    clip_low: float  # the ratio is clipped below at 1 - this; gmpo: its log at minus this; dppo: the divergence at this
    clip_high: float  # and above at 1 + this; gmpo: at this; dppo: at this
    clip_dual: float = math.inf  # default: bound of the loss, in units of -advantage, where the advantage is negative
    tau_positive: float = 1.0  # sapo: temperature of the gate for positive advantages
    tau_negative: float = 1.05  # sapo: for the others
    kl_cov_coef: float = 1.0  # kl_cov: weight of the KL at the tokens that it holds

    def __call__(
        self,
        logprobs_T: Tensor,
        old_logprobs_T: Tensor,
        advantages_T: Tensor,
        segments: Segments,
        is_chosen_T: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at each token, (T,), to be minimised, and what to watch, each (T,).

        Args: natural-log probabilities and advantages, (T,).
        Returns: the loss; ppo_kl (the k1 divergence from the old policy), and the loss's own figures: of those built
            in, pg_clipfrac_higher (1 where the bounds around 1 hold a token back) and pg_clipfrac_lower (1 where the
            dual clip does).
        """
        tokens = LossTokens(logprobs_T, old_logprobs_T, advantages_T, segments, is_chosen_T)
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


def gmpo(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """GMPO (arXiv 2507.20673, eq. 4 and 5): the geometric mean of a response's ratios, each clipped by its log first.

    A response whose advantages differ by token has the sign of each at its token and their mean as its own. The weights
    of `aggregation` then average over responses; the paper's is `seq`.
    """
    sign_T = tokens.advantages_T.sign()
    log_ratio_T = tokens.log_ratio_T
    held_T = log_ratio_T.clamp(-loss.clip_low, loss.clip_high)
    least_T = sign_T * torch.minimum(sign_T * log_ratio_T, sign_T * held_T)
    segments = tokens.segments
    ratio_S = segments.mean(least_T).clamp(-_MOST, _MOST).exp()
    loss_T = segments.spread(-segments.mean(tokens.advantages_T) * ratio_S)
    is_held_T = sign_T * held_T < sign_T * log_ratio_T
    return loss_T, _shares(is_held_T, torch.zeros_like(is_held_T))


def kl_cov(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """KL-Cov (arXiv 2505.22617, eq. 13): tokens of the highest covariance are held to the old policy, none is clipped.

    The KL is that of the old policy from the new, by k3: r - 1 - log r, r the ratio, whose gradient is 0 where the two
    are equal. The authors' |log r| has +-1 there, by the sign of a rounding.
    """
    log_ratio_T = tokens.log_ratio_T.clamp(-_MOST, _MOST)
    ratio_T = log_ratio_T.exp()
    chosen_T = torch.zeros_like(ratio_T) if tokens.is_chosen_T is None else tokens.is_chosen_T.to(ratio_T.dtype)
    loss_T = -tokens.advantages_T * ratio_T + chosen_T * loss.kl_cov_coef * (ratio_T - 1 - log_ratio_T)
    nothing_T = torch.zeros_like(ratio_T)
    return loss_T, _shares(nothing_T, nothing_T) | {"kl_cov_fraction": chosen_T}


def dppo_tv(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """DPPO (arXiv 2602.04879), binary total variation: |p - q| of the token's probabilities, new and old."""
    return _dppo(tokens, loss, (tokens.logprobs_T.detach().exp() - tokens.old_logprobs_T.exp()).abs())


def dppo_kl(tokens: LossTokens, loss: PolicyLoss) -> Found:
    """DPPO (arXiv 2602.04879), binary KL: q log(q / p) + (1 - q) log((1 - q) / (1 - p)) of the same two, q the old."""
    new_T, old_T = (x_T.clamp(-_MOST, -_LEAST) for x_T in (tokens.logprobs_T.detach(), tokens.old_logprobs_T))
    new_rest_T, old_rest_T = -new_T.expm1(), -old_T.expm1()
    return _dppo(tokens, loss, old_T.exp() * (old_T - new_T) + old_rest_T * (old_rest_T / new_rest_T).log())


LOSSES: dict[str, Callable[[LossTokens, PolicyLoss], Any]] = {
    "default": clipped,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "kl_cov": kl_cov,
}


def _dppo(tokens: LossTokens, loss: PolicyLoss, divergence_T: Tensor) -> Found:
    """Mask tokens that an update would take further from the old policy than the bounds allow.

    The ratio is a weight, at most `_DPPO_MOST` as in the authors' code: a token that has become likely and is to become
    unlikely again is never masked, however large its ratio.
    """
    log_ratio_T = tokens.log_ratio_T.detach()
    rises_T, falls_T = (tokens.advantages_T > 0) & (log_ratio_T > 0), (tokens.advantages_T < 0) & (log_ratio_T < 0)
    higher_T, lower_T = rises_T & (divergence_T > loss.clip_high), falls_T & (divergence_T > loss.clip_low)
    weight_T = log_ratio_T.clamp(-_MOST, _MOST).exp().clamp(max=_DPPO_MOST)
    weight_T = weight_T.masked_fill(higher_T | lower_T, 0.0)
    return -weight_T * tokens.advantages_T * tokens.logprobs_T, _shares(higher_T, lower_T)


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
