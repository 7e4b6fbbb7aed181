"""A table of pass rates, a line a prompt, that grows while a validation samples and is continued by the next one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmr1_ds.errors import UserError
from mmr1_ds.io import in_words, write_whole

KEY = "trainer.pass_rates"
_TENTHS, _BAR = 10, 40


class PassRates:
    """The table of one policy. For rank 0, which alone writes."""

    def __init__(self, path: Path, policy: str, num_answers: int) -> None:
        """Open the table, or the one that an earlier call left unfinished.

        Args: policy: model and step that are measured; num_answers: to each prompt.
        Raises: UserError for a table of another policy or number, and for a file that cannot be read or written.
        """
        self._path, self._policy, self._num_answers = path, policy, num_answers
        self._rates: dict[str, float | None] = {}
        try:
            text = path.read_bytes() if path.exists() else b""
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = text[: text.rfind(b"\n") + 1]  # a kill may have torn the last line
            rows = [json.loads(line) for line in whole.splitlines()]
            self._rates = {row["prompt_id"]: row["pass_rate"] for row in rows}
            found = {(row["policy"], row["num_asked"]) for row in rows}
            write_whole(path, whole)
        except OSError as error:
            raise UserError(f"{KEY}={path}: {in_words(error)}; name another file") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{KEY}={path} holds no pass rates; name another file") from error
        for other, number in found - {(policy, num_answers)}:
            raise UserError(
                f"{KEY}={path} holds pass rates of {other} by {number} answers a prompt, not of {policy} by "
                f"{num_answers}; name another file"
            )

    @property
    def prompt_ids(self) -> frozenset[str]:
        """The prompts that are in the table."""
        return frozenset(self._rates)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append prompts: {prompt_id, pass_rate, num_answers, ...}. Raises: UserError when the disk refuses them."""
        known = {"num_asked": self._num_answers, "policy": self._policy}
        lines = [json.dumps({**row, **known}, ensure_ascii=False) + "\n" for row in rows]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise UserError(f"{KEY}={self._path}: {in_words(error)}; make room and start again to go on") from error
        self._rates |= {row["prompt_id"]: row["pass_rate"] for row in rows}

    def histogram(self) -> str:
        """Describe the table: how many prompts have which pass rate, those of 0 and of 1 by themselves."""
        rates = [rate for rate in self._rates.values() if rate is not None]
        tenths = [0] * _TENTHS
        for rate in rates:
            if 0.0 < rate < 1.0:
                tenths[int(rate * _TENTHS)] += 1
        labels = [f"{tenth / _TENTHS:.1f} to {(tenth + 1) / _TENTHS:.1f}" for tenth in range(_TENTHS)]
        counts = {"0": rates.count(0.0), **dict(zip(labels, tenths, strict=True)), "1": rates.count(1.0)}
        most = max(1, *counts.values())
        lines = [f"{label:>10} {count:>8,} {'#' * round(count / most * _BAR)}" for label, count in counts.items()]
        between = sum(tenths)
        title = (
            f"pass rates of {len(rates):,} prompts by {self._num_answers} answers each, in {self._path}; "
            f"{between:,} are neither 0 nor 1"
        )
        unknown = len(self._rates) - len(rates)
        return "\n".join([title + (f"; {unknown:,} unknown" if unknown else ""), *lines])
