"""The prompts that moved most, with their images and an early and a late response."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr1_ds.commands.report.curriculum import Mover, movers
from mmr1_ds.commands.report.curriculum_figures import draw_way
from mmr1_ds.commands.report.runs import Run

_KINDS = {".webp": "image/webp", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_MOST_IMAGES = 4
_MOST_BYTES = 200_000  # of an image


@dataclass(frozen=True)
class Answer:
    """One sampled response."""

    step: int
    text: str
    reward: str
    pass_rate: str  # of its group
    is_right: bool


@dataclass(frozen=True)
class MovedPrompt:
    """The content of a prompt's card."""

    title: str
    prompt: str
    ground_truth: str
    images: Sequence[str]  # data URIs
    way: str  # SVG
    change: str
    answers: Sequence[Answer]  # early, late; one where the prompt was sampled once


def moved_prompts(run: Run, most: int, prefix: str) -> list[MovedPrompt]:
    """Return the prompts with two samples, or else those with one. Call it within `drawing.drawing()`."""
    places = run.samples.places
    twice = {prompt for prompt, found in places.items() if len({step for step, _ in found}) > 1}
    found = movers(run.observations, twice or set(places), most)
    return [_card(run, mover, f"{prefix}_{number}") for number, mover in enumerate(found)]


def _card(run: Run, mover: Mover, slug: str) -> MovedPrompt:
    places = run.samples.places[mover.prompt]
    samples = [run.samples.reader.at(offset) for _, offset in dict.fromkeys([places[0], places[-1]])]
    rates, steps = mover.pass_rates, mover.steps
    change = (
        f"Pass rate {rates[0]:.2f} at step {steps[0]:,}, {rates[-1]:.2f} at step {steps[-1]:,}; "
        f"observed {len(steps)} times"
    )
    return MovedPrompt(
        title=str(samples[-1].get("prompt_id") or mover.prompt),
        prompt=str(samples[-1].get("prompt", "")),
        ground_truth=shown(samples[-1].get("ground_truth")),
        images=_images(run.run_dir, samples[-1].get("images")),
        way=draw_way(mover, slug, run.num_steps).svg,
        change=change,
        answers=[answer for sample in samples if (answer := _answer(sample)) is not None],
    )


def _answer(sample: Mapping[str, Any]) -> Answer | None:
    """The better of the two kept responses where the group was right more often than not, else the worse."""
    responses = [found for found in sample.get("responses") or () if isinstance(found, Mapping)]
    if not responses:
        return None
    rate = sample.get("pass_rate")
    ordered = sorted(responses, key=lambda response: _number(response.get("reward")))
    chosen = ordered[-1] if _number(rate) >= 0.5 else ordered[0]
    return Answer(
        step=int(sample["step"]),
        text=str(chosen.get("text", "")),
        reward=shown(chosen.get("reward")),
        pass_rate="unscored" if rate is None else f"{_number(rate):.2f}",
        is_right=_number(chosen.get("accuracy")) > 0.5,
    )


def _images(run_dir: Path, names: Any) -> list[str]:
    """Data URIs of the thumbnails; a name that leads out of the run's directory is left out."""
    found = []
    for name in names[:_MOST_IMAGES] if isinstance(names, list) else ():
        path = (run_dir / str(name)).resolve()
        kind = _KINDS.get(path.suffix.lower())
        if kind is None or not path.is_relative_to(run_dir.resolve()) or not path.is_file():
            continue
        if path.stat().st_size <= _MOST_BYTES:
            found.append(f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")
    return found


def _number(value: Any) -> float:
    """Unscored counts as 0."""
    return float(value) if isinstance(value, int | float) else 0.0


def shown(value: Any) -> str:
    """Return a value of a sample as the page shows it."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
