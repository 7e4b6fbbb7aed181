"""Checks of a model's folder, whose weights are not read, and what its config.json says."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from mmr1_ds.config import ModelConfig
from mmr1_ds.config.families import FAMILIES, PUBLISHED
from mmr1_ds.config.schema import CriticModelConfig
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.files import json_object

# Of mixtures that are in no row of the table.
_NUM_EXPERTS = ("num_experts", "num_experts_per_tok", "num_local_experts", "experts_per_token", "n_routed_experts")
_MADE = {"demo_assets": "make demo", "real_text_assets": "make real"}  # folders of models -> what writes them
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_model(model: ModelConfig) -> None:
    """Check that the model is a folder with safetensors weights, or looks like a hub id.

    Raises: UserError naming what is missing and how to get it.
    """
    check_model_path(model.model_path, "worker.actor.model.model_path")
    if "model_type" in model.override_config:
        raise UserError(
            f"worker.actor.model.override_config.model_type={model.override_config['model_type']} would make another "
            "model of it; leave it out"
        )
    _check_tied_head(model)
    if model.tokenizer_path and _is_folder(model.tokenizer_path, "worker.actor.model.tokenizer_path"):
        _check_json_files(Path(model.tokenizer_path), "worker.actor.model.tokenizer_path")


def check_model_path(path: str | None, key: str) -> None:
    """Check a path or hub id alone. Raises: UserError that names `key`."""
    if not path:
        raise UserError(f"{key} is not set; give a model folder, or a hub id like Qwen/Qwen2.5-VL-3B-Instruct")
    if _is_folder(path, key):
        _check_model_folder(path, key)


def _is_folder(name: str, key: str) -> bool:
    """Return True for a path that exists, False for a hub id. Raises: UserError for neither."""
    if os.path.exists(name):
        return True
    if _HUB_ID.fullmatch(name):
        return False
    made = next((f"; {command} makes it" for folder, command in _MADE.items() if folder in Path(name).parts), "")
    raise UserError(f"{key}: no such folder {name!r}, and not a hub id of the form org/name{made}")


def _check_model_folder(name: str, key: str) -> None:
    path = Path(name)
    if not path.is_dir() or not (path / "config.json").is_file():
        raise UserError(f"{key}: {name!r} is not a model folder; it needs a config.json beside the weights")
    _check_json_files(path, key)
    content = json_object(path / "config.json", key)
    if not isinstance(content.get("model_type"), str):
        raise UserError(
            f"{key}: the config.json in {name!r} has no model_type, by which transformers and vLLM find the model's "
            "class; complete it"
        )
    if not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")):
            raise UserError(
                f"{key}: {name!r} has *.bin weights, which can run code when loaded; convert them to safetensors "
                "(from_pretrained(...).save_pretrained(...) of transformers)"
            )
        raise UserError(f"{key}: {name!r} has no weights; it needs *.safetensors")


def _check_tied_head(model: ModelConfig) -> None:
    """Check that vLLM ties the output layer where transformers does: Qwen3.5's model there reads its text_config."""
    content, family = _config(model) or {}, FAMILIES.get(model_type(model) or "")
    text = content.get("text_config")
    if family is None or not family.carries_states or not isinstance(text, dict):
        return
    if content.get("tie_word_embeddings") and not text.get("tie_word_embeddings"):
        raise UserError(
            f"worker.actor.model.model_path: tie_word_embeddings is true in {model.model_path!r} but not in its "
            "text_config, where vLLM looks: it would leave the output layer random; set it there too, or "
            "worker.actor.model.override_config.text_config.tie_word_embeddings=true"
        )


