"""The pull towards the reference: estimates of the KL at sampled tokens, and the coefficient they are multiplied by.

Source: http://joschu.net/blog/kl-approx.html. Shape letter: T tokens.
"""

from __future__ import annotations

import math

from torch import Tensor

from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.config.ranges import MOST_ERROR


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


class KLController:
    """Holds the coefficient: fixed, or steered towards a target (Ziegler et al., arXiv 1909.08593, section 2.2)."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self._config = config
        self.coefficient = config.kl_coef

    def update(self, kl: float, num_responses: int) -> None:
        """Steer the coefficient after a step of `num_responses` (over all ranks) whose mean KL was `kl` nats a token.

        A KL that is not finite changes nothing: the coefficient outlives the step that is left out.
        """
        if self._config.kl_type == "adaptive" and math.isfinite(kl):
            error = min(MOST_ERROR, max(-MOST_ERROR, kl / self._config.kl_target - 1))
            self.coefficient *= 1 + error * num_responses / self._config.kl_horizon

    def state_dict(self) -> dict[str, float]:
        """The state that a resumed run starts from."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned. A fixed coefficient stays the configuration's."""
        if self._config.kl_type == "adaptive":
            self.coefficient = state["coefficient"]
