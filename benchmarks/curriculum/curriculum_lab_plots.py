"""Plots of the curriculum laboratory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

_COLOURS = {
    "uniform": "0.75",
    "dapo": "0.35",
    "full_n32_t35": "tab:blue",
    "full_n16_t56": "tab:cyan",
    "full_n8_t4": "navy",
    "mopps_geo3k": "tab:olive",
    "mopps_math": "darkkhaki",
    "dps": "tab:green",
    "dps_math": "limegreen",
    "vade": "tab:brown",
    "greso": "tab:purple",
    "difficulty_pools": "tab:pink",
    "pilot_commit": "plum",
    "online_half": "tab:orange",
    "online_candidates": "gold",
    "online_posterior": "tomato",
    "online": "tab:red",
    "online_no_categories": "salmon",
    "online_clusters": "darkred",
}


def plot(means: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write groups_per_rollout.png, teaching_by_quarter.png and ranking_by_quarter.png.

    Args: means: one row a setting and policy.
    """
    _groups_per_rollout(means, folder / "groups_per_rollout.png")
    _by_quarter(means, "effective_group_fraction", "groups that teach", folder / "teaching_by_quarter.png")
    _by_quarter(means, "spearman", "rank correlation of the belief's mean", folder / "ranking_by_quarter.png")


def _unique(means: Sequence[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in means))


def _groups_per_rollout(means: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a policy: a small dot for each setting, a large one for their mean."""
    mean = {
        policy: np.mean([row["effective_per_rollout"] for row in means if row["policy"] == policy])
        for policy in _unique(means, "policy")
    }
    policies = sorted(mean, key=lambda policy: mean[policy])
    figure, axes = plt.subplots(figsize=(7.0, 0.32 * len(policies) + 1.0), layout="constrained")
    for height, policy in enumerate(policies):
        found = [row["effective_per_rollout"] for row in means if row["policy"] == policy]
        axes.scatter(found, [height] * len(found), s=14, alpha=0.6, color=_COLOURS[policy])
        axes.scatter(mean[policy], height, s=90, color=_COLOURS[policy], edgecolor="black")
    axes.set_yticks(range(len(policies)), policies)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("groups that teach, for each eight rollouts of the whole run")
    axes.set_title("Small: settings. Large: their mean.", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _by_quarter(means: Sequence[dict[str, Any]], measure: str, label: str, path: Path) -> None:
    key = f"{measure}_by_quarter"
    means = [row for row in means if key in row]
    settings = _unique(means, "setting")
    num_columns = min(5, max(1, len(settings)))
    num_rows = max(1, -(-len(settings) // num_columns))
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(2.6 * num_columns + 1.2, 2.4 * num_rows + 0.8),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, setting in zip(axes.flat, settings, strict=False):
        for row in means:
            if row["setting"] == setting:
                panel.plot([1, 2, 3, 4], row[key], "o-", ms=3, color=_COLOURS[row["policy"]])
        panel.set_title(setting, fontsize=9)
        panel.set_xticks([1, 2, 3, 4])
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(settings) :]:
        panel.set_axis_off()
    figure.supxlabel("quarter of the run")
    figure.supylabel(label)
    policies = _unique(means, "policy")
    handles = [plt.Line2D([], [], marker="o", ms=4, color=_COLOURS[policy]) for policy in policies]
    figure.legend(handles, policies, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
