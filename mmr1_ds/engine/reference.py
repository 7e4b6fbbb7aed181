"""The reference: the policy that the KL term holds the actor to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import ActorConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.model.lora import adapters_off
from mmr1_ds.engine.model.policy import exact_types, load_policy
from mmr1_ds.engine.zero_engine import Sizes, ZeroEngine, start_deepspeed
from mmr1_ds.records import Pair


class Reference(ZeroEngine):
    """A frozen copy of the policy that the training starts from."""

    def __init__(
        self,
        settings: ActorConfig,
        sizes: Sizes,
        temperature: float,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
    ) -> None:
        """Load the model and wrap it. Collective."""
        dtype = start_deepspeed(ranks)
        policy = load_policy(
            settings,
            exact_types(deepspeed_config),
            encoder.forbidden_token_ids,
            temperature,
            dtype,
            trainable=False,
            ranks=ranks,
        )
        super().__init__(policy, settings, sizes, deepspeed_config, ranks, encoder)

    def log_probs(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """See `Actor.log_probs`. Collective: all ranks, with the same number of pairs."""
        return self._evaluate(pairs)


class AdapterlessReference:
    """The reference of a run with adapters: the actor with them off, exactly the model it was loaded from."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def log_probs(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """See `Actor.log_probs`. Collective: all ranks, with the same number of pairs."""
        with adapters_off(self._actor.model):
            return self._actor.log_probs(pairs)
