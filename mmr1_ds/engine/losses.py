"""Per-token losses on packed response tokens. Shape letter: T tokens of all responses, end to end."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate with separate bounds (DAPO, arXiv 2503.14476) and dual clip (arXiv 1912.09729).

    Args: natural-log probabilities and advantages, (T,); clip_low and clip_high around a ratio of 1;
        clip_dual > 1 bounds the loss of tokens with a negative advantage at -clip_dual * advantage.
    Returns: loss (T,), to be minimised; per-token indicators and the k1 divergence from the old policy, each (T,).
    """
    log_ratio = (logprobs_T - old_logprobs_T).clamp(-20.0, 20.0)  # exp stays finite in fp32
    ratio = log_ratio.exp()
    plain = -advantages_T * ratio
    clipped = -advantages_T * ratio.clamp(1 - clip_low, 1 + clip_high)
    bounded = torch.maximum(plain, clipped)
    dual = -advantages_T * clip_dual
    loss = torch.where(advantages_T < 0, torch.minimum(bounded, dual), bounded)
    with torch.no_grad():
        indicators = {
            "pg_clipfrac_higher": (clipped > plain).float(),
            "pg_clipfrac_lower": ((bounded > dual) & (advantages_T < 0)).float(),
            "ppo_kl": -log_ratio,
        }
    return loss, indicators


def low_var_kl(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) at each sampled token, (T,), clamped as in verl.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    difference = (ref_logprobs_T - logprobs_T).clamp(-20.0, 20.0)
    return (difference.exp() - difference - 1).clamp(-10.0, 10.0)
