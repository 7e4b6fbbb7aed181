"""Groups of runs that differ in nothing but seeds; a group's label is what distinguishes it from the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from mmr1_ds.commands.report.runs import Run
from mmr1_ds.config.redaction import redacted

_NAMES = (  # names, directories and logging, which do not change what is learned
    "trainer.project_name",
    "trainer.experiment_name",
    "trainer.run_dir",
    "trainer.save_checkpoint_path",
    "trainer.load_checkpoint_path",
    "trainer.logger",
    "trainer.report_freq",
    "trainer.val_generations_to_log",
    "trainer.train_generations_to_log",
)
_NOT_SET, _NOT_USED = "not set", "not used"
_STRATEGY, _CURRICULUM = "data.sampling_strategy", "data.curriculum_"
_MOST_IN_LABEL = 3  # keys
_MOST_LETTERS = 28  # of a value


@dataclass(frozen=True)
class Group:
    """The runs over which a mean and a band are drawn."""

    label: str
    runs: Sequence[Run]
    values: Mapping[str, str]  # the values of keys that differ between groups; empty without config.yaml

    @property
    def first(self) -> Run:
        return self.runs[0]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group the runs, in the order in which they came."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(_identity(run), []).append(run)
    members = list(together.values())
    if len(members) == 1:
        only = members[0]
        return [Group(only[0].name if len(only) == 1 else f"{len(only)} seeds", only, {})]
    flats = [_counted(found[0]) for found in members]
    keys = _differing([flat for flat in flats if flat])
    values = [{key: _value(flat, key) for key in keys} if flat else {} for flat in flats]
    labels = _labels(members, values, keys)
    return [Group(label, found, of) for label, found, of in zip(labels, members, values, strict=True)]


def seeds(run: Run) -> dict[str, Any]:
    """Return the seeds in a run's configuration, by their dotted names."""
    return {key: value for key, value in _flat(run.config).items() if _is_seed(key)}


def _identity(run: Run) -> str:
    flat = _counted(run)
    return json.dumps(sorted(flat.items()), default=str) if flat else f"folder {run.run_dir.resolve()}"


def _counted(run: Run) -> dict[str, Any]:
    """Return the keys that can distinguish runs: no names, no seeds, no unused keys."""
    flat = {key: value for key, value in _flat(run.config).items() if key not in _NAMES and not _is_seed(key)}
    if flat.get(_STRATEGY, "curriculum") == "curriculum":
        return flat
    return {key: value for key, value in flat.items() if not key.startswith(_CURRICULUM)}


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def _differing(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the differing keys in the order of the configurations; keys that only later ones have come last."""
    missing = object()
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if any(flat.get(key, missing) != flats[0].get(key, missing) for flat in flats)]


def _value(flat: Mapping[str, Any], key: str) -> str:
    if key in flat:
        return _words(flat[key])
    return _NOT_USED if key.startswith(_CURRICULUM) and flat.get(_STRATEGY) != "curriculum" else _NOT_SET


def _labels(members: Sequence[Sequence[Run]], values: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """Label the groups with a few of the keys whose values differ, and with the run's name where these are the same."""

    def num_values(key: str) -> int:
        return len({of.get(key) for of in values} - {_NOT_USED, _NOT_SET, None})

    chosen = [key for key in keys if num_values(key) > 1][:_MOST_IN_LABEL]
    if _STRATEGY in keys:
        chosen = [_STRATEGY, *(key for key in chosen if key != _STRATEGY)][:_MOST_IN_LABEL]
    last = [key.rpartition(".")[2] for key in keys]
    labels = []
    for runs, of in zip(members, values, strict=True):
        parts = []
        for key in chosen:
            name = key.rpartition(".")[2]
            if of.get(key, _NOT_USED) != _NOT_USED:
                parts.append(f"{name if last.count(name) == 1 else '.'.join(key.split('.')[-2:])}={of[key]}")
        labels.append(", ".join(parts) or runs[0].name)
    return [
        f"{label} ({runs[0].name})" if labels.count(label) > 1 else label
        for label, runs in zip(labels, members, strict=True)
    ]


def _words(value: Any) -> str:
    """Return a value in a short form: the last part of a path."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if isinstance(value, str) and "/" in value:
        text = PurePath(value).name or value
    text = redacted(text)
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
