"""ZeRO-3 engines: a model partitioned over the ranks, evaluated at response tokens, and how one learns.

Shape letter: T response tokens, end to end.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from mmr1_ds.algorithm.aggregation import GlobalBatch, Segments, token_weights
from mmr1_ds.algorithm.schedule import learning_rate
from mmr1_ds.cluster.agreement import in_step
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import ActorConfig, CriticConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.build_lock import lock_builds_by_kernel
from mmr1_ds.engine.micro_batches import Agree, by_prompts, by_tokens, in_turn
from mmr1_ds.engine.model.batching import collate, to_device
from mmr1_ds.engine.model.linear_attention import has_states
from mmr1_ds.engine.model.packing import shares_prompts
from mmr1_ds.engine.model.policy import PolicyModel, exact_types
from mmr1_ds.engine.model.value_model import ValueModel
from mmr1_ds.engine.optimizers import choose_optimizer, set_rates
from mmr1_ds.engine.weights.adapter_checkpoint import AdapterCheckpoint
from mmr1_ds.engine.weights.offloading import drop_host_copies, states_offloaded
from mmr1_ds.engine.weights.zero_checkpoint import ZeroCheckpoint, trained_weights
from mmr1_ds.errors import UserError
from mmr1_ds.io import PendingFile
from mmr1_ds.records import Pair, Trajectory


def weights_dtype(deepspeed_config: Mapping[str, Any]) -> torch.dtype:
    """Return the type that weights are loaded in."""
    return torch.bfloat16 if deepspeed_config["bf16"]["enabled"] else torch.float32


def start_deepspeed(ranks: Ranks) -> None:
    """Let DeepSpeed adopt the process group that is there. Collective."""
    lock_builds_by_kernel()
    deepspeed.init_distributed(auto_mpi_discovery=False)
    ranks.barrier("start of DeepSpeed")
    # On CPU each rank makes 66 MB of shared memory that outlives it. Unlinked, once every rank has it open, it ends
    # with the last of them, however they end.
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path(f"/dev/shm/{name}_{ranks.rank}").unlink(missing_ok=True)

@dataclass(frozen=True)
class Sizes:
    """What an engine needs to know about the responses that it computes."""

    num_responses: int  # to each prompt, or on average
    max_prompt_length: int  # tokens
    max_response_length: int  # tokens


class OptimiserStep(NamedTuple):
    """The figures of an optimiser step."""

    shares: dict[str, float]  # this rank's parts of means over the global batch
    largest: dict[str, float]  # on this rank
    of_all: dict[str, float]  # the same on every rank


class ZeroEngine:
    """A ZeRO-3 partitioned model that computes something at every response token."""

    def __init__(
        self,
        module: PolicyModel | ValueModel,
        settings: ActorConfig | CriticConfig,
        sizes: Sizes,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
    ) -> None:
        """Wrap a module that was loaded partitioned. Collective.

        Args: settings: a critic's must be resolved.
        """
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.module = module
        resolved, optimizer = exact_types(deepspeed_config), None
        if "optimizer" in resolved:
            resolved, optimizer = choose_optimizer(resolved, parameters, settings.optim)
        self.engine, *_ = deepspeed.initialize(
            model=module, config=resolved, model_parameters=parameters or None, optimizer=optimizer
        )
        self.settings, self._sizes, self._ranks, self._encoder = settings, sizes, ranks, encoder
        self._parallel = module.parallel
        self._num_neighbours = 1 if self._parallel is None else self._parallel.size  # ranks that share each sequence

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside, partitioned."""
        return self.module.model

    @torch.no_grad()
    def _evaluate(
        self, pairs: Sequence[Pair], num_outputs: int | None = None, experts: Sequence[np.ndarray] | None = None
    ) -> tuple[list[np.ndarray], ...]:
        """The module's first outputs, or all, at every response token, one float32 array (T,) a pair.

        Collective: all ranks, each with at least one pair. Args: experts: see `collate`.
        """
        self.engine.eval()
        if self._parallel is not None:
            pairs = self._parallel.gather(pairs)
            experts = experts and self._parallel.gather(experts)
        computed: list[tuple[list[int], list[Tensor | list[np.ndarray]]]] = []
        size = self.settings.micro_batch_size_per_device_for_experience
        for own in self._micro_batches(pairs, size, self._most_of_all_ranks):
            part = own or [_shortest(pairs)]
            outputs = self._forward([pairs[i] for i in part], experts and [experts[i] for i in part])[:num_outputs]
            # Numbers of tokens stay on the device until all are there: reading waits for them.
            kept = [_experts_of(output[: len(part)]) if output.ndim == 4 else output.float() for output in outputs]
            if own:
                computed.append((part, kept))
        found: dict[int, tuple[np.ndarray, ...]] = {}
        for part, kept in computed:
            cuts = np.cumsum([len(pairs[i][1]) for i in part])[:-1]
            parts = [np.split(item.cpu().numpy(), cuts) if isinstance(item, Tensor) else item for item in kept]
            found.update(zip(part, zip(*parts, strict=True), strict=True))
        in_order = [found[i] for i in range(len(pairs))]
        in_order = in_order if self._parallel is None else self._parallel.own(in_order)
        return tuple(list(column) for column in zip(*in_order, strict=True))

    def _forward(self, pairs: Sequence[Pair], experts: Sequence[np.ndarray] | None = None) -> tuple[Tensor, ...]:
        """The module's outputs at the response tokens of one micro-batch, (T,) each. Collective."""
        outputs = self.engine(collate(pairs, self._encoder, self._ranks.device, experts))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _most_of_all_ranks(self, fewest: int) -> int:
        return int(self._ranks.max({"micro-batches": float(fewest)}, "plan micro-batches")["micro-batches"])

    def _micro_batches(self, pairs: Sequence[Pair], size: int | None, agree: Agree) -> list[list[int]]:
        """Which pairs are computed together, by position; none where other ranks have more to compute. Collective."""
        assert size is not None  # resolved
        size *= self._num_neighbours  # a rank holds a cut of each sequence
        if not self.settings.dynamic_batching:
            return in_turn(len(pairs), size, agree)
        budget = size * (self._sizes.max_prompt_length + self._sizes.max_response_length)
        prompt_lengths = [prompt.num_tokens or len(prompt.token_ids) for prompt, _ in pairs]
        lengths = [len(response) for _, response in pairs]
        both = [prompt + response for prompt, response in zip(prompt_lengths, lengths, strict=True)]
        if self._counts_prompts_once():
            names = [id(prompt) for prompt, _ in pairs]
            if has_states(self.model.config):  # its layers compute, and keep, a prompt once for each response
                prompt_lengths, lengths = [0] * len(pairs), both
            return by_prompts(names, prompt_lengths, lengths, budget, agree)
        return by_tokens(both, budget, agree)

    @contextmanager
    def _own_shards(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's part of each parameter, to be changed in place. Collective."""
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        # Small ones are kept whole between two forwards: those copies are made again.
        whole = [item for item in parameters.values() if item.ds_status == ZeroParamStatus.AVAILABLE]
        if whole:
            whole[0].partition(whole, has_been_updated=False)
        yield {name: item.ds_tensor.data for name, item in parameters.items()}
        if whole:
            whole[0].all_gather(whole)

    @torch.no_grad()
    def _take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put whole weights, by their names in the module, in the places of the engine's own. Collective.

        Raises: UserError for weights of another model.
        """
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        shapes = {name: tuple(item.ds_shape) for name, item in parameters.items()}
        with self._own_shards() as own:
            left = set(own)
            for name, weight in weights:
                if name not in own:  # another name of a tied one
                    continue
                if tuple(weight.shape) != shapes[name]:
                    raise UserError(
                        f"the checkpoint has {name} of shape {tuple(weight.shape)}, worker.actor.model.model_path "
                        f"{shapes[name]}; name the model that was trained"
                    )
                shard = own[name]
                part = weight.flatten()[self._ranks.rank * shard.numel() :][: shard.numel()]
                shard.copy_(pad(part, (0, shard.numel() - part.numel())))
                left.discard(name)
        if left:
            raise UserError(
                f"the checkpoint has no {min(left)}, worker.actor.model.model_path has; name the model that was trained"
            )

    def _counts_prompts_once(self) -> bool:
        """Whether the responses to a prompt are planned together, around one copy of it."""
        return shares_prompts(self.model)


def _shortest(pairs: Sequence[Pair]) -> int:
    """The place of the pair with the fewest tokens."""
    lengths = [(prompt.num_tokens or len(prompt.token_ids)) + len(response) for prompt, response in pairs]
    return lengths.index(min(lengths))


def _experts_of(recorded_SLlk: Tensor) -> list[np.ndarray]:
    """Of each sequence, as `Response.experts`: without the places that have none."""
    found = recorded_SLlk.cpu().numpy()
    narrow = np.uint8 if found.max(initial=0) < 256 else np.uint16
    return [rows[rows[:, 0, 0] >= 0].astype(narrow) for rows in found]


@dataclass(frozen=True)
class TokenLoss:
    """The loss at each token of a micro-batch, and what to report of it."""

    loss_T: Tensor  # with gradient
    weighted: dict[str, Tensor]  # (T,) each: reported as the mean that the loss itself is
    per_token: dict[str, Tensor]  # (T,) each: reported as the mean over all tokens of the optimiser step
    largest: dict[str, Tensor] = field(default_factory=dict)  # (T,) each, none below 0: reported as the maximum


class Learner(ZeroEngine, ABC):
    """An engine that is trained. A subclass says by which loss."""

    name: ClassVar[str]  # in metrics, in errors and in the files of bad updates

    def __init__(
        self,
        module: PolicyModel | ValueModel,
        settings: ActorConfig | CriticConfig,
        sizes: Sizes,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
        num_updates: int,
        bad_updates: BadUpdates,
        offload_states: bool,
    ) -> None:
        """Wrap a module that was loaded partitioned. Collective.

        Args: num_updates: optimiser steps of the whole run, for the learning-rate schedule; offload_states: whether
            `offloaded` does anything.
        """
        super().__init__(module, settings, sizes, deepspeed_config, ranks, encoder)
        self._learns = "optimizer" in deepspeed_config  # a validation alone has none, nor its memory
        self.bad_updates = bad_updates
        self.num_updates_done = 0
        self._num_updates, self._offload_states = num_updates, offload_states
        self._num_responses_of_update = 0  # over all ranks
        self._loss_scale_factor = 1.0
        self._adapters = AdapterCheckpoint(self.model)
        strategy = settings.optim.strategy
        bound = "" if strategy in ("adamw", "adamw_bf16") else f"worker.{self.name}.optim.strategy={strategy}"
        self._checkpoint = ZeroCheckpoint(self.engine, ranks, bound)

    @abstractmethod
    def _loss(self, outputs: tuple[Tensor, ...], trajectories: Sequence[Trajectory], segments: Segments) -> TokenLoss:
        """The loss at each token, given the module's outputs there."""

    def _experts(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray] | None:
        """Where the tokens of each are sent again, of a mixture; None = where the router says."""
        return None

    def offloaded(self, with_weights: bool = True) -> AbstractContextManager[None]:
        """With worker.actor.offload_states: inside, the states are in host memory and the device is the rollout's.

        with_weights: False = only gradients and the optimiser's states, so that the weights can be read.
        """
        if not self._offload_states or not self._learns:
            return nullcontext()
        return states_offloaded(self.engine, self._ranks.on_gpu, with_weights)

    @property
    def _mini_batch_size(self) -> int:
        """Groups an optimiser step on this rank."""
        assert self.settings.global_batch_size is not None  # resolved
        return self.settings.global_batch_size // self._ranks.size

    def update(
        self, trajectories: Sequence[Trajectory], group_sizes: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Train on this rank's share of a batch: one optimiser step for each global_batch_size prompts.

        Args: group_sizes: how many of the trajectories, in their order, are responses to each prompt; None = n each.
        Returns: metrics over all ranks, averaged over the optimiser steps (of maxima, the largest). An update whose
            loss or gradient is not finite is left out of the training and of the metrics.
        Raises: UserError for too many of those in a row.
        Collective: all ranks, with the same number of groups.
        """
        self.engine.train()
        steps: list[OptimiserStep] = []
        n, share = self._sizes.num_responses, self._mini_batch_size
        if group_sizes is None:
            group_sizes = [len(trajectories[start : start + n]) for start in range(0, len(trajectories), n)]
        ends = np.cumsum(group_sizes)
        assert ends[-1] == len(trajectories), (group_sizes, len(trajectories))
        cuts = [0, *ends[share - 1 :: share].tolist()]
        if cuts[-1] < len(trajectories):
            cuts.append(len(trajectories))
        self._num_responses_of_update = n * len(group_sizes) * self._ranks.size  # n is the mean over all ranks
        for _ in range(self.settings.ppo_epochs):
            for start, end in pairwise(cuts):
                taken = self._optimiser_step(trajectories[start:end])
                if taken is not None:
                    steps.append(taken)
        metrics = {f"{self.name}/num_bad_updates": float(self.bad_updates.num_bad)}
        if steps:
            shares, maxima, of_all = zip(*steps, strict=True)
            largest = {name: max(step[name] for step in maxima) for name in maxima[0]}
            means, largest = self._ranks.sum_and_max(_mean(shares), largest, f"{self.name} metrics")
            metrics |= means | largest | _mean(of_all)
        return metrics

    def _optimiser_step(self, trajectories: Sequence[Trajectory]) -> OptimiserStep | None:
        """Returns: its figures, None when it was left out."""
        lengths = [len(item.token_ids) for item in trajectories if item.trains]
        own = {"tokens": float(sum(lengths)), "responses": float(sum(length > 0 for length in lengths))}
        totals: dict[str, float] = {}

        def agree(fewest: int) -> int:
            """Agree on a number of micro-batches; the same collective counts what the losses are averaged over."""
            sums, most = self._ranks.sum_and_max(own, {"micro-batches": float(fewest)}, "plan the update")
            totals.update(sums)
            return int(most["micro-batches"])

        rate = learning_rate(self.settings.optim, self.num_updates_done, self._num_updates)
        set_rates(self.engine.optimizer.param_groups, rate, self.settings.optim)
        if self._parallel is not None:
            trajectories = self._parallel.gather(trajectories)
        sums: dict[str, Tensor] = {}  # figures stay on the device until the step is taken: a read waits for it
        largest: dict[str, Tensor] = {}
        pairs = [item.pair for item in trajectories]
        micro_batches = self._micro_batches(pairs, self.settings.micro_batch_size_per_device_for_update, agree)
        batch = GlobalBatch(totals["tokens"], totals["responses"])
        for number, part in enumerate(micro_batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            own_part = [trajectories[i] for i in part]
            if not part:  # the others have more to compute, and every forward is a collective
                own_part = [replace(trajectories[_shortest(pairs)], trains=False)]
            shares, own_largest = self._micro_step(own_part, batch)
            for name, value in shares.items():
                # Every rank of a group counts all of its sequences.
                sums[name] = sums.get(name, 0.0) + value / self._num_neighbours
            for name, value in own_largest.items():
                largest[name] = value if name not in largest else torch.maximum(largest[name], value)
            self.engine.step()
        if not self.engine.was_step_applied():
            self.bad_updates.was_bad(trajectories, micro_batches)
            return None
        self.bad_updates.was_good()
        self.num_updates_done += 1
        norm = float(self.engine.get_global_grad_norm())
        read = torch.stack([*sums.values(), *largest.values()]).tolist()
        means, maxima = dict(zip(sums, read, strict=False)), dict(zip(largest, read[len(sums) :], strict=True))
        return OptimiserStep(means, maxima, {f"{self.name}/grad_norm": norm, f"{self.name}/lr": rate})

    def _micro_step(
        self, trajectories: Sequence[Trajectory], batch: GlobalBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Go forward and backward. Returns: this micro-batch's shares of the means, and its maxima, () float64 each."""
        outputs = self._forward([item.pair for item in trajectories], self._experts(trajectories))
        on_host, device = Segments.of([len(item.token_ids) for item in trajectories]), self._ranks.device
        segments = Segments(to_device(on_host.lengths, device), to_device(on_host.ids, device))
        found = self._loss(outputs, trajectories, segments)
        weights_T = token_weights(self.settings.loss_avg_mode, segments, batch, self._loss_scale_factor)
        trains_S = to_device(torch.tensor([item.trains for item in trajectories]), device)
        trains_T = segments.spread(trains_S).to(found.loss_T.dtype)
        weights_T = weights_T.to(found.loss_T.dtype) * trains_T
        # Weights of the GLOBAL batch: DeepSpeed averages gradients over ranks, so each rank's share is scaled up by
        # their number; neither ranks nor micro-batches change the gradient.
        loss = self.bad_updates.guard((found.loss_T * weights_T).sum(), outputs[0])
        self.engine.backward(loss * self._ranks.size, scale_wrt_gas=False)
        num_tokens = max(1.0, batch.num_tokens)
        with torch.no_grad():
            shares = {name: (values_T * weights_T).sum().double() for name, values_T in found.weighted.items()}
            for name, values_T in found.per_token.items():
                shares[name] = (values_T * trains_T).sum().double() / num_tokens
            largest = {name: pad(values_T.double(), (0, 1)).max() for name, values_T in found.largest.items()}
        return shares, largest

    def _state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the shards."""
        return {"num_updates_done": self.num_updates_done, "bad_updates": self.bad_updates.state_dict()}

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_updates_done = int(state["num_updates_done"])
        self.bad_updates.load_state_dict(state.get("bad_updates", {}))

    def save(self, folder: Path, in_background: bool = False) -> list[PendingFile]:
        """Write the sharded state; see `ZeroCheckpoint.save`. Collective. Raises: SaveFailed, on every rank."""
        drop_host_copies(self.engine.optimizer.optimizer)
        leaves_out = self._adapters.leaves_out_frozen
        files = self._checkpoint.save(folder, self._state_dict(), leaves_out, in_background)
        in_step(self._ranks, "name the adapters", lambda: self._adapters.write(folder, self._ranks.rank == 0))
        return files

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of ranks. Collective.

        Raises: UserError for a checkpoint of other adapters, or one that cannot be converted to this number of ranks.
        """
        self._adapters.check(folder)
        if not self._learns:
            self._take(trained_weights(folder))
            return
        self._load_state_dict(self._checkpoint.load(folder, strict=not self._adapters.leaves_out_frozen))


def _mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
