"""Reading a run's JSON lines files, which may be long and may end in a line that is still being written.

A step that occurs again (the run resumed from a checkpoint) replaces what the file has from that step on.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class LineReader:
    """Yields (offset in bytes, object) of each line that holds an object with a step.

    A torn last line, of a live or killed run, is skipped. `num_unreadable`: lines before it that are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_unreadable = 0

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self.num_unreadable, offset, is_torn = 0, 0, False
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                self.num_unreadable += is_torn
                found = _object(line)
                is_torn = found is None and bool(line.strip())
                if found is not None:
                    yield offset, found
                offset += len(line)

    def at(self, offset: int) -> dict[str, Any]:
        """Return the object of the line that begins at this offset."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return _object(file.readline()) or {}


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None


def _held(steps: Sequence[int], several_a_step: bool = False) -> np.ndarray:
    """Return (L,) bool, whether each line still holds: no later line begins at its step or before it.

    Args: several_a_step: lines of one step that follow each other belong together.
    """
    starts = np.flatnonzero(np.diff(steps, prepend=-1)) if several_a_step else np.arange(len(steps))
    begun = np.array(steps, dtype=np.int64)[starts]
    later = np.append(np.minimum.accumulate(begun[::-1])[::-1], np.iinfo(np.int64).max)[1:]
    return np.repeat(begun < later, np.diff(starts, append=len(steps)))


@dataclass(frozen=True)
class MetricsTable:
    """The columns of metrics.jsonl."""

    steps: np.ndarray  # (S,) int64, rising strictly
    columns: Mapping[str, np.ndarray]  # (S,) float64, NaN where a step has no value; only those with any

    def column(self, name: str) -> np.ndarray | None:
        return self.columns.get(name)


def read_metrics(reader: LineReader) -> MetricsTable:
    steps, columns = array("q"), dict[str, "array[float]"]()
    for _, line in reader:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                column = columns.setdefault(name, array("d"))
                column.extend([math.nan] * (len(steps) - len(column)))
                column.append(value if math.isfinite(value) else math.nan)
        steps.append(line["step"])
    held = _held(steps)
    found = {}
    for name, column in columns.items():
        values = np.full(len(steps), np.nan)
        values[: len(column)] = column
        if np.isfinite(values[held]).any():
            found[name] = values[held]
    return MetricsTable(np.array(steps, dtype=np.int64)[held], found)


@dataclass(frozen=True)
class Observations:
    """The groups that the curriculum observed, from observations.jsonl, in the order of the steps."""

    steps: np.ndarray  # (K,) int64
    prompts: np.ndarray  # (K,) int64, indices in the data set
    predicted: np.ndarray  # (K,) float64, NaN = never seen before
    pass_rates: np.ndarray  # (K,) float64, NaN = unscored
    num_responses: np.ndarray  # (K,) int64


def read_observations(reader: LineReader) -> Observations:
    """Read observations.jsonl; a line whose lists differ in length is skipped."""
    steps, counts = array("q"), array("q")
    columns = {name: array("d") for name in ("prompts", "predicted", "pass_rates", "num_responses")}
    for _, line in reader:
        lists = [line.get(name) for name in columns]
        if not all(isinstance(values, list) and len(values) == len(lists[0] or ()) for values in lists):
            lists = [[] for _ in columns]
        steps.append(line["step"])
        counts.append(len(lists[0] or ()))
        for column, values in zip(columns.values(), lists, strict=True):
            column.extend(math.nan if value is None else value for value in values or ())
    held = np.repeat(_held(steps), counts)
    prompts, predicted, pass_rates, num_responses = (np.array(column)[held] for column in columns.values())
    return Observations(
        np.repeat(np.array(steps, dtype=np.int64), counts)[held],
        prompts.astype(np.int64),
        predicted,
        pass_rates,
        num_responses.astype(np.int64),
    )


@dataclass(frozen=True)
class TableLook:
    """The table after a refresh, a line of curriculum.jsonl."""

    step: int
    counts: Mapping[str, np.ndarray]  # (10,) int64 of "weight" and "pass_rate"
    num_unknown: int
    transitions: Mapping[str, np.ndarray | None]  # of the same, (10, 10) int64, from row to column


def read_curriculum(reader: LineReader) -> list[TableLook]:
    lines = [line for _, line in reader]
    found = []
    for line, holds in zip(lines, _held([line["step"] for line in lines]), strict=True):
        counts = {name: _counts(line.get(f"{name}_counts"), 1) for name in ("weight", "pass_rate")}
        known = {name: values for name, values in counts.items() if values is not None}
        if holds and len(known) == 2:
            moves = {name: _counts(line.get(f"{name}_transitions"), 2) for name in counts}
            found.append(TableLook(line["step"], known, int(line.get("num_unknown") or 0), moves))
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


def index_samples(reader: LineReader) -> SampleIndex:
    entries = [(line["step"], line.get("index"), offset) for offset, line in reader]
    places: dict[int, list[tuple[int, int]]] = {}
    for (step, prompt, offset), holds in zip(entries, _held([entry[0] for entry in entries], True), strict=True):
        if holds and isinstance(prompt, int):
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
