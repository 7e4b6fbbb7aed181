"""Keys that reach into nested columns: `reward_model.ground_truth`, `answers.0`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def column_of(path: str, columns: Collection[str]) -> str | None:
    """Return the column that a key names or reaches into; None without one. A column of that very name comes first."""
    if path in columns:
        return path
    parts = path.split(".")
    heads = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((head for head in heads if head in columns), None)


def at_path(row: Mapping[str, Any], path: str) -> Any:
    """Return what a key names in a row, a number counting in a list from 0; None where there is nothing."""
    column = column_of(path, row)
    if column is None:
        return None
    value = row[column]
    rest = path[len(column) + 1 :]
    if not rest:
        return value
    if isinstance(value, Mapping):
        return at_path(value, rest)
    head, _, tail = rest.partition(".")
    if isinstance(value, (list, tuple)) and head.isdecimal() and int(head) < len(value):
        return at_path({head: value[int(head)]}, f"{head}.{tail}" if tail else head)
    return None
