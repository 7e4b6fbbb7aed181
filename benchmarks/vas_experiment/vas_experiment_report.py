"""The experiment's figures from its finished runs: the rollouts to reach a target, tables, JSON.

The headline of a pool: shuffle's final validation accuracy is the target; how many rollouts does another arm spend
(training, refreshes, probes, dropped groups; validation not) until its smoothed curve first reaches it? The ratio is
shuffle's whole run over that. Beside it stands shuffle's own first crossing of its final accuracy: were the run
longer than shuffle needs, the ratio would flatter everybody, shuffle too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vas_experiment_runs import (
    SHUFFLE,
    SMOOTHED,
    Arms,
    Pool,
    Run,
    arm_order,
    by_pool,
    curves,
    first_crossing,
    load_runs,
    smooth,
)

LENGTHS = (40, 80, 160)  # steps of the shuffled run that are compared with
RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """An arm against shuffle on one pool, over the seeds that both have."""

    target: float  # shuffle's final smoothed accuracy, mean over seeds
    shuffle_rollouts: float  # of its whole run
    shuffle_first_rollouts: float  # where its own mean curve first reaches the target
    needed_rollouts: float  # NaN = never
    ratio: float  # shuffle_rollouts / needed_rollouts; 0 = never
    ratio_interval: tuple[float, float]  # 5 % to 95 %, seeds resampled in pairs
    first_ratio: float  # shuffle_first_rollouts / needed_rollouts; 0 = never
    paired_ratios: list[float]  # each seed with its own target; 0 = never
    accuracy_gains: list[float]  # at shuffle's rollouts (or where the arm's run ended), a seed
    extra_rollout_fraction: float  # at the end of the arm's run


def compare(shuffled: Mapping[int, Run], others: Mapping[int, Run], length: int) -> Comparison | None:
    """Compare on the seeds that both have; None without any."""
    seeds = sorted(shuffled.keys() & others.keys())
    if not seeds:
        return None
    base_rollouts, base = curves([shuffled[seed] for seed in seeds], length)
    rollouts, other = curves([others[seed] for seed in seeds])
    spent = float(base_rollouts[-1])

    def ratio(picked: Sequence[int] | np.ndarray) -> float:
        needed = first_crossing(rollouts, other[picked].mean(axis=0), float(base[picked, -1].mean()))
        return 0.0 if np.isnan(needed) else spent / max(needed, 1.0)

    everyone = np.arange(len(seeds))
    target = float(base[:, -1].mean())
    shuffle_first = first_crossing(base_rollouts, base.mean(axis=0), target)
    generator = np.random.default_rng(0)
    resampled = [ratio(generator.choice(everyone, len(seeds))) for _ in range(RESAMPLES)]
    at_same = [float(np.interp(spent, *others[seed].curve())) for seed in seeds]
    last = [run.steps[-1].get("extra_rollout_fraction", 0.0) for run in (others[seed] for seed in seeds)]
    return Comparison(
        target=target,
        shuffle_rollouts=spent,
        shuffle_first_rollouts=shuffle_first,
        needed_rollouts=first_crossing(rollouts, other.mean(axis=0), target),
        ratio=ratio(everyone),
        first_ratio=ratio(everyone) * shuffle_first / spent,
        ratio_interval=(float(np.quantile(resampled, 0.05)), float(np.quantile(resampled, 0.95))),
        paired_ratios=[ratio([int(i)]) for i in everyone],
        accuracy_gains=[same - float(final) for same, final in zip(at_same, base[:, -1], strict=True)],
        extra_rollout_fraction=float(np.mean(last)),
    )


def comparisons(pools: Mapping[Pool, Arms]) -> list[dict[str, Any]]:
    """A row for each pool, arm and length of the shuffled run."""
    rows: list[dict[str, Any]] = []
    for pool, arms in pools.items():
        if SHUFFLE not in arms:
            continue
        longest = max(int(run.trial["steps"]) for run in arms[SHUFFLE].values())
        for length in sorted({*(length for length in LENGTHS if length < longest), longest}):
            for label in sorted(arms.keys() - {SHUFFLE}, key=arm_order):
                found = compare(arms[SHUFFLE], arms[label], length)
                if found is None:
                    continue
                row = {"pool": str(pool), **vars(pool), "steps": length, "arm": label} | vars(found)
                row["seeds"] = sorted(arms[SHUFFLE].keys() & arms[label].keys())
                rows.append(_without_nan(row))
    return rows


def final_figures(pools: Mapping[Pool, Arms]) -> list[dict[str, Any]]:
    """A row for each pool and arm: means over the run and the end, with the standard deviation over seeds."""
    rows: list[dict[str, Any]] = []
    for pool, arms in pools.items():
        for label in sorted(arms, key=arm_order):
            runs = list(arms[label].values())
            row: dict[str, Any] = {"pool": str(pool), **vars(pool), "arm": label, "num_seeds": len(runs)}
            row["code"] = sorted({str(run.trial.get("code")) for run in runs})
            figures: dict[str, Callable[[Run], float]] = {
                "start_accuracy": lambda run: float(run.validations()[2][0]),
                "final_accuracy": lambda run: float(smooth(run.validations()[2])[-1]),
                "rollouts": lambda run: float(run.steps[-1]["rollouts"]),
                "effective_fraction": lambda run: mean_of(run, "effective_fraction"),
                "drawn_effective_fraction": lambda run: mean_of(run, "drawn_effective_fraction"),
                "learnable_fraction": lambda run: mean_of(run, "learnable_fraction"),
                "gradient_norm": lambda run: mean_of(run, "gradient_norm"),
                "clip_fraction": lambda run: mean_of(run, "clip_fraction"),
                "seconds": lambda run: run.seconds,
            }
            for name, figure in figures.items():
                values = [figure(run) for run in runs]
                row[name] = float(np.mean(values))
                row[f"{name}_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
            rows.append(row)
    return rows


def answer_rows(pools: Mapping[Pool, Arms]) -> list[dict[str, Any]]:
    """A row for each pool and arm that has runs with pass@k: means, standard errors, and differences to shuffle's.

    Differences are of the seeds that both have.
    """
    rows: list[dict[str, Any]] = []
    for pool, arms in pools.items():
        shuffled = {seed: run.answers for seed, run in arms.get(SHUFFLE, {}).items() if run.answers is not None}
        for label in sorted(arms, key=arm_order):
            found = {seed: run.answers for seed, run in sorted(arms[label].items()) if run.answers is not None}
            if not found:
                continue
            row: dict[str, Any] = {"pool": str(pool), **vars(pool), "arm": label, "seeds": list(found)}
            for name in next(iter(found.values())):
                row[name] = _mean_and_error([answers[name] for answers in found.values()])
                paired = [answers[name] - shuffled[seed][name] for seed, answers in found.items() if seed in shuffled]
                row[f"{name}_beyond_shuffle"] = _mean_and_error(paired) if paired and label != SHUFFLE else None
            rows.append(row)
    return rows


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error where there are several."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error


def mean_of(run: Run, name: str) -> float:
    """Mean over the steps that have the figure."""
    values = [step[name] for step in run.steps if name in step]
    return float(np.mean(values)) if values else float("nan")


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}


def tables(
    finals: Sequence[Mapping[str, Any]], answered: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]
) -> str:
    """All tables as Markdown; that of pass@k where there is any."""
    lines = [
        "| pool | arm | seeds | accuracy, start -> end | rollouts | groups that teach | learnable groups |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in finals:
        spread = "" if row["final_accuracy_deviation"] is None else f" +- {row['final_accuracy_deviation']:.3f}"
        lines.append(
            f"| {row['pool']} | {row['arm']} | {row['num_seeds']} "
            f"| {row['start_accuracy']:.3f} -> {row['final_accuracy']:.3f}{spread} | {row['rollouts']:,.0f} "
            f"| {row['effective_fraction']:.3f} | {row['learnable_fraction']:.3f} |"
        )
    if answered:
        lines += ["", *_answer_table(answered)]
    lines += [
        "",
        "| pool | shuffle's steps | target | shuffle first there | arm | rollouts to it | fewer than shuffle's run "
        "| 5 % to 95 % | by seed | fewer than shuffle first there | gain at equal rollouts |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in compared:
        needed = "never" if row["needed_rollouts"] is None else f"{row['needed_rollouts']:,.0f}"
        low, high = row["ratio_interval"]
        gains = np.array(row["accuracy_gains"])
        error = f" +- {gains.std(ddof=1) / np.sqrt(len(gains)):.3f}" if len(gains) > 1 else ""
        lines.append(
            f"| {row['pool']} | {row['steps']} | {row['target']:.3f} "
            f"| {row['shuffle_first_rollouts']:,.0f} | {row['arm']} | {needed} "
            f"| {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {' '.join(f'{x:.2f}' for x in row['paired_ratios'])} "
            f"| {row['first_ratio']:.2f} | {gains.mean():+.3f}{error} |"
        )
    return "\n".join(lines) + "\n"


def _answer_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for name in rows[0] if name.startswith("pass_at_") and not name.endswith("_beyond_shuffle")]
    heads = [name.replace("pass_at_", "pass@") for name in names]
    heads += [f"{head} beyond shuffle's" for head in (heads[0], heads[-1])]
    lines = [f"| pool | arm | seeds | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for row in rows:
        cells = [_with_error(row[name], "") for name in names]
        cells += [_with_error(row[f"{name}_beyond_shuffle"], "+") for name in (names[0], names[-1])]
        lines.append(f"| {row['pool']} | {row['arm']} | {len(row['seeds'])} | {' | '.join(cells)} |")
    return lines


def _with_error(figure: tuple[float, float | None] | None, sign: str) -> str:
    if figure is None:
        return ""
    mean, error = figure
    return f"{mean:{sign}.3f}" + ("" if error is None else f" +- {error:.3f}")


def write_report(folder: Path, json_file: Path | None, plots: Path | None) -> str:
    """Make everything that was asked for. Returns: the tables."""
    runs = load_runs(folder)
    pools = by_pool(runs)
    finals, answered, compared = final_figures(pools), answer_rows(pools), comparisons(pools)
    if json_file is not None:
        content = {"runs": finals, "comparisons": compared, "answers": answered, "smoothed_validations": SMOOTHED}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if plots is not None:
        from vas_experiment_plots import draw

        plots.mkdir(parents=True, exist_ok=True)
        draw(pools, plots)
    return tables(finals, answered, compared)
