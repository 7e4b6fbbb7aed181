"""Figures of time and memory by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.commands.report import drawing
from mmr1_ds.commands.report.curves import colour_of, legend_of
from mmr1_ds.commands.report.drawing import INK, MUTED, OTHER, Heading, Picture
from mmr1_ds.commands.report.groups import Group
from mmr1_ds.commands.report.runs import BETWEEN_STEPS, Run
from mmr1_ds.commands.report.series import MOST_POINTS, evenly
from mmr1_ds.commands.report.summary import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = {  # in the order of a step, with what the page calls them
    "gen": "generate",
    "reward": "reward",
    "curriculum": "curriculum",
    "draw": "draw",
    "old": "old log-probs",
    "ref": "reference",
    "values": "values",
    "adv": "advantages",
    "update_critic": "critic update",
    "update_actor": "actor update",
    "sync": "weight sync",
    "refresh": "refresh",
    "testing": "validation",
    "save_checkpoint": "checkpoint",
}
_REST, _ALL = "other", "all stages, within 5%"
_MOST_STAGES, _MOST_BARS = 7, 8  # that have a colour, that have a bar
_FEW = 0.005  # a stage with a smaller share counts as other
_TALL = 2.5  # a step that is so many times longer than 95 % of the steps is cut off
_LEGEND_COLUMNS, _LEGEND_ROW = 3, 17
_HEIGHT = drawing.HEIGHT + 40
_BAR, _BETWEEN_BARS, _MOST_BAR, _MOST_ROW = 16, 8, 24, 40  # pixels


@dataclass(frozen=True)
class StagePalette:
    """The stages that all figures distinguish, and their colours."""

    names: Sequence[str]  # stages that take time, in the order of a step; the others are drawn as one
    colours: Mapping[str, str]  # of these, and of others as far as there are colours

    def colour(self, name: str) -> str:
        return self.colours.get(name, OTHER)

    def gathered(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the values of the named stages, and the sum of the others."""
        named = {name: values[name] for name in self.names if name in values}
        others = [found for name, found in values.items() if name not in self.names]
        return named | ({_REST: np.sum(others, axis=0)} if others else {})


def stage_seconds(run: Run) -> dict[str, np.ndarray]:
    """Return stage -> (S,) float64 seconds; `other` is what a step took beside its stages."""
    found = _by_stage(run, "timing_s/")
    step = found.pop("step", None)
    if step is not None:
        inside = [values for name, values in found.items() if name not in BETWEEN_STEPS]
        found[_REST] = np.maximum(step - np.sum(inside, axis=0), 0.0) if inside else step
    return found


def palette(groups: Sequence[Group]) -> StagePalette:
    """Choose the stages that took most time over all runs."""
    shares: dict[str, float] = {}
    for group in groups:
        for run in group.runs:
            seconds = {name: values.sum() for name, values in stage_seconds(run).items()}
            total = sum(seconds.values()) or 1.0
            for name, value in seconds.items():
                shares[name] = max(shares.get(name, 0.0), float(value / total))
    shares.pop(_REST, None)
    first = [name for name in sorted(shares, key=lambda name: -shares[name]) if shares[name] >= _FEW][:_MOST_STAGES]
    remembered = dict.fromkeys(
        name for group in groups for run in group.runs for name in _by_stage(run, "memory_gb/", fill=False)
    )
    coloured = [*first, *(name for name in remembered if name not in first)][:_MOST_STAGES]
    colours = {name: colour_of(number) for number, name in enumerate(sorted(coloured, key=_place))}
    return StagePalette(sorted(first, key=_place), colours)


def draw_step_times(run: Run, stages: StagePalette, slug: str, heading: Heading, png: bool) -> Picture | None:
    """Draw the seconds of each step, stacked, without what happens between steps."""
    inside = {name: values for name, values in stage_seconds(run).items() if name not in BETWEEN_STEPS}
    total = np.sum([*inside.values()], axis=0) if inside else np.zeros(0)
    stepped = total > 0  # step 0 has a validation alone
    if not stepped.any():
        return None
    steps = run.metrics.steps[stepped]
    figure, ax = _stacked(
        steps, stages.gathered({name: values[stepped] for name, values in inside.items()}), stages, bars=True
    )
    ax.set_ylabel("seconds", labelpad=3)
    usual, tallest = float(np.percentile(total[stepped], 95)), int(np.argmax(total * stepped))
    if total[tallest] > _TALL * usual:
        ax.set_ylim(top=_TALL * usual)
        words = f"step {run.metrics.steps[tallest]:,}: {total[tallest]:.3g} s"
        ax.text(0.99, 0.97, words, transform=ax.transAxes, ha="right", va="top", color=MUTED)
    return drawing.picture(figure, slug, heading, f"{heading.title}: stacked over steps.", png=png)


