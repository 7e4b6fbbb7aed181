"""Curves over a run: each against steps, rollouts and wall clock, with a band where runs differ by seeds alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.commands.report import drawing
from mmr1_ds.commands.report.drawing import Card
from mmr1_ds.commands.report.groups import Group
from mmr1_ds.commands.report.runs import AXES, Run
from mmr1_ds.commands.report.series import MOST_POINTS, band, evenly, smoothed, smoothing_reach

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_SPIKED = 30.0  # a curve whose largest value is so many times the median is drawn on a logarithmic scale
_MOST_MARKERS, _FEW_POINTS = 40, 3  # values a line has markers at, and every line has, else a first step is not seen


@dataclass(frozen=True)
class Curve:
    """The description of one figure."""

    title: str
    lines: Mapping[str, str]  # metric -> what its line is called; several differ by their dashes
    caption: str
    is_fraction: bool = False
    is_validation: bool = False  # few values, drawn with markers
    exact: bool = False  # without noise: not averaged
    may_spike: bool = False

    @property
    def name(self) -> str:
        return self.title.lower().replace(" ", "_")


LEARNING = (
    Curve(
        "Validation accuracy", {"val/accuracy_reward": "accuracy"}, "Share of held-out prompts answered right.",
        is_validation=True, exact=True,
    ),
    Curve(
        "Pass at k", {f"val/pass_at_{k}": f"k = {k}" for k in (1, 2, 4, 8, 16, 32, 64)},
        "Share of held-out prompts with a right answer among k, by all choices of k of the answers.",
        is_validation=True, exact=True,
    ),
    Curve(
        "Training reward", {"reward/overall": "reward"},
        "Mean reward of the responses of each step. The sampler chooses the prompts, so compare runs by validation.",
    ),
    Curve(
        "Training accuracy", {"reward/accuracy": "accuracy", "reward/format": "format"},
        "Share of right, and of well-formed, responses of each step.",
    ),
    Curve(
        "Gradient norm", {"actor/grad_norm": "gradient norm"}, "Before clipping; spikes mean unstable updates.",
        may_spike=True,
    ),
    Curve(
        "Clip fraction", {"actor/pg_clipfrac_higher": "clip", "actor/pg_clipfrac_lower": "dual clip"},
        "Share of tokens that the clip holds back; 0 where each batch is used for one update.", is_fraction=True,
    ),
    Curve(
        "KL to the reference", {"actor/ref_kl": "KL"},
        "How far the policy has gone from the reference model, nats per token.", may_spike=True,
    ),
    Curve(
        "Entropy", {"actor/entropy_loss": "entropy"},
        "Of the policy, nats per token; a fall to 0 means that it has stopped exploring.",
    ),
    Curve(
        "Response length", {"response_length/mean": "mean", "response_length/max": "longest"}, "Tokens per response.",
    ),
    Curve(
        "Responses cut off", {"response_length/clip_ratio": "cut off"},
        "Share of responses that reached data.max_response_length.", is_fraction=True,
    ),
    Curve(
        "Rollout against trainer", {"rollout/logprob_diff_max": "largest", "rollout/logprob_diff_mean": "mean"},
        "Difference of the log-probabilities of the engine that sampled and the one that learns, per token.",
        may_spike=True,
    ),
    Curve("Learning rate", {"actor/lr": "learning rate"}, "Of the optimiser.", exact=True),
)  # fmt: skip
CURRICULUM = (
    Curve(
        "Effective groups",
        {"curriculum/effective_group_fraction": "groups", "curriculum/effective_response_fraction": "responses"},
        "Share of groups whose rewards differ, and where groups differ in size the responses' share in such groups. "
        "The others teach nothing.",
        is_fraction=True,
    ),
    Curve(
        "Extra rollouts", {"curriculum/extra_rollout_fraction": "extra"},
        "Responses sampled for the curriculum alone so far, as a share of those trained on.",
        is_fraction=True, exact=True, may_spike=True,
    ),
    Curve(
        "Log loss of predictions", {"curriculum/log_loss": "log loss"},
        "Of the predicted pass rates against the responses, in nats; 0.69 is a coin's.",
    ),
)  # fmt: skip
THROUGHPUT = (
    Curve(
        "Throughput", {"perf/throughput": "tokens"}, "Prompt and response tokens per second and rank, of whole steps.",
    ),
    Curve(
        "Host memory", {"perf/cpu_memory_used_gb": "resident"},
        "Resident memory of all ranks together, GB. One that keeps rising is a leak.", exact=True,
    ),
)  # fmt: skip


def draw_curves(curves: Sequence[Curve], groups: Sequence[Group], png: bool) -> list[Card]:
    """Draw the curves that any run has values for. Call it within `drawing.drawing()`."""
    return [figure for curve in curves if (figure := _draw(curve, groups, png)) is not None]


def legend_of(groups: Sequence[Group]) -> list[Line2D]:
    """Return the legend's entry of each group; empty for a single group."""
    from matplotlib.lines import Line2D

    if len(groups) == 1:
        return []
    return [
        Line2D([], [], color=colour_of(place), linestyle=dashes_of(place), linewidth=2, label=group.label)
        for place, group in enumerate(groups)
    ]


def colour_of(place: int) -> str:
    return drawing.SERIES[place % 7]  # the eighth is for what is left over


def dashes_of(place: int) -> Any:
    return drawing.DASHES[place % len(drawing.DASHES)]


def shared_axes(groups: Sequence[Group]) -> list[str]:
    """Return the axes that all runs have."""
    return [axis for axis in AXES if all(run.axis(axis) is not None for group in groups for run in group.runs)]


