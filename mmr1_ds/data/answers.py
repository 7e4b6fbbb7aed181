"""Answers of JSON files as they are written: a reader of columns makes one type of them, and loses digits on the way.

Beside 0.5, 123456789012345678 would become 1.2345678901234568e+17, and "007" beside 7 would become 7.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmr1_ds.data.paths import at_path

if TYPE_CHECKING:
    from datasets import Dataset

_EXACT = ("string", "large_string", "int64", "bool", "null")
_TEXT = "utf-8-sig"  # passes over the byte order mark that spreadsheets write


def with_exact_answers(rows: Dataset, files: Sequence[str], answer_key: str) -> Dataset:
    """Return the rows of JSON files with a column `answer_key` of answers as they are written.

    That is a column of its own also where `answer_key` is a path into another. Rows whose answers keep their digits
    anyway (text, whole numbers), or are neither text nor numbers, are returned as they are.
    """
    from datasets import Value

    feature = feature_at(rows.features, answer_key)
    if isinstance(feature, Value) and feature.dtype in _EXACT:
        return rows
    answers = list(_answers(files, answer_key))
    if feature is None and not any(answers):  # no such column
        return rows
    if len(answers) != len(rows) or not all(answer is None or isinstance(answer, str) for answer in answers):
        return rows
    digest = hashlib.blake2b(rows._fingerprint.encode(), digest_size=8)
    digest.update(json.dumps([answer_key, answers]).encode())
    others = rows.remove_columns(answer_key) if answer_key in rows.column_names else rows
    return others.add_column(answer_key, answers, new_fingerprint=digest.hexdigest(), feature=Value("string"))


def without_answers(file: str, answer_key: str, folder: str) -> str:
    """Write the rows of a JSON file without their answers, whose types no column holds. Returns: the new file."""
    state = os.stat(file)
    key = repr((os.path.abspath(file), state.st_size, state.st_mtime_ns, answer_key))
    path = Path(folder) / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # every rank writes it, the last one's stays
            whole = Path(scratch) / "rows.jsonl"
            with whole.open("w", encoding="utf-8") as lines:
                for row in _rows(file):
                    _remove(row, answer_key)
                    lines.write(json.dumps(row) + "\n")
            whole.replace(path)
    return str(path)


class _Number(str):
    """A number as it is written."""


def feature_at(features: Any, path: str) -> Any:
    """Return the type of a column or of a part of one; None without it."""
    if path in features:
        return features[path]
    head, _, rest = path.partition(".")
    inner = features.get(head)
    if isinstance(inner, dict) and rest:
        return feature_at(inner, rest)
    return inner  # a list, or values of several types: to be looked into row by row


def _answers(files: Sequence[str], answer_key: str) -> Iterator[Any]:
    for file in files:
        for row in _rows(file, exactly=True):
            answer = at_path(row, answer_key)
            yield str(answer) if isinstance(answer, str | bool) else answer


def _rows(file: str, exactly: bool = False) -> Iterator[dict[str, Any]]:
    numbers: dict[str, Any] = {"parse_int": _Number, "parse_float": _Number} if exactly else {}
    if exactly:
        numbers["parse_constant"] = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}.get
    decoder = json.JSONDecoder(**numbers)
    with open(file, encoding=_TEXT) as lines:
        first = lines.read(1)
        while first.isspace():
            first = lines.read(1)
        if first == "[":
            yield from decoder.decode(first + lines.read())
            return
        yield decoder.decode(first + lines.readline())
        yield from (decoder.decode(line) for line in lines if line.strip())


def _remove(row: dict[str, Any], path: str) -> None:
    head, _, rest = path.partition(".")
    if path in row:
        del row[path]
    elif rest and isinstance(row.get(head), dict):
        _remove(row[head], rest)
