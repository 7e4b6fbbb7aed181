"""Prompt ids beside saved columns, so that a table finds its rows again whatever the order of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from mmr1_ds.errors import UserError


def encode_prompt_ids(prompt_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """The ids as two arrays that safetensors can hold: their bytes end to end (uint8), and where each begins."""
    encoded = [prompt_id.encode() for prompt_id in prompt_ids]
    return {
        "prompt_id_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8).copy(),
        "prompt_id_offsets": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    }


def decode_prompt_ids(state: Mapping[str, np.ndarray]) -> list[str]:
    """The inverse of `encode_prompt_ids`."""
    packed, offsets = state["prompt_id_bytes"].tobytes(), state["prompt_id_offsets"].tolist()
    return [packed[begin:end].decode() for begin, end in pairwise(offsets)]


def saved_positions(
    state: Mapping[str, np.ndarray], saved_fingerprint: str, prompt_ids: Sequence[str], fingerprint: str
) -> np.ndarray:
    """The saved position of each of our prompts, (P,) int64.

    Raises: UserError when the saved columns are of another data set, by fingerprint or by ids.
    """
    saved_ids = decode_prompt_ids(state)
    if saved_fingerprint != fingerprint or len(saved_ids) != len(prompt_ids):
        raise UserError(
            f"the checkpoint's curriculum is of data set {saved_fingerprint} ({len(saved_ids)} prompts), but "
            f"data.train_files is data set {fingerprint} ({len(prompt_ids)} prompts); "
            "resume with the same data and settings, or set trainer.resume=false"
        )
    if saved_ids == list(prompt_ids):
        return np.arange(len(prompt_ids))  # the usual case, and the only one where ids may repeat
    position_of = {prompt_id: position for position, prompt_id in enumerate(saved_ids)}
    missing = next((prompt_id for prompt_id in prompt_ids if prompt_id not in position_of), None)
    if missing is not None:
        raise UserError(
            f"the checkpoint's curriculum has no prompt {missing!r} though both data sets are "
            f"{fingerprint}; give the rows stable ids (data.id_key), or set trainer.resume=false"
        )
    return np.array([position_of[prompt_id] for prompt_id in prompt_ids], dtype=np.int64)
