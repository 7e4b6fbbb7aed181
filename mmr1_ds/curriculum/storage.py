"""The coordinator's state as files: arrays in safetensors, numbers in JSON. No pickle, so loading runs no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmr1_ds.errors import UserError

_ARRAYS, _NUMBERS = "curriculum.safetensors", "curriculum.json"
_FORMAT = 2


def write_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write `curriculum.safetensors` and `curriculum.json` into an existing folder."""
    from safetensors.numpy import save_file

    groups = {name: value for name, value in state.items() if name in ("table", "refresh", "history")}
    numbers = {name: value for name, value in state.items() if name not in groups}
    save_file(
        {f"{group}.{name}": array for group, arrays in groups.items() for name, array in arrays.items()},
        folder / _ARRAYS,
    )
    (folder / _NUMBERS).write_text(json.dumps({"format": _FORMAT, **numbers}, indent=1) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state that `write_state` wrote. Raises: UserError for another format, OSError for a missing file."""
    from safetensors.numpy import load_file

    state: dict[str, Any] = json.loads((folder / _NUMBERS).read_text())
    found = state.pop("format")
    if found != _FORMAT:
        raise UserError(
            f"{folder / _NUMBERS} has format {found}, this version reads {_FORMAT}; "
            "set trainer.resume=false to begin anew"
        )
    state |= {"table": {}, "refresh": {}, "history": {}}
    for key, array in load_file(folder / _ARRAYS).items():
        group, name = key.split(".", 1)
        state[group][name] = array
    return state
