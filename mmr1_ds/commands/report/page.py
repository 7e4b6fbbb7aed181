"""The page: one file that needs nothing beside it, and pictures of its figures."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml

from mmr1_ds.commands.report import drawing, sections
from mmr1_ds.commands.report.curves import colour_of, dashes_of, shared_axes
from mmr1_ds.commands.report.drawing import COLOURS, VARIABLES
from mmr1_ds.commands.report.groups import Group, group_runs
from mmr1_ds.commands.report.prompts import MovedPrompt, moved_prompts, shown
from mmr1_ds.commands.report.runs import AXES, load_runs
from mmr1_ds.commands.report.sections import MOST_GROUPS, Block
from mmr1_ds.commands.report.summary import facts, final_figures, tiles
from mmr1_ds.config.redaction import redacted
from mmr1_ds.errors import require

_FOLDER = Path(__file__).parent
_MOST_MOVERS, _MOST_MOVERS_EACH = 8, 4  # of one run; of each of several


def write_report(run_dirs: Sequence[Path], output: Path, pngs: bool) -> Path:
    """Write the report of these runs, and with `pngs` its figures into the folder `report` beside it.

    Each file appears whole or not at all. Returns: the report's path. Raises: UserError for a folder that is no run.
    """
    require("report", "matplotlib", purpose="mmr1-ds report")
    groups = group_runs(load_runs(run_dirs))
    with drawing.drawing():
        found = {
            "learning": sections.learning(groups, pngs),
            "curriculum": sections.curriculum(groups, pngs),
            "resources": sections.resources(groups, pngs),
        }
        html = redacted(_render(groups, found))
    output.parent.mkdir(parents=True, exist_ok=True)
    cards = [card for blocks in found.values() for block in blocks for card in block.cards]
    for picture in (picture for card in cards for picture in card.pictures.values()):
        if picture.png is not None:
            folder = output.parent / "report"
            folder.mkdir(exist_ok=True)
            _write(folder / f"{picture.name}.png", picture.png)
    # Texts of a run may hold half a character, which no encoding has.
    _write(output, html.encode("utf-8", "replace"))
    return output


def _write(path: Path, content: bytes) -> None:
    """Under another name first: a reader may have the old one open, and another report may be under way."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _render(groups: Sequence[Group], blocks: Mapping[str, Sequence[Block]]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    runs = [run for group in groups for run in group.runs]
    keys = dict.fromkeys(key for group in groups for key in group.values)  # that distinguish the groups
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        title=groups[0].first.name if len(runs) == 1 else f"{len(runs)} runs compared",
        groups=groups,
        runs=runs,
        blocks=blocks,
        tiles=tiles(runs[0]) if len(runs) == 1 else [],
        facts=facts,
        figures=final_figures(groups),
        differences=[(key, [group.values.get(key, "no config.yaml") for group in groups]) for key in keys],
        movers=_movers(groups),
        has_observations=any(len(run.observations.steps) for run in runs),
        axes={axis: AXES[axis] for axis in shared_axes(groups)},
        sampled=[group.first for group in groups[:MOST_GROUPS]],
        to_yaml=lambda config: yaml.safe_dump(dict(config), sort_keys=False),
        notes=[note for run in runs for note in run.notes],
        colours=COLOURS,
        look_of=_look,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _movers(groups: Sequence[Group]) -> list[tuple[int, Group, list[MovedPrompt]]]:
    """Place, group, prompts of its first run; groups without any left out."""
    most = _MOST_MOVERS if len(groups) == 1 else _MOST_MOVERS_EACH
    found = [
        (place, group, moved_prompts(group.first, most, f"way_{place}"))
        for place, group in enumerate(groups[:MOST_GROUPS])
    ]
    return [entry for entry in found if entry[2]]


def _look(place: int) -> dict[str, str]:
    """A group's line, as a style of the page has it."""
    dashes = dashes_of(place)
    lengths = "none" if isinstance(dashes, str) else " ".join(map(str, dashes[1]))
    return {"colour": VARIABLES[colour_of(place)], "dashes": lengths}
