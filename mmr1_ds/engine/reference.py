"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import RunConfig
from mmr1_ds.engine.model.lora import adapters_off
from mmr1_ds.engine.zero_engine import ZeroEngine

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder
    from mmr1_ds.engine.actor import Actor
    from mmr1_ds.engine.zero_engine import Pair


class Reference(ZeroEngine):
    """The frozen policy that the KL term holds the actor to."""

    def __init__(
        self, config: RunConfig, deepspeed_config: Mapping[str, Any], ranks: Ranks, encoder: PromptEncoder
    ) -> None:
        """Collective."""
        super().__init__(config, deepspeed_config, ranks, encoder, trainable=False)


class AdapterlessReference:
    """The reference of a run with adapters: the actor with them off, exactly the model it was loaded from."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def log_probs(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """See `ZeroEngine.log_probs`. Collective: all ranks, with the same number of pairs."""
        with adapters_off(self._actor.model):
            return self._actor.log_probs(pairs)
