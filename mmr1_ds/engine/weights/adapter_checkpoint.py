"""Checkpoints of adapters alone: the frozen weights are not written, but must be the same when one is read.

A frozen weight never changes, and the model folder has it: written with every checkpoint it would be hundreds of times
the adapters. DeepSpeed loads by position in its flat buffers, so that adapters of other layers or another rank would
take each other's places, or fail deep inside of it; `adapters.json` names the adapters and their base, and is compared
before anything is read.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from mmr1_ds.engine.model.lora import KEY, adapters, base_name
from mmr1_ds.engine.weights.gathering import weights_digest, whole_parameters
from mmr1_ds.errors import UserError

FILE = "adapters.json"


class AdapterCheckpoint:
    """The identity of a model's adapters: written with a checkpoint, checked before one is read."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._adapters = adapters(model)

    @property
    def leaves_out_frozen(self) -> bool:
        """Whether the frozen weights stay out of checkpoints."""
        return bool(self._adapters)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """Collective when first asked for: the base is gathered. It does not change, so once is enough."""
        layers = {
            base_name(name): {"rank": adapter.b.ds_shape[1], "scale": adapter.scale}  # type: ignore[attr-defined]
            for name, adapter in self._adapters.items()
        }
        base = weights_digest(whole_parameters(self._model, with_adapters=False))
        return {"base": base, "layers": layers}

    def write(self, folder: Path, is_main: bool) -> None:
        """Name the checkpoint's adapters and their base in its folder; nothing without adapters. Collective."""
        if self._adapters:
            text = json.dumps(self._identity, indent=1)
            if is_main:
                (folder / FILE).write_text(text, encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Compare with what `write` wrote. Collective. Raises: UserError for another model, or other adapters."""
        path = folder / FILE
        if not self._adapters:
            if path.is_file():
                raise UserError(
                    f"{folder} holds adapters alone; set {KEY}.rank to theirs, or another trainer.experiment_name"
                )
            return
        if not path.is_file():
            raise UserError(f"{folder} holds whole weights and no adapters; set {KEY}.rank=0, or start elsewhere")
        written = json.loads(path.read_text(encoding="utf-8"))
        if written["layers"] != self._identity["layers"]:
            raise UserError(
                f"{folder} has {_in_words(written['layers'])}, the run {_in_words(self._identity['layers'])}; set "
                f"{KEY} (rank, alpha, target_modules, exclude_modules) as it was"
            )
        if written["base"] != self._identity["base"]:
            raise UserError(
                f"{folder} has adapters for other weights than worker.actor.model.model_path has now; name the model "
                "that they were trained on"
            )


def _in_words(layers: dict[str, dict[str, float]]) -> str:
    kinds = sorted({f"{layer['rank']} (scaled by {layer['scale']:g})" for layer in layers.values()})
    return f"adapters of rank {', '.join(kinds)} for {len(layers)} layers"
