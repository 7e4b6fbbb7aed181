"""Reading a run's JSON lines files, which may be long and may end in a line that is still being written.

They are read line by line. A step that occurs again (the run resumed from a checkpoint) replaces what the
file has from that step on.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NAN = math.nan


class LineReader:
    """Yields (offset in bytes, object) of each line that holds an object with a step.

    A torn last line, of a live or killed run, is skipped. `num_unreadable`: lines before it that are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_unreadable = 0

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self.num_unreadable = 0
        if not self.path.is_file():
            return
        pending, offset = 0, 0
        with self.path.open("rb") as file:
            for line in file:
                start, offset = offset, offset + len(line)
                self.num_unreadable, pending = self.num_unreadable + pending, 0
                found = _object(line)
                if found is None:
                    pending = int(bool(line.strip()))
                else:
                    yield start, found

    def at(self, offset: int) -> dict[str, Any]:
        """Return the object of the line that begins at this offset."""
        with self.path.open("rb") as file:
            file.seek(offset)
            found = _object(file.readline())
        return found or {}


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    return found


class MetricsTable:
    """The columns of metrics.jsonl; steps rise strictly."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Add one step. It replaces what the table has from this step on."""
        keep = bisect_left(self._steps, line["step"])
        if keep < len(self._steps):
            del self._steps[keep:]
            for column in self._columns.values():
                del column[keep:]
        self._steps.append(line["step"])
        for name, value in line.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            column = self._columns.setdefault(name, array("d"))
            column.extend([_NAN] * (keep - len(column)))
            column.append(value if math.isfinite(value) else _NAN)

    @property
    def steps(self) -> np.ndarray:
        """The steps, (S,) int64."""
        return np.array(self._steps, dtype=np.int64)

    def column(self, name: str) -> np.ndarray | None:
        """Return a column, (S,) float64 with NaN where a step has no value; None when no step has one."""
        found = self._columns.get(name)
        if found is None:
            return None
        values = np.full(len(self._steps), np.nan)
        values[: len(found)] = found
        return values if np.isfinite(values).any() else None

    def names(self, prefix: str) -> list[str]:
        """Return the columns with this prefix, without it, in the order in which they came."""
        return [name.removeprefix(prefix) for name in self._columns if name.startswith(prefix)]


@dataclass(frozen=True)
class Observations:
    """The groups that the curriculum observed, from observations.jsonl, in the order of the steps."""

    steps: np.ndarray  # (K,) int64
    prompts: np.ndarray  # (K,) int64, indices in the data set
    predicted: np.ndarray  # (K,) float64, NaN = never seen before
    pass_rates: np.ndarray  # (K,) float64, NaN = unscored
    num_responses: np.ndarray  # (K,) int64


def read_metrics(reader: LineReader) -> MetricsTable:
    table = MetricsTable()
    for _, line in reader:
        table.add(line)
    return table


def read_observations(reader: LineReader) -> Observations:
    """Read observations.jsonl; a line whose lists differ in length is skipped."""
    steps, prompts, num_responses = array("q"), array("q"), array("q")
    predicted, pass_rates = array("d"), array("d")
    columns = (steps, prompts, num_responses, predicted, pass_rates)
    for _, line in reader:
        keep = bisect_left(steps, line["step"])
        if keep < len(steps):
            for column in columns:
                del column[keep:]
        lists = [line.get(name) for name in ("prompts", "num_responses", "predicted", "pass_rates")]
        if not all(isinstance(values, list) and len(values) == len(lists[0] or ()) for values in lists):
            continue
        indices, counts, before, after = ([*(values or ())] for values in lists)
        steps.extend([line["step"]] * len(indices))
        prompts.extend(indices)
        num_responses.extend(counts)
        predicted.extend(_NAN if value is None else value for value in before)
        pass_rates.extend(_NAN if value is None else value for value in after)
    integers = (np.array(column, dtype=np.int64) for column in (steps, prompts, num_responses))
    step, prompt, count = integers
    return Observations(step, prompt, np.array(predicted), np.array(pass_rates), count)


@dataclass(frozen=True)
class TableLook:
    """The table after a refresh, a line of curriculum.jsonl."""

    step: int
    kind: str  # full or online
    weight_counts: np.ndarray  # (10,) int64
    pass_rate_counts: np.ndarray  # (10,) int64
    num_unknown: int
    weight_transitions: np.ndarray | None  # (10, 10) int64, from row to column
    pass_rate_transitions: np.ndarray | None


def read_curriculum(reader: LineReader) -> list[TableLook]:
    found: list[TableLook] = []
    for _, line in reader:
        while found and found[-1].step >= line["step"]:
            found.pop()
        weights, pass_rates = _counts(line.get("weight_counts"), 1), _counts(line.get("pass_rate_counts"), 1)
        if weights is None or pass_rates is None:
            continue
        moves = [_counts(line.get(f"{name}_transitions"), 2) for name in ("weight", "pass_rate")]
        unknown = int(line.get("num_unknown") or 0)
        found.append(TableLook(line["step"], str(line.get("kind")), weights, pass_rates, unknown, *moves))
    return found


def _counts(values: Any, dimensions: int) -> np.ndarray | None:
    """(10,) or (10, 10) int64; None for anything else."""
    try:
        found = np.array(values, dtype=np.int64)
    except (TypeError, ValueError):
        return None
    return found if found.shape == (10,) * dimensions else None


@dataclass(frozen=True)
class SampleIndex:
    """The places of each prompt's samples in samples.jsonl: prompt -> [(step, offset in bytes)], steps rising."""

    reader: LineReader
    places: dict[int, list[tuple[int, int]]]

    def read(self, offset: int) -> dict[str, Any]:
        return self.reader.at(offset)


def index_samples(reader: LineReader) -> SampleIndex:
    entries: list[tuple[int, int, int]] = []  # step, prompt, offset
    last = -1
    for offset, line in reader:
        if line["step"] < last:
            entries = [entry for entry in entries if entry[0] < line["step"]]
        last = line["step"]
        if isinstance(line.get("index"), int):
            entries.append((line["step"], line["index"], offset))
    places: dict[int, list[tuple[int, int]]] = {}
    for step, prompt, offset in entries:
        places.setdefault(prompt, []).append((step, offset))
    return SampleIndex(reader, places)


def last_generations(reader: LineReader, most: int) -> list[dict[str, Any]]:
    """Return at most `most` samples of the last validation."""
    found: list[dict[str, Any]] = []
    for _, line in reader:
        if found and line["step"] != found[0]["step"]:
            found = []
        if len(found) < most:
            found.append(line)
    return found
