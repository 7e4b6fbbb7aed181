"""The critic: a ZeRO-3 engine around the value model, with an optimiser and a schedule of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from torch import Tensor

from mmr1_ds.algorithm.aggregation import GlobalBatch, Segments, token_weights
from mmr1_ds.algorithm.losses import value_loss
from mmr1_ds.algorithm.schedule import learning_rate
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import resolved_critic
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.micro_batches import by_tokens, in_turn
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.engine.model.policy import exact_types
from mmr1_ds.engine.model.value_model import load_value_model
from mmr1_ds.engine.weights.offloading import drop_host_copies, states_offloaded
from mmr1_ds.engine.weights.zero_checkpoint import ZeroCheckpoint
from mmr1_ds.engine.zero_engine import Pair, start_deepspeed

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


class Critic:
    """Estimates what the states of a response are worth, and learns it from the returns."""

    def __init__(
        self,
        config: RunConfig,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
        num_steps: int,
        bad_batches: Path | None = None,
    ) -> None:
        """Collective: load the model and wrap it.

        Args: num_steps: of the whole run, for the learning-rate schedule; bad_batches: as the actor's.
        """
        self._settings = resolved_critic(config)
        types = exact_types(deepspeed_config)
        start_deepspeed(ranks)
        self.value_model = load_value_model(self._settings, types, torch.bfloat16 if ranks.on_gpu else torch.float32)
        parameters = [parameter for parameter in self.value_model.parameters() if parameter.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=self.value_model, config=types, model_parameters=parameters)
        self._checkpoint = ZeroCheckpoint(self.engine, ranks)
        self._ranks, self._encoder = ranks, encoder
        self._offload_states = config.worker.actor.offload_states
        self._longest = config.data.max_prompt_length + config.data.max_response_length  # tokens of a sequence
        assert self._settings.global_batch_size is not None  # resolved
        # Responses an optimiser step on this rank.
        self._mini_batch_size = self._settings.global_batch_size * config.worker.rollout.n // ranks.size
        optimiser_steps = config.data.rollout_batch_size // self._settings.global_batch_size * self._settings.ppo_epochs
        self._num_updates = num_steps * optimiser_steps
        self.bad_updates = BadUpdates("critic", config.trainer.max_bad_updates, ranks, bad_batches)
        self.num_updates_done = 0

    def offloaded(self) -> AbstractContextManager[None]:
        """With worker.actor.offload_states: inside, all states are in host memory; the device is the rollout's."""
        return states_offloaded(self.engine, self._ranks.on_gpu) if self._offload_states else nullcontext()

    @torch.no_grad()
    def values(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """The value of the state before every response token, one float32 tensor (T,) a pair, on the CPU.

        Collective: all ranks, with the same number of pairs.
        """
        self.engine.eval()
        outputs: dict[int, Tensor] = {}
        for part in self._micro_batches(pairs, self._settings.micro_batch_size_per_device_for_experience):
            chosen = [pairs[i] for i in part]
            values_T = self.engine(collate(chosen, self._encoder, self._ranks.device))
            outputs.update(zip(part, values_T.cpu().split([len(response) for _, response in chosen]), strict=True))
        return [outputs[i] for i in range(len(pairs))]

    def _micro_batches(self, pairs: Sequence[Pair], size: int | None) -> list[list[int]]:
        """Which pairs are computed together, by position. Collective: all ranks, with the same number of pairs."""
        assert size is not None  # resolved
        if not self._settings.dynamic_batching:
            return in_turn(len(pairs), size)
        lengths = [(prompt.num_tokens or len(prompt.token_ids)) + len(response) for prompt, response in pairs]
        return by_tokens(lengths, size * self._longest, self._ranks)

    def update(
        self, pairs: Sequence[Pair], old_values: Sequence[Tensor], returns: Sequence[Tensor]
    ) -> dict[str, float]:
        """Train on this rank's share of a batch: one optimiser step for each global_batch_size prompts.

        Args: values at the rollout and returns, one tensor (T,) a pair.
        Returns: metrics over all ranks, averaged over the optimiser steps. An update whose loss or gradient is not
            finite is left out, of them too.
        Raises: UserError for too many of those in a row.
        Collective: all ranks, with the same number of pairs.
        """
        self.engine.train()
        steps: list[dict[str, float]] = []
        for _ in range(self._settings.ppo_epochs):
            for start in range(0, len(pairs), self._mini_batch_size):
                part = slice(start, start + self._mini_batch_size)
                taken = self._optimiser_step(pairs[part], old_values[part], returns[part])
                if taken is not None:
                    steps.append(taken)
        count = {"critic/num_bad_updates": float(self.bad_updates.num_bad)}
        if not steps:
            return count
        return count | {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}

    def _optimiser_step(
        self, pairs: Sequence[Pair], old_values: Sequence[Tensor], returns: Sequence[Tensor]
    ) -> dict[str, float] | None:
        """Returns: its metrics; None when it was left out."""
        batch = self._global_batch(pairs)
        rate = learning_rate(self._settings.optim, self.num_updates_done, self._num_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        micro_batches = self._micro_batches(pairs, self._settings.micro_batch_size_per_device_for_update)
        for number, part in enumerate(micro_batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            shares = self._micro_step(
                [pairs[i] for i in part], [old_values[i] for i in part], [returns[i] for i in part], batch
            )
            for name, value in shares.items():
                sums[name] = sums.get(name, 0.0) + value
            self.engine.step()
        if not self.engine.was_step_applied():
            self.bad_updates.was_bad(pairs, micro_batches, {"old_values": old_values, "returns": returns})
            return None
        self.bad_updates.was_good()
        self.num_updates_done += 1
        metrics = self._ranks.sum(sums, "critic metrics")
        return metrics | {"critic/grad_norm": float(self.engine.get_global_grad_norm()), "critic/lr": rate}

    def _global_batch(self, pairs: Sequence[Pair]) -> GlobalBatch:
        lengths = [len(response) for _, response in pairs]
        own = {"tokens": float(sum(lengths)), "responses": float(sum(length > 0 for length in lengths))}
        totals = self._ranks.sum(own, "count response tokens")
        return GlobalBatch(totals["tokens"], totals["responses"])

    def _micro_step(
        self, pairs: Sequence[Pair], old_values: Sequence[Tensor], returns: Sequence[Tensor], batch: GlobalBatch
    ) -> dict[str, float]:
        """Forward and backward. Returns: its shares of the metrics."""
        device = self._ranks.device
        values_T = self.engine(collate(pairs, self._encoder, device))
        old_T, returns_T = (torch.cat(list(item)).to(device) for item in (old_values, returns))
        loss_T, clipped_T = value_loss(values_T, old_T, returns_T, self._settings.cliprange_value)
        segments = Segments.of([len(response) for _, response in pairs], device)
        weights_T = token_weights(self._settings.loss_avg_mode, segments, batch, 1.0).to(loss_T.dtype)
        loss = self.bad_updates.guard((loss_T * weights_T).sum(), values_T)
        # Weights of the GLOBAL batch, as the actor's: times the ranks, over which DeepSpeed takes the mean.
        self.engine.backward(loss * self._ranks.size, scale_wrt_gas=False)
        num_tokens = max(1.0, batch.num_tokens)
        return {
            "critic/vf_loss": float(loss.detach()),
            "critic/vf_clipfrac": float(clipped_T.sum()) / num_tokens,
            "critic/vpred_mean": float(values_T.detach().sum()) / num_tokens,
        }

    def save(self, folder: Path) -> None:
        """Write the sharded state. Collective. Raises: SaveFailed, on every rank."""
        drop_host_copies(self.engine.optimizer.optimizer)
        state = {"num_updates_done": self.num_updates_done, "bad_updates": self.bad_updates.state_dict()}
        self._checkpoint.save(folder, state)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of ranks. Collective. Raises: UserError if it cannot be converted."""
        client_state = self._checkpoint.load(folder)
        self.num_updates_done = int(client_state["num_updates_done"])
        self.bad_updates.load_state_dict(client_state.get("bad_updates", {}))
