"""The actor and the reference: ZeRO-3 engines around the policy model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmr1_ds.algorithm.aggregation import GlobalBatch, Segments, token_weights
from mmr1_ds.algorithm.importance import ImportanceSampling
from mmr1_ds.algorithm.kl import KLController, kl_penalty
from mmr1_ds.algorithm.losses import PolicyLoss
from mmr1_ds.algorithm.schedule import learning_rate
from mmr1_ds.cluster.agreement import in_step
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import AlgorithmConfig, RunConfig
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.engine.weights.adapter_checkpoint import AdapterCheckpoint
from mmr1_ds.engine.weights.gathering import weight_buckets, whole_parameters
from mmr1_ds.engine.weights.offloading import drop_host_copies, states_offloaded
from mmr1_ds.engine.weights.zero_checkpoint import ZeroCheckpoint
from mmr1_ds.engine.zero_engine import ZeroEngine
from mmr1_ds.records import Trajectory, WeightInfo

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


class Actor(ZeroEngine):
    """The policy that is trained."""

    def __init__(
        self,
        config: RunConfig,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
        num_updates: int,
        bad_batches: Path | None = None,
    ) -> None:
        """Collective.

        Args: num_updates: optimiser steps of the whole run, for the learning-rate schedule; bad_batches: folder for
            the batches of updates that were left out, None = they are not kept.
        """
        super().__init__(config, deepspeed_config, ranks, encoder, trainable=True)
        self._algorithm: AlgorithmConfig = config.algorithm
        self._loss = PolicyLoss(
            self._settings.loss_type,
            self._settings.clip_ratio_low,
            self._settings.clip_ratio_high,
            self._settings.clip_ratio_dual,
            self._settings.tau_positive,
            self._settings.tau_negative,
        )
        self._importance = ImportanceSampling(self._algorithm.rollout_is, self._algorithm.rollout_is_threshold)
        self._scale_factor = float(self._settings.loss_scale_factor or config.data.max_response_length)
        self.kl = KLController(self._algorithm)
        self._responses_per_prompt = config.worker.rollout.n
        self._num_updates = num_updates
        self._adapters = AdapterCheckpoint(self.model)
        self._checkpoint = ZeroCheckpoint(self.engine, ranks)
        self.bad_updates = BadUpdates("actor", config.trainer.max_bad_updates, ranks, bad_batches)
        self.num_updates_done = 0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights, whole, for a rollout engine. Collective: see `whole_parameters`."""
        return whole_parameters(self.model)

    def weight_buckets(self) -> list[list[WeightInfo]]:
        """What `weights` will yield, by the buckets that are gathered together. Not a collective."""
        return weight_buckets(self.model)

    def offloaded(self, with_weights: bool = True) -> AbstractContextManager[None]:
        """With worker.actor.offload_states: inside, the states are in host memory and the device is the rollout's.

        with_weights: False = only gradients and the optimiser's states, so that `weights` can be read.
        """
        if not self._settings.offload_states:
            return nullcontext()
        return states_offloaded(self.engine, self._ranks.on_gpu, with_weights)

    def needs_old_log_probs(self, num_trajectories: int) -> bool:
        """False when the batch is one optimiser step: then the old policy is the policy itself."""
        return self._settings.ppo_epochs > 1 or num_trajectories > self._mini_batch_size()

    def _mini_batch_size(self) -> int:
        """Responses an optimiser step on this rank."""
        return self._settings.global_batch_size * self._responses_per_prompt // self._ranks.size

    def update(
        self,
        trajectories: Sequence[Trajectory],
        old_log_probs: Sequence[Tensor] | None,
        ref_log_probs: Sequence[Tensor] | None,
    ) -> dict[str, float]:
        """Train on this rank's share of a batch: one optimiser step for each global_batch_size prompts.

        Args: old and reference log-probabilities, one tensor (T,) a trajectory, or None for those not in use.
        Returns: metrics over all ranks, averaged over the optimiser steps (of maxima, the largest). An update whose
            loss or gradient is not finite is left out, of them too.
        Raises: UserError for too many of those in a row.
        Collective: all ranks, with the same number of trajectories.
        """
        self.engine.train()
        size = self._mini_batch_size()
        steps: list[dict[str, float]] = []
        for _ in range(self._settings.ppo_epochs):
            for start in range(0, len(trajectories), size):
                part = slice(start, start + size)
                taken = self._optimiser_step(
                    trajectories[part],
                    None if old_log_probs is None else old_log_probs[part],
                    None if ref_log_probs is None else ref_log_probs[part],
                )
                if taken is not None:
                    steps.append(taken)
        count = {"actor/num_bad_updates": float(self.bad_updates.num_bad)}
        if not steps:
            return count
        metrics = count | {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        metrics["rollout/logprob_diff_max"] = max(step["rollout/logprob_diff_max"] for step in steps)
        if ref_log_probs is not None:
            metrics["actor/kl_coef"] = self.kl.coefficient
            self.kl.update(metrics["actor/ref_kl"], len(trajectories) * self._ranks.size)
        return metrics

    def _optimiser_step(
        self, trajectories: Sequence[Trajectory], old: Sequence[Tensor] | None, ref: Sequence[Tensor] | None
    ) -> dict[str, float] | None:
        """Returns: its metrics; None when it was left out."""
        batch = self._global_batch(trajectories)
        rate = learning_rate(self._settings.optim, self.num_updates_done, self._num_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        largest_drift = 0.0
        parallel = self.policy.parallel
        if parallel is not None:
            trajectories = parallel.gather(trajectories)
            old, ref = (None if item is None else parallel.gather(item) for item in (old, ref))
        pairs = [(item.prompt, item.token_ids) for item in trajectories]
        micro_batches = self._micro_batches(pairs, self._settings.micro_batch_size_per_device_for_update)
        for number, part in enumerate(micro_batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            shares, drift = self._micro_step(
                [trajectories[i] for i in part],
                None if old is None else [old[i] for i in part],
                None if ref is None else [ref[i] for i in part],
                batch,
            )
            largest_drift = max(largest_drift, drift)
            for name, value in shares.items():
                # Every rank of a group counts all of its sequences.
                sums[name] = sums.get(name, 0.0) + value / self._settings.ulysses_size
            self.engine.step()
        if not self.engine.was_step_applied():
            columns = {
                "rewards": [torch.tensor(item.reward) for item in trajectories],
                "advantages": [_advantages([item], torch.device("cpu")) for item in trajectories],
                "rollout_logprobs": [torch.tensor(item.rollout_logprobs) for item in trajectories],
                "old_logprobs": old,
                "ref_logprobs": ref,
            }
            self.bad_updates.was_bad(pairs, micro_batches, columns)
            return None
        self.bad_updates.was_good()
        self.num_updates_done += 1
        metrics = self._ranks.sum(sums, "actor metrics")
        metrics |= self._ranks.max({"rollout/logprob_diff_max": largest_drift}, "actor metrics")
        metrics["actor/grad_norm"] = float(self.engine.get_global_grad_norm())
        metrics["actor/lr"] = rate
        return metrics

    def _global_batch(self, trajectories: Sequence[Trajectory]) -> GlobalBatch:
        lengths = [len(item.token_ids) for item in trajectories]
        own = {"tokens": float(sum(lengths)), "responses": float(sum(length > 0 for length in lengths))}
        totals = self._ranks.sum(own, "count response tokens")
        return GlobalBatch(totals["tokens"], totals["responses"])

    def _micro_step(
        self,
        trajectories: Sequence[Trajectory],
        old: Sequence[Tensor] | None,
        ref: Sequence[Tensor] | None,
        batch: GlobalBatch,
    ) -> tuple[dict[str, float], float]:
        """Forward and backward. Returns its shares of the metrics, and the largest drift from the rollout."""
        device = self._ranks.device
        pairs = [(item.prompt, item.token_ids) for item in trajectories]
        logprobs_T, entropies_T = self.engine(collate(pairs, self._encoder, device))
        segments = Segments.of([len(response) for _, response in pairs], device)
        old_T = logprobs_T.detach() if old is None else torch.cat(list(old)).to(device)
        rollout = list(chain.from_iterable(item.rollout_logprobs for item in trajectories))
        importance_T, drift = self._importance(old_T, torch.tensor(rollout, device=device), segments)
        loss_T, figures = self._loss(logprobs_T, old_T, _advantages(trajectories, device), segments)
        loss_T = loss_T * importance_T
        parts = {"actor/pg_loss": loss_T.detach()}
        if ref is not None:
            kl_T = kl_penalty(self._algorithm.kl_penalty, logprobs_T, torch.cat(list(ref)).to(device))
            loss_T = loss_T + self.kl.coefficient * kl_T
            figures["ref_kl"] = parts["actor/kl_loss"] = kl_T.detach()
        weights_T = token_weights(self._settings.loss_avg_mode, segments, batch, self._scale_factor).to(loss_T.dtype)
        # Weights of the GLOBAL batch: DeepSpeed averages gradients over ranks, so each rank's share is scaled up by
        # their number; neither ranks nor micro-batches change the gradient.
        loss = self.bad_updates.guard((loss_T * weights_T).sum(), logprobs_T)
        self.engine.backward(loss * self._ranks.size, scale_wrt_gas=False)

        shares = {name: float((values_T * weights_T).sum()) for name, values_T in parts.items()}
        per_token = {f"actor/{name}": values_T for name, values_T in figures.items()}
        per_token |= {"actor/entropy_loss": entropies_T, **{f"rollout/{name}": drift[name] for name in drift}}
        num_tokens = max(1.0, batch.num_tokens)
        shares |= {name: float(values_T.sum()) / num_tokens for name, values_T in per_token.items()}
        return shares, float(drift["logprob_diff_mean"].max()) if rollout else 0.0

    def save(self, folder: Path) -> None:
        """Write the sharded state. Collective. Raises: SaveFailed, on every rank."""
        state = {"num_updates_done": self.num_updates_done, "kl": self.kl.state_dict()}
        state["bad_updates"] = self.bad_updates.state_dict()
        drop_host_copies(self.engine.optimizer.optimizer)
        self._checkpoint.save(folder, state, exclude_frozen=self._adapters.leaves_out_frozen)
        in_step(self._ranks, "name the adapters", lambda: self._adapters.write(folder, self._ranks.rank == 0))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of ranks. Collective.

        Raises: UserError for a checkpoint of other adapters, or one that cannot be converted to this number of ranks.
        """
        self._adapters.check(folder)
        client_state = self._checkpoint.load(folder, strict=not self._adapters.leaves_out_frozen)
        self.num_updates_done = int(client_state["num_updates_done"])
        self.bad_updates.load_state_dict(client_state.get("bad_updates", {}))
        if "kl" in client_state:  # checkpoints of earlier versions have a fixed coefficient
            self.kl.load_state_dict(client_state["kl"])


def _advantages(trajectories: Sequence[Trajectory], device: torch.device) -> Tensor:
    """At each response token, end to end, (T,) float32."""
    by_token = (item.token_advantages or (item.advantage,) * len(item.token_ids) for item in trajectories)
    return torch.tensor(list(chain.from_iterable(by_token)), dtype=torch.float32, device=device)
