"""Prompt ids saved beside the columns of a table, which finds its rows by them in whatever order the data comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from mmr1_ds.errors import UserError

_SLICE = 1 << 16  # ids held as Python strings at a time: a hundred million of them would take gigabytes


def encode_prompt_ids(prompt_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """The ids as two arrays that safetensors can hold: their bytes end to end (uint8), and where each begins."""
    packed, lengths = bytearray(), np.zeros(len(prompt_ids) + 1, dtype=np.int64)
    for start in range(0, len(prompt_ids), _SLICE):
        encoded = [prompt_id.encode() for prompt_id in prompt_ids[start : start + _SLICE]]
        packed += b"".join(encoded)
        lengths[start + 1 : start + 1 + len(encoded)] = [len(item) for item in encoded]
    return {"prompt_id_bytes": np.frombuffer(packed, dtype=np.uint8), "prompt_id_offsets": np.cumsum(lengths)}


def decode_prompt_ids(state: Mapping[str, np.ndarray], start: int = 0, stop: int | None = None) -> list[str]:
    """The inverse of `encode_prompt_ids`, of the ids from `start` to `stop`."""
    offsets = state["prompt_id_offsets"][start : None if stop is None else stop + 1].tolist()
    packed = state["prompt_id_bytes"][offsets[0] : offsets[-1]].tobytes()
    return [packed[begin - offsets[0] : end - offsets[0]].decode() for begin, end in pairwise(offsets)]


def saved_positions(
    state: Mapping[str, np.ndarray], saved_fingerprint: str, prompt_ids: Sequence[str], fingerprint: str
) -> np.ndarray:
    """The saved position of each of our prompts, (P,) int64.

    Raises: UserError when the saved columns belong to another data set, by fingerprint or by ids.
    """
    num_saved = len(state["prompt_id_offsets"]) - 1
    if saved_fingerprint != fingerprint or num_saved != len(prompt_ids):
        raise UserError(
            f"the checkpoint's curriculum belongs to data set {saved_fingerprint} ({num_saved} prompts), but "
            f"data.train_files is data set {fingerprint} ({len(prompt_ids)} prompts); "
            "resume with the same data and settings, or set trainer.resume=false"
        )
    slices = range(0, num_saved, _SLICE)
    if all(decode_prompt_ids(state, i, min(i + _SLICE, num_saved)) == list(prompt_ids[i : i + _SLICE]) for i in slices):
        return np.arange(len(prompt_ids))  # the usual case, and the only one where ids may repeat
    position_of = {prompt_id: position for position, prompt_id in enumerate(decode_prompt_ids(state))}
    missing = next((prompt_id for prompt_id in prompt_ids if prompt_id not in position_of), None)
    if missing is not None:
        raise UserError(
            f"the checkpoint's curriculum lacks prompt {missing!r} though both data sets are "
            f"{fingerprint}; give the rows stable ids (data.id_key), or set trainer.resume=false"
        )
    return np.array([position_of[prompt_id] for prompt_id in prompt_ids], dtype=np.int64)
