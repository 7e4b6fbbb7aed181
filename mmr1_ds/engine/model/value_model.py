"""The critic's model: what the state before each response token is worth; loaded partitioned (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmr1_ds.config import CriticConfig, CriticModelConfig, DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.attention import attention_implementation
from mmr1_ds.engine.model.batching import ModelBatch
from mmr1_ds.engine.model.loading import checkpoint_gradients, freeze_vision_tower, load_config, load_partitioned
from mmr1_ds.engine.model.packing import response_states
from mmr1_ds.engine.model.sequence_parallel import SequenceParallel
from mmr1_ds.errors import UserError

SECTION = "worker.critic.model"
_IMAGE_SETTINGS = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "rescale_factor")


class ValueHead(nn.Linear):
    """A linear layer from a hidden state to its value.

    It starts at zero: every state is worth the same, so that the first advantages are the rewards themselves, not the
    accident of a seed on hidden states whose scale differs by model. The head learns first, the model under it as soon
    as the head is not zero.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """The values, (T,), float32 at least: rounded to bf16 they would lie a two-hundredth of themselves apart."""
        exact = torch.promote_types(hidden_TH.dtype, torch.float32)
        return nn.functional.linear(hidden_TH.to(exact), self.weight.to(exact), self.bias.to(exact)).squeeze(-1)


class ValueModel(nn.Module):
    """A transformers model without its output layer, and a value head. One module, so that DeepSpeed sees both."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.parallel: SequenceParallel | None = None  # each rank computes its own sequences
        self.head = ValueHead(model.config.get_text_config().hidden_size, dtype)

    def forward(self, batch: ModelBatch) -> Tensor:
        """The value of the state before each response token: of the hidden state that predicts it, (T,) float32.

        Without response tokens it is empty but still in the graph, so the backward reaches every parameter.
        """
        return self.head(response_states(self.model, batch))


def load_value_model(
    settings: CriticConfig, deepspeed_config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> ValueModel:
    """Load a model folder or hub model without its output layer, each parameter partitioned as it is made.

    Args: settings: resolved. Collective: all ranks, same order. Rank 0's copy of the file is the one that counts.
    """
    from transformers import AutoModel

    config = settings.model
    assert settings.padding_free is not None and settings.attention is not None
    model_config = load_config(config)
    attention = attention_implementation(
        settings.attention, settings.padding_free, model_config.model_type, dtype, device
    )
    model = load_partitioned(AutoModel, config, model_config, attention, deepspeed_config, dtype, SECTION)
    if config.freeze_vision_tower:
        freeze_vision_tower(model, config.model_path, SECTION)
    if config.enable_gradient_checkpointing:
        checkpoint_gradients(model)
    return ValueModel(model, dtype)


def check_reads_alike(model: CriticModelConfig, data: DataConfig, actor: PromptEncoder) -> None:
    """Check that a critic of another model reads the actor's token ids and image patches as the actor does.

    Raises: UserError when it does not, or when its tokenizer or processor cannot be loaded.
    """
    critic = PromptEncoder(ModelConfig(model_path=model.model_path, trust_remote_code=model.trust_remote_code), data)
    difference = ""
    if critic.is_multimodal != actor.is_multimodal:
        difference = "one of them takes images and the other does not"
    elif critic.tokenizer.get_vocab() != actor.tokenizer.get_vocab():
        difference = "their tokens differ"
    elif actor.is_multimodal:
        for name in _IMAGE_SETTINGS:
            ours, theirs = (getattr(item.processor.image_processor, name, None) for item in (critic, actor))
            if ours != theirs:
                difference = f"{name} of their image processors is {ours} and {theirs}"
    if difference:
        raise UserError(
            f"{SECTION}.model_path={model.model_path} does not read what the actor writes: {difference}; "
            "name a model of the actor's family, or leave it out to start from the actor's own"
        )
