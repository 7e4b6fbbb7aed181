"""Figures of the curriculum: histograms over time, transition matrices, calibration, a prompt's pass rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.commands.report import drawing
from mmr1_ds.commands.report.curriculum import NUM_BINS, Calibration, Mover, transitions
from mmr1_ds.commands.report.drawing import HEAT, INK, MUTED, ON_HEAT, Picture
from mmr1_ds.commands.report.files import TableLook
from mmr1_ds.commands.report.series import evenly

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_COLUMNS = 60  # of a heat map
_COLUMNS_WITH_COUNTS = 8
# How strong the colour of a cell is, from an empty to a full one. Letters are dark on the first nine and light on the
# others (in the dark the other way round); at a strength between, neither would be 4.5:1.
_STRENGTHS = (0.03, 0.08, 0.13, 0.19, 0.24, 0.3, 0.35, 0.4, 0.46, 0.75, 0.82, 0.89, 0.96)
_STRONG = 9
_MATRIX_HEIGHT = 352
_MOST_MARKERS = 30  # on a prompt's way


def draw_histograms(looks: Sequence[TableLook], name: str, title: str, slug: str, png: bool) -> Picture:
    """Draw a heat map with a column a refresh, the fullest cell in full colour. Args: name: weight or pass_rate."""
    shown = [looks[place] for place in evenly(len(looks), _MOST_COLUMNS)]
    counts = np.stack([look.counts[name] for look in shown], axis=1)
    unknown = [look.num_unknown for look in shown]
    skipped = int(name == "pass_rate" and any(unknown))  # cells before the first bin
    if skipped:
        counts = np.vstack([unknown, counts])
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    figure = drawing.canvas(_MATRIX_HEIGHT)
    ax = drawing.axes(figure, left=64 if skipped else 40, top=8, right=14, bottom=42)
    _shade(ax, shares / shares.max(), counts if len(shown) <= _COLUMNS_WITH_COUNTS else None)
    ticks = evenly(len(shown), 7)
    ax.set_xticks([place + 0.5 for place in ticks], [f"{shown[place].step:,}" for place in ticks])
    ax.set_yticks([*[0.5] * skipped, *(skipped + _edges(NUM_BINS))], ["unknown"] * skipped + _edge_labels())
    ax.set_xlabel("steps done at the refresh")
    return drawing.picture(figure, slug, title, "a heat map over the refreshes.", png)


def draw_transitions(
    looks: Sequence[TableLook], name: str, most: int, prefix: str, title: str, label: str, png: bool
) -> list[tuple[str, Picture]]:
    """Return (steps, picture) of up to `most` matrices, evenly chosen; full colour is all of a row.

    Args: label: of the group, in the PNGs.
    """
    from matplotlib.patches import Rectangle

    found = transitions(looks, name)
    pictures = []
    for place in evenly(len(found), most):
        before, after, counts = found[place]
        figure = drawing.canvas(_MATRIX_HEIGHT)
        ax = drawing.axes(figure, left=48, top=8, right=14, bottom=42)
        _shade(ax, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), counts)
        for number in range(NUM_BINS):  # the cells of those that did not move
            corner = (number + 0.05, number + 0.05)
            ax.add_patch(Rectangle(corner, 0.9, 0.9, facecolor="none", edgecolor=MUTED, linewidth=1))
        ax.set_xticks(_edges(NUM_BINS), _edge_labels())
        ax.set_yticks(_edges(NUM_BINS), _edge_labels())
        ax.set_xlabel(f"after step {after:,}")
        ax.set_ylabel(f"after step {before:,}", labelpad=4)
        words = f"step {before:,} to {after:,}"
        own = f"{title}, {words}\n{label}".strip()
        pictures.append((words, drawing.picture(figure, f"{prefix}_{after}", own, "a matrix of counts.", png)))
    return pictures


def draw_calibration(found: Calibration, title: str, slug: str, png: bool) -> Picture:
    """Draw a reliability diagram over a histogram of the groups."""
    figure = drawing.canvas(_MATRIX_HEIGHT)
    ax = drawing.axes(figure, left=52, top=8, right=14, bottom=126)
    low, high = (np.clip(found.predicted + side * found.half_band, 0, 1) for side in (-1, 1))
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.vlines(found.predicted, low, high, color=MUTED, alpha=0.3, linewidth=9)
    ax.plot(found.predicted, found.observed, color=drawing.SERIES[0], marker="o", markersize=5, linewidth=1.5)
    ax.set_ylim(-0.03, 1.03)
    ax.set_yticks(_edges(1), _edge_labels())
    ax.set_ylabel("observed", labelpad=4)
    below = drawing.axes(figure, left=52, top=_MATRIX_HEIGHT - 110, right=14, bottom=42)
    below.bar((found.bins + 0.5) / NUM_BINS, found.num_groups, width=0.86 / NUM_BINS, color=drawing.OTHER)
    drawing.count_ticks(below.yaxis, 2)
    below.set_xlabel("predicted pass rate")
    below.set_ylabel("groups", labelpad=4)
    for part, labels in ((ax, [""] * 6), (below, _edge_labels())):
        part.grid(axis="y")
        part.set_xlim(-0.02, 1.02)
        part.set_xticks(_edges(1), labels)
    return drawing.picture(figure, slug, title, "observed against predicted pass rates, ten bins.", png)


def draw_way(mover: Mover, slug: str, last_step: int) -> Picture:
    """Draw a prompt's observed pass rates over the steps of the run, small."""
    figure = drawing.canvas(height=56, width=220)
    ax = drawing.axes(figure, left=6, top=8, right=6, bottom=8)
    marker = "o" if len(mover.steps) <= _MOST_MARKERS else None
    ax.axhline(0, color=drawing.GRID, linewidth=1)
    ax.axhline(1, color=drawing.GRID, linewidth=1)
    ax.plot(mover.steps, mover.pass_rates, color=drawing.SERIES[0], linewidth=1.8, marker=marker, markersize=4)
    ax.set_xlim(-0.03 * last_step, 1.03 * last_step)
    ax.set_ylim(-0.15, 1.15)
    ax.set_axis_off()
    rates = ", ".join(f"{rate:.2f}" for rate in mover.pass_rates[evenly(len(mover.pass_rates), 12)])
    return drawing.picture(figure, slug, "Observed pass rates", f"{rates}.", png=False)


