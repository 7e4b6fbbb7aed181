"""The pull towards the reference: estimates of the KL at sampled tokens.

Source: http://joschu.net/blog/kl-approx.html. Shape letter: T tokens.
"""

from __future__ import annotations

from torch import Tensor


def kl_penalty(kind: str, logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) at each sampled token, (T,), with the gradient of the very formula.

    kl (k1), log p - log r: unbiased; as a loss its gradient is zero on average, whatever the policy.
    abs, |k1|: biased, never negative.
    mse (k2), k1^2 / 2: biased, little variance; as a loss its gradient is that of the KL.
    low_var_kl (k3), r/p - 1 - log r/p: unbiased, never negative; clamped to 10, and the log ratio to 20, as in verl.
    """
    log_ratio_T = logprobs_T - ref_logprobs_T
    if kind == "kl":
        return log_ratio_T
    if kind == "abs":
        return log_ratio_T.abs()
    if kind == "mse":
        return 0.5 * log_ratio_T.square()
    assert kind == "low_var_kl", kind
    difference_T = (-log_ratio_T).clamp(-20.0, 20.0)
    return (difference_T.exp() - difference_T - 1).clamp(-10.0, 10.0)
