"""Finding the rows that the trainer does not take as they are: refused, dropped, or renamed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.commands.data.figures import SHOWN
from mmr1_ds.commands.data.rows import AT_ITS_START, WHEN_DRAWN
from mmr1_ds.config import RunConfig
from mmr1_ds.data.columns import image_remedy
from mmr1_ds.data.rows import RowReader

if TYPE_CHECKING:
    import pyarrow as pa

DROPPED, KEPT = "dropped", "kept"
_EFFECTS = (AT_ITS_START, WHEN_DRAWN, DROPPED, KEPT)  # the worst first
_VARIES = re.compile(r"0x[0-9a-f]+|\d+|'[^']*'|\"[^\"]*\"")  # in a message, from row to row


@dataclass(frozen=True)
class Example:
    """A row that shows a finding."""

    row: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """The rows that the trainer does not take as they are, for one reason."""

    effect: str  # one of _EFFECTS
    reason: str
    num_rows: int
    rows_by_file: dict[str, list[int]]  # all rows of the finding
    examples: list[Example]  # at most SHOWN rows

    @property
    def stops_run(self) -> bool:
        return self.effect in (AT_ITS_START, WHEN_DRAWN)


class SurveyedRows:
    """The R rows of a survey, and which of them a run can use."""

    def __init__(self, table: pa.Table, readers: Sequence[RowReader], config: RunConfig) -> None:
        """Take a survey. Args: table: as `survey_rows` returns it for the readers."""
        self.table, self.readers = table, readers
        limit = config.worker.rollout.limit_images
        self.is_measured = table["problem"].is_null().to_numpy(zero_copy_only=False)
        self.lengths = table["length"].fill_null(0).to_numpy()  # (R,) tokens; 0 where not measured
        self.num_images = table["num_images"].fill_null(0).to_numpy()  # (R,)
        self.is_overlong = self.is_measured & (self.lengths > config.data.max_prompt_length)
        self.has_too_many = self.is_measured & (self.num_images > limit) & (limit > 0)
        if config.data.filter_overlong_prompts:
            self.has_too_many &= ~self.is_overlong  # the trainer drops those before it counts images
        self.usable = np.flatnonzero(self.is_measured & ~self.is_overlong & ~self.has_too_many)

    def place(self, row: int) -> tuple[RowReader, int]:
        """Return the source of a row, and its number there."""
        return self.readers[self.table["source"][row].as_py()], self.table["row"][row].as_py()

    def name(self, row: int) -> str:
        """Return the name of a row for people, with the file where there are several."""
        reader, local = self.place(row)
        return f"row {local}" if len(self.readers) == 1 else f"{reader.name} row {local}"

    def texts(self, column: str, rows: np.ndarray) -> list[str]:
        found: list[str] = self.table[column].take(rows).to_pylist()
        return found

    def flat(self, column: str) -> np.ndarray:
        """Return all numbers of a column of lists, in the order of the rows."""
        import pyarrow.compute as pc

        return pc.list_flatten(self.table[column]).to_numpy()


def _finding(
    rows: SurveyedRows, effect: str, reason: str, concerned: Sequence[int] | np.ndarray, examples: list[Example]
) -> list[Finding]:
    """Return the one finding about these rows; none without any."""
    by_file: dict[str, list[int]] = defaultdict(list)
    for row in concerned:
        reader, local = rows.place(row)
        by_file[reader.name].append(local)
    return [Finding(effect, reason, len(concerned), dict(by_file), examples)] if len(concerned) else []


def find(rows: SurveyedRows, config: RunConfig) -> list[Finding]:
    """Return all findings, those that stop a run first."""
    found = [*_refused(rows), *_too_many_images(rows, config), *_overlong(rows, config), *_repeated(rows, config)]
    found += [*_answered(rows), *_passed_over(rows, config)]
    return sorted(found, key=lambda finding: _EFFECTS.index(finding.effect))


def _refused(rows: SurveyedRows) -> list[Finding]:
    """Return the rows that the loader refuses, those with the same reason together."""
    refused = np.flatnonzero(~rows.is_measured)
    groups: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for row, effect, problem in zip(
        refused, rows.texts("effect", refused), rows.texts("problem", refused), strict=True
    ):
        groups[effect, _VARIES.sub("...", problem)].append((row, problem))
    found = []
    for (effect, words), members in groups.items():
        problems = {problem for _, problem in members}
        examples = [Example(rows.name(row), problem) for row, problem in members[:SHOWN]]
        reason = problems.pop() if len(problems) == 1 else words
        found += _finding(rows, effect, reason, [row for row, _ in members], examples)
    return found


def _too_many_images(rows: SurveyedRows, config: RunConfig) -> list[Finding]:
    over = np.flatnonzero(rows.has_too_many)
    reason = (
        f"more images than worker.rollout.limit_images={config.worker.rollout.limit_images}; raise it, or set it to 0 "
        "for as many as the data has"
    )
    examples = [Example(rows.name(row), f"{rows.num_images[row]} images") for row in over[:SHOWN]]
    return _finding(rows, AT_ITS_START, reason, over, examples)


def _overlong(rows: SurveyedRows, config: RunConfig) -> list[Finding]:
    """Return the over-long rows, with the longest as examples."""
    over = np.flatnonzero(rows.is_overlong)
    limit = config.data.max_prompt_length
    longest = over[np.argsort(-rows.lengths[over], kind="stable")][:SHOWN]
    examples = [Example(rows.name(row), f"{rows.lengths[row]:,} tokens") for row in longest]
    reason = f"longer than data.max_prompt_length={limit} tokens"
    if not config.data.filter_overlong_prompts:
        reason += "; raise it, or set data.filter_overlong_prompts=true"
        return _finding(rows, WHEN_DRAWN, reason, over, examples)
    found = _finding(rows, DROPPED, reason, over, examples)
    if len(over) and len(over) == rows.is_measured.sum():
        shortest = rows.lengths[over].min()
        reason = f"no prompt is left: the shortest has {shortest:,} tokens; raise data.max_prompt_length"
        found += _finding(rows, AT_ITS_START, reason, over, [])
    return found


def _answered(rows: SurveyedRows) -> list[Finding]:
    """Return the rows whose messages end with the answer, which the trainer does not show."""
    answered = np.flatnonzero(rows.table["has_answer"].fill_null(False).to_numpy())
    reason = (
        "the last message is the assistant's, and taken off as the answer; data.assistant_prefill=true continues it"
    )
    return _finding(rows, KEPT, reason, answered, [Example(rows.name(row), reason) for row in answered[:SHOWN]])


def _passed_over(rows: SurveyedRows, config: RunConfig) -> list[Finding]:
    """Return the rows without images whose other column holds one, which the model does not see."""
    column = rows.table["passed_over"]
    concerned = np.flatnonzero(column.is_valid().to_numpy())
    if not len(concerned):
        return []
    name = column[int(concerned[0])].as_py()
    reason = (
        f"column {name!r} holds an image that the model does not see, data.image_key={config.data.image_key} has none; "
        f"{image_remedy(name)}"
    )
    return _finding(rows, KEPT, reason, concerned, [Example(rows.name(row), reason) for row in concerned[:SHOWN]])


def _repeated(rows: SurveyedRows, config: RunConfig) -> list[Finding]:
    """Return the rows with the id of an earlier row: the trainer keeps them, with a number behind the id."""
    first: dict[str, int] = {}
    repeated = []
    measured = np.flatnonzero(rows.is_measured)
    for row, prompt_id in zip(measured, rows.texts("prompt_id", measured), strict=True):
        if first.setdefault(prompt_id, row) != row:
            repeated.append((row, first[prompt_id]))
    same = "prompt, answer and images" if config.data.id_key is None else f"id in column {config.data.id_key!r}"
    examples = [Example(rows.name(row), f"as {rows.name(earlier)}") for row, earlier in repeated[:SHOWN]]
    reason = f"the same {same} as an earlier row; each counts as a prompt"
    return _finding(rows, KEPT, reason, [row for row, _ in repeated], examples)
