"""The model with its log-probability head, loaded partitioned (ZeRO-3) from the first byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import ActorConfig
from mmr1_ds.engine.model import sequence_parallel
from mmr1_ds.engine.model.attention import attention_implementation
from mmr1_ds.engine.model.batching import ModelBatch
from mmr1_ds.engine.model.experts import balances_experts, routing
from mmr1_ds.engine.model.loading import checkpoint_gradients, freeze_vision_tower, load_config, load_partitioned
from mmr1_ds.engine.model.log_probs import LogProbHead
from mmr1_ds.engine.model.lora import add_adapters
from mmr1_ds.engine.model.packing import compute
from mmr1_ds.engine.model.router_replay import RouterReplay
from mmr1_ds.engine.model.sequence_parallel import SequenceParallel

_SECTION = "worker.actor.model"


class PolicyModel(nn.Module):
    """A transformers model whose forward ends in the log-probabilities of the response tokens.

    One module and one forward, so that DeepSpeed's hooks see the head too. The head runs on response positions
    only: prompt positions would multiply the largest tensor of the step for nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forbidden_token_ids: Sequence[int],
        temperature: float,
        parallel: SequenceParallel | None = None,
        entropy_gradient: bool = False,
        balances_experts: bool = False,
        replays_experts: bool = False,
        fp32_logits: bool = False,
    ) -> None:
        """
        Args:
            parallel: the ranks that compute every sequence together; None = each rank computes its own.
            entropy_gradient: whether the entropies have one.
            balances_experts: whether `forward` returns what `balance_loss` needs.
            replays_experts: whether tokens can be sent to given experts.
            fp32_logits: whether logits are float32 whatever the weights are.
        """
        super().__init__()
        self.model: PreTrainedModel = model
        self.parallel, self.balances_experts = parallel, balances_experts
        self.replay = RouterReplay(model) if replays_experts else None
        self._gives_states = False
        if parallel is not None:
            parallel.install(model)
        layer = model.get_output_embeddings()
        head = LogProbHead(layer, forbidden_token_ids, temperature, entropy_gradient, fp32_logits)
        model.set_output_embeddings(head)

    @contextmanager
    def giving_states(self) -> Iterator[None]:
        """Inside, `forward` returns the hidden states that predict the response tokens, (T, H), behind entropies."""
        self._gives_states = True
        try:
            yield
        finally:
            self._gives_states = False

    def forward(self, batch: ModelBatch) -> tuple[Tensor, ...]:
        """Log-probability and entropy (nats) of the sampled distribution at each response token.

        The distribution is that of the rollout: temperature applied, forbidden tokens left out.
        Returns: log-probabilities (T,) with gradient, entropies (T,) with one where asked for; both float32. With
            balances_experts also `routing`, with experts in the batch behind it `RouterReplay.differing`, (T,). While
            it records, the experts of each sequence's tokens in place of both, as `ModelBatch.experts`.
        """
        if self.parallel is not None:
            assert not self._gives_states, "check_config refuses it"
            return self.parallel.log_probs(self.model, batch, self.replay)
        # Without response tokens (a row of padding) both are empty but the former is still in the graph, so the
        # backward reaches every parameter and all ranks reduce the same gradients.
        head = self.model.get_output_embeddings()
        found = compute(self.model, batch, **({"output_router_logits": True} if self.balances_experts else {}))
        outputs = head(found.states_KH[found.places_T], batch.targets)
        if self._gives_states:
            return *outputs, found.states_KH[found.places_T]
        if self.replay is not None and self.replay.records:
            return *outputs, _chosen(self.replay, batch, found.places_SL)
        if self.balances_experts:
            chosen_each = self.model.config.get_text_config().num_experts_per_tok
            outputs = *outputs, *routing([logits_KE[found.places_T] for logits_KE in found.router_logits], chosen_each)
        if batch.experts is not None:
            assert self.replay is not None
            outputs = *outputs, self.replay.differing()[found.places_T]
        return outputs


def _chosen(replay: RouterReplay, batch: ModelBatch, places_SL: Tensor) -> Tensor:
    """The experts of every sequence's tokens but the last, (S, L, layers, chosen); -1 elsewhere."""
    chosen = replay.chosen().cpu()[places_SL]
    followed_SL = torch.nn.functional.pad(batch.attention_mask[:, 1:], (0, 1)).bool()
    return chosen.where(followed_SL[:, :, None, None], chosen.new_full((), -1))


def exact_types(deepspeed_config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with two float32 exceptions to bf16; entries of the user's own win.

    Rotary frequencies: partitioned loading casts them to bf16, which turns angles by radians at long positions, so
    that another model is trained than vLLM samples from. Accumulated gradients: a hundred small bf16 additions
    lose a percent.
    """
    own = deepspeed_config.get("data_types", {})
    exact = {"keep_in_fp32_modules": ["inv_freq"], "grad_accum_dtype": "fp32"}
    return {**deepspeed_config, "data_types": {**exact, **own}}


def load_policy(
    settings: ActorConfig,
    deepspeed_config: Mapping[str, Any],
    forbidden_token_ids: Sequence[int],
    temperature: float,
    dtype: torch.dtype,
    trainable: bool,
    ranks: Ranks,
) -> PolicyModel:
    """Load a model folder or hub model, each parameter partitioned as it is made.

    Collective: all ranks, same order. Rank 0's copy of the file is the one that counts.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = settings.model
    model_config = load_config(config)
    family = AutoModelForImageTextToText if hasattr(model_config, "vision_config") else AutoModelForCausalLM
    attention: Any = attention_implementation(
        settings.attention, settings.padding_free, model_config.model_type, dtype, ranks.device
    )
    parallel = None
    balances = trainable and balances_experts(model_config)
    assert not (balances and settings.ulysses_size > 1), "check_family refuses it"
    replays = trainable and settings.router_replay.mode != "disabled"
    if settings.ulysses_size > 1:
        parallel = SequenceParallel(ranks.neighbours(settings.ulysses_size), model_config, attention)
        attention = {"text_config": sequence_parallel.NAME, "vision_config": attention}
        if not hasattr(model_config, "vision_config"):
            attention = sequence_parallel.NAME
    model = load_partitioned(family, config, model_config, attention, deepspeed_config, dtype, _SECTION)
    model.generation_config = GenerationConfig()  # a published model's penalties are not the policy's distribution
    if not trainable:
        model.requires_grad_(False)
    else:
        if config.freeze_vision_tower:
            freeze_vision_tower(model, config.model_path, _SECTION)
        if config.lora.rank > 0:
            add_adapters(model, config, dtype)
        if config.enable_gradient_checkpointing:
            checkpoint_gradients(model)
    entropy_gradient = trainable and settings.entropy_coef > 0
    return PolicyModel(
        model, forbidden_token_ids, temperature, parallel, entropy_gradient, balances, replays, config.fp32_lm_head
    )
