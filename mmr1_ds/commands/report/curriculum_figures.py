"""Figures of the curriculum: histograms over time, transition matrices, calibration, a prompt's pass rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.commands.report import drawing
from mmr1_ds.commands.report.curriculum import NUM_BINS, Calibration, Mover, transitions
from mmr1_ds.commands.report.drawing import HEAT, INK, MUTED, ON_HEAT, WIDTH, Heading, Picture
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


def draw_histograms(looks: Sequence[TableLook], name: str, heading: Heading, slug: str, png: bool) -> Picture:
    """Draw a heat map with a column a refresh, the fullest cell in full colour. Args: name: weight or pass_rate."""
    shown = [looks[place] for place in evenly(len(looks), _MOST_COLUMNS)]
    counts = np.stack([look.weight_counts if name == "weight" else look.pass_rate_counts for look in shown], axis=1)
    labels = [f"{low / NUM_BINS:.1f}" for low in range(NUM_BINS)]
    if name == "pass_rate" and any(look.num_unknown for look in shown):
        counts = np.vstack([[look.num_unknown for look in shown], counts])
        labels = ["unknown", *labels]
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    figure = drawing.canvas(_MATRIX_HEIGHT)
    ax = drawing.axes(figure, left=64 if len(labels) > NUM_BINS else 40, top=8, right=14, bottom=42)
    _shade(ax, shares / shares.max(), counts if len(shown) <= _COLUMNS_WITH_COUNTS else None)
    ticks = evenly(len(shown), 7)
    ax.set_xticks([place + 0.5 for place in ticks], [f"{shown[place].step:,}" for place in ticks])
    skipped = len(labels) - NUM_BINS
    _bin_ticks(ax.set_yticks, skipped)
    if skipped:
        ax.set_yticks([0.5, *(skipped + np.arange(0, NUM_BINS + 1, 2))], ["unknown", *_edges()])
    ax.set_xlabel("steps done at the refresh")
    return drawing.picture(figure, slug, heading, f"{heading.title}: a heat map over the refreshes.", png=png)


def draw_transitions(
    looks: Sequence[TableLook], name: str, most: int, prefix: str, heading: Heading, png: bool
) -> list[tuple[str, Picture]]:
    """Return (steps, picture) of up to `most` matrices, evenly chosen; full colour is all of a row."""
    found = transitions(looks, name)
    pictures = []
    for place in evenly(len(found), most):
        before, after, counts = found[place]
        figure = drawing.canvas(_MATRIX_HEIGHT)
        ax = drawing.axes(figure, left=48, top=8, right=14, bottom=42)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        _shade(ax, shares, counts)
        _frame_diagonal(ax)
        _bin_ticks(ax.set_xticks, 0)
        _bin_ticks(ax.set_yticks, 0)
        ax.set_xlabel(f"after step {after:,}")
        ax.set_ylabel(f"after step {before:,}", labelpad=4)
        words = f"step {before:,} to {after:,}"
        description = f"{heading.title}, {words}: a matrix of counts."
        own = Heading(f"{heading.title}, {words}", heading.of)
        pictures.append((words, drawing.picture(figure, f"{prefix}_{after}", own, description, png=png)))
    return pictures


def draw_calibration(found: Calibration, heading: Heading, slug: str, png: bool) -> Picture:
    """Draw a reliability diagram over a histogram of the groups."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = drawing.canvas(_MATRIX_HEIGHT)
    ax = drawing.axes(figure, left=52, top=8, right=14, bottom=126)
    low, high = (np.clip(found.predicted + side * found.half_band, 0, 1) for side in (-1, 1))
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.vlines(found.predicted, low, high, color=MUTED, alpha=0.3, linewidth=9)
    ax.plot(found.predicted, found.observed, color=drawing.SERIES[0], marker="o", markersize=5, linewidth=1.5)
    ax.grid(axis="y")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.03, 1.03)
    ax.set_yticks(np.arange(6) / 5, _edges())
    ax.set_xticks(np.arange(6) / 5, [""] * 6)
    ax.set_ylabel("observed", labelpad=4)
    below = drawing.axes(figure, left=52, top=_MATRIX_HEIGHT - 110, right=14, bottom=42)
    below.bar((found.bins + 0.5) / NUM_BINS, found.num_groups, width=0.86 / NUM_BINS, color=drawing.OTHER)
    below.set_xlim(-0.02, 1.02)
    below.grid(axis="y")
    below.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.compact(value)))
    below.set_xticks(np.arange(6) / 5, _edges())
    below.set_xlabel("predicted pass rate")
    below.set_ylabel("groups", labelpad=4)
    return drawing.picture(figure, slug, heading, "Observed against predicted pass rates, ten bins.", png=png)


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
    return drawing.picture(figure, slug, Heading(""), f"Observed pass rates: {rates}.", png=False)


def _shade(ax: Axes, shades: np.ndarray, counts: np.ndarray | None) -> None:
    """Cells from (0, 0) up, in a colour by the square root of the shade in [0, 1]: small shares are to be seen.

    One path for all cells of a colour keeps the file small. Args: counts: to be written into the cells.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    num_rows, num_columns = shades.shape
    gap_x, gap_y = (min(0.06, 0.3 * size / WIDTH) for size in (num_columns, num_rows))
    corners = np.array([(gap_x, gap_y), (1 - gap_x, gap_y), (1 - gap_x, 1 - gap_y), (gap_x, 1 - gap_y), (0, 0)])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    levels = np.ceil(np.sqrt(np.clip(shades, 0, 1)) * (len(_STRENGTHS) - 1)).astype(np.int64)
    ax.set_xlim(0, num_columns)
    ax.set_ylim(0, num_rows)
    for level, strength in enumerate(_STRENGTHS):
        cells = np.argwhere(levels == level)
        if not len(cells):
            continue
        vertices = (cells[:, None, ::-1] + corners).reshape(-1, 2)
        path = Path(vertices, codes * len(cells))
        ax.add_patch(PathPatch(path, facecolor=HEAT, alpha=strength, linewidth=0))
    if counts is not None:
        for row, column in np.argwhere(counts > 0):
            ax.text(
                column + 0.5,
                row + 0.5,
                _short(int(counts[row, column])),
                ha="center",
                va="center_baseline",
                color=ON_HEAT if levels[row, column] >= _STRONG else INK,
            )
    for spine in ax.spines.values():
        spine.set_visible(False)


def _short(count: int) -> str:
    """Four letters at most, up to a billion: 999, 1.2k, 45k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}" if count < 10 * size else f"{count / size:.0f}{unit}"
    return str(count)


def _frame_diagonal(ax: Axes) -> None:
    """The cells of those that did not move."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    near, far = 0.05, 0.95  # so that frames do not touch
    square = np.array([(near, near), (far, near), (far, far), (near, far), (near, near)])
    vertices = np.concatenate([square + place for place in range(NUM_BINS)])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * NUM_BINS
    ax.add_patch(PathPatch(Path(vertices, codes), facecolor="none", edgecolor=MUTED, linewidth=1))


def _edges() -> list[str]:
    return [f"{edge / NUM_BINS:g}" for edge in range(0, NUM_BINS + 1, 2)]


def _bin_ticks(set_ticks: Any, skipped: int) -> None:
    """Every second edge of the bins. Args: skipped: cells before the first bin."""
    set_ticks(skipped + np.arange(0, NUM_BINS + 1, 2), _edges())
