"""The actor: the policy that is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmr1_ds.algorithm.aggregation import Segments
from mmr1_ds.algorithm.importance import ImportanceSampling
from mmr1_ds.algorithm.kl import KLController, kl_penalty
from mmr1_ds.algorithm.losses import PolicyLoss
from mmr1_ds.algorithm.selection import highest_covariances, top_bound
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import ActorConfig, AlgorithmConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.model.batching import end_to_end
from mmr1_ds.engine.model.experts import as_published, balance_loss, is_transposed
from mmr1_ds.engine.model.policy import exact_types, load_policy
from mmr1_ds.engine.weights.gathering import adapter_weights, weight_buckets, weights_digest, whole_parameters
from mmr1_ds.engine.weights.weight_files import write_weights
from mmr1_ds.engine.zero_engine import Learner, OptimiserStep, Sizes, TokenLoss, start_deepspeed, weights_dtype
from mmr1_ds.records import Pair, Prompt, Trajectory, WeightInfo


class OldPolicy(NamedTuple):
    """The policy that a step's updates start from, one array a pair."""

    logprobs: list[np.ndarray]  # (T,) float32
    entropies: list[np.ndarray] | None  # (T,) float32, nats; None = no token is chosen by it
    experts: Sequence[np.ndarray] | None  # where the update sends tokens, see Trajectory; None = where the router says


