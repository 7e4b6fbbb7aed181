"""The coefficient of the KL: fixed, or steered towards a target (Ziegler et al., arXiv 1909.08593, section 2.2)."""

from __future__ import annotations

import math

from mmr1_ds.config import AlgorithmConfig

MOST_ERROR = 0.2  # a relative error counts for this at most


class KLController:
    """Holds the coefficient."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self._config = config
        self.coefficient = config.kl_coef

    def update(self, kl: float, num_responses: int) -> None:
        """After a step of `num_responses` (over all ranks) whose mean KL a token was `kl`, nats.

        One that is not finite says nothing: its update is left out, the coefficient must outlive it.
        """
        if self._config.kl_type == "adaptive" and math.isfinite(kl):
            error = min(MOST_ERROR, max(-MOST_ERROR, kl / self._config.kl_target - 1))
            self.coefficient *= 1 + error * num_responses / self._config.kl_horizon

    def state_dict(self) -> dict[str, float]:
        """What a resumed run goes on from."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what `state_dict` gave. A fixed coefficient stays the configuration's."""
        if self._config.kl_type == "adaptive":
            self.coefficient = state["coefficient"]
