"""Every answer of a validation, a line each, in `eval/step_N/answers.jsonl`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmr1_ds.io import in_words
from mmr1_ds.monitoring.thinning import thin_folders

logger = logging.getLogger(__name__)

FILE = "answers.jsonl"
Rows = Sequence[Mapping[str, Any]]


class AnswerLog:
    """Writes the answers of validations. A disk that refuses them costs the answers, and not the run."""

    def __init__(self, folder: Path, is_main: bool, most_bytes: int = 1 << 40) -> None:
        """folder: `eval` of the run; is_main: False writes nothing; most_bytes: of the answers of all steps."""
        self._folder, self._is_main, self._most_bytes = folder, is_main, most_bytes

    @contextmanager
    def of_step(self, step: int, continued: bool = False) -> Iterator[Callable[[Rows], None]]:
        """Open the file of a step, in place of an earlier one. Yields: what takes rows and writes them at once.

        continued: an earlier one stays, and what is written comes behind it.
        """
        path = self._folder / f"step_{step}" / FILE
        works = self._is_main

        def write(rows: Rows, mode: str = "a") -> None:
            nonlocal works
            if not works:
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open(mode, encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            except OSError as error:
                works = False
                logger.warning("%s is not written (%s); its answers are lost, the run goes on", path, in_words(error))

        write((), "a" if continued else "w")
        yield write
        try:
            if works:
                thin_folders(self._folder, FILE, self._most_bytes, keep=step)
        except OSError as error:
            logger.warning("%s stays over trainer.samples_limit_gb (%s)", self._folder, in_words(error))