def _shade(ax: Axes, shades: np.ndarray, counts: np.ndarray | None) -> None:
    """Cells from (0, 0) up, in a colour by the square root of the shade in [0, 1]: small shares are to be seen.

    Args: counts: to be written into the cells.
    """
    from matplotlib.colors import ListedColormap, to_rgb

    levels = np.ceil(np.sqrt(np.clip(shades, 0, 1)) * (len(_STRENGTHS) - 1)).astype(np.int64)
    colours = ListedColormap([(*to_rgb(HEAT), strength) for strength in _STRENGTHS])
    gap = drawing.COLOURS["card"][0]
    ax.pcolormesh(levels, cmap=colours, vmin=0, vmax=len(_STRENGTHS) - 1, edgecolors=gap, linewidth=1)
    if counts is None:
        counts = np.zeros_like(levels)
    for row, column in np.argwhere(counts > 0):
        colour = ON_HEAT if levels[row, column] >= _STRONG else INK
        words = _short(int(counts[row, column]))
        ax.text(column + 0.5, row + 0.5, words, ha="center", va="center_baseline", color=colour)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _short(count: int) -> str:
    """Four letters at most, up to a billion: 999, 1.2k, 45k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}" if count < 10 * size else f"{count / size:.0f}{unit}"
    return str(count)


def _edges(of: float) -> Any:
    """Return every second edge of the bins, where all bins together are `of` wide."""
    return np.linspace(0, of, NUM_BINS // 2 + 1)


def _edge_labels() -> list[str]:
    return [f"{edge:g}" for edge in _edges(1)]
