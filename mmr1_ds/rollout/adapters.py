"""LoRA's adapters beside the weights in vLLM's model: worker.rollout.lora_sync=adapters.

vLLM takes an adapter from a folder, by the path in a request. Servers do (servers/weights/adapters.py). An engine in
the ranks is given it in memory at every sync, which registers the factors under the adapter's id and writes them into
vLLM's buffers: a request finds that id registered, so that no path is opened. All functions with a worker run in vLLM's
worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.lora.request import LoRARequest

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has buffers for; a lower one is padded with zeros
_ID, _NAME = 1, "policy"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def adapter_options(layers: Sequence[str], rank: int) -> dict[str, Any]:
    """Arguments of vLLM's engine. layers: names of the adapted layers in transformers' model."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(size for size in _RANKS if size >= rank),
        # Else vLLM computes zeros for every layer without an adapter, experts and output layer included.
        "lora_target_modules": sorted({_target(layer) for layer in layers}),
        "enable_tower_connector_lora": any(".visual." in f".{layer}" for layer in layers),
    }


def adapter_request() -> LoRARequest:
    """What every request carries from the first sync on."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(_NAME, _ID, "given in memory")


def check_places(worker: Any, layers: Iterable[str]) -> None:
    """Raise UserError for layers that vLLM's model has no place for an adapter at: it would pass them over."""
    manager = worker.model_runner.lora_manager._adapter_manager
    places = {*manager.modules, *(part for parts in manager.packed_modules.values() for part in parts)}
    lost = [layer for layer in layers if _name_in_vllm(manager.model, layer) not in places]
    if lost:
        raise UserError(refusal(f"there is no place for {len(lost)} adapters, {lost[0]} among them"))


def refusal(reason: str) -> str:
    """What the user reads when vLLM does not take the adapters; `reason` may be vLLM's own message."""
    if "HTTP 404" in reason:
        return (
            f"worker.rollout.lora_sync=adapters: a server says {reason}; start mmr1-ds serve with the run's lora_sync "
            "and lora.rank, and with trainer.run_dir on a disk that it sees under the same path, or set it to merged"
        )
    said = reason.partition(". target_modules=")[0]
    return (
        f"worker.rollout.lora_sync=adapters: vLLM says {said}; set it to merged, or leave such layers out "
        "(worker.actor.model.lora.exclude_modules)"
    )


def load_adapters(worker: Any, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Take the place of the adapter before. tensors: see `Policy.adapter_weights`."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    manager = worker.model_runner.lora_manager._adapter_manager
    layers = {}
    for key, a in tensors.items():
        if key.endswith(_A):
            layer = key.removesuffix(_A)
            name = _name_in_vllm(manager.model, layer)
            layers[name] = LoRALayerWeights(name, rank, rank, a, tensors[layer + _B])
    manager.remove_adapter(_ID)  # an id that is registered would keep its weights
    manager.add_adapter(LoRAModel(_ID, rank, layers))
    manager.activate_adapter(_ID)
    layers.clear()  # vLLM's buffers have them now, and these would be held while the actor learns


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Write an adapter as vLLM reads one, in peft's form. tensors: see `Policy.adapter_weights`. Raises: OSError."""
    from safetensors.torch import save

    layers = sorted(key.removesuffix(_A) for key in tensors if key.endswith(_A))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers, "bias": "none"}
    stored = {f"base_model.model.{key}": tensor.cpu().contiguous() for key, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(save(stored, {"format": "pt"}))


def _target(layer: str) -> str:
    """The end of a layer's name, which finds it in vLLM's packed layers too; a tower's whole name where that is vague.

    proj is the name of a convolution as well, and a number that of every layer: vLLM refuses both.
    """
    end = layer.rpartition(".")[2]
    return layer.removeprefix("model.") if end == "proj" or end.isdigit() else end


def _name_in_vllm(model: Any, layer: str) -> str:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return parse_fine_tuned_lora_name(layer + _A, None if mapper is None else mapper.get_rename_mapper())[0]
