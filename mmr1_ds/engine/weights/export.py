"""A checkpoint's policy as an ordinary model folder, or its adapters as an ordinary folder of peft's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmr1_ds.config import ModelConfig
from mmr1_ds.engine.model.experts import register_layouts
from mmr1_ds.engine.model.loading import load_config
from mmr1_ds.engine.model.lora import base_name
from mmr1_ds.engine.weights.adapter_checkpoint import FILE
from mmr1_ds.engine.weights.gathering import weights_digest
from mmr1_ds.engine.weights.weight_files import has_weights_alone, read_weights
from mmr1_ds.engine.weights.zero_checkpoint import trained_weights
from mmr1_ds.errors import UserError
from mmr1_ds.io import whole_folder

logger = logging.getLogger(__name__)

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FEWEST_KEPT = 0.5  # share of the changed weights that must be left after rounding, or a warning says so
_INSIDE = "model."  # the transformers model in `PolicyModel`
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def write_policy(source: Path, config: ModelConfig, out: Path, dtype: str | None, max_shard_size: str) -> None:
    """Write the weights, merged with the adapters if there are any, and all that is needed to load them.

    The model folder gives what the checkpoint lacks: configuration, tokenizer, processor, chat template, and the
    weights under adapters.
    Args: source: the actor's part of a checkpoint; dtype: of the weights, None for the model folder's own;
        max_shard_size: as transformers takes it.
    Raises: UserError when the checkpoint is of another model.
    """
    trained = dict(_trained(source))
    if (source / FILE).is_file():
        model = _base_of_adapters(source, config)
        _merge(model, trained, _layers(source))
        model.to(TYPES[dtype] if dtype else _stored_type(config))
    else:
        model = _load(config, TYPES[dtype] if dtype else _stored_type(config))
        fill(model, trained, config)
    del trained
    with whole_folder(out) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        _write_processor(config, model.config, folder)


def write_adapters(source: Path, config: ModelConfig, out: Path) -> None:
    """Write the adapters alone, in peft's form; the model folder stays what they are for."""
    import peft
    from safetensors.torch import save_file

    layers = _layers(source)
    (shape,) = {(layer["rank"], layer["scale"]) for layer in layers.values()}
    targets = [name.removesuffix(".weight") for name in layers]
    settings = peft.LoraConfig(
        r=shape[0],
        lora_alpha=shape[0] * shape[1],
        target_modules=targets,
        bias="none",
        base_model_name_or_path=str(config.model_path),
        inference_mode=True,
    )
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in _trained(source)}
    with whole_folder(out) as folder:
        settings.save_pretrained(str(folder))
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _trained(source: Path) -> Any:
    """What the checkpoint holds, by transformers' names."""
    if has_weights_alone(source):
        return read_weights(source)
    return ((name.removeprefix(_INSIDE), tensor) for name, tensor in trained_weights(source))


def _layers(source: Path) -> dict[str, dict[str, Any]]:
    """Rank and scale of each adapter, by its weight's name."""
    return json.loads((source / FILE).read_text(encoding="utf-8"))["layers"]


def _load(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The model folder's own weights, whole."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    register_layouts()
    model_config = load_config(config)
    family = AutoModelForImageTextToText if hasattr(model_config, "vision_config") else AutoModelForCausalLM
    return family.from_pretrained(
        config.model_path, config=model_config, dtype=dtype, trust_remote_code=config.trust_remote_code
    )


def _stored_type(config: ModelConfig) -> torch.dtype:
    """The type that the model folder names; bf16 without one."""
    found = getattr(load_config(config), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _base_of_adapters(source: Path, config: ModelConfig) -> Any:
    """The model folder's weights in the type that they had in training. Raises: UserError for others than then."""
    written = json.loads((source / FILE).read_text(encoding="utf-8"))["base"]
    for dtype in (torch.bfloat16, torch.float32):  # on GPU and on CPU
        model = _load(config, dtype)
        if weights_digest((name, weight.detach()) for name, weight in model.named_parameters()) == written:
            return model
    raise UserError(
        f"{source} has adapters for other weights than worker.actor.model.model_path={config.model_path} has now; "
        "name the model that they were trained on"
    )


@torch.no_grad()
def _merge(model: Any, trained: dict[str, Tensor], layers: dict[str, dict[str, Any]]) -> None:
    """W + s B A in the type of W, as the rollout engine got it in training."""
    weights = dict(model.named_parameters())
    for name, layer in layers.items():
        stem, weight = name.removesuffix(".weight"), weights[name]
        # The shards are float32; the actor's own adapters, from which it computes, have the type of W.
        a, b = (trained[f"{stem}{part}"].to(weight.dtype).float() for part in (_A, _B))
        weight.copy_(torch.addmm(weight.float(), b, a, alpha=layer["scale"]))


@torch.no_grad()
def fill(model: Any, trained: dict[str, Tensor], config: ModelConfig) -> None:
    """Put the trained weights in the places of the model folder's."""
    own = model.state_dict()
    filled = set()
    changed = kept = 0
    for name, tensor in trained.items():
        name = base_name(name)
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"the checkpoint has {name} {tuple(tensor.shape)}, worker.actor.model.model_path={config.model_path} "
                "lacks it; name the model that was trained"
            )
        target, before = own[name], own[name].clone()
        target.copy_(tensor)
        if target.data_ptr() not in filled and target.dtype != tensor.dtype:
            changed += int((tensor != before.to(tensor.dtype)).sum())
            kept += int((target != before).sum())
        filled.add(own[name].data_ptr())
    if lacking := [name for name, parameter in model.named_parameters() if parameter.data_ptr() not in filled]:
        raise UserError(
            f"the checkpoint lacks {lacking[0]} of worker.actor.model.model_path={config.model_path}; "
            "name the model that was trained"
        )
    if kept < _FEWEST_KEPT * changed and _stored_type(config) == target.dtype:
        logger.warning(
            "rounded to %s, %.0f%% of the weights that training changed are the model folder's again; a run on the CPU "
            "samples and validates in float32: --dtype fp32 exports that",
            str(target.dtype).removeprefix("torch."), 100 * (1 - kept / changed),
        )  # fmt: skip


def _write_processor(config: ModelConfig, model_config: Any, out: Path) -> None:
    """Write the tokenizer or processor, with the chat template."""
    from transformers import AutoProcessor, AutoTokenizer

    family = AutoProcessor if hasattr(model_config, "vision_config") else AutoTokenizer
    source = config.tokenizer_path or config.model_path
    family.from_pretrained(source, trust_remote_code=config.trust_remote_code).save_pretrained(out)