def axis_unit(groups: Sequence[Group], axis: str) -> tuple[float, str]:
    """Return what values of the axis are divided by, and its label."""
    if axis != "seconds":
        return 1.0, {"steps": "step", "rollouts": "rollouts, extra ones included"}[axis]
    found = [seconds for group in groups for run in group.runs if (seconds := run.axis(axis)) is not None]
    divisor, unit = drawing.time_unit(max(float(seconds[-1]) for seconds in found))
    return divisor, f"wall clock ({unit})"


def points(run: Run, metric: str, axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return x and y of the values that a run has; None without any."""
    x, values = run.axis(axis), run.metrics.column(metric)
    if x is None or values is None:
        return None
    known = np.isfinite(values)
    return x[known], values[known]


def _draw(curve: Curve, groups: Sequence[Group], png: bool) -> Card | None:
    lines = {metric: label for metric, label in curve.lines.items() if _values(groups, metric)}
    if not lines:
        return None
    pictures = {}
    for axis in shared_axes(groups):
        divisor, axis_label = axis_unit(groups, axis)
        figure = drawing.canvas()
        ax = drawing.axes(figure, left=48, top=24 if len(lines) > 1 else 10, right=14, bottom=42)
        for number, (metric, label) in enumerate(lines.items()):
            for place, group in enumerate(groups):
                found = [pair for run in group.runs if (pair := points(run, metric, axis)) is not None]
                style = _style(place, number, len(groups), len(lines))
                _draw_group(ax, [(x / divisor, y) for x, y in found], style, curve, len(groups))
            # Of one group each metric has a colour of its own; of several its dashes, and the groups have colours.
            colour = colour_of(number) if len(groups) == 1 else drawing.MUTED
            ax.plot([], [], color=colour, linestyle=dashes_of(number), linewidth=2, label=label)
        if len(lines) > 1:
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.03), ncols=len(lines))
        _scale(ax, curve, [values for metric in lines for values in _values(groups, metric)])
        ax.set_xlabel(axis_label)
        name = curve.name if axis == "steps" else f"{curve.name}_by_{axis}"
        description = f"by {axis_label}. {curve.caption}"
        with_png = png and (axis == "steps" or curve.is_validation)
        pictures[axis] = drawing.picture(figure, name, curve.title, description, with_png, legend_of(groups))
    return Card(curve.title, _last(curve, groups), curve.caption, pictures)


def _values(groups: Sequence[Group], metric: str) -> list[np.ndarray]:
    """Of every run that has some."""
    return [pair[1] for group in groups for run in group.runs if (pair := points(run, metric, "steps")) is not None]


def _style(place: int, number: int, num_groups: int, num_lines: int) -> dict[str, Any]:
    return {
        "color": colour_of(number if num_groups == 1 else place),
        "linestyle": dashes_of(number if num_groups == 1 or num_lines > 1 else place),
        "linewidth": 2.0,
    }


def _draw_group(
    ax: Axes, found: Sequence[tuple[np.ndarray, np.ndarray]], style: dict[str, Any], curve: Curve, num_groups: int
) -> None:
    """One metric of one group: mean and band; of a single run, the values and their moving average."""
    most_markers = _MOST_MARKERS if curve.is_validation else _FEW_POINTS

    def plot(x: np.ndarray, y: np.ndarray) -> None:
        ax.plot(x, y, **style, marker="o" if len(x) <= most_markers else None, markersize=4.5)

    averages = [(x, y if curve.exact else smoothed(y, smoothing_reach(len(y)))) for x, y in found]
    joined = band(averages) if len(averages) > 1 else None
    if joined is not None:
        x, mean, low, high = (values[evenly(len(joined[0]), MOST_POINTS)] for values in joined)
        ax.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        plot(x, mean)
        return
    for (x, y), (_, mean) in zip(found, averages, strict=True):
        if not curve.exact and smoothing_reach(len(y)):
            width = 1.0 if len(x) <= MOST_POINTS else 0.6
            ax.plot(x, y, color=style["color"], linewidth=width, alpha=0.35 / num_groups)
        plot(x, mean)


def _scale(ax: Axes, curve: Curve, found: Sequence[np.ndarray]) -> None:
    """Limits that show the curves and do not make much of noise; ticks that can be read. Args: found: of each run."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    low, high = min(float(values.min()) for values in found), max(float(values.max()) for values in found)
    ax.grid(axis="y")
    ax.margins(x=0.02, y=0.08)
    if curve.may_spike and low >= 0 and high > _SPIKED * max(float(np.median(np.concatenate(found))), 1e-12):
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        if 0 <= low <= high / 2 or 0 < low == high:
            ax.set_ylim(bottom=-0.03 * high)
        if low == high == 0:
            highest = 0.01 if curve.is_fraction else 1.0
            ax.set_ylim(-0.03 * highest, highest)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _shown(curve, value)))
    left, right = ax.dataLim.intervalx
    if left == right:
        ax.set_xlim(max(0, left - 1), right + 1)
    drawing.count_ticks(ax.xaxis)


def _shown(curve: Curve, value: float) -> str:
    return drawing.percent(value) if curve.is_fraction else drawing.compact(value)


def _last(curve: Curve, groups: Sequence[Group]) -> str:
    """Of the first metric, the last value there is; "" for several runs."""
    values = _values(groups, next(iter(curve.lines)))
    if len(groups) > 1 or len(groups[0].runs) > 1 or not values:
        return ""
    return _shown(curve, round(float(values[0][-1]), 4) if curve.is_fraction else float(values[0][-1]))
