"""Low-rank adapters (LoRA, arXiv 2106.09685) in a model whose weights are partitioned.

Beside a linear layer's frozen weight W (out, in) stand A (rank, in) and B (out, rank), which are trained:

    y = W x + s B (A x)        s = alpha / rank

B starts at zero, so the policy starts as the model it was loaded from, and is that model again with adapters off.

peft puts them in place: the transformers model keeps its class and its own modules, only an adapted layer `x` becomes
peft's layer, with W as `x.base_layer.weight`. The adapters are made whole, after the partitioned load;
deepspeed.initialize partitions what is not partitioned yet, from rank 0's copy.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmr1_ds.config import LoraConfig, ModelConfig
from mmr1_ds.config.keys import nearest
from mmr1_ds.engine.model.experts import has_experts
from mmr1_ds.engine.model.loading import load_config
from mmr1_ds.errors import UserError, remedy

logger = logging.getLogger(__name__)

KEY = "worker.actor.model.lora"
_NAME = "default"  # peft's own for the only adapter of a layer
_BASE = ".base_layer."


class Adapter(NamedTuple):
    """The two factors beside one weight."""

    a: nn.Parameter  # (rank, in)
    b: nn.Parameter  # (out, rank)
    scale: float


def add_adapters(model: PreTrainedModel, config: ModelConfig, dtype: torch.dtype) -> None:
    """Put adapters into the model and freeze everything else. Not a collective, but all ranks must do the same.

    They start the same on every rank and in every run.

    Args: dtype: of the weights, and so of the adapters. In bf16 no small step is lost: DeepSpeed steps its own float32
    copies of what is trained. Computing with float32 adapters would save twice the activations for the backward, and
    bring the policy no nearer to what vLLM samples from, the sum of both rounded to bf16.
    Raises: UserError for a name that the model lacks.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            f"{KEY}.rank={config.lora.rank} but peft is not installed; {remedy('gpu')} or set the rank to 0"
        ) from None
    names = target_layers(_linear_layers(model, config), config.lora, str(config.model_path))
    whole: nn.Module = model
    targets = names
    if has_experts(model):
        logger.warning("LoRA: the experts of %s and their routers are no linear layers; they stay frozen, without "
                       "adapters", config.model_path)  # fmt: skip
        # peft takes the names of a mixture's dense layers for those of its experts, but not without a config in sight.
        whole, targets = nn.ModuleDict({"model": model}), [f"model.{name}" for name in names]
    settings = peft.LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=targets, bias="none")
    with torch.random.fork_rng(devices=[]):  # peft draws A on the CPU, layer by layer; B is zero
        torch.default_generator.manual_seed(0)
        peft.inject_adapter_in_model(settings, whole, _NAME)
    made = adapters(model)
    assert sorted(made) == sorted(f"{name}{_BASE}weight" for name in names), "peft adapted other layers"
    for adapter in made.values():
        for parameter in (adapter.a, adapter.b):
            parameter.data = parameter.data.to(dtype)  # peft makes them float32
    trained = {id(parameter) for adapter in made.values() for parameter in (adapter.a, adapter.b)}
    assert all(parameter.requires_grad == (id(parameter) in trained) for parameter in model.parameters())
    num_trained = sum(parameter.numel() for adapter in made.values() for parameter in (adapter.a, adapter.b))
    logger.info("LoRA: %d layers adapted, %s weights are trained", len(names), f"{num_trained:,}")


def _linear_layers(model: PreTrainedModel, config: ModelConfig) -> list[str]:
    """Names of the layers that adapters may be put beside."""
    head = model.get_output_embeddings()  # log-probabilities come from its own weight, often the embedding's
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not (config.freeze_vision_tower and ".visual." in f".{name}")
    ]


def layers_to_adapt(config: ModelConfig) -> list[str]:
    """Names of the layers that will have an adapter, before the model is loaded: it is built without its weights.

    Raises: UserError as `add_adapters` does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model_config = load_config(config)
    family = AutoModelForImageTextToText if hasattr(model_config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = family.from_config(model_config, trust_remote_code=config.trust_remote_code)
    return target_layers(_linear_layers(model, config), config.lora, str(config.model_path))


def target_layers(layers: Sequence[str], config: LoraConfig, model_path: str) -> list[str]:
    """The layers that the configuration selects.

    As in peft: a name in a list means every layer that ends in it; a regex is matched with the whole name.
    Raises: UserError for a name that selects none, or when none is left.
    """
    targets = wanted_modules(config)
    if targets is None:
        chosen = list(layers)
    else:
        for target in targets:
            if not any(_ends_in(layer, target) for layer in layers):
                known = sorted({layer.rpartition(".")[2] for layer in layers if not layer.rpartition(".")[2].isdigit()})
                close = nearest(target, [*known, *layers])
                raise UserError(
                    f"{KEY}.target_modules: {target} is no linear layer of {model_path} that may have an adapter; "
                    + (f"did you mean {close}? " if close else "")
                    + f"There are {', '.join(known)}"
                )
        chosen = [layer for layer in layers if any(_ends_in(layer, target) for target in targets)]
    left = [layer for layer in chosen if not _is_excluded(layer, config.exclude_modules)]
    if not left:
        raise UserError(f"{KEY}.exclude_modules={config.exclude_modules} leaves none of {len(chosen)} layers to adapt")
    if config.exclude_modules and len(left) == len(chosen):
        logger.warning("%s.exclude_modules=%s excludes nothing", KEY, config.exclude_modules)
    return left


def wanted_modules(config: LoraConfig) -> list[str] | None:
    """The names in target_modules, a list or text with commas as EasyR1 writes it; None for all-linear."""
    targets = config.target_modules
    if isinstance(targets, str):
        targets = [part.strip() for part in targets.split(",") if part.strip()]
    return None if [str(target).lower() for target in targets] == ["all-linear"] else list(targets)


def _ends_in(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")


def _is_excluded(layer: str, exclude: str | Sequence[str] | None) -> bool:
    if isinstance(exclude, str):
        return re.fullmatch(exclude, layer) is not None
    return any(_ends_in(layer, name) for name in exclude or ())


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapter of each adapted weight, by the weight's name among the model's parameters; empty without LoRA."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            a, b = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
            found[f"{name}{_BASE}weight"] = Adapter(a, b, float(module.scaling[_NAME]))
    return found


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers with an adapter in the model as it was before it got them."""
    return [base_name(name).removesuffix(".weight") for name in adapters(model)]


def base_name(name: str) -> str:
    """A parameter's name in the model as it was before it got adapters: the name that vLLM and a model folder know."""
    return name.replace(_BASE, ".")


def merged(weight: Tensor, adapter: Adapter) -> Tensor:
    """W + s B A in the type of W, rounded once; W itself stays as it is. All three must be whole."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        b, a = adapter.b.detach().to(exact), adapter.a.detach().to(exact)
        return torch.addmm(weight.to(exact), b, a, alpha=adapter.scale).to(weight.dtype)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, for forwards without gradient. All ranks together: they gather in step."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
