"""The model with its log-probability head, loaded partitioned (ZeRO-3) from the first byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from mmr1_ds.config import ModelConfig
from mmr1_ds.distributed import Neighbours
from mmr1_ds.engine import sequence_parallel
from mmr1_ds.engine.batching import ModelBatch
from mmr1_ds.engine.log_probs import LogProbHead
from mmr1_ds.engine.lora import add_adapters
from mmr1_ds.engine.packing import attention_implementation, response_states
from mmr1_ds.engine.sequence_parallel import SequenceParallel
from mmr1_ds.errors import UserError


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
    ) -> None:
        """parallel: the ranks that compute every sequence together; None = each rank its own."""
        super().__init__()
        self.model: PreTrainedModel = model
        self.parallel = parallel
        if parallel is not None:
            parallel.install(model)
        model.set_output_embeddings(LogProbHead(model.get_output_embeddings(), forbidden_token_ids, temperature))

    def forward(self, batch: ModelBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (nats) of the sampled distribution at each response token.

        The distribution is that of the rollout: temperature applied, forbidden tokens left out.
        Returns: log-probabilities (T,) with gradient, entropies (T,) without; both float32.
        """
        if self.parallel is not None:
            return self.parallel.log_probs(self.model, batch)
        # Without response tokens (a row of padding) both are empty but the former is still in the graph, so the
        # backward reaches every parameter and all ranks reduce the same gradients.
        return self.model.get_output_embeddings()(response_states(self.model, batch), batch.targets)


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
    config: ModelConfig,
    deepspeed_config: Mapping[str, Any],
    forbidden_token_ids: Sequence[int],
    temperature: float,
    dtype: torch.dtype,
    trainable: bool,
    padding_free: bool = True,
    neighbours: Neighbours | None = None,
) -> PolicyModel:
    """Load a model folder or hub model, each parameter partitioned as it is made.

    Collective: all ranks, same order. Rank 0's copy of the file is the one that counts.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    assert config.model_path is not None
    model_config = AutoConfig.from_pretrained(
        config.model_path, trust_remote_code=config.trust_remote_code, **config.override_config
    )
    family = AutoModelForImageTextToText if hasattr(model_config, "vision_config") else AutoModelForCausalLM
    attention: Any = attention_implementation(padding_free, model_config.model_type, dtype)
    parallel = None
    if neighbours is not None:
        parallel = SequenceParallel(neighbours, model_config, attention)
        attention = {"text_config": sequence_parallel.NAME, "vision_config": attention}
        if not hasattr(model_config, "vision_config"):
            attention = sequence_parallel.NAME
    partitioned = HfDeepSpeedConfig(dict(deepspeed_config))  # transformers asks for it while it is alive
    try:
        model, loaded = family.from_pretrained(
            config.model_path,
            config=model_config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    finally:
        unset_hf_deepspeed_config()  # vLLM in this process must not load its model partitioned
        del partitioned
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"worker.actor.model.model_path={config.model_path} lacks {len(missing)} of the model's tensors, "
            f"as {missing[0]}; they would start random: complete the download or the export"
        )
    model.generation_config = GenerationConfig()  # a published model's penalties are not the policy's distribution
    if not trainable:
        model.requires_grad_(False)
    else:
        if config.freeze_vision_tower:
            _freeze_vision_tower(model, str(config.model_path))
        if config.lora.rank > 0:
            add_adapters(model, config, dtype)
        if config.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # transformers lets what embeds tokens and patches ask for gradients, for adapters under the reentrant
            # kind. Here a frozen vision tower would be computed twice and run backward for nothing.
            model.disable_input_require_grads()
    return PolicyModel(model, forbidden_token_ids, temperature, parallel)


def _freeze_vision_tower(model: nn.Module, path: str) -> None:
    frozen = [parameter for name, parameter in model.named_parameters() if ".visual." in f".{name}"]
    if not frozen:
        raise UserError(f"worker.actor.model.freeze_vision_tower=true but {path} has no vision tower; set it to false")
    for parameter in frozen:
        parameter.requires_grad_(False)
