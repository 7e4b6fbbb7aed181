"""A run in words and figures: what it is, how many steps it did, and what it reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmr1_ds.commands.report.groups import Group, seeds
from mmr1_ds.commands.report.runs import Run

VALIDATION = "val/accuracy_reward"
_SECONDS = {"min": 60, "h": 3600, "days": 86400}
_LAST_STEPS = 10  # over which final figures of training are averaged


@dataclass(frozen=True)
class Tile:
    """A large figure at the top of the page."""

    label: str
    value: str
    detail: str


def tiles(run: Run) -> list[Tile]:
    """Return the figures that a reader looks for first."""
    found = [Tile("Steps", *_progress(run))]
    validation = _known(run, VALIDATION)
    if validation is not None:
        steps, values = validation
        before = f"{values[0]:.3f} at step {steps[0]:,}, " if len(values) > 1 else ""
        found.append(Tile("Validation accuracy", f"{values[-1]:.3f}", f"{before}best {values.max():.3f}"))
    reward = _known(run, "reward/overall")
    if reward is not None:
        found.append(Tile("Training reward", f"{reward[1][-_LAST_STEPS:].mean():.3f}", _averaged(reward[1])))
    rollouts, training = run.axis("rollouts")[-1], run.training_rollouts()[-1]
    if rollouts:
        detail = f"{training:,.0f} trained on, {max(0.0, rollouts - training):,.0f} extra"
        found.append(Tile("Rollouts", f"{rollouts:,.0f}", detail))
    effective = _known(run, "curriculum/effective_group_fraction")
    if effective is not None:
        found.append(Tile("Effective groups", f"{effective[1].mean():.0%}", "mean over the run"))
    found.append(Tile("Wall clock", duration(run.axis("seconds")[-1]), _step_seconds(run)))
    throughput = _known(run, "perf/throughput")
    if throughput is not None:
        found.append(Tile("Throughput", f"{np.median(throughput[1]):,.0f}", "tokens/s per rank, median step"))
    return found


def facts(group: Group) -> list[tuple[str, str]]:
    """Return what was run and on what, as (name, value), as far as it is known."""
    run = group.first
    environment, versions = run.environment, run.environment.get("versions")
    ranks = environment.get("num_ranks")
    device = environment.get("device")
    if environment.get("num_gpus"):
        device = f"{environment['num_gpus']} x {device}" if device else None
    found = [
        ("Model", run.setting("worker.actor.model.model_path")),
        ("Training data", run.setting("data.train_files")),
        ("Validation data", run.setting("data.val_files")),
        ("Sampling", _sampling(run)),
        ("Batch", _batch(run)),
        ("Estimator", run.setting("algorithm.adv_estimator")),
        ("Rollout engine", run.setting("worker.rollout.engine")),
        ("Ranks", ranks),
        ("Device", device),
        ("Seeds", ", ".join(_seed(member) for member in group.runs) if len(group.runs) > 1 else _seed(run)),
        ("Versions", _versions(versions) if isinstance(versions, Mapping) else None),
    ]
    return [(name, _joined(value)) for name, value in found if value not in (None, "", [])]


@dataclass(frozen=True)
class Row:
    """A row of the table of final figures."""

    place: int  # of the group
    is_mean: bool  # of the group's runs, which follow
    cells: Mapping[str, str]  # by column


def final_figures(groups: Sequence[Group]) -> list[Row]:
    """Return a row for each run, and before several seeds their mean. Columns without a value are left out."""
    columns: dict[str, tuple[Callable[[Run], float | None], str]] = {
        "Val. accuracy": (lambda run: _of(run, VALIDATION, lambda values: values[-1]), ".3f"),
        "Best": (lambda run: _of(run, VALIDATION, np.max), ".3f"),
        "Train reward": (lambda run: _of(run, "reward/overall", lambda values: values[-_LAST_STEPS:].mean()), ".3f"),
        "Effective groups": (lambda run: _of(run, "curriculum/effective_group_fraction", np.mean), ".0%"),
        "Rollouts": (lambda run: run.axis("rollouts")[-1] or None, ",.0f"),
        "Extra": (_extra, ".0%"),
        "Length": (lambda run: _of(run, "response_length/mean", lambda values: values[-_LAST_STEPS:].mean()), ",.0f"),
        "Wall clock": (lambda run: run.axis("seconds")[-1], ""),
        "Tokens/s/rank": (lambda run: _of(run, "perf/throughput", np.median), ",.0f"),
    }
    values = {run.run_dir: {name: of(run) for name, (of, _) in columns.items()} for g in groups for run in g.runs}
    known = [name for name in columns if any(found[name] is not None for found in values.values())]

    def cells(found: Mapping[str, float | None]) -> dict[str, str]:
        return {name: _cell(found[name], columns[name][1]) for name in known}

    rows = []
    for place, group in enumerate(groups):
        if len(group.runs) > 1:
            means = {name: _mean([values[run.run_dir][name] for run in group.runs]) for name in known}
            first = {"Run": group.label, "Seed": "mean", "Steps": ""}
            rows.append(Row(place, True, first | cells(means)))
        for run in group.runs:
            first = {"Run": run.name, "Seed": _seed(run), "Steps": _steps(run)}
            rows.append(Row(place, False, first | cells(values[run.run_dir])))
    return rows


def _steps(run: Run) -> str:
    return f"{run.num_steps:,}" + (f"/{run.total_steps:,}" if run.total_steps is not None else "")


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if form else duration(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def progress_in_words(run: Run) -> str:
    """Return "step 60 of 60", or where the run is now."""
    done, rest = _progress(run)
    return f"Step {done} {rest}" if run.total_steps is not None else f"Step {done}"


def duration(seconds: float) -> str:
    """Return a duration like 57 s, 15.9 min, 9.2 h or 3.1 days."""
    for size, unit in ((2 * 86400, "days"), (2 * 3600, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / _SECONDS[unit]:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _progress(run: Run) -> tuple[str, str]:
    """Steps done, and what is to be said of them."""
    done, total = run.num_steps, run.total_steps
    if total is None:
        return f"{done:,}", "so far, or in all"
    return f"{done:,}", f"of {total:,}" + ("" if done >= total else "; still going, or stopped")


def _known(run: Run, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and values, those that are there."""
    values = run.metrics.column(metric)
    if values is None:
        return None
    known = np.isfinite(values)
    return run.metrics.steps[known], values[known]


