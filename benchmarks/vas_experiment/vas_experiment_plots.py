"""The experiment's plots: accuracy against steps and rollouts, the paper's Figure 2 and its Figure 3."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from vas_experiment_runs import SHUFFLE, Arms, Pool, Run, arm_order, curves, smooth
from vas_experiment_trials import CURRICULA, RIVAL_RULES, TOLD

Pools = Mapping[Pool, Arms]
RIVALS = ("filtering", *RIVAL_RULES)

MAIN = {  # label -> colour
    "shuffle": "#555555",
    "full, lambda 0.5": "#e08214",
    "filtering": "#7b3294",
    "shipped": "#1b7837",
    "shipped, no categories": "#c51b8a",
}
SHOWN = {  # the arm of a label -> its name in the legend
    "shuffle": "uniform", "filtering": "DAPO", "greso": "GRESO", "pilot": "Pilot-Commit", "mopps": "MoPPS, as for MATH",
    "dps_math": "DPS, as for MATH", "dps": "DPS, as for Geo3K", "vade": "VADE", "pools": "difficulty pools",
    "online": "online's first default", "shipped": "online", "textless": "online, no texts",
    "sized": "online with sizes", "posterior": "online, posterior, no texts", "text": "online, posterior",
}  # fmt: skip
STEPS_SMOOTHED = 21
CROWDED = 6  # arms a panel
DYNAMICS = {
    "effective_fraction": "groups trained on\nthat teach",
    "learnable_effective_fraction": "groups of learnable\nprompts that teach",
    "gradient_norm": "gradient norm",
}
CLIPPED = {"clip_fraction": "clip fraction"}


def draw(pools: Pools, folder: Path) -> None:
    """Write every plot that the runs allow."""
    main = _only(pools, MAIN)
    colours: dict[str, object] = dict(MAIN)
    if main:
        _accuracy(main, colours, folder / "accuracy_by_steps.png", by_rollouts=False)
        _accuracy(main, colours, folder / "accuracy_by_rollouts.png", by_rollouts=True)
        _dynamics(main, colours, folder / "dynamics.png", DYNAMICS)
        _weights(main, folder / "weights.png")
        _transitions(main, folder / "transitions.png")
    others = sorted({label for arms in pools.values() for label in arms if label not in MAIN}, key=arm_order)
    if others:
        with_others = {pool: arms for pool, arms in pools.items() if arms.keys() & set(others)}
        palette = [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors]  # type: ignore[attr-defined]
        colours |= {label: palette[i % len(palette)] for i, label in enumerate(others)}
        _accuracy(with_others, colours, folder / "variants_by_rollouts.png", by_rollouts=True)
    # With one optimiser step a batch the policy is the one that sampled, and nothing is ever clipped.
    clipped = _only(pools, [label for label in others if "mini-batches" in label])
    if clipped:
        _dynamics(clipped, colours, folder / "dynamics_mini_batches.png", DYNAMICS | CLIPPED)


def _only(pools: Pools, labels: Collection[str]) -> dict[Pool, Arms]:
    kept = {pool: {label: runs for label, runs in arms.items() if label in labels} for pool, arms in pools.items()}
    return {pool: arms for pool, arms in kept.items() if arms}


def _accuracy(pools: Pools, colours: Mapping[str, object], path: Path, by_rollouts: bool) -> None:
    """Validation accuracy, smoothed as in the tables: mean, and one standard deviation over seeds either side."""
    is_crowded = max(map(len, pools.values())) > CROWDED
    num_columns, width, height = (min(2, len(pools)), 7.5, 5.0) if is_crowded else (min(4, len(pools)), 4.2, 3.3)
    num_rows = -(-len(pools) // num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(width * num_columns, height * num_rows), squeeze=False, sharey=not is_crowded
    )
    for axis, (pool, arms) in zip(axes.flat, pools.items(), strict=False):
        for label in sorted(arms, key=arm_order):
            runs = list(arms[label].values())
            if by_rollouts:
                positions, values = curves(runs)
            else:
                shortest = min(len(run.validations()[0]) for run in runs)
                positions = runs[0].validations()[0][:shortest]
                values = np.array([smooth(run.validations()[2])[:shortest] for run in runs])
            if is_crowded:  # bands would hide the lines
                style = "--" if label in RIVALS else "-"
                mean = values.mean(axis=0)
                axis.plot(positions, mean, color=colours[label], label=shown(label), linewidth=1.8, linestyle=style)
            else:
                _band(axis, positions, values, colours[label], shown(label))
        if SHUFFLE in arms:
            final = curves(list(arms[SHUFFLE].values()))[1][:, -1].mean()
            axis.axhline(final, color="#555555", linewidth=0.7, linestyle=":")
        seeds = sorted({len(runs) for runs in arms.values()})
        axis.set_title(f"{pool} ({' to '.join(map(str, seeds[:: max(1, len(seeds) - 1)]))} seeds)", fontsize=9)
        axis.set_xlabel("rollouts spent, scoring included" if by_rollouts else "steps")
        axis.xaxis.set_major_formatter(lambda value, position: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out accuracy (greedy)")
    for axis in axes.flat[len(pools) :]:
        axis.set_visible(False)
    handles = {line.get_label(): line for axis in axes.flat for line in axis.get_lines() if line.get_label()[0] != "_"}
    # Below the curves, which it would hide.
    num_named = max(4, 2 * num_columns)  # a line
    figure.legend(handles.values(), handles.keys(), fontsize=9 if is_crowded else 7, loc="lower center", ncol=num_named)
    of_line = 0.22 if is_crowded else 0.16
    _save(figure, path, bottom=(0.1 + of_line * -(-len(handles) // num_named)) / (height * num_rows))


def shown(label: str) -> str:
    """A label in the words of the pages."""
    arm, _, rest = label.partition(", ")
    name = SHOWN.get(arm, arm)
    told = "" if "no categories" in rest or arm not in TOLD else ", told the category"
    others = [word for word in rest.split(", ") if word not in ("", "no categories", "lambda 0.5")]
    return ", ".join([name, *others]) + told


def _band(axis: Axes, positions: np.ndarray, values: np.ndarray, colour: object, label: str) -> None:
    mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0.0
    axis.plot(positions, mean, color=colour, label=label, linewidth=1.6)
    axis.fill_between(positions, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)


def _dynamics(pools: Pools, colours: Mapping[str, object], path: Path, figures: Mapping[str, str]) -> None:
    """The paper's Figure 2: what a step trains on, against steps, smoothed."""
    figure, axes = plt.subplots(
        len(figures), len(pools), figsize=(3.4 * len(pools), 2.3 * len(figures)), squeeze=False, sharey="row"
    )
    for column, (pool, arms) in enumerate(pools.items()):
        for row, (name, title) in enumerate(figures.items()):
            axis = axes[row, column]
            for label in sorted(arms, key=arm_order):
                positions, values = _series(list(arms[label].values()), name)
                if len(positions):
                    _band(axis, positions, smooth(values, STEPS_SMOOTHED), colours[label], label)
            axis.grid(alpha=0.25)
            if column == 0:
                axis.set_ylabel(title, fontsize=9)
            if row == 0:
                axis.set_title(str(pool), fontsize=10)
        axes[-1, column].set_xlabel("steps")
    handles = {h.get_label(): h for axis in axes.flat for h in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="lower center", ncol=min(len(pools), len(handles)))
    _save(figure, path, bottom=0.07 + 0.02 * (len(handles) // len(pools)))


def _series(runs: Sequence[Run], name: str) -> tuple[np.ndarray, np.ndarray]:
    """One figure over the steps that all runs have: (S,), (runs, S)."""
    rows = [[step[name] for step in run.steps if name in step] for run in runs]
    shortest = min(len(row) for row in rows)
    return np.arange(1, shortest + 1), np.array([row[:shortest] for row in rows], dtype=np.float64)


def _weights(pools: Pools, path: Path) -> None:
    """The paper's Figure 3a: histograms of the weights over time, one run a panel; below, who holds the weight."""
    panels = [
        (pool, label, arms[label][min(arms[label])])
        for pool, arms in pools.items()
        for label in sorted(arms, key=arm_order)
        if label.startswith(CURRICULA) and "no categories" not in label
    ]
    if not panels:
        return
    figure, axes = plt.subplots(
        2, len(panels), figsize=(3.0 * len(panels), 5.2), squeeze=False, sharey="row",
        gridspec_kw={"height_ratios": [3, 2]},
    )  # fmt: skip
    for column, (pool, label, run) in enumerate(panels):
        noted = [step for step in run.steps if "weight_histogram" in step]
        counts = np.array([step["weight_histogram"] for step in noted], dtype=np.float64)
        shares = counts / counts.sum(axis=1, keepdims=True)
        steps = [step["step"] for step in noted]
        axis = axes[0, column]
        image = axis.imshow(
            np.log10(shares.T + 1e-4), origin="lower", aspect="auto", cmap="viridis", vmin=-4, vmax=0,
            extent=(0, steps[-1], 0, 1),
        )  # fmt: skip
        axis.set_title(f"{label}\n{pool!s}", fontsize=8)
        for sort, colour in (("easy", "#4393c3"), ("learnable", "#1b7837"), ("hard", "#b2182b")):
            axes[1, column].plot(steps, [step["weight_shares"][sort] for step in noted], color=colour, label=sort)
        axes[1, column].set_ylim(0, 1)
        axes[1, column].set_xlabel("steps")
        axes[1, column].grid(alpha=0.25)
    axes[0, 0].set_ylabel("weight / largest weight")
    axes[1, 0].set_ylabel("share of the weights")
    axes[1, 0].legend(fontsize=7)
    bar = figure.colorbar(image, ax=axes[0, -1], fraction=0.05)
    bar.set_label("log10 of the share of prompts", fontsize=7)
    _save(figure, path)


def _transitions(pools: Pools, path: Path) -> None:
    """The paper's Figure 3b: from one full refresh to the next, how pass rates moved; rows sum to one."""
    panels = []
    for pool, arms in pools.items():
        for label, runs in arms.items():
            noted = [
                [(step["step"], np.array(step["transitions"])) for step in run.steps if "transitions" in step]
                for run in runs.values()
            ]
            for refreshes in zip(*noted, strict=False):
                if label.startswith("full"):
                    panels.append((pool, refreshes[0][0], sum(matrix for _, matrix in refreshes)))
    if not panels:
        return
    num_columns = min(4, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(3.2 * num_columns, 3.2 * num_rows), squeeze=False)
    for axis, (pool, step, counts) in zip(axes.flat, panels, strict=False):
        rows = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        axis.imshow(rows, origin="lower", cmap="magma_r", vmin=0, vmax=1)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if value >= 0.005:
                    text = f"{value:.2f}".lstrip("0")
                    axis.text(j, i, text, ha="center", va="center", fontsize=5, color="w" if value > 0.5 else "k")
        axis.set_title(f"{pool!s}\nrefresh after step {step}", fontsize=8)
        axis.set_xlabel("right of 8, after", fontsize=8)
        axis.set_ylabel("right of 8, before", fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
