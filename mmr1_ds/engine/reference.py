"""The reference: the policy that the KL term holds the actor to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import ActorConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.model.lora import adapters_off
from mmr1_ds.engine.model.policy import exact_types, load_policy
from mmr1_ds.engine.zero_engine import Sizes, ZeroEngine, start_deepspeed, weights_dtype
from mmr1_ds.records import Pair


class Reference(ZeroEngine):
    """A copy of the policy that the training starts from, which no gradient moves."""

    def __init__(
        self,
        settings: ActorConfig,
        ema_decay: float,
        sizes: Sizes,
        temperature: float,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
    ) -> None:
        """Load the model and wrap it. Collective. ema_decay: the share of itself that `follow` keeps."""
        start_deepspeed(ranks)
        policy = load_policy(
            settings,
            exact_types(deepspeed_config),
            encoder.forbidden_token_ids,
            temperature,
            weights_dtype(deepspeed_config),
            trainable=False,
            ranks=ranks,
        )
        super().__init__(policy, settings, sizes, deepspeed_config, ranks, encoder)
        self._ema_decay = ema_decay
        self._averages: dict[str, Tensor] = {}  # of each shard in float32: in bf16 a small step would be rounded away
        self._has_moved = False

    def log_probs(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """See `Actor.log_probs`. Collective: all ranks, with the same number of pairs."""
        return self._evaluate(pairs, 1)[0]

    @torch.no_grad()
    def follow(self, actor: Actor) -> None:
        """Move towards the actor: w <- d w + (1 - d) w_actor, shard by shard. Collective."""
        theirs: dict[str, Any] = dict(actor.module.named_parameters())
        with self._own_shards() as own:
            for name, shard in own.items():
                average = self._averages.setdefault(name, shard.float()) if self._ema_decay else shard
                average.lerp_(theirs[name].ds_tensor.to(average), 1 - self._ema_decay)
                shard.copy_(average)
        self._has_moved = True

    def save(self, folder: Path) -> None:
        """Write this rank's part into the folder, if it has ever moved. Not a collective. Raises: OSError."""
        if self._has_moved:
            parameters: dict[str, Any] = dict(self.module.named_parameters())
            shards = {name: self._averages.get(name, item.ds_tensor.data) for name, item in parameters.items()}
            copies = {name: shard.to("cpu", copy=True) for name, shard in shards.items()}
            save_file(copies, folder / f"rank_{self._ranks.rank:05d}.safetensors")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of ranks; nothing where it wrote nothing. Collective."""
        paths = sorted(folder.glob("rank_*.safetensors"))
        if not paths:
            return
        with ExitStack() as stack, self._own_shards() as own:
            files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            for name, shard in own.items():
                if len(files) == self._ranks.size:
                    read = files[self._ranks.rank].get_tensor(name)
                else:  # a parameter's parts are of one size, the last filled up
                    read = torch.cat([file.get_tensor(name) for file in files])
                    read = read[self._ranks.rank * shard.numel() :][: shard.numel()]
                    read = torch.nn.functional.pad(read, (0, shard.numel() - read.numel()))
                shard.copy_(read)
                if self._ema_decay:
                    self._averages[name] = shard if shard.dtype == read.dtype else read.to(shard.device).float()
        self._has_moved = True


class AdapterlessReference:
    """The reference of a run with adapters: the actor with them off, exactly the model it was loaded from."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def log_probs(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """See `Actor.log_probs`. Collective: all ranks, with the same number of pairs."""
        with adapters_off(self._actor.model):
            return self._actor.log_probs(pairs)

    def follow(self, actor: Actor) -> None:
        """See `Reference.follow`; refused before a run begins."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """See `Reference.save`: nothing moves."""

    def load(self, folder: Path) -> None:
        """See `Reference.load`: nothing was written."""