def _check_json_files(folder: Path, key: str) -> None:
    """Check files on which transformers fails somewhere inside when they hold anything but an object."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        content = json_object(folder / name, key) if (folder / name).is_file() else {}
        if not isinstance(content.get("text_config") or {}, dict):
            raise UserError(f"{key}: text_config in {str(folder / name)!r} must be an object")


def model_type(model: ModelConfig | CriticModelConfig) -> str | None:
    """Return the family of a model; None for a hub model that is neither in the cache nor known by name."""
    found = (_config(model) or {}).get("model_type") or PUBLISHED.get(model.model_path or "")
    return found if isinstance(found, str) else None


def model_has_experts(model: ModelConfig) -> bool | None:
    """Return whether a model is a mixture of experts; None for a hub model that is not in the cache."""
    family, text = FAMILIES.get(model_type(model) or ""), _text_config(model)
    if family is not None:
        return family.has_experts
    return any(text.get(name) for name in _NUM_EXPERTS) if text else None


def balances_experts(model: ModelConfig) -> bool:
    """Return whether a model asks for the loss that balances experts; False for a hub model not in the cache."""
    return bool(_text_config(model).get("output_router_logits"))


def model_takes_images(model: ModelConfig) -> bool | None:
    """Return whether a model takes images; None for a hub model that is not in the cache."""
    content = _config(model)
    return None if content is None else content.get("vision_config") is not None


def model_hidden_size(model: ModelConfig) -> int | None:
    """Return the width of a model's text part; None for a hub model that is not in the cache."""
    width = (_config(model) or {}).get("hidden_size") or _text_config(model).get("hidden_size")
    return width if isinstance(width, int) else None


def model_positions(model: ModelConfig) -> int | None:
    """Return the longest sequence that vLLM starts a model with; None where its config.json leaves room for doubt.

    So do a model that is not in the cache, positions that are scaled, and a length under another name.
    """
    content, text = _config(model) or {}, _text_config(model)
    for part in (content, text):
        if part.get("model_max_length") is not None or _is_scaled(part):
            return None
    found = [part.get("max_position_embeddings") for part in (content, text)]
    return max((number for number in found if isinstance(number, int)), default=None)


def _is_scaled(part: dict[str, Any]) -> bool:
    ropes = [part.get(name) for name in ("rope_scaling", "rope_parameters")]
    ropes += [of_layers for rope in ropes if isinstance(rope, dict) for of_layers in rope.values()]
    return any(isinstance(rope, dict) and "factor" in rope for rope in ropes)


def _text_config(model: ModelConfig) -> dict[str, Any]:
    """The part of config.json on a model's text; empty for a hub model."""
    content = _config(model) or {}
    text = content.get("text_config")
    return text if isinstance(text, dict) else content


def weights_are_here(model: ModelConfig) -> bool:
    """Return whether the weights need no download: those of a folder, or of a hub model that is in the cache."""
    if not model.model_path or os.path.exists(model.model_path):
        return True
    return any(_in_cache(model.model_path, f"model.safetensors{suffix}") for suffix in ("", ".index.json"))


def num_parameters(model: ModelConfig) -> int:
    """Return how many a model folder's weights have, by the headers of its files; 0 for one that is not there."""
    total = 0
    for path in sorted(Path(model.model_path or "").glob("*.safetensors")) if model.model_path else []:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def _config(model: ModelConfig | CriticModelConfig) -> dict[str, Any] | None:
    """The config.json of a local model, or of a hub model that was downloaded before, with override_config over it.

    Nothing is fetched.
    """
    if not model.model_path:
        return None
    path: str | None = os.path.join(model.model_path, "config.json")
    if not os.path.exists(model.model_path):
        path = _in_cache(model.model_path, "config.json")
    if path is None or not os.path.isfile(path):
        return None
    content = json_object(Path(path), "worker.actor.model.model_path")
    for key, value in model.override_config.items():  # of its parts the keys named, as transformers does it
        part = content.get(key)
        content[key] = {**part, **value} if isinstance(part, dict) and isinstance(value, dict) else value
    return content


def _in_cache(model_path: str, name: str) -> str | None:
    """A file of a hub model that was downloaded before."""
    if not _HUB_ID.fullmatch(model_path) or importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_path, name)
    return found if isinstance(found, str) else None
