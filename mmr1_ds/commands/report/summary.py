"""A run in words and figures: what it is, how many steps it did, and what it reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmr1_ds.commands.report.drawing import duration
from mmr1_ds.commands.report.groups import Group, seeds
from mmr1_ds.commands.report.runs import Run

_LAST_STEPS = 10  # over which final figures of training are averaged
_LATE = f"mean of the last {_LAST_STEPS} steps"
_SETTINGS = {
    "Model": "worker.actor.model.model_path",
    "Training data": "data.train_files",
    "Validation data": "data.val_files",
    "Sampling": "data.sampling_strategy",
    "Prompts a step": "data.rollout_batch_size",
    "Responses a prompt": "worker.rollout.n",
    "Fewest responses": "worker.rollout.n_min",
    "Most responses": "worker.rollout.n_max",
    "Estimator": "algorithm.adv_estimator",
    "Rollout engine": "worker.rollout.engine",
}
_CURRICULUM = {
    "Metrics": "data.curriculum_metrics",
    "Their weights": "data.curriculum_metric_weights",
    "Mixture": "data.curriculum_mixture_ratio",
    "Refresh": "data.curriculum_refresh",
    "Steps between refreshes": "data.curriculum_update_freq",
}


@dataclass(frozen=True)
class Figure:
    """A final figure of a run: a tile of its own report, a column where several are compared."""

    name: str
    of: Callable[[Run], float | None]
    write: Callable[[float], str]
    detail: str = ""


def _of(metric: str, summarise: Callable[[np.ndarray], Any]) -> Callable[[Run], float | None]:
    def found(run: Run) -> float | None:
        values = run.metrics.column(metric)
        return None if values is None else float(summarise(values[np.isfinite(values)]))

    return found


def _last(values: np.ndarray) -> float:
    return float(values[-1])


def _late_mean(values: np.ndarray) -> float:
    return float(values[-_LAST_STEPS:].mean())


FIGURES = (
    Figure("Val. accuracy", _of("val/accuracy_reward", _last), "{:.3f}".format, "the last"),
    Figure("Best", _of("val/accuracy_reward", np.max), "{:.3f}".format, "validation accuracy"),
    Figure("Train reward", _of("reward/overall", _late_mean), "{:.3f}".format, _LATE),
    Figure("Effective groups", _of("curriculum/effective_group_fraction", np.mean), "{:.0%}".format, "mean of steps"),
    Figure("Rollouts", _of("perf/num_rollouts", _last), "{:,.0f}".format, "refreshes and probes included"),
    Figure("Extra", _of("curriculum/extra_rollout_fraction", _last), "{:.0%}".format, "of the rollouts trained on"),
    Figure("Length", _of("response_length/mean", _late_mean), "{:,.0f}".format, _LATE),
    Figure("Wall clock", _of("perf/elapsed_seconds", _last), duration),
    Figure("Step", _of("timing_s/step", np.median), duration, "median"),
    Figure("Tokens/s/rank", _of("perf/throughput", np.median), "{:,.0f}".format, "median step"),
)


@dataclass(frozen=True)
class Tile:
    """A large figure at the top of the page."""

    label: str
    value: str
    detail: str


def tiles(run: Run) -> list[Tile]:
    """Return the figures that a reader looks for first."""
    found = [(figure, figure.of(run)) for figure in FIGURES]
    known = [Tile(figure.name, figure.write(value), figure.detail) for figure, value in found if value is not None]
    done, total = run.num_steps, run.total_steps
    rest = "so far, or in all"
    if total is not None:
        rest = f"of {total:,}" + ("" if done >= total else "; still going, or stopped")
    return [Tile("Steps", f"{done:,}", rest), *known]


@dataclass(frozen=True)
class Row:
    """A row of the table of final figures."""

    place: int  # of the group
    is_mean: bool  # of the group's runs, which follow
    cells: Mapping[str, str]  # by column


def final_figures(groups: Sequence[Group]) -> list[Row]:
    """Return a row for each run, and before several seeds their mean. Columns without a value are left out."""
    known = [figure for figure in FIGURES if any(figure.of(run) is not None for group in groups for run in group.runs)]

    def cells(runs: Sequence[Run]) -> dict[str, str]:
        found = {}
        for figure in known:
            values = [value for run in runs if (value := figure.of(run)) is not None]
            found[figure.name] = figure.write(float(np.mean(values))) if values else ""
        return found

    rows = []
    for place, group in enumerate(groups):
        if len(group.runs) > 1:
            first = {"Run": group.label, "Seed": "mean", "Steps": ""}
            rows.append(Row(place, True, first | cells(group.runs)))
        for run in group.runs:
            steps = f"{run.num_steps:,}" + (f"/{run.total_steps:,}" if run.total_steps is not None else "")
            rows.append(Row(place, False, {"Run": run.name, "Seed": _seed(run), "Steps": steps} | cells([run])))
    return rows


def facts(group: Group) -> list[tuple[str, str]]:
    """Return what was run and on what, as (name, value), as far as it is known."""
    run, environment = group.first, group.first.environment
    settings = _SETTINGS | (_CURRICULUM if run.setting("data.sampling_strategy") == "curriculum" else {})
    if run.setting("data.curriculum_refresh") == "online":
        settings = {name: key for name, key in settings.items() if key != "data.curriculum_update_freq"}
    found = {name: run.setting(key) for name, key in settings.items()}
    for name in ("num_ranks", "num_gpus", "device"):
        found[name.removeprefix("num_").capitalize()] = environment.get(name)
    found["Seeds"] = ", ".join(map(_seed, group.runs))
    versions = environment.get("versions")
    if isinstance(versions, Mapping):
        found["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in found.items()
        if value not in (None, "", [])
    ]


def _seed(run: Run) -> str:
    values = dict.fromkeys(str(value) for value in seeds(run).values() if value is not None)
    return "/".join(values)
