"""A run as its directory shows it: configuration, environment, metrics, and the three axes of the curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmr1_ds.commands.report.files import (
    LineReader,
    MetricsTable,
    Observations,
    SampleIndex,
    TableLook,
    index_samples,
    last_generations,
    read_curriculum,
    read_metrics,
    read_observations,
)
from mmr1_ds.config.redaction import without_secrets
from mmr1_ds.errors import UserError

AXES = {"steps": "steps", "rollouts": "rollouts", "seconds": "wall clock"}  # and what the page calls them
_LOGGED = {"rollouts": "perf/num_rollouts", "seconds": "perf/elapsed_seconds"}
BETWEEN_STEPS = ("testing", "refresh", "save_checkpoint")  # stages outside timing_s/step
_MOST_GENERATIONS = 6


@dataclass(frozen=True)
class Run:
    """The content of one run's directory, as the report reads it."""

    run_dir: Path
    name: str
    config: Mapping[str, Any]  # nested; empty without config.yaml
    environment: Mapping[str, Any]
    metrics: MetricsTable
    observations: Observations
    looks: Sequence[TableLook]
    samples: SampleIndex
    generations: Sequence[Mapping[str, Any]]
    notes: Sequence[str]  # what the reader must know of the files

    def setting(self, key: str) -> Any:
        """Return a value of the configuration by its dotted name; None when it is missing."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def num_steps(self) -> int:
        """The number of steps done so far."""
        return int(self.metrics.steps[-1])

    @property
    def total_steps(self) -> int | None:
        """The steps of the whole run; None where neither the configuration nor the environment has them."""
        total = self.environment.get("total_steps", self.setting("trainer.max_steps"))
        return total if isinstance(total, int) else None

    def axis(self, name: str) -> np.ndarray | None:
        """Return (S,) float64, rising: the steps, rollouts or seconds at work when each line of metrics was written.

        None where the run did not log them.
        """
        values = self.metrics.steps if name == "steps" else self.metrics.column(_LOGGED[name])
        return None if values is None else np.maximum.accumulate(np.nan_to_num(values.astype(np.float64)))


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read the runs in these folders. Raises: UserError for a folder that is no run, or is named twice."""
    seen: set[Path] = set()
    for run_dir in run_dirs:
        if run_dir.resolve() in seen:
            raise UserError(f"RUN={run_dir} is named twice; name each run once")
        seen.add(run_dir.resolve())
        if not run_dir.is_dir():
            raise UserError(f"RUN={run_dir} is no folder; name a run's directory (trainer.run_dir, as runs/demo)")
        if not (run_dir / "metrics.jsonl").is_file():
            raise UserError(f"RUN={run_dir} holds no metrics.jsonl, so it is no run's directory; name trainer.run_dir")
    configs = [without_secrets(_mapping(run_dir / "config.yaml", yaml.safe_load)) for run_dir in run_dirs]
    names = _names(run_dirs, configs)
    return [_load(run_dir, name, config) for run_dir, name, config in zip(run_dirs, names, configs, strict=True)]


def _load(run_dir: Path, name: str, config: Mapping[str, Any]) -> Run:
    kinds = ("metrics", "observations", "curriculum", "samples", "generations")
    readers = {kind: LineReader(run_dir / f"{kind}.jsonl") for kind in kinds}
    metrics = read_metrics(readers["metrics"])
    if not len(metrics.steps):
        raise UserError(f"RUN={run_dir} has no step in metrics.jsonl yet; call this again after its first step")
    observations, looks = read_observations(readers["observations"]), read_curriculum(readers["curriculum"])
    samples = index_samples(readers["samples"])
    generations = last_generations(readers["generations"], _MOST_GENERATIONS)
    notes = [
        f"{name}: {reader.num_unreadable} line(s) of {reader.path.name} could not be read and are left out."
        for reader in readers.values()
        if reader.num_unreadable
    ]
    environment = _mapping(run_dir / "environment.json", json.loads)
    return Run(run_dir, name, config, environment, metrics, observations, looks, samples, generations, notes)


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the content of a file; empty for one that is missing or damaged."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(run_dirs: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The experiments' names where these differ, else the folders', else their paths."""
    folders = [run_dir.resolve().name for run_dir in run_dirs]
    trainers = [config.get("trainer") for config in configs]
    experiments = [
        str((isinstance(trainer, Mapping) and trainer.get("experiment_name")) or folder)
        for trainer, folder in zip(trainers, folders, strict=True)
    ]
    for names in (experiments, folders):
        if len(set(names)) == len(names):
            return names
    return [str(run_dir) for run_dir in run_dirs]
