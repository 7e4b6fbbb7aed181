"""The actor and the reference: ZeRO-3 engines around the policy model."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmr1_ds.config import ActorConfig, AlgorithmConfig, RunConfig
from mmr1_ds.distributed import Ranks
from mmr1_ds.engine.batching import Trajectory, collate
from mmr1_ds.engine.losses import clipped_policy_loss, low_var_kl
from mmr1_ds.engine.policy import exact_types, load_policy
from mmr1_ds.engine.schedule import learning_rate
from mmr1_ds.engine.weights import whole_parameters
from mmr1_ds.records import Prompt

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

Pair = tuple[Prompt, tuple[int, ...]]


def _start_deepspeed(ranks: Ranks) -> None:
    """Let DeepSpeed adopt the process group that is there."""
    deepspeed.init_distributed(auto_mpi_discovery=False)
    ranks.barrier("start of DeepSpeed")
    # On CPU each rank makes 66 MB of shared memory that outlives it. Unlinked, once every rank has it open, it ends
    # with the last of them, however they end.
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path(f"/dev/shm/{name}_{ranks.rank}").unlink(missing_ok=True)


class ZeroEngine:
    """A ZeRO-3 partitioned policy that can say how likely given responses are."""

    def __init__(
        self,
        config: RunConfig,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
        trainable: bool,
    ) -> None:
        """Collective: load the model and wrap it."""
        settings = exact_types(deepspeed_config)
        _start_deepspeed(ranks)
        self.policy = load_policy(
            config.worker.actor.model,
            settings,
            encoder.forbidden_token_ids,
            config.worker.rollout.temperature,
            torch.bfloat16 if ranks.on_gpu else torch.float32,
            trainable,
        )
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=self.policy, config=settings, model_parameters=parameters or None)
        self._ranks, self._encoder = ranks, encoder

    @torch.no_grad()
    def log_probs(self, pairs: Sequence[Pair], micro_batch_size: int) -> list[Tensor]:
        """Log-probability of every response token, one float32 tensor (T,) a pair, on the CPU.

        Collective: all ranks, with the same number of pairs.
        """
        self.engine.eval()
        outputs: list[Tensor] = []
        for start in range(0, len(pairs), micro_batch_size):
            part = pairs[start : start + micro_batch_size]
            logprobs, _ = self.engine(collate(part, self._encoder, self._ranks.device))
            outputs += logprobs.float().cpu().split([len(response) for _, response in part])
        return outputs

    def weights_digest(self) -> str:
        """Names these very weights, whatever the number of ranks. Collective: gathers them as a sync does."""
        digest = hashlib.sha256()
        for name, weight in whole_parameters(self.model):
            bits = weight.contiguous().view({2: torch.int16, 4: torch.int32}[weight.element_size()])
            digest.update(f"{name} {tuple(weight.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
        return digest.hexdigest()

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside, partitioned."""
        return self.policy.model


