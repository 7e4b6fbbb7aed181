"""The places that metrics and records are written to: JSON lines files, the console, tensorboard. More: `trackers`."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmr1_ds.errors import UserError, remedy
from mmr1_ds.io import in_words, sync
from mmr1_ds.monitoring.progress import FIGURES, TimeLeft, bar_of, format_duration
from mmr1_ds.monitoring.thinning import thin_lines

logger = logging.getLogger(__name__)

RECORDS = (  # besides metrics.jsonl; a line each
    "generations",  # of a validation's response
    "draws",  # a line a step: the prompts that it learned from
    "observations",  # a line a step: predicted and observed pass rates of the groups that the curriculum saw
    "curriculum",  # a line a refresh of the table: histograms, and the prompts that moved since the last
    "samples",  # a line a training group: what was asked and answered
)
_TEXTS = ("generations", "samples")
_BLOCK_BYTES = 1 << 20  # read at a time from the end of a file
_HISTOGRAMS = ("weight", "pass_rate")  # in a record of the curriculum


class Writer:
    """One place that metrics are written to. A writer ignores the kinds that it does not support."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one flat dictionary of a step; another one of the same step is merged into it."""

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write sampled responses, which all have the same keys."""

    def record(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """Write a line of one of `RECORDS`."""

    def close(self) -> None:
        """Write what is left and close."""


class _Lines:
    """A file of lines. Lines that the disk refuses wait in memory until the next one, and the run continues."""

    def __init__(self, path: Path, last_line_bytes: int = 0) -> None:
        """last_line_bytes: of the line that `replace_last` may put another in place of; 0 = none."""
        self._path = path
        self._offset = (path.stat().st_size if path.exists() else 0) - last_line_bytes  # of the first line in memory
        self._written = next(lines_from_end(path))[1] if last_line_bytes else b""  # may be replaced
        self._waiting: list[bytes] = []

    def append(self, line: bytes, is_final: bool = True) -> None:
        """is_final: the line will not be replaced."""
        self._offset += len(self._written)
        self._written = b""
        self._waiting.append(line)
        self._write(is_final)

    def replace_last(self, line: bytes) -> None:
        if self._waiting:
            self._waiting[-1] = line
        else:
            self._waiting, self._written = [line], b""
        self._write(is_final=False)

    def thin(self, most_bytes: int) -> None:
        """Drop old steps where the file has more bytes."""
        if self._offset <= most_bytes or self._waiting:
            return
        try:
            self._offset = thin_lines(self._path, most_bytes)
        except OSError as error:
            with suppress(OSError):
                self._offset = self._path.stat().st_size
            logger.warning("%s stays over trainer.samples_limit_gb (%s)", self._path, in_words(error))

    def close(self) -> None:
        """Write what still waits, or log that it is lost."""
        if self._waiting:
            self._write(is_final=True)
        if self._waiting:
            logger.error("%s: the last %d lines are lost, the disk did not take them", self._path, len(self._waiting))

    def _write(self, is_final: bool) -> None:
        try:
            with self._path.open("r+b" if self._path.exists() else "wb") as file:
                # Over the old line, then cut: cut first, a kill in between would lose it.
                file.seek(self._offset)
                file.write(b"".join(self._waiting))
                file.truncate()
        except OSError as error:
            if len(self._waiting) == 1:
                words = in_words(error)
                logger.warning("%s is not written (%s); its lines are kept in memory till it is", self._path, words)
            return
        self._offset += sum(map(len, self._waiting[:-1]))
        self._written = self._waiting[-1]
        self._waiting = []
        if is_final:
            self._offset += len(self._written)
            self._written = b""


class JsonLinesWriter(Writer):
    """Writes `metrics.jsonl`, one flat object a step, and a file for each of `RECORDS`; none stays open."""

    def __init__(self, run_dir: Path, resumed_step: int, most_text_bytes: int = 1 << 40) -> None:
        """most_text_bytes: of each of the records that hold texts."""
        self._most_text_bytes = most_text_bytes
        paths = {name: run_dir / f"{name}.jsonl" for name in ("metrics", *RECORDS)}
        for path in paths.values():
            drop_lines_after(path, resumed_step)
        self._last, length = last_line(paths["metrics"])
        self._metrics = _Lines(paths["metrics"], length)
        self._records = {name: _Lines(paths[name]) for name in RECORDS}
        self.elapsed_seconds = float(self._last.get("perf/elapsed_seconds") or 0.0)  # of the run so far
        self._last_renewal = last_line(paths["curriculum"])[0].get("step", -1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        last_step = self._last.get("step", -1)
        assert step >= last_step, f"step {step} logged after step {last_step}"
        is_new = step > last_step
        self._last = {"step": step} if is_new else self._last
        self._last |= {name: json_number(value) for name, value in metrics.items()}
        line = json.dumps(self._last).encode() + b"\n"
        if is_new:
            self._metrics.append(line, is_final=False)
        else:
            self._metrics.replace_last(line)

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self.record("generations", step, {name: _json_value(value) for name, value in row.items()})

    def record(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        if name == "curriculum":
            # A run that was stopped between the checkpoint before a refresh and its end refreshes again.
            if step <= self._last_renewal:
                return
            self._last_renewal = step
        self._records[name].append(json.dumps({"step": step, **row}, ensure_ascii=False).encode() + b"\n")
        if name in _TEXTS:
            self._records[name].thin(self._most_text_bytes)

    def close(self) -> None:
        for lines in (self._metrics, *self._records.values()):
            lines.close()


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a torn last line goes too. A fresh run sets the whole file aside."""
    if not path.exists():
        return
    if step == 0:
        numbers = itertools.count(1)
        path.rename(next(name for n in numbers if not (name := path.with_name(f"{path.stem}.{n}.jsonl")).exists()))
        return
    size = path.stat().st_size
    for start, line in lines_from_end(path):  # steps never fall: what is to go stands at the end
        if line.endswith(b"\n") and json.loads(line)["step"] <= step:
            break
        size = start
    os.truncate(path, size)
    sync(path)


def lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield where each line begins, and the line, from the last to the first; no more is read than is asked for."""
    with path.open("rb") as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start > 0:
            length = min(_BLOCK_BYTES, start)
            start -= length
            file.seek(start)
            lines = (file.read(length) + rest).splitlines(keepends=True)
            rest = lines[0]
            place = start + sum(map(len, lines))
            for line in reversed(lines[1:]):
                place -= len(line)
                yield place, line
        if rest:
            yield 0, rest


def last_line(path: Path) -> tuple[dict[str, Any], int]:
    """The last object of a JSON lines file and the length of its line in bytes; ({}, 0) without one."""
    if not path.exists():
        return {}, 0
    line = next(lines_from_end(path), (0, b""))[1]
    return (json.loads(line), len(line)) if line else ({}, 0)


def json_number(value: float) -> float | None:
    """JSON has no NaN or infinity: null."""
    number = float(value)
    return number if math.isfinite(number) else None


def _json_value(value: Any) -> Any:
    if isinstance(value, (str, int)) or value is None:
        return value
    return json_number(value)


class ConsoleWriter(Writer):
    """Writes one log line a step."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._time_left = TimeLeft(total_steps)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"step {step}/{self._total_steps}"]
        parts += [f"{label} {metrics[name]:{form}}" for label, name, form in FIGURES if name in metrics]
        stages = {
            name.removeprefix("timing_s/"): seconds
            for name, seconds in metrics.items()
            if name.startswith("timing_s/") and name != "timing_s/step"
        }
        if stages:
            parts.append("seconds " + " ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items()))
        time_left = self._time_left.after(step, metrics)
        if time_left is not None:
            parts.append(f"{format_duration(time_left)} left")
        logger.info("%s", " | ".join(parts))

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        shown = ", ".join(f"{name} {value!r}" for name, value in rows[0].items())
        logger.info("step %d, first of %d generations: %s", step, len(rows), shown)


class BarWriter(Writer):
    """Shows a bar over the steps on a terminal, with the figures that matter and the time left."""

    def __init__(self, total_steps: int, resumed_step: int) -> None:
        self._time_left = TimeLeft(total_steps)
        self._shown: dict[str, str] = {}
        self._stack = ExitStack()
        form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        self._bar = self._stack.enter_context(bar_of(total_steps, "training", initial=resumed_step, bar_format=form))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # Validation comes every few steps: its figure stays until the next.
        self._shown |= {label: f"{metrics[name]:{form}}" for label, name, form in FIGURES if name in metrics}
        left = self._time_left.after(step, metrics)
        figures = [f"{label} {value}" for label, value in self._shown.items()]
        self._bar.n = step
        self._bar.set_postfix_str(", ".join(figures if left is None else [*figures, f"{format_duration(left)} left"]))

    def close(self) -> None:
        self._stack.close()


class TensorboardWriter(Writer):
    """Writes event files in `<run_dir>/tensorboard`, without responses, which generations.jsonl has."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"trainer.logger has tensorboard, which does not import ({error}); {remedy('gpu')}"
            ) from error
        # Tensorboard then hides the events of steps that the resumed run repeats.
        purge_step = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def record(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        for key, counts, edges in histograms(name, row):
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            total = sum(count * middle for count, middle in zip(counts, middles, strict=True))
            squares = sum(count * middle * middle for count, middle in zip(counts, middles, strict=True))
            self._writer.add_histogram_raw(
                key, min=edges[0], max=edges[-1], num=sum(counts), sum=total, sum_squares=squares,
                bucket_limits=edges[1:], bucket_counts=list(counts), global_step=step,
            )  # fmt: skip

    def close(self) -> None:
        self._writer.close()


def histograms(name: str, row: Mapping[str, Any]) -> Iterator[tuple[str, list[int], list[float]]]:
    """Yield metric, counts and edges of what a record holds as histograms."""
    if name != "curriculum":
        return
    for part in _HISTOGRAMS:
        counts = row[f"{part}_counts"]
        yield f"curriculum/{part}_histogram", counts, [k / len(counts) for k in range(len(counts) + 1)]