def _of(run: Run, metric: str, summarise: Callable[[np.ndarray], float]) -> float | None:
    found = _known(run, metric)
    return None if found is None else float(summarise(found[1]))


def _extra(run: Run) -> float | None:
    """Rollouts that were not trained on, as a share of those that were."""
    rollouts, training = run.axis("rollouts")[-1], run.training_rollouts()[-1]
    return float(max(0.0, rollouts / training - 1)) if training else None


def _averaged(values: np.ndarray) -> str:
    return f"mean of the last {min(len(values), _LAST_STEPS)} steps" if len(values) > 1 else "of the first step"


def _step_seconds(run: Run) -> str:
    found = _known(run, "timing_s/step")
    return "" if found is None else f"{np.median(found[1]):.3g} s a step, median"


def _seed(run: Run) -> str:
    values = dict.fromkeys(str(value) for value in seeds(run).values() if value is not None)
    return "/".join(values)


def _sampling(run: Run) -> str | None:
    strategy = run.setting("data.sampling_strategy")
    if strategy != "curriculum":
        return strategy if isinstance(strategy, str) else None
    frequency = run.setting("data.curriculum_update_freq")
    rhythm = "at the end of each epoch" if frequency == 0 else f"every {frequency} steps"
    metrics = _weighed(run.setting("data.curriculum_metrics"), run.setting("data.curriculum_metric_weights"))
    parts = [f"variance-aware, {run.setting('data.curriculum_refresh')} refresh {rhythm}", metrics]
    return "; ".join([*(part for part in parts if part), f"mixture {run.setting('data.curriculum_mixture_ratio')}"])


def _weighed(metrics: Any, weights: Any) -> str:
    if not isinstance(metrics, list) or not isinstance(weights, list) or len(metrics) != len(weights):
        return _joined(metrics) if metrics else ""
    return " + ".join(f"{weight} {metric}" for metric, weight in zip(metrics, weights, strict=True))


def _batch(run: Run) -> str | None:
    prompts, responses = run.setting("data.rollout_batch_size"), run.setting("worker.rollout.n")
    return f"{prompts} prompts x {responses} responses" if prompts and responses else None


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _joined(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)
