"""What a configuration brings along unasked: a preset's values beside the user's, a key that EasyR1 means otherwise."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mmr1_ds.config.ranges import value_at
from mmr1_ds.config.schema import RunConfig


def remarks(
    config: RunConfig, given: Collection[str], offloads: Collection[str], presets: Mapping[str, Any]
) -> list[str]:
    """Return a line for each.

    Args: given: keys that the user's files and the command line set; offloads: our names of those that the files set
        and EasyR1 has, too, with another meaning; presets: the values that the project's own configs set.
    """
    return [*_validation_data(config, given, presets), *([] if config.trainer.val_only else _offload(config, offloads))]


def _validation_data(config: RunConfig, given: Collection[str], presets: Mapping[str, Any]) -> list[str]:
    key, names = "data.val_files", config.data.val_files
    if not names or key in given or key not in presets:
        return []
    columns = ("data.prompt_key", "data.answer_key")
    changed = [name for name in columns if name in given and value_at(config, name) != presets.get(name)]
    if not changed:
        return []
    settings = " and ".join(f"{name}={value_at(config, name)}" for name in changed)
    return [
        f"{key}={names} comes from a preset, {settings} from you: both data sets are read by the same columns; set "
        f"{key} to data of yours, or to null"
    ]


def _offload(config: RunConfig, offloads: Collection[str]) -> list[str]:
    asked = [key for key in offloads if value_at(config, key)]
    if not asked:
        return []
    learning = [key for key in asked if not key.startswith("worker.ref.")]
    nearest = "; nearest to EasyR1's is worker.actor.offload_states=true in their place" if learning else ""
    return [
        f"{', '.join(asked)}: not as in EasyR1, which moves them to host memory between the phases of a step: here "
        "they stay there, weights come over PCIe a layer at a time and the optimiser steps on the CPU (ZeRO-Offload)"
        f"{nearest}"
    ]