def draw_cumulative_times(run: Run, stages: StagePalette, slug: str, heading: Heading, png: bool) -> Picture | None:
    """Draw the seconds since the start, stacked, with refreshes, validation and checkpoints."""
    seconds = stage_seconds(run)
    if not seconds or len(run.metrics.steps) < 2:
        return None
    summed = stages.gathered({name: np.cumsum(values) for name, values in seconds.items()})
    total = float(np.sum([values[-1] for values in summed.values()]))
    divisor, unit = next(
        ((size, name) for size, name in ((7200, "hours"), (120, "minutes")) if total >= size), (1, "seconds")
    )
    divisor = {7200: 3600, 120: 60}.get(divisor, 1)
    figure, ax = _stacked(
        run.metrics.steps, {name: values / divisor for name, values in summed.items()}, stages, bars=False
    )
    ax.set_ylabel(unit, labelpad=3)
    return drawing.picture(figure, slug, heading, f"{heading.title}: stacked over steps.", png=png)


def draw_totals(groups: Sequence[Group], slug: str, heading: Heading, png: bool) -> Picture | None:
    """Draw a bar for each stage and group: its seconds, averaged over seeds."""
    totals = []
    for group in groups:
        sums = [{name: float(values.sum()) for name, values in stage_seconds(run).items()} for run in group.runs]
        names = dict.fromkeys(name for found in sums for name in found)
        totals.append({name: float(np.mean([found.get(name, 0.0) for found in sums])) for name in names})
    all_seconds = [sum(found.values()) for found in totals]
    if not any(all_seconds):
        return None
    largest = {name: max(found.get(name, 0.0) for found in totals) for found in totals for name in found}
    shown = sorted(largest, key=lambda name: largest[name])[-_MOST_BARS:]
    shown = [name for name in shown if largest[name] >= _FEW * max(all_seconds)]
    words = [
        [f"{duration(found.get(name, 0.0))} ({found.get(name, 0.0) / (whole or 1.0):.0%})" for name in shown]
        for found, whole in zip(totals, all_seconds, strict=True)
    ]
    values = [[found.get(name, 0.0) for name in shown] for found in totals]
    return _bars(groups, [STAGES.get(name, name) for name in shown], values, words, slug, heading, png)


def draw_memory(run: Run, stages: StagePalette, slug: str, heading: Heading, png: bool) -> Picture | None:
    """Draw the peak of each stage over the steps, as lines, since peaks do not add up."""
    peaks = _by_stage(run, "memory_gb/", fill=False)
    if peaks and _alike(peaks):
        highest = np.fmax.reduce([*peaks.values()])
        peaks, stages = {_ALL: highest}, StagePalette([_ALL], {_ALL: colour_of(0)})
    shown = [name for name in peaks if name in stages.colours]
    if not shown:
        return None
    figure, ax = _with_legend(shown, stages)
    for name in shown:
        known = np.isfinite(peaks[name])
        x, y = run.metrics.steps[known], peaks[name][known]
        few = len(x) <= 12
        kept = evenly(len(x), MOST_POINTS)
        ax.plot(x[kept], y[kept], color=stages.colour(name), linewidth=1.8, marker="o" if few else None, markersize=3.5)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("GB", labelpad=3)
    return drawing.picture(figure, slug, heading, f"{heading.title}: lines over steps.", png=png)


def draw_memory_peaks(groups: Sequence[Group], slug: str, heading: Heading, png: bool) -> Picture | None:
    """Draw a bar for each stage and group: its highest peak over steps, seeds and ranks. None if all are alike."""
    peaks = [
        {
            name: max(float(np.nanmax(found[name])) for found in of_runs if name in found)
            for name in dict.fromkeys(name for found in of_runs for name in found)
        }
        for of_runs in ([_by_stage(run, "memory_gb/", fill=False) for run in group.runs] for group in groups)
    ]
    shown = sorted({name for found in peaks for name in found}, key=_place, reverse=True)
    if all(_alike({name: np.array([peak]) for name, peak in found.items()}) for found in peaks):
        return None
    values = [[found.get(name, 0.0) for name in shown] for found in peaks]
    words = [[f"{value:.3g} GB" if value else "" for value in row] for row in values]
    return _bars(groups, [STAGES.get(name, name) for name in shown], values, words, slug, heading, png)


