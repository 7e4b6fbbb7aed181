"""The table and the plot of the experiment on a real model."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {
    "shuffle": "#555555", "shipped": "#b2182b", "posterior": "#1b7837", "posterior_text": "#7fbf7b", "mopps": "#e08214",
    "full": "#2166ac", "dapo": "#7b3294",
}  # fmt: skip
FIGURES = ("accuracy", "pass_at_4", "maj_at_4")
Runs = Mapping[str, Mapping[int, dict[str, Any]]]  # arm, seed


def report(argv: Sequence[str]) -> int:
    """Print a line of JSON an arm, write all of it to a file and draw the curves. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--min-seeds", type=int, default=3, help="of an arm that is drawn (default: %(default)s)")
    options = parser.parse_args(argv)
    runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in sorted(options.folder.glob("*_seed*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs[run["arm"]][run["seed"]] = run
    if unknown := runs.keys() - COLOURS.keys():
        sys.exit(f"{options.folder}: no arm of this experiment is called {', '.join(sorted(unknown))}")
    rows = [summary(arm, runs) for arm in COLOURS if arm in runs]
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "runs": runs}), encoding="utf-8")
    if options.plot is not None:
        draw(runs, options.plot, options.min_seeds)
    return 0


def curve(run: Mapping[str, Any], figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts spent and the figure, at each validation."""
    rows = [(step.get("rollouts", 0.0), step[figure]) for step in run["steps"] if figure in step]
    rollouts, values = np.array(rows, dtype=np.float64).T
    return rollouts, values


def at_budget(run: Mapping[str, Any], figure: str) -> float:
    """The figure at the end of the budget: of the last validation, or on the line between the two around it."""
    rollouts, values = curve(run, figure)
    return float(np.interp(run["budget"], rollouts, values))


def over_budget(run: Mapping[str, Any]) -> float:
    """The mean accuracy over the whole budget: the area under the curve."""
    rollouts, values = curve(run, "accuracy")
    grid = np.linspace(0, run["budget"], 200)
    return float(np.interp(grid, rollouts, values).mean())


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error over the seeds; None of a single one."""
    error = round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4) if len(values) > 1 else None
    return round(float(np.mean(values)), 4), error


def summary(arm: str, runs: Runs) -> dict[str, Any]:
    """One arm's figures over its seeds, and their differences to shuffle, seed by seed."""
    own, shuffled = runs[arm], runs.get("shuffle", {})
    both = sorted(own.keys() & shuffled.keys())
    teach = [
        np.mean([step["teach"] for step in run["steps"] if "teach" in step and step["rollouts"] <= run["budget"]])
        for run in own.values()
    ]
    row: dict[str, Any] = {"arm": arm, "seeds": sorted(own), "groups_that_teach": _mean(teach)}
    row["before"] = _mean([curve(run, "accuracy")[1][0] for run in own.values()])
    row["mean_over_budget"] = _mean([over_budget(run) for run in own.values()])
    for figure in FIGURES:
        row[figure] = _mean([at_budget(run, figure) for run in own.values()])
    row["accuracy_less_shuffle"] = _mean(
        [at_budget(own[seed], "accuracy") - at_budget(shuffled[seed], "accuracy") for seed in both]
    )
    row["mean_less_shuffle"] = _mean([over_budget(own[seed]) - over_budget(shuffled[seed]) for seed in both])
    last = [[step for step in run["steps"] if "families" in step][-1]["families"] for run in own.values()]
    row["families"] = {name: round(float(np.mean([part[name] for part in last])), 3) for name in last[0]}
    return row


def draw(runs: Runs, path: Path, min_seeds: int) -> None:
    """Accuracy and pass@4 against rollouts: mean over seeds, and one standard error either side.

    min_seeds: of an arm that is drawn.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, name, title in zip(axes, FIGURES, ("accuracy at temperature 1", "right with one of four"), strict=False):
        for arm, colour in COLOURS.items():
            if len(runs.get(arm, ())) < min_seeds:
                continue
            budget = min(run["budget"] for run in runs[arm].values())
            ends = [min(curve(run, name)[0][-1], budget) for run in runs[arm].values()]
            grid = np.linspace(0, min(ends), 60)
            values = np.array([np.interp(grid, *curve(run, name)) for run in runs[arm].values()])
            mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / len(values) ** 0.5
            axis.plot(grid, mean, color=colour, label=f"{arm} ({len(values)} seeds)")
            axis.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel("rollouts, dropped groups included")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
