"""Opening the user's data: files, folders, saved data sets and hub names, as memory-mapped `datasets`."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from mmr1_ds.data.answers import with_exact_answers, without_answers
from mmr1_ds.errors import UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class Source:
    """One of the user's data sets, whose rows are read on access."""

    name: str  # as the user wrote it: names the rows in errors
    rows: Dataset
    folder: str | None  # where relative image paths start; None for a hub data set

    def where(self, row: int) -> str:
        return f"{self.name} row {row} (counted from 0)"


def list_names(files: Any, key: str = "data.train_files") -> list[str]:
    """Return the names in `data.train_files`, which is a string, comma separated, or a list.

    Raises: UserError when the list is empty, or a local file is missing. Imports nothing heavy: a dry run calls this.
    """
    parts = files.split(",") if isinstance(files, str) else list(files or [])
    names = [str(part).strip() for part in parts if str(part).strip()]
    if not names:
        raise UserError(f"{key} is empty; give a file, a folder, a hub name, or a list of them")
    for name in names:
        path, _ = split_name(name)
        if not os.path.exists(path) and _looks_local(path):
            raise UserError(f"{key}: no such file or folder {path!r}")
    return names


def builder_of(path: str) -> str | None:
    """Return the builder of `datasets` that reads a file of this name, in any case of letters; None for no data."""
    return BUILDERS.get(os.path.splitext(path)[1].lower())


def split_name(name: str) -> tuple[str, str]:
    """Split `name@split` into (name, split); a path that itself contains an @ stays whole when it exists."""
    name = os.path.expanduser(name)
    if "@" not in name or os.path.exists(name):
        return name, DEFAULT_SPLIT
    path, split = name.rsplit("@", 1)
    return path, split or DEFAULT_SPLIT


def open_sources(files: Any, key: str = "data.train_files", answer_key: str | None = None) -> list[Source]:
    """Open everything in `files`, in order. answer_key: the column whose numbers keep their digits.

    Raises: UserError naming the file when it cannot be read, is empty, or has no such split.
    """
    return [_open_source(name, key, answer_key) for name in list_names(files, key)]


def _looks_local(path: str) -> bool:
    """Hub names are `name` or `owner/name`, without a data suffix."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or builder_of(path) is not None


def _open_source(name: str, key: str, answer_key: str | None) -> Source:
    from datasets import disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils import are_progress_bars_disabled

    path, split = split_name(name)
    bars_were_on = not are_progress_bars_disabled()
    disable_progress_bars()  # every rank would draw its own
    try:
        rows = _read(path, split, answer_key)
    except DatasetGenerationError as error:
        raise _cannot_read(name, key, error.__cause__ or error) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _cannot_read(name, key, error) from error
    finally:
        if bars_were_on:
            enable_progress_bars()
    if len(rows) == 0:
        raise UserError(f"{key}: {name!r} has no rows")
    return Source(name, rows, _folder(path))


def _read(path: str, split: str, answer_key: str | None) -> Dataset:
    import datasets

    if os.path.isfile(path):
        builder = builder_of(path)
        if os.path.getsize(path) == 0:
            raise ValueError("the file is empty")
        if builder is None:
            raise ValueError(f"unknown kind of file {os.path.splitext(path)[1]!r}; known: {', '.join(BUILDERS)}")
        return _read_files(builder, [path], split, answer_key)
    if os.path.isdir(path) and _is_saved(path):
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.Dataset):
            if split != DEFAULT_SPLIT:
                raise ValueError(f"it is one saved data set and has no split {split!r}; leave @{split} out")
            return saved
        if split not in saved:
            raise ValueError(f"no split {split!r}; there are {', '.join(saved)}")
        return saved[split]
    if os.path.isdir(path):
        files = (datasets.load_dataset_builder(path).config.data_files or {}).get(split, [])
        builders = {builder_of(file) for file in files}
        for builder in ("csv", "json"):
            if builders == {builder}:
                return _read_files(builder, list(files), split, answer_key)
    return datasets.load_dataset(path, split=split)


def _read_files(builder: str, files: list[str], split: str, answer_key: str | None) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if builder == "csv":
        return datasets.load_dataset("csv", data_files={split: files}, split=split, **_as_text(files[0]))
    if builder != "json" or answer_key is None:
        return datasets.load_dataset(builder, data_files=files, split=split)
    try:
        rows = datasets.load_dataset("json", data_files={split: files}, split=split)
    except (DatasetGenerationError, ValueError) as error:
        # Whole numbers at the beginning of a long file and others further on, which the first ones' type does not hold;
        # or numbers of more digits than the reader takes.
        folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "mmr1_ds_rows")
        try:
            others = [without_answers(file, answer_key, folder) for file in files]
        except (ValueError, AttributeError):  # no rows of JSON: the reader's words are the better ones
            raise error from error.__cause__  # which says what is wrong with the row
        rows = datasets.load_dataset("json", data_files={split: others}, split=split)
    return with_exact_answers(rows, files, answer_key)


def _as_text(file: str) -> dict[str, Any]:
    """Return what makes every cell of a CSV file the text that it is: 007 is no 7, and NA an answer."""
    from datasets import Features, Value

    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv_rows(lines)
        header = next(rows, [])
        check_cells(next((row for row in rows if row), []), header, 0)
    columns = [name or f"Unnamed: {place}" for place, name in enumerate(header)]  # as pandas, which reads it, calls it
    return {"features": Features({name: Value("string") for name in columns}), "keep_default_na": False}


def csv_rows(lines: TextIO) -> Iterator[list[str]]:
    """Yield the rows of an open CSV file. A cell may be as long as an image in base64."""
    csv.field_size_limit(2**31 - 1)  # of the process; the module's own is 128 KB
    yield from csv.reader(lines)


def check_cells(row: Sequence[str], header: Sequence[str], place: int) -> None:
    """Check a row of a CSV file. Raises: ValueError for more cells than columns: pandas takes the first for a name."""
    if len(row) > len(header):
        raise ValueError(
            f"row {place} (counted from 0) has {len(row)} cells, the header {len(header)}; put texts with commas in "
            "quotes"
        )


def _is_saved(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, mark)) for mark in ("state.json", "dataset_dict.json"))


def _folder(path: str) -> str | None:
    if os.path.isdir(path):
        return path
    return (os.path.dirname(path) or ".") if os.path.isfile(path) else None


def _cannot_read(name: str, key: str, error: BaseException) -> UserError:
    return UserError(f"{key}: cannot read {name!r}: {first_line(error)}")
