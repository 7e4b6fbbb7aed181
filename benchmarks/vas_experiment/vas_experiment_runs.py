"""The finished runs of the experiment, read from their files, and their curves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vas_experiment_trials import ARMS

SMOOTHED = 3  # validations that a point of a smoothed curve is the mean of
SHUFFLE = "shuffle"


@dataclass(frozen=True, order=True)
class Pool:
    """What runs have in common, besides the seed."""

    dead: bool  # whether the rest teaches nothing at all
    share: int  # learnable, %
    size: int

    def __str__(self) -> str:
        return f"{self.share} % of {self.size:,}, rest {'dead' if self.dead else 'mixed'}"


@dataclass(frozen=True)
class Run:
    """A finished run."""

    trial: Mapping[str, Any]
    steps: list[dict[str, Any]]
    seconds: float
    answers: Mapping[str, float] | None = None  # accuracy and pass@k after the training; earlier runs had none

    @property
    def pool(self) -> Pool:
        """Which pool it trained on."""
        return Pool(self.trial["dead"], self.trial["share"], self.trial["size"])

    def validations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, rollouts spent, accuracies; (V,) each."""
        rows = [(s["step"], s["rollouts"], s["validation_accuracy"]) for s in self.steps if "validation_accuracy" in s]
        steps, rollouts, accuracies = np.array(rows, dtype=np.float64).T
        return steps, rollouts, accuracies

    def curve(self, last_step: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rollouts spent and smoothed accuracies, (2V,) each: every validation before and after the refresh on it.

        A refresh spends without learning; a straight line over it to the next validation would have it learn.
        """
        steps, before, accuracies = self.validations()
        kept = np.searchsorted(steps, last_step, "right") if last_step else len(steps)
        after = before.copy()
        for row, following in zip(self.steps, self.steps[1:], strict=False):
            if "refresh_seconds" in row and row["step"] in steps:
                own = self.trial["responses_per_step"]
                after[np.searchsorted(steps, row["step"])] = following["rollouts"] - own
        return np.stack([before, after], axis=1)[:kept].reshape(-1), smooth(accuracies[:kept]).repeat(2)


def load_runs(folder: Path) -> list[Run]:
    """The finished runs of an experiment, traced ones aside."""
    runs = []
    for path in sorted((folder / "runs").glob("*.jsonl")):
        if path.stem.endswith("_traced"):
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert lines[-1]["finished"], path
        runs.append(Run(lines[0]["trial"], lines[1:-1], lines[-1]["seconds"], lines[-1].get("answers")))
    return runs


Arms = dict[str, dict[int, Run]]  # label -> seed -> run


def by_pool(runs: Sequence[Run]) -> dict[Pool, Arms]:
    """Pool -> label -> seed -> run.

    Raises: ValueError where the folder has an arm twice, with different budgets.
    """
    pools: dict[Pool, Arms] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        label, seed = run.trial["label"], run.trial["seed"]
        if seed in pools[run.pool][label]:
            raise ValueError(f"{run.pool}: {label} of seed {seed} is there with two budgets; report them apart")
        pools[run.pool][label][seed] = run
    return {pool: dict(pools[pool]) for pool in sorted(pools)}


def smooth(values: np.ndarray, width: int = SMOOTHED) -> np.ndarray:
    """Centred moving mean along the last axis, over as many as there are at the end.

    The beginning looks no further ahead than back: a curve starts where it starts.
    """
    length = values.shape[-1]
    reach = [min(width // 2, i) for i in range(length)]
    return np.stack([values[..., i - r : i + r + 1].mean(axis=-1) for i, r in enumerate(reach)], axis=-1)


def first_crossing(positions: np.ndarray, curve: np.ndarray, target: float) -> float:
    """Where a piecewise linear curve first reaches the target; NaN when it never does."""
    reached = np.flatnonzero(curve >= target)
    if len(reached) == 0:
        return float("nan")
    i = int(reached[0])
    if i == 0:
        return float(positions[0])
    share = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(positions[i - 1] + share * (positions[i] - positions[i - 1]))


def curves(runs: Sequence[Run], last_step: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed accuracies of several runs over the same rollouts: (R,) rollouts, (runs, R).

    Runs that spend differently are interpolated, up to where the first of them ends.
    """
    parts = [run.curve(last_step) for run in runs]
    longest = max((rollouts for rollouts, _ in parts), key=len)
    end = min(rollouts[-1] for rollouts, _ in parts)
    grid = np.unique([*longest[longest < end], end])
    return grid, np.array([np.interp(grid, rollouts, values) for rollouts, values in parts])


def arm_order(label: str) -> tuple[int, str]:
    """Shuffle first, then the others as they are usually named."""
    return ARMS.index(label.split(",")[0]), label
