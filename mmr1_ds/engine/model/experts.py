"""Mixtures of experts, whose experts transformers holds stacked: one parameter (experts, out, in) for each matrix.

ZeRO-3 gathers a stacked parameter whole, whichever experts the tokens go to. So ranks whose tokens choose different
experts run the same collectives in the same order, and no leaf modules are needed.

Where config.json has output_router_logits=true, a loss keeps the experts evenly loaded (Switch Transformer, arXiv
2101.03961 eq. 4-6; published Qwen3 models have it false). With F the share of the tokens that go to each of E experts
and P the mean of its probabilities, over tokens and layers:

    L = E sum_e F_e P_e

as transformers computes it, but over the response tokens of a whole optimiser step in place of all tokens of a
micro-batch: F, which has no gradient, is found by a forward before the step, so that neither micro-batches nor ranks
change the loss.

Shape letters: T response tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Families whose published checkpoints hold the experts' matrices as (experts, in, out), which vLLM expects too.
_TRANSPOSED = "qwen3_vl_moe"
_STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class _FromPublished(Transpose):
    """(experts, in, out) of a published checkpoint to (experts, out, in); what transformers 5 saved stays."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        found = next(iter(input_dict.values()))
        tensor = found[0] if isinstance(found, list) else found
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        own = tuple(getattr(parameter, "ds_shape", parameter.shape))  # a partitioned one is empty
        turned = tuple(tensor.shape) != own or own[1] == own[2]
        name = self.get_target_pattern(input_dict, source_patterns, target_patterns)
        return {name: tensor.transpose(1, 2).contiguous() if turned else tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        return Transpose(1, 2)


def register_layouts() -> None:
    """Let transformers load a mixture's published checkpoint under ZeRO-3, and save in that same layout.

    Its own conversion compares with the shape of the parameter, which is empty when partitioned, and saves without
    transposing what it transposed, which vLLM then reads wrongly.
    """
    converters = [WeightConverter(name, name, operations=[_FromPublished(1, 2)]) for name in _STACKED]
    register_checkpoint_conversion_mapping(_TRANSPOSED, converters, overwrite=True)


def is_transposed(model: Any, name: str) -> bool:
    """Whether published checkpoints hold this parameter with its last two axes exchanged."""
    return model.config.model_type == _TRANSPOSED and name.endswith(_STACKED)


def as_published(model: Any, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in the layout of published checkpoints; what differs is a view."""
    for name, weight in weights:
        yield name, weight.transpose(1, 2) if is_transposed(model, name) else weight


def has_experts(model: nn.Module) -> bool:
    """Whether the model is a mixture of stacked experts."""
    return any(name.endswith(_STACKED) for name, _ in model.named_parameters())


def balances_experts(config: PreTrainedConfig) -> bool:
    """Whether the model's config.json asks for the loss that balances experts."""
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def routing(logits_TE: Sequence[Tensor], chosen_each: int) -> tuple[Tensor, Tensor]:
    """The probabilities of experts, with gradient, and which are chosen, averaged over layers.

    Args: logits_TE: of each layer; chosen_each: experts that a token goes to.
    Returns: (T, E) each, float32; a row sums to 1, and to chosen_each.
    """
    probabilities_TE = torch.zeros_like(logits_TE[0], dtype=torch.float32)
    chosen_TE = torch.zeros_like(probabilities_TE)
    for layer_TE in logits_TE:
        of_layer_TE = layer_TE.float().softmax(dim=-1)
        places = of_layer_TE.detach().topk(chosen_each, dim=-1).indices
        probabilities_TE = probabilities_TE + of_layer_TE / len(logits_TE)
        chosen_TE += torch.zeros_like(chosen_TE).scatter(1, places, 1 / len(logits_TE))
    return probabilities_TE, chosen_TE


def balance_loss(probabilities_TE: Tensor, share_E: Tensor) -> Tensor:
    """E sum_e F_e P_e of each token, (T,): the mean over the tokens of an optimiser step is its L.

    Args: share_E: F, the mean of `routing`'s choices over those tokens.
    """
    return len(share_E) * probabilities_TE @ share_E
