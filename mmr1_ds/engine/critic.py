"""The critic: what the states of a response are worth, learned with an optimiser and a schedule of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mmr1_ds.algorithm.aggregation import Segments
from mmr1_ds.algorithm.losses import value_loss
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import CriticConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.model.batching import end_to_end
from mmr1_ds.engine.model.policy import exact_types
from mmr1_ds.engine.model.value_model import load_value_model
from mmr1_ds.engine.zero_engine import Learner, Sizes, TokenLoss, start_deepspeed, weights_dtype
from mmr1_ds.records import Pair, Trajectory


class Critic(Learner):
    """Estimates what the states of a response are worth, and learns it from the returns."""

    name = "critic"

    def __init__(
        self,
        settings: CriticConfig,
        sizes: Sizes,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
        num_updates: int,
        bad_updates: BadUpdates,
        offload_states: bool = False,
    ) -> None:
        """Load the model and wrap it. Collective.

        Args: settings: resolved; num_updates: optimiser steps of the whole run, for the learning-rate schedule;
            offload_states: as worker.actor.offload_states.
        """
        start_deepspeed(ranks)
        dtype = weights_dtype(deepspeed_config)
        module = load_value_model(settings, exact_types(deepspeed_config), dtype, ranks.device)
        super().__init__(
            module, settings, sizes, deepspeed_config, ranks, encoder, num_updates, bad_updates, offload_states
        )
        self._clip = settings.cliprange_value

    def values(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """The value of the state before every response token, one float32 array (T,) a pair.

        Collective: all ranks, with the same number of pairs.
        """
        return self._evaluate(pairs)[0]

    def _counts_prompts_once(self) -> bool:
        """False: the budget counts each prompt with each of its responses."""
        return False

    def _loss(self, outputs: tuple[Tensor, ...], trajectories: Sequence[Trajectory], segments: Segments) -> TokenLoss:
        (values_T,) = outputs
        old_T = end_to_end([item.values for item in trajectories], self._ranks.device)
        returns_T = end_to_end([item.returns for item in trajectories], self._ranks.device)
        loss_T, clipped_T = value_loss(values_T, old_T, returns_T, self._clip)
        per_token = {"critic/vf_clipfrac": clipped_T, "critic/vpred_mean": values_T.detach()}
        return TokenLoss(loss_T, {"critic/vf_loss": loss_T.detach()}, per_token)
