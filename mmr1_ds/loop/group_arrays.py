"""Scored groups as arrays, in which they travel from rank to rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmr1_ds.loop.in_flight import pack_responses, unpack_responses
from mmr1_ds.records import GroupRewards, Prompt, RolloutGroup, ScoredGroup

_PART, _HAS_PART = "part.", "has_part."  # before the name of a reward's part


def groups_to_arrays(groups: Mapping[int, ScoredGroup]) -> dict[str, np.ndarray]:
    """Turn groups by slot into arrays for another rank: G groups, B responses. Inverse: `groups_from_arrays`.

    Prompts stay behind but for their index, for their images' sake: the receiver has the same data set.
    """
    scored, rewards = [*groups.values()], [item.rewards for item in groups.values()]
    arrays = {
        "slot": np.array([*groups], dtype=np.int64),  # (G,)
        "index": np.array([item.group.prompt.index for item in scored], dtype=np.int64),
        "version": np.array([item.group.policy_version for item in scored], dtype=np.int64),
        "num_responses": np.array([len(item.group.responses) for item in scored], dtype=np.int64),
        "overall": _end_to_end([item.overall for item in rewards]),  # (B,)
        "accuracy": _end_to_end([item.accuracy for item in rewards]),
        "failed": np.concatenate([np.empty(0, dtype=np.bool_), *(item.failed for item in rewards)]),
        **pack_responses([response for item in scored for response in item.group.responses]),
    }
    for name in sorted({name for item in rewards for name in item.parts}):  # not every group has every part
        arrays[_HAS_PART + name] = np.array([name in item.parts for item in rewards], dtype=np.bool_)  # (G,)
        arrays[_PART + name] = _end_to_end([item.parts[name] for item in rewards if name in item.parts])
    return arrays


def groups_from_arrays(arrays: Mapping[str, np.ndarray]) -> dict[int, ScoredGroup]:
    """The groups by slot, their prompts empty but for the index."""
    sizes, responses = arrays["num_responses"], unpack_responses(arrays)
    parts: list[dict[str, np.ndarray]] = [{} for _ in sizes]
    for key in arrays:
        if key.startswith(_PART):
            name = key.removeprefix(_PART)
            having = np.flatnonzero(arrays[_HAS_PART + name])
            for group, values in zip(having.tolist(), _cut(arrays[key], sizes[having]), strict=True):
                parts[group][name] = values
    columns = (_cut(arrays[name], sizes) for name in ("overall", "accuracy", "failed"))
    found = {}
    stop = 0
    for slot, index, version, size, *rewards in zip(
        *(arrays[name].tolist() for name in ("slot", "index", "version", "num_responses")), *columns, parts, strict=True
    ):
        start, stop = stop, stop + size
        group = RolloutGroup(Prompt(index, "", (), (), ""), tuple(responses[start:stop]), version)
        found[slot] = ScoredGroup(group, GroupRewards(*rewards))
    return found


def _end_to_end(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.float32), *parts])


def _cut(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """The inverse of laying parts of these sizes end to end."""
    return np.split(values, np.cumsum(sizes)[:-1]) if len(sizes) else []
