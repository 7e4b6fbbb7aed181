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
    "dapo": "0.55",
    "full_n32_t35": "tab:blue",
    "full_n16_t56": "tab:cyan",
    "full_n8_t4": "tab:purple",
    "mopps": "tab:olive",
    "vade": "tab:brown",
    "online_free": "tab:orange",
    "online": "tab:red",
    "online_no_categories": "tab:pink",
    "online_clusters": "tab:green",
}
_RANKING_NOTHING = ("uniform", "dapo")


def plot(means: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write ranking_against_rollouts.png, ranking_by_quarter.png and oracle_share.png.

    Args: means: one row a setting and policy.
    """
    _ranking_against_rollouts(means, folder / "ranking_against_rollouts.png")
    _by_quarter(means, "spearman", "rank correlation with the true p(1-p)", folder / "ranking_by_quarter.png")
    _by_quarter(means, "ovs_share", "share of the oracle's OVS", folder / "oracle_share.png")


def _unique(means: Sequence[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in means))


def _ranking_against_rollouts(means: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.0, 4.5), layout="constrained")
    for policy in _unique(means, "policy"):
        if policy in _RANKING_NOTHING:
            continue
        rows = [row for row in means if row["policy"] == policy]
        extra = [100.0 * row["extra_rollout_fraction"] for row in rows]
        ranking = [row["spearman"] for row in rows]
        axes.scatter(extra, ranking, s=14, alpha=0.5, color=_COLOURS[policy])
        axes.scatter(np.mean(extra), np.mean(ranking), s=90, color=_COLOURS[policy], edgecolor="black", label=policy)
    axes.set_xscale("symlog", linthresh=10.0, linscale=0.6)
    axes.set_xlim(left=-1.0)
    axes.set_xticks([0, 10, 100, 366, 732], ["0", "10", "100", "366", "732"])
    axes.set_xlabel("rollouts beside training's, % (symlog)")
    axes.set_ylabel("rank correlation, second half")
    axes.set_title("Small: settings. Large: their mean.", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _by_quarter(means: Sequence[dict[str, Any]], measure: str, label: str, path: Path) -> None:
    settings = _unique(means, "setting")
    num_columns = min(5, len(settings))
    num_rows = -(-len(settings) // num_columns)
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
            if row["setting"] == setting and not (measure == "spearman" and row["policy"] in _RANKING_NOTHING):
                panel.plot([1, 2, 3, 4], row[f"{measure}_by_quarter"], "o-", ms=3, color=_COLOURS[row["policy"]])
        panel.set_title(setting, fontsize=9)
        panel.set_xticks([1, 2, 3, 4])
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(settings) :]:
        panel.set_axis_off()
    figure.supxlabel("quarter of the run")
    figure.supylabel(label)
    policies = [name for name in _unique(means, "policy") if measure != "spearman" or name not in _RANKING_NOTHING]
    handles = [plt.Line2D([], [], marker="o", ms=4, color=_COLOURS[policy]) for policy in policies]
    figure.legend(handles, policies, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
