"""A run as its directory shows it: configuration, environment, metrics, and the three axes of the curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

AXES = ("steps", "rollouts", "seconds")
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

    def axis(self, name: str) -> np.ndarray:
        """Return (S,) float64, rising: the steps, rollouts or seconds at work when each line of metrics was written."""
        if name == "steps":
            return self.metrics.steps.astype(np.float64)
        if name == "rollouts":
            return _carried(self.metrics.column("perf/num_rollouts"), self._estimated_rollouts())
        return _carried(self.metrics.column("perf/elapsed_seconds"), self._estimated_seconds())

    def training_rollouts(self) -> np.ndarray:
        """Return (S,) float64, the responses that the run has learned from so far."""
        return np.cumsum(self._filled("reward/num_responses"))

    def _estimated_rollouts(self) -> np.ndarray:
        """Estimate the rollouts of a run older than perf/num_rollouts, from its fraction of extra to training ones."""
        extra = self._filled("curriculum/extra_rollout_fraction")
        return np.maximum.accumulate(self.training_rollouts() * (1 + extra))

    def _estimated_seconds(self) -> np.ndarray:
        """Estimate the time of a run older than perf/elapsed_seconds, without loading or the time between stages."""
        stages = ("step", *BETWEEN_STEPS)
        return np.cumsum(sum((self._filled(f"timing_s/{stage}") for stage in stages), np.zeros(1)))

    def _filled(self, name: str) -> np.ndarray:
        """(S,) float64 with 0 where there is no value."""
        values = self.metrics.column(name)
        return np.zeros(len(self.metrics.steps)) if values is None else np.nan_to_num(values)


def _carried(values: np.ndarray | None, otherwise: np.ndarray) -> np.ndarray:
    """Fill the holes of a cumulative column with the value before, 0 at the start."""
    if values is None:
        return otherwise
    return np.maximum.accumulate(np.nan_to_num(values))


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read the runs in these folders. Raises: UserError for a folder that is no run, or is named twice."""
    seen: set[Path] = set()
    for run_dir in run_dirs:
        if run_dir.resolve() in seen:
            raise UserError(f"RUN={run_dir} is named twice; name each run once")
        seen.add(run_dir.resolve())
        _check_directory(run_dir)
    configs = [_config(run_dir) for run_dir in run_dirs]
    names = _names(run_dirs, configs)
    return [_load(run_dir, name, config) for run_dir, name, config in zip(run_dirs, names, configs, strict=True)]


def _check_directory(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise UserError(f"RUN={run_dir} is no folder; name a run's directory (trainer.run_dir, as runs/demo)")
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"RUN={run_dir} holds no metrics.jsonl, so it is no run's directory; name trainer.run_dir")


def _load(run_dir: Path, name: str, config: Mapping[str, Any]) -> Run:
    readers = {
        kind: LineReader(run_dir / f"{kind}.jsonl")
        for kind in ("metrics", "observations", "curriculum", "samples", "generations")
    }
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
    estimated = [
        what
        for what, metric in (("rollouts", "perf/num_rollouts"), ("wall clock", "perf/elapsed_seconds"))
        if metrics.column(metric) is None
    ]
    if estimated:
        notes.append(f"{name}: {' and '.join(estimated)} estimated from other figures; the run did not log them.")
    return Run(run_dir, name, config, _environment(run_dir), metrics, observations, looks, samples, generations, notes)


def _config(run_dir: Path) -> Mapping[str, Any]:
    """Return the configuration without what looks like a credential."""
    try:
        found = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return without_secrets(found) if isinstance(found, dict) else {}


def _environment(run_dir: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(run_dirs: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The experiments' names where these differ, else the folders', else their paths."""
    experiments = []
    for run_dir, config in zip(run_dirs, configs, strict=True):
        trainer = config.get("trainer")
        named = trainer.get("experiment_name") if isinstance(trainer, Mapping) else None
        experiments.append(str(named or run_dir.resolve().name))
    for names in (experiments, [run_dir.resolve().name for run_dir in run_dirs]):
        if len(set(names)) == len(names):
            return names
    return [str(run_dir) for run_dir in run_dirs]
