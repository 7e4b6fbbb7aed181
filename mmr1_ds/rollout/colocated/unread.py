"""A vLLM engine that reads no weights: the first sync brings them.

vLLM's own load format "dummy" gives random values to buffers too. One of them is what its vision towers scale pixels
by, which no sync brings.
"""

from __future__ import annotations

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

LOAD_FORMAT = "mmr1_ds_unread"


@register_model_loader(LOAD_FORMAT)
class UnreadWeights(DummyModelLoader):
    """Gives random values to parameters, so that vLLM can try the model as it starts, and leaves buffers as made."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """See BaseModelLoader."""
        for parameter in model.parameters():
            initialize_single_dummy_weight(parameter)
