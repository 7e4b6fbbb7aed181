"""The content of the page in its order: blocks of figures with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmr1_ds.commands.report import curves, resource_figures
from mmr1_ds.commands.report.curriculum import calibrate, transitions
from mmr1_ds.commands.report.curriculum_figures import draw_calibration, draw_histograms, draw_transitions
from mmr1_ds.commands.report.drawing import Card, Picture
from mmr1_ds.commands.report.groups import Group

MOST_GROUPS = 6  # groups beyond have their curves alone
_MOST_MATRICES = {"weight": 6, "pass_rate": 3}


@dataclass(frozen=True)
class Block:
    """A row of cards under a heading."""

    title: str
    place: int | None = None  # of its group among several
    cards: Sequence[Card] = ()
    note: str = ""


def learning(groups: Sequence[Group], png: bool) -> list[Block]:
    note = "Of noisy curves the thin lines are the steps, the thick ones a moving average."
    if any(len(group.runs) > 1 for group in groups):
        note += " Of several seeds the line is the mean, and the band goes from the lowest to the highest."
    return [Block("", cards=curves.draw_curves(curves.LEARNING, groups, png), note=note)]


def curriculum(groups: Sequence[Group], png: bool) -> list[Block]:
    blocks = [Block("", cards=curves.draw_curves(curves.CURRICULUM, groups, png))]
    for place, group in enumerate(groups[:MOST_GROUPS]):
        blocks += _table(group, place if len(groups) > 1 else None, png)
    if not any(block.cards for block in blocks[1:]):
        remedy = "data.sampling_strategy=curriculum turns it on."
        note = f"No curriculum.jsonl or observations.jsonl: without variance-aware sampling there is no table; {remedy}"
        blocks.append(Block("", note=note))
    return blocks


def resources(groups: Sequence[Group], png: bool) -> list[Block]:
    stages = resource_figures.palette(groups)
    totals, peaks, steps = "Where the time went", "Peak memory by stage", "Time of a step by stage"
    cards = _cards(
        (
            totals,
            "The stages that took longest over the whole run, with refreshes, validation and checkpoints.",
            resource_figures.draw_totals(groups, totals, "time_by_stage", png),
        ),
        (
            peaks,
            "Highest peak of any step and rank; device memory on GPUs, resident memory on the CPU.",
            resource_figures.draw_memory_peaks(groups, peaks, "memory_by_stage", png),
        ),
    )
    for place, group in enumerate(groups[:MOST_GROUPS]):
        own = group.first.name if len(groups) > 1 or len(group.runs) > 1 else ""
        title, slug = f"{steps}\n{own}".strip(), _slug("step_times", place if len(groups) > 1 else None)
        picture = resource_figures.draw_step_times(group.first, stages, title, slug, png)
        caption = "Stages of a step, stacked; what comes between steps is left out." + (f" Run {own}." if own else "")
        cards += _cards((steps, caption, picture))
    return [Block("", cards=[*cards, *curves.draw_curves(curves.THROUGHPUT, groups, png)])]


def _table(group: Group, place: int | None, png: bool) -> list[Block]:
    """What became of the table in the first run of a group; its predictions, in all runs."""
    looks, label = group.first.looks, "" if place is None else group.label
    cards = []
    for name, title, slug, caption in (
        ("weight", "Sampling weights over time", "weights",
         "Weights relative to the largest: prompts high up are sampled more."),
        ("pass_rate", "Pass rates over time", "pass_rates",
         "Prompts wander from 0 (too hard) towards 1 (solved); those between teach most."),
    ):  # fmt: skip
        if looks:
            shade = "A column is the table after a refresh; the stronger its colour, the more prompts a cell holds."
            picture = draw_histograms(looks, name, f"{title}\n{label}".strip(), _slug(slug, place), png)
            cards += _cards((title, f"{shade} {caption}", picture))
    calibration = calibrate([run.observations for run in group.runs])
    if calibration is not None:
        words = (
            "Dots: right responses among all whose prompt was predicted so, probes included; on the dashed line the "
            f"prediction holds, within the grey bars 95% of the time by chance. Mean distance "
            f"{calibration.mean_distance:.3f}."
        )
        picture = draw_calibration(calibration, f"Calibration\n{label}".strip(), _slug("calibration", place), png)
        cards += _cards(("Calibration", words, picture))
    note = (
        f"The tables are those of {group.first.name}, the calibration is of all seeds." if len(group.runs) > 1 else ""
    )
    blocks = [Block(label, place, cards, note)] if cards else []
    moves, notes = [], []
    for name, words in (("weight", "Weights"), ("pass_rate", "Pass rates")):
        slug, title = _slug(f"{name}_moves", place), f"Moves of {words.lower()}"
        found = draw_transitions(looks, name, _MOST_MATRICES[name], slug, title, label, png)
        moves += [Card(f"{words}, {steps}", "", "", {"": picture}) for steps, picture in found]
        if (count := len(transitions(looks, name))) > len(found):
            notes.append(f"{len(found)} of {count} of {words.lower()}")
    if moves:
        note = (
            "How many prompts went from the bin of a row to that of a column between two refreshes, coloured by their "
            "share of the row. Those in the framed cells stayed."
        ) + (f" Shown are {' and '.join(notes)}, evenly chosen." if notes else "")
        blocks.append(Block("Moves between refreshes" + (f": {label}" if label else ""), place, moves, note))
    return blocks


def _cards(*found: tuple[str, str, Picture | None]) -> list[Card]:
    """(title, caption, picture) of those that have a picture."""
    return [Card(title, "", caption, {"": picture}) for title, caption, picture in found if picture is not None]


def _slug(name: str, place: int | None) -> str:
    return name if place is None else f"{name}_{place + 1}"