class Actor(Learner):
    """The policy that is trained."""

    name = "actor"

    def __init__(
        self,
        settings: ActorConfig,
        algorithm: AlgorithmConfig,
        sizes: Sizes,
        temperature: float,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
        num_updates: int,
        bad_updates: BadUpdates,
    ) -> None:
        """Load the model and wrap it. Collective.

        Args: temperature: at which responses are sampled; num_updates: optimiser steps of the whole run, for the
            learning-rate schedule; deepspeed_config: without an optimizer the policy is only sampled from.
        """
        start_deepspeed(ranks)
        policy = load_policy(
            settings,
            exact_types(deepspeed_config),
            encoder.forbidden_token_ids,
            temperature,
            weights_dtype(deepspeed_config),
            trainable="optimizer" in deepspeed_config,
            ranks=ranks,
        )
        offload = settings.offload_states
        super().__init__(policy, settings, sizes, deepspeed_config, ranks, encoder, num_updates, bad_updates, offload)
        self._actor_settings, self._policy = settings, policy
        self.kl = KLController(algorithm)
        self._kl_penalty = algorithm.kl_penalty
        self.importance = ImportanceSampling(
            algorithm.rollout_is,
            algorithm.rollout_is_threshold,
            algorithm.rollout_mask,
            algorithm.rollout_mask_low,
            algorithm.rollout_mask_high,
        )
        self.policy_loss = PolicyLoss(
            settings.loss_type,
            settings.clip_ratio_low,
            settings.clip_ratio_high,
            settings.clip_ratio_dual,
            settings.tau_positive,
            settings.tau_negative,
            settings.kl_cov_coef,
        )
        self._entropy_bound = -math.inf  # top_entropy_quantile: tokens below it do not train in this optimiser step
        self._balances_experts = policy.balances_experts
        if policy.balances_experts:
            self._balance_coef = float(policy.model.config.get_text_config().router_aux_loss_coef)
        self._loss_scale_factor = float(settings.loss_scale_factor or sizes.max_response_length)

    def log_probs(self, pairs: Sequence[Pair], experts: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """The log-probability of every response token, one float32 array (T,) a pair.

        Collective: all ranks, with the same number of pairs. Args: experts: of a mixture: where the tokens of each pair
            are sent (`Response.experts`); None = where the router says.
        """
        return self._evaluate(pairs, 1, experts)[0]

    def old_policy(self, pairs: Sequence[Pair], experts: Sequence[np.ndarray] | None = None) -> OldPolicy:
        """What the update needs of the policy before it. Collective: as `log_probs`.

        Args: experts: of the rollout engine, which are replayed; with router_replay.mode=R2 the policy's own are noted.
        """
        if self._actor_settings.router_replay.mode == "R2":
            assert self._policy.replay is not None
            with self._policy.replay.recording():
                logprobs, entropies, experts = self._evaluate(pairs, 3)
            return OldPolicy(logprobs, entropies if self.selects_by_entropy else None, experts)
        if not self.selects_by_entropy:
            return OldPolicy(self._evaluate(pairs, 1, experts)[0], None, experts)
        logprobs, entropies = self._evaluate(pairs, 2, experts)
        return OldPolicy(logprobs, entropies, experts)

    def prompt_states(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The last layer's hidden state of each prompt's last token, (K, H) float32.

        Collective: all ranks, with the same number of prompts, at least one.
        """
        one_token = np.array(self._encoder.eos_token_ids[:1], dtype=np.int32)  # that state predicts it, and sees it not
        with self._policy.giving_states():
            states = self._evaluate([(prompt, one_token) for prompt in prompts], 3)[2]
        return np.concatenate(states)

    def weights(self, as_held: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The current weights, whole, for a rollout engine. Collective: see `whole_parameters`.

        as_held: in the shapes of the model's own parameters, not in those of published checkpoints.
        """
        found = whole_parameters(self.model)
        return found if as_held else as_published(self.model, found)

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The factors of the adapters alone, whole, for a rollout engine. Collective: see `gathering`'s function."""
        return adapter_weights(self.model)

    def weight_buckets(self) -> list[list[WeightInfo]]:
        """What `weights` will yield, by the buckets that are gathered together. Not a collective."""
        return [
            [
                info._replace(shape=(info.shape[0], info.shape[2], info.shape[1]))
                if is_transposed(self.model, info.name)
                else info
                for info in bucket
            ]
            for bucket in weight_buckets(self.model)
        ]

    def weights_digest(self) -> str:
        """A name for these very weights, whatever the number of ranks. Collective: gathers them as a sync does."""
        return weights_digest(self.weights())

    def save_weights(self, folder: Path) -> None:
        """Write the weights alone, adapters added to them. Collective. Raises: SaveFailed, on every rank."""
        write_weights(self.weights(as_held=True), folder, self._ranks)

    def needs_old_log_probs(self, num_groups: int) -> bool:
        """False when the batch is one optimiser step: then the old policy is the policy itself.

        Args: num_groups: of the batch, on this rank.
        """
        several = self.settings.ppo_epochs > 1 or num_groups > self._mini_batch_size
        return several or self.selects_by_entropy

    @property
    def selects_by_entropy(self) -> bool:
        """Whether `update` needs the entropies of the old policy."""
        return self._actor_settings.top_entropy_quantile < 1

    def update(
        self, trajectories: Sequence[Trajectory], group_sizes: Sequence[int] | None = None
    ) -> dict[str, float]:
        """See `Learner.update`. A KL in the loss also steers its coefficient."""
        metrics = super().update(trajectories, group_sizes)
        if "actor/ref_kl" in metrics:
            metrics["actor/kl_coef"] = self.kl.coefficient
            self.kl.update(metrics["actor/ref_kl"], self._num_responses_of_update)
        return metrics

    def _optimiser_step(self, trajectories: Sequence[Trajectory]) -> OptimiserStep | None:
        """See Learner. Which tokens are chosen follows from all of the step's, before any micro-batch is computed."""
        if self.policy_loss.kind == "kl_cov":
            trajectories = self._with_choice(trajectories)
        if self.selects_by_entropy:
            own = [item.old_entropies for item in trajectories if item.trains]
            nothing = np.zeros(0, dtype=np.float32)
            entropies_T = np.concatenate([nothing, *(values for values in own if values is not None)])
            self._entropy_bound = top_bound(entropies_T, self._actor_settings.top_entropy_quantile, self._ranks)
        if self._balances_experts:
            self._expert_share_E = self._share_of_experts(trajectories)
        return super()._optimiser_step(trajectories)

    def _experts(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray] | None:
        """See Learner."""
        found = [item.experts for item in trajectories if item.experts is not None]
        assert len(found) in (0, len(trajectories)), "experts of some sequences alone"
        return found or None

    def _share_of_experts(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """The share of the step's response tokens that go to each expert, (E,), by one forward. Collective."""
        chosen = self._evaluate([item.pair for item in trajectories], 4, self._experts(trajectories))[3]
        self.engine.train()
        own = [rows_TE for item, rows_TE in zip(trajectories, chosen, strict=True) if item.trains]
        counts_E = np.concatenate([chosen[0][:0], *own]).sum(axis=0, dtype=np.float64)
        sums = {str(i): float(count) for i, count in enumerate(counts_E)} | {"tokens": float(sum(map(len, own)))}
        sums = self._ranks.sum(sums, "count the tokens of experts")
        shares = [sums[str(i)] / max(1.0, sums["tokens"]) for i in range(len(counts_E))]
        return torch.tensor(shares, device=self._ranks.device)

    def _with_choice(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Mark the tokens that kl_cov holds; without old log-probabilities there are none. Collective."""
        found = [np.zeros(len(item.token_ids), dtype=bool) for item in trajectories]
        if trajectories[0].old_logprobs is not None:
            places = [i for i, item in enumerate(trajectories) if item.trains]
            old = [values for i in places if (values := trajectories[i].old_logprobs) is not None]
            advantages = [trajectories[i].advantages for i in places]
            chosen = highest_covariances(old, advantages, self._actor_settings.kl_cov_ratio, self._ranks)
            for i, is_chosen in zip(places, chosen, strict=True):
                found[i] = is_chosen
        return [replace(item, is_chosen=is_chosen) for item, is_chosen in zip(trajectories, found, strict=True)]

    def _loss(self, outputs: tuple[Tensor, ...], trajectories: Sequence[Trajectory], segments: Segments) -> TokenLoss:
        logprobs_T, entropies_T, *more = outputs
        device = self._ranks.device
        rollout_T = end_to_end([item.rollout_logprobs for item in trajectories], device)
        advantages_T = end_to_end([item.advantages for item in trajectories], device)
        old_T = logprobs_T.detach()
        if trajectories[0].old_logprobs is not None:
            old_T = end_to_end([item.old_logprobs for item in trajectories], device)
        importance_T, drift = self.importance(old_T, rollout_T, segments)
        chosen_T = None
        if trajectories[0].is_chosen is not None:
            chosen_T = end_to_end([item.is_chosen for item in trajectories], device)
        loss_T, figures = self.policy_loss(logprobs_T, old_T, advantages_T, segments, chosen_T)
        loss_T = loss_T * importance_T
        if self.selects_by_entropy:
            trains_T = end_to_end([item.old_entropies for item in trajectories], device) >= self._entropy_bound
            figures["top_entropy_fraction"] = trains_T.to(loss_T.dtype)
            loss_T = loss_T * trains_T
        weighted = {"actor/pg_loss": loss_T.detach()}
        if trajectories[0].ref_logprobs is not None:
            ref_T = end_to_end([item.ref_logprobs for item in trajectories], device)
            kl_T = kl_penalty(self._kl_penalty, logprobs_T, ref_T)
            loss_T = loss_T + self.kl.coefficient * kl_T
            figures["ref_kl"] = weighted["actor/kl_loss"] = kl_T.detach()
        if self._actor_settings.entropy_coef > 0:
            loss_T = loss_T - self._actor_settings.entropy_coef * entropies_T
        rerouted = {"actor/rerouted_fraction": more.pop()} if trajectories[0].experts is not None else {}
        if more:
            balance_T = balance_loss(more[0], self._expert_share_E)
            loss_T = loss_T + self._balance_coef * balance_T
            weighted["actor/router_aux_loss"] = balance_T.detach()
        entropies_T = entropies_T.detach()
        per_token = rerouted | {f"actor/{name}": values_T for name, values_T in figures.items()}
        per_token |= {"actor/entropy_loss": entropies_T, **{f"rollout/{name}": drift[name] for name in drift}}
        return TokenLoss(loss_T, weighted, per_token, {"rollout/logprob_diff_max": drift["logprob_diff_mean"]})

    def _state_dict(self) -> dict[str, Any]:
        return super()._state_dict() | {"kl": self.kl.state_dict()}

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        super()._load_state_dict(state)
        if "kl" in state:  # checkpoints of earlier versions have a fixed coefficient
            self.kl.load_state_dict(state["kl"])
