"""Figures of time and memory by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmr1_ds.commands.report import drawing
from mmr1_ds.commands.report.curves import colour_of, legend_of
from mmr1_ds.commands.report.drawing import INK, MUTED, OTHER, Picture
from mmr1_ds.commands.report.groups import Group
from mmr1_ds.commands.report.runs import BETWEEN_STEPS, Run
from mmr1_ds.commands.report.series import MOST_POINTS

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
_REST = "other"
_MOST_STAGES, _MOST_BARS = 7, 8  # that have a colour, that have a bar
_FEW = 0.005  # a stage with a smaller share counts as other
_TALL = 2.5  # a step that is so many times longer than 95 % of the steps is cut off
_LEGEND_COLUMNS, _LEGEND_ROW = 3, 17
_HEIGHT = drawing.HEIGHT + 40
_BAR, _BETWEEN_BARS, _MOST_BAR, _MOST_ROW = 16, 8, 24, 40  # pixels


def stage_seconds(run: Run) -> dict[str, np.ndarray]:
    """Return stage -> (S,) float64 seconds; `other` is what a step took beside its stages."""
    found = {name: np.nan_to_num(values) for name, values in _by_stage(run, "timing_s/").items()}
    step = found.pop("step", None)
    if step is not None:
        inside = [values for name, values in found.items() if name not in BETWEEN_STEPS]
        found[_REST] = np.maximum(step - np.sum(inside, axis=0), 0.0) if inside else step
    return found


def palette(groups: Sequence[Group]) -> dict[str, str]:
    """Return the colours of the stages that took most time over all runs, in the order of a step."""
    shares: dict[str, float] = {}
    for group in groups:
        for run in group.runs:
            seconds = {name: values.sum() for name, values in stage_seconds(run).items()}
            total = sum(seconds.values()) or 1.0
            for name, value in seconds.items():
                shares[name] = max(shares.get(name, 0.0), float(value / total))
    shares.pop(_REST, None)
    first = [name for name in sorted(shares, key=lambda name: -shares[name]) if shares[name] >= _FEW][:_MOST_STAGES]
    return {name: colour_of(number) for number, name in enumerate(sorted(first, key=_place))}


def draw_step_times(run: Run, stages: Mapping[str, str], title: str, slug: str, png: bool) -> Picture | None:
    """Draw the seconds of each step, stacked, without what happens between steps.

    Args: stages: with their colours; the others are drawn as one.
    """
    inside = {name: values for name, values in stage_seconds(run).items() if name not in BETWEEN_STEPS}
    total = np.sum([*inside.values()], axis=0) if inside else np.zeros(0)
    stepped = total > 0  # step 0 has a validation alone
    if not stepped.any():
        return None
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    shown = {name: inside[name][stepped] for name in stages if name in inside}
    if others := [values[stepped] for name, values in inside.items() if name not in stages]:
        shown[_REST] = np.sum(others, axis=0)
    colours = {name: stages.get(name, OTHER) for name in shown}
    figure = drawing.canvas(_HEIGHT)
    above = -(-len(shown) // _LEGEND_COLUMNS) * _LEGEND_ROW + 10
    ax = drawing.axes(figure, left=58, top=above, right=14, bottom=44)
    patches = [Patch(color=colour, label=STAGES.get(name, name)) for name, colour in colours.items()]
    figure.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(0.02, 0.985), ncols=_LEGEND_COLUMNS, handlelength=0.9
    )
    # Each area goes from half a step before its first step to half a step after its last.
    steps = run.metrics.steps[stepped]
    edges = np.linspace(0, len(steps), min(len(steps), MOST_POINTS // 2) + 1).astype(np.int64)
    x = np.append(steps[edges[:-1]] - 0.5, steps[-1] + 0.5)
    base = np.zeros(len(x))
    for name, whole in shown.items():
        means = np.add.reduceat(whole, edges[:-1]) / np.diff(edges)
        top = base + np.append(means, means[-1])
        ax.fill_between(x, base, top, step="post", color=colours[name], linewidth=0)
        base = top
    ax.grid(axis="y")
    ax.margins(x=0.0)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    drawing.count_ticks(ax.xaxis)
    ax.set_xlabel("step")
    ax.set_ylabel("seconds", labelpad=3)
    usual, tallest = float(np.percentile(total[stepped], 95)), int(np.argmax(total))
    if total[tallest] > _TALL * usual:
        ax.set_ylim(top=_TALL * usual)
        words = f"step {run.metrics.steps[tallest]:,}: {total[tallest]:.3g} s"
        ax.text(0.99, 0.97, words, transform=ax.transAxes, ha="right", va="top", color=MUTED)
    return drawing.picture(figure, slug, title, "stacked over steps.", png)


def draw_totals(groups: Sequence[Group], title: str, slug: str, png: bool) -> Picture | None:
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

    def words(place: int, seconds: float) -> str:
        return f"{drawing.duration(seconds)} ({seconds / (all_seconds[place] or 1.0):.0%})"

    return _bars(groups, shown, totals, words, title, slug, png)


def draw_memory_peaks(groups: Sequence[Group], title: str, slug: str, png: bool) -> Picture | None:
    """Draw a bar for each stage and group: its highest peak over steps, seeds and ranks."""
    peaks: list[dict[str, float]] = []
    for group in groups:
        highest: dict[str, float] = {}
        for run in group.runs:
            for name, values in _by_stage(run, "memory_gb/").items():
                highest[name] = max(highest.get(name, 0.0), float(np.nanmax(values)))
        peaks.append(highest)
    shown = sorted({name for found in peaks for name in found}, key=_place, reverse=True)
    if not shown:
        return None
    return _bars(groups, shown, peaks, lambda _, peak: f"{peak:.3g} GB" if peak else "", title, slug, png)


def _by_stage(run: Run, prefix: str) -> dict[str, np.ndarray]:
    """Stage -> (S,) float64, NaN where there is no value, in the order of a step."""
    names = [name.removeprefix(prefix) for name in run.metrics.columns if name.startswith(prefix)]
    return {name: run.metrics.columns[prefix + name] for name in sorted(names, key=_place)}


def _place(name: str) -> int:
    """In the order of a step; stages that are not known here come last."""
    return [*STAGES].index(name) if name in STAGES else len(STAGES)


def _bars(
    groups: Sequence[Group],
    names: Sequence[str],
    values: Sequence[Mapping[str, float]],
    words: Callable[[int, float], str],
    title: str,
    slug: str,
    png: bool,
) -> Picture:
    """Args: names: from the bottom up; values: of each group; words: beside a bar, from its group and value."""
    bar, row = float(_BAR), float(len(groups) * _BAR + _BETWEEN_BARS)
    height = max(len(names) * row + 16, _HEIGHT)
    if len(groups) == 1:  # as tall as the figures beside it
        row = min(_MOST_ROW, (height - 16) / len(names))
        bar = min(_MOST_BAR, row - _BETWEEN_BARS + 3)
    figure = drawing.canvas(height)
    ax = drawing.axes(figure, left=96, top=4, right=92, bottom=12)
    middle = np.arange(len(names)) * row
    for place, found in enumerate(values):
        y = middle + ((len(groups) - 1) / 2 - place) * bar
        own = [found.get(name, 0.0) for name in names]
        ax.barh(y, own, height=bar - 3, color=colour_of(place), linewidth=0)
        for bottom, value in zip(y, own, strict=True):
            at = (value, bottom)
            ax.annotate(words(place, value), at, (5, 0), textcoords="offset points", va="center", color=INK)
    top = (len(names) - 0.5) * row
    ax.set_ylim(top - (height - 16), top)  # in pixels
    ax.set_xlim(0, max(max(found.values(), default=0.0) for found in values) or 1.0)
    ax.set_yticks(middle, [STAGES.get(name, name) for name in names])
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    return drawing.picture(figure, slug, title, "bars by stage.", png, legend_of(groups))
