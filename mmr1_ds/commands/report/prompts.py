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
class MovedPrompt:
    """The content of a prompt's card."""

    mover: Mover
    sample: Mapping[str, Any]  # the last that was kept
    images: Sequence[str]  # data URIs
    way: str  # SVG
    answers: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]  # (sample, response), early and late


def moved_prompts(run: Run, most: int, prefix: str) -> list[MovedPrompt]:
    """Return the prompts with two samples, or else those with one. Call it within `drawing.drawing()`."""
    places = run.samples.places
    twice = {prompt for prompt, found in places.items() if len({step for step, _ in found}) > 1}
    found = movers(run.observations, twice or set(places), most)
    return [_card(run, mover, f"{prefix}_{number}") for number, mover in enumerate(found)]


def _card(run: Run, mover: Mover, slug: str) -> MovedPrompt:
    places = run.samples.places[mover.prompt]
    samples = [run.samples.reader.at(offset) for _, offset in dict.fromkeys([places[0], places[-1]])]
    return MovedPrompt(
        mover,
        samples[-1],
        images=_images(run.run_dir, samples[-1].get("images")),
        way=draw_way(mover, slug, run.num_steps).svg,
        answers=[(sample, answer) for sample in samples if (answer := _answer(sample)) is not None],
    )


def _answer(sample: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The better of the two kept responses where the group was right more often than not, else the worse."""
    responses = [found for found in sample.get("responses") or () if isinstance(found, Mapping)]
    ordered = sorted(responses, key=lambda response: _number(response.get("reward")))
    if not ordered:
        return None
    return ordered[-1] if _number(sample.get("pass_rate")) >= 0.5 else ordered[0]


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
