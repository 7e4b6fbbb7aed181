"""Models of transformers, loaded partitioned (ZeRO-3) from the first byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmr1_ds.config import CriticModelConfig, ModelConfig
from mmr1_ds.engine.model.attention import attend_images_at_once
from mmr1_ds.engine.model.experts import register_layouts
from mmr1_ds.engine.model.linear_attention import keep_states_apart
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(config: ModelConfig | CriticModelConfig) -> PreTrainedConfig:
    """The model's own config.json, with the keys of override_config replaced."""
    from transformers import AutoConfig

    assert config.model_path is not None
    return AutoConfig.from_pretrained(
        config.model_path, trust_remote_code=config.trust_remote_code, **config.override_config
    )


def load_partitioned(
    family: Any,
    config: ModelConfig | CriticModelConfig,
    model_config: PreTrainedConfig,
    attention: Any,
    deepspeed_config: Mapping[str, Any],
    dtype: torch.dtype,
    section: str,
) -> Any:
    """Load a model folder or hub model, each parameter partitioned as it is made.

    Args: family: an auto class of transformers; attention: its attn_implementation; section: of the run configuration,
        for errors. Collective: all ranks, same order. Rank 0's copy of the file is the one that counts.
    Raises: UserError when the file lacks tensors of the model.
    """
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    register_layouts()
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
            f"{section}.model_path={config.model_path} lacks {len(missing)} of the model's tensors, "
            f"as {missing[0]}; they would start random: complete the download or the export"
        )
    attend_images_at_once(model)
    keep_states_apart(model)
    return model


def freeze_vision_tower(model: nn.Module, path: str | None, section: str) -> None:
    """Leave the vision tower's parameters out of training. Raises: UserError for a model without one."""
    frozen = [parameter for name, parameter in model.named_parameters() if ".visual." in f".{name}"]
    if not frozen:
        raise UserError(f"{section}.freeze_vision_tower=true but {path} has no vision tower; set it to false")
    for parameter in frozen:
        parameter.requires_grad_(False)


def checkpoint_gradients(model: Any) -> None:
    """Recompute activations in the backward."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes embeddings of tokens and patches require gradients, for adapters under the reentrant kind. Here
    # a frozen vision tower would be computed twice and run backward for nothing.
    model.disable_input_require_grads()
