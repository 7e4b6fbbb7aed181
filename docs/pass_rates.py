"""Draw docs/pass_rates.png from the recorded runs in benchmarks/curriculum/data, and print its figures.

    python docs/pass_rates.py

A recording has the pass rates of 256 prompts of a real run of the demo task, of 64 responses each, every ten steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

DOCS = Path(__file__).resolve().parent
RECORDINGS = {  # file in benchmarks/curriculum/data -> what the run was
    "demo_shuffle_mixed15.npz": "15 % learnable, rest easy or hard; shuffle",
    "demo_online_mixed50.npz": "50 % learnable, rest easy or hard; online",
}
GROUP = 8  # responses, as the runs trained with


def recording(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) and pass rates (S, P)."""
    with np.load(DOCS.parent / "benchmarks" / "curriculum" / "data" / name) as data:
        return data["steps"], data["pass_rates"].astype(np.float64)


def figures(pass_rates_SP: np.ndarray) -> dict[str, np.ndarray]:
    """Shares of the prompts, and the chance that a group teaches, each (S,)."""
    p = pass_rates_SP
    teaches_SP = 1 - p**GROUP - (1 - p) ** GROUP
    variance_SP = p * (1 - p)
    return {
        "almost never right (under 1 in 16)": (p < 1 / 16).mean(axis=1),
        "in between": ((p >= 1 / 16) & (p <= 15 / 16)).mean(axis=1),
        "almost always right (over 15 in 16)": (p > 15 / 16).mean(axis=1),
        "drawn uniformly": teaches_SP.mean(axis=1),
        "drawn in proportion to p(1-p)": (teaches_SP * variance_SP).sum(axis=1) / variance_SP.sum(axis=1),
    }


def table() -> str:
    """The figures at the first, the middle and the last measurement."""
    lines = []
    for name, title in RECORDINGS.items():
        steps, pass_rates = recording(name)
        lines.append(title)
        chosen = [0, len(steps) // 2, len(steps) - 1]
        lines.append(f"  {'step':<36}" + "".join(f"{steps[k]:>7d}" for k in chosen))
        for label, values in figures(pass_rates).items():
            lines.append(f"  {label:<36}" + "".join(f"{values[k]:>7.3f}" for k in chosen))
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Two rows, a recording each: what the prompts are, and what a group of them is worth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(len(RECORDINGS), 2, figsize=(9.0, 5.6), layout="constrained", sharex=True)
    for (name, title), (left, right) in zip(RECORDINGS.items(), rows, strict=True):
        steps, pass_rates = recording(name)
        found = figures(pass_rates)
        shares = dict(list(found.items())[:3])
        left.stackplot(steps, *shares.values(), labels=list(shares), colors=["#b9c0ca", "#2f6fd0", "#e7c58a"])
        left.set(title=title, ylabel="share of the prompts", ylim=(0, 1), xlim=(steps[0], steps[-1]))
        for label, colour in (("drawn in proportion to p(1-p)", "#2f6fd0"), ("drawn uniformly", "#6b7a90")):
            right.plot(steps, found[label], color=colour, label=label, marker="o", markersize=3)
        right.set(title=title, ylabel=f"chance that {GROUP} responses differ", ylim=(0, 1))
        for axes in (left, right):
            axes.title.set_fontsize(9)
    for axes, columns in ((rows[0][0], 1), (rows[0][1], 1)):
        axes.legend(fontsize=7, loc="lower left", ncols=columns, framealpha=0.95)
    for axes in rows[-1]:
        axes.set_xlabel("optimiser steps")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    draw(DOCS / "pass_rates.png")
    sys.stdout.write(table())
