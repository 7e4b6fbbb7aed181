"""The coordinator's state as files: arrays in safetensors, numbers in JSON. No pickle, so loading runs no code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmr1_ds.curriculum.prompt_ids import encode_prompt_ids
from mmr1_ds.errors import UserError
from mmr1_ds.io import whole_file

_ARRAYS, _NUMBERS, _PROMPT_IDS = "curriculum.safetensors", "curriculum.json", "prompt_ids.safetensors"
_FORMAT = 3
_EARLIER = (2,)  # had the prompt ids among the arrays
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "uint16": "U16", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip


def write_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write `curriculum.safetensors` and `curriculum.json` into an existing folder."""
    groups = {name: value for name, value in state.items() if name in ("table", "refresh", "history")}
    numbers = {name: value for name, value in state.items() if name not in groups}
    _write_arrays(
        {f"{group}.{name}": array for group, arrays in groups.items() for name, array in arrays.items()},
        folder / _ARRAYS,
    )
    (folder / _NUMBERS).write_text(json.dumps({"format": _FORMAT, **numbers}, indent=1) + "\n")


def write_prompt_ids(prompt_ids: Sequence[str], folder: Path) -> None:
    """Write the ids that belong to the table, `prompt_ids.safetensors`, into an existing folder."""
    _write_arrays(encode_prompt_ids(prompt_ids), folder / _PROMPT_IDS)


def keep_prompt_ids(prompt_ids: Sequence[str], kept: Path) -> None:
    """Write the ids to a file of their own, which `link_prompt_ids` links to; a run's ids never change."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(kept) as temporary:
        _write_arrays(encode_prompt_ids(prompt_ids), temporary)


def link_prompt_ids(kept: Path, folder: Path) -> None:
    """Give a folder its `prompt_ids.safetensors` without writing it again, or a copy where links are not possible."""
    try:
        os.link(kept, folder / _PROMPT_IDS)
    except OSError:
        shutil.copyfile(kept, folder / _PROMPT_IDS)


def _write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file straight from the arrays' memory: the library's own writer copies each one first."""
    header, end = {}, 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state that `write_state` wrote. Raises: UserError for another format, OSError for a missing file."""
    from safetensors.numpy import load_file

    state: dict[str, Any] = json.loads((folder / _NUMBERS).read_text())
    found = state.pop("format")
    if found not in (_FORMAT, *_EARLIER):
        raise UserError(
            f"{folder / _NUMBERS} has format {found}, this version reads {_FORMAT}; "
            "set trainer.resume=false to begin anew"
        )
    state |= {"table": {}, "refresh": {}, "history": {}}
    for key, array in load_file(folder / _ARRAYS).items():
        group, name = key.split(".", 1)
        state[group][name] = array
    if found not in _EARLIER:
        state["table"] |= load_file(folder / _PROMPT_IDS)
    return state
