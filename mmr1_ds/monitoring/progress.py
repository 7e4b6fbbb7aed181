"""The progress of a run, as bars on a terminal and as occasional log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

FIGURES = (  # that matter at a glance: label, metric, format
    ("reward", "reward/overall", ".3f"),
    ("accuracy", "reward/accuracy", ".3f"),
    ("effective", "curriculum/effective_group_fraction", ".2f"),
    ("length", "response_length/mean", ".1f"),
    ("val accuracy", "val/accuracy_reward", ".3f"),
)


def is_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def progress(total: int, description: str, with_lines: bool = True) -> Iterator[Callable[[int], None]]:
    """Show the progress of a long stage. Yields a function that takes how many more are done.

    A terminal shows a bar; elsewhere, with `with_lines`, a log line appears about every tenth of the way.
    """
    if is_terminal():
        with bar_of(total, description, leave=False) as bar:
            yield lambda count: bar.update(count) and None
    elif with_lines:
        yield _line_progress(total, description)
    else:
        yield lambda count: None


@contextmanager
def bar_of(total: int, description: str, **options: Any) -> Iterator[Any]:
    """Show a bar while inside. Yields: tqdm's. options: tqdm's."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

    with (
        logging_redirect_tqdm([logging.getLogger("mmr1_ds")]),
        tqdm(total=total, desc=description, disable=False, dynamic_ncols=True, **options) as bar,
    ):
        yield bar


def _line_progress(total: int, description: str) -> Callable[[int], None]:
    """Log a line whenever another tenth of the way is done."""
    done, started = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done
        tenths_before = done * 10 // max(1, total)
        done += count
        if done * 10 // max(1, total) > tenths_before:
            left = (time.monotonic() - started) / done * max(0, total - done)
            logger.info("%s: %d of %d, %s left", description, done, total, format_duration(left))

    return advance


class TimeLeft:
    """An estimate of the seconds to the last step, from the time between recent steps and all that is done there."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._recent_seconds: deque[float] = deque(maxlen=20)  # a step
        self._previous: tuple[int, float] | None = None  # step logged last, and when

    def after(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """Return the seconds left after `step`, None before there is an estimate. Call it once a log line."""
        now = time.monotonic()
        if self._previous is None:
            # The clock has run since before the models loaded: believe the step's own timing.
            if "timing_s/step" in metrics:
                self._recent_seconds.append(metrics["timing_s/step"])
        elif step > self._previous[0]:
            self._recent_seconds.append((now - self._previous[1]) / (step - self._previous[0]))
        # What a step logs later, as its validation, is part of the time to the next.
        if self._previous is None or step > self._previous[0]:
            self._previous = (step, now)
        if not self._recent_seconds:
            return None
        return sum(self._recent_seconds) / len(self._recent_seconds) * max(0, self._total_steps - step)


def format_duration(seconds: float) -> str:
    """Return a duration like 42 s, 3:05 or 1:02:03."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    hours, minutes = total // 3600, total // 60 % 60
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"