def _alike(peaks: Mapping[str, np.ndarray]) -> bool:
    """Whether the stages hardly differ, as on a CPU, where a process seldom gives memory back."""
    highest = [float(np.nanmax(values)) for values in peaks.values()]
    return not highest or min(highest) > 0.95 * max(highest)


def _by_stage(run: Run, prefix: str, fill: bool = True) -> dict[str, np.ndarray]:
    """Stage -> (S,) float64. Args: fill: 0 where there is no value, else NaN."""
    found = {}
    for name in sorted(run.metrics.names(prefix), key=_place):
        values = run.metrics.column(prefix + name)
        if values is not None:
            found[name] = np.nan_to_num(values) if fill else values
    return found


def _place(name: str) -> int:
    """In the order of a step; stages that are not known here come last."""
    return [*STAGES].index(name) if name in STAGES else len(STAGES)


def _with_legend(names: Sequence[str], stages: StagePalette) -> tuple[Figure, Axes]:
    """Return axes over steps under a legend of the stages."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    above = -(-len(names) // _LEGEND_COLUMNS) * _LEGEND_ROW + 10
    figure = drawing.canvas(_HEIGHT)
    ax = drawing.axes(figure, left=58, top=above, right=14, bottom=44)
    patches = [Patch(color=stages.colour(name), label=STAGES.get(name, name)) for name in names]
    figure.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(0.02, 0.985), ncols=_LEGEND_COLUMNS, handlelength=0.9
    )
    ax.grid(axis="y")
    ax.margins(x=0.0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: drawing.compact(value)))
    ax.set_xlabel("step")
    return figure, ax


def _stacked(
    steps: np.ndarray, values: Mapping[str, np.ndarray], stages: StagePalette, bars: bool
) -> tuple[Figure, Axes]:
    """Args: bars: each value holds for its step; else straight from step to step."""
    figure, ax = _with_legend([*values], stages)
    edges = np.linspace(0, len(steps), min(len(steps), MOST_POINTS // 2) + 1).astype(np.int64)
    lengths = np.diff(edges)
    x = np.add.reduceat(steps, edges[:-1]) / lengths
    if bars:  # from half a step before to half a step after
        x = np.append(steps[edges[:-1]] - 0.5, steps[-1] + 0.5)
    base = np.zeros(len(x))
    for name, whole in values.items():
        means = np.add.reduceat(whole, edges[:-1]) / lengths
        top = base + (np.append(means, means[-1]) if bars else means)
        ax.fill_between(x, base, top, step="post" if bars else None, color=stages.colour(name), linewidth=0)
        base = top
    ax.set_ylim(bottom=0)
    return figure, ax


def _bars(
    groups: Sequence[Group],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    words: Sequence[Sequence[str]],
    slug: str,
    heading: Heading,
    png: bool,
) -> Picture:
    """Args: values, words: of each group, in the order of names, from the bottom up."""
    bar, row = float(_BAR), float(len(groups) * _BAR + _BETWEEN_BARS)
    height = max(len(names) * row + 16, _HEIGHT)
    if len(groups) == 1:  # as tall as the figures beside it
        row = min(_MOST_ROW, (height - 16) / len(names))
        bar = min(_MOST_BAR, row - _BETWEEN_BARS + 3)
    figure = drawing.canvas(height)
    ax = drawing.axes(figure, left=96, top=4, right=92, bottom=12)
    middle = np.arange(len(names)) * row
    for place, group_values in enumerate(values):
        y = middle + ((len(groups) - 1) / 2 - place) * bar
        ax.barh(y, group_values, height=bar - 3, color=colour_of(place), linewidth=0)
        for bottom, value, text in zip(y, group_values, words[place], strict=True):
            ax.annotate(text, (value, bottom), (5, 0), textcoords="offset points", va="center", color=INK)
    top = (len(names) - 0.5) * row
    ax.set_ylim(top - (height - 16), top)  # in pixels
    ax.set_xlim(0, max(max(of_group) for of_group in values) or 1.0)
    ax.set_yticks(middle, names)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    return drawing.picture(figure, slug, heading, f"{heading.title}: bars by stage.", legend_of(groups), png)