class Actor(ZeroEngine):
    """The policy that is trained."""

    def __init__(
        self,
        config: RunConfig,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
        num_updates: int,
    ) -> None:
        """Collective. num_updates: optimiser steps of the whole run, for the learning-rate schedule."""
        super().__init__(config, deepspeed_config, ranks, encoder, trainable=True)
        self._config: ActorConfig = config.worker.actor
        self._algorithm: AlgorithmConfig = config.algorithm
        self._responses_per_prompt = config.worker.rollout.n
        self._num_updates = num_updates
        self.num_updates_done = 0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights, whole, for a rollout engine. Collective: see `whole_parameters`."""
        return whole_parameters(self.model)

    def needs_old_log_probs(self, num_trajectories: int) -> bool:
        """False when the batch is one optimiser step: then the old policy is the policy itself."""
        return self._config.ppo_epochs > 1 or num_trajectories > self._mini_batch_size()

    def _mini_batch_size(self) -> int:
        """Responses an optimiser step on this rank."""
        return self._config.global_batch_size * self._responses_per_prompt // self._ranks.size

    def update(
        self,
        trajectories: Sequence[Trajectory],
        old_log_probs: Sequence[Tensor] | None,
        ref_log_probs: Sequence[Tensor] | None,
    ) -> dict[str, float]:
        """Train on this rank's share of a batch: one optimiser step for each global_batch_size prompts.

        Args: old and reference log-probabilities, one tensor (T,) a trajectory, or None for those not in use.
        Returns: metrics over all ranks, averaged over the optimiser steps.
        Collective: all ranks, with the same number of trajectories.
        """
        self.engine.train()
        size = self._mini_batch_size()
        steps: list[dict[str, float]] = []
        for _ in range(self._config.ppo_epochs):
            for start in range(0, len(trajectories), size):
                part = slice(start, start + size)
                steps.append(
                    self._optimiser_step(
                        trajectories[part],
                        None if old_log_probs is None else old_log_probs[part],
                        None if ref_log_probs is None else ref_log_probs[part],
                    )
                )
        return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}

    def _optimiser_step(
        self, trajectories: Sequence[Trajectory], old: Sequence[Tensor] | None, ref: Sequence[Tensor] | None
    ) -> dict[str, float]:
        num_tokens = sum(len(item.token_ids) for item in trajectories)
        global_tokens = self._ranks.sum({"tokens": num_tokens}, "count response tokens")["tokens"]
        rate = learning_rate(self._config.optim, self.num_updates_done, self._num_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        largest_drift = 0.0
        micro = self._config.micro_batch_size_per_device_for_update
        for start in range(0, len(trajectories), micro):
            part = slice(start, start + micro)
            self.engine.set_gradient_accumulation_boundary(start + micro >= len(trajectories))
            token_sums, drift = self._micro_step(
                trajectories[part],
                None if old is None else old[part],
                None if ref is None else ref[part],
                global_tokens,
            )
            largest_drift = max(largest_drift, drift)
            for name, value in token_sums.items():
                sums[name] = sums.get(name, 0.0) + value
            self.engine.step()
        self.num_updates_done += 1
        totals = self._ranks.sum(sums, "actor metrics")
        metrics = {f"actor/{name}": value / max(1.0, global_tokens) for name, value in totals.items()}
        metrics["rollout/logprob_diff_mean"] = metrics.pop("actor/rollout_drift")
        metrics |= self._ranks.max({"rollout/logprob_diff_max": largest_drift}, "actor metrics")
        metrics["actor/grad_norm"] = self._gradient_norm()
        metrics["actor/lr"] = rate
        if ref is not None:
            metrics["actor/kl_coef"] = self._algorithm.kl_coef
        return metrics

    def _micro_step(
        self,
        trajectories: Sequence[Trajectory],
        old: Sequence[Tensor] | None,
        ref: Sequence[Tensor] | None,
        global_tokens: float,
    ) -> tuple[dict[str, float], float]:
        """Forward and backward. Returns sums of per-token figures, and the largest drift from the rollout."""
        device = self._ranks.device
        pairs = [(item.prompt, item.token_ids) for item in trajectories]
        logprobs_T, entropies_T = self.engine(collate(pairs, self._encoder, device))
        lengths = torch.tensor([len(response) for _, response in pairs])
        advantages_T = torch.tensor([item.advantage for item in trajectories]).repeat_interleave(lengths).to(device)
        old_T = logprobs_T.detach() if old is None else torch.cat(list(old)).to(device)
        loss_T, figures = clipped_policy_loss(
            logprobs_T,
            old_T,
            advantages_T,
            self._config.clip_ratio_low,
            self._config.clip_ratio_high,
            self._config.clip_ratio_dual,
        )
        figures |= {"pg_loss": loss_T.detach(), "entropy_loss": entropies_T}
        if ref is not None:
            kl_T = low_var_kl(logprobs_T, torch.cat(list(ref)).to(device))
            loss_T = loss_T + self._algorithm.kl_coef * kl_T
            figures["kl_loss"] = kl_T.detach()
        # The mean over the tokens of the GLOBAL batch: DeepSpeed averages gradients over ranks, so each rank's
        # share is scaled up by their number; neither ranks nor micro-batches change the gradient.
        loss = loss_T.sum() * (self._ranks.size / max(1.0, global_tokens))
        self.engine.backward(loss, scale_wrt_gas=False)

        rollout_T = torch.tensor(list(chain.from_iterable(item.rollout_logprobs for item in trajectories)))
        drift_T = (old_T.cpu() - rollout_T).abs()  # both of the policy that sampled, by the two implementations
        sums = {name: float(values_T.sum()) for name, values_T in figures.items()}
        sums["rollout_drift"] = float(drift_T.sum())
        return sums, float(drift_T.max()) if len(drift_T) else 0.0

    def _gradient_norm(self) -> float:
        """Raises: RuntimeError when it is not finite: the weights are lost, the last checkpoint must not follow."""
        norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise RuntimeError(
                f"the gradient norm of optimiser step {self.num_updates_done} is {norm}: the weights are spoilt; "
                "start again from the last checkpoint with a lower worker.actor.optim.lr or max_grad_norm"
            )
        return norm

    def save(self, folder: Path) -> None:
        """Write the sharded state. Collective."""
        self.engine.save_checkpoint(
            str(folder), tag="zero3", client_state={"num_updates_done": self.num_updates_done}, save_latest=False
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on the same number of ranks. Collective."""
        path, client_state = self.engine.load_checkpoint(str(folder), tag="zero3")
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load the actor from {folder}")
        self.num_updates_done = int(client_state["num_updates_done"])


class Reference(ZeroEngine):
    """The frozen policy that the KL term holds the actor to."""

    def __init__(
        self, config: RunConfig, deepspeed_config: Mapping[str, Any], ranks: Ranks, encoder: PromptEncoder
    ) -> None:
        """Collective."""
        super().__init__(config, deepspeed_config, ranks, encoder, trainable=False)
