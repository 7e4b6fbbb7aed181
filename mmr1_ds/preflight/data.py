"""Checks of the data files that a run names: they exist, and their first rows have what the run reads."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.columns import ROWS_LOOKED_AT, check_images_are_read, image_remedy, unread_image_columns
from mmr1_ds.data.paths import column_of
from mmr1_ds.data.rows import check_columns
from mmr1_ds.data.sources import BUILDERS, builder_of, check_cells, csv_rows, list_names, split_name
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.files import json_object
from mmr1_ds.preflight.models import model_takes_images
from mmr1_ds.preflight.videos import check_first_videos

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_TEXT = "utf-8-sig"  # passes over the byte order mark that spreadsheets write, as `datasets` does
_MAX_COUNTED_BYTES = 256 * 2**20  # a larger JSON file is not counted: a dry run stays quick


@dataclass(frozen=True)
class FileSummary:
    """One data set as the user named it."""

    name: str
    is_local: bool  # False: taken for a hub name, not checked
    num_rows: int | None  # before over-long prompts are dropped; None = not counted
    has_images: bool | None  # None = unknown
    has_videos: bool | None = None


@dataclass(frozen=True)
class DataSummary:
    """All data sets of one key."""

    files: tuple[FileSummary, ...]

    @property
    def num_rows(self) -> int | None:
        """Return P before filtering, None when a part of it is unknown."""
        counts = [file.num_rows for file in self.files]
        return None if None in counts else sum(count for count in counts if count is not None)


def check_data(data: DataConfig, key: str, model: ModelConfig, engine: str = "auto") -> DataSummary:
    """Check that the files of data.train_files or data.val_files (`key`) exist and their first rows have the columns.

    Images in a column of another name are an error for a local model that takes images, else a warning. Videos of the
    first rows are opened where PyAV is installed. Args: engine: worker.rollout.engine, servers take no videos.
    Raises: UserError naming the file, the key, and the columns of the file.
    """
    files = data.train_files if key == "train_files" else data.val_files
    if not isinstance(files, str) and not (isinstance(files, list) and all(isinstance(name, str) for name in files)):
        raise UserError(f"data.{key} must be a path, a hub name or a list of them, got {files}")
    if data.image_dir is not None and not Path(data.image_dir).is_dir():
        raise UserError(f"data.image_dir: no such folder {data.image_dir!r}")
    names = list_names(files, f"data.{key}")
    return DataSummary(tuple(_look_at(name, data, f"data.{key}", model, engine) for name in names))


def _look_at(name: str, data: DataConfig, key: str, model: ModelConfig, engine: str) -> FileSummary:
    path_text, split = split_name(name)
    path = Path(path_text)
    if not os.path.exists(path):
        return FileSummary(name, is_local=False, num_rows=None, has_images=None)
    parts = _data_files(path, split, key) if path.is_dir() else [path]
    if not parts:
        raise UserError(f"{key}: the folder {path} holds no data files ({', '.join(BUILDERS)})")
    counts = [_readable(_count_rows, part, key) for part in parts]
    num_rows = None if None in counts else sum(count for count in counts if count is not None)
    if num_rows == 0:
        raise UserError(f"{key}: {name!r} has no rows")
    columns = _readable(_columns, parts[0], key)
    if columns is not None:
        check_columns(name, columns, data)
        takes_images = model_takes_images(model)
        _check_images(name, parts[0], data, key, takes_images)
        check_first_videos(name, path, _readable(_first_rows, parts[0], key), data, takes_images, engine)
    return FileSummary(name, True, num_rows, _has(data.image_key, columns), _has(data.video_key, columns))


def _has(key: str | None, columns: list[str] | None) -> bool | None:
    if columns is None:
        return None
    return key is not None and column_of(key, columns) is not None


def _check_images(name: str, part: Path, data: DataConfig, key: str, takes_images: bool | None) -> None:
    """Raises: UserError for images that would be passed over; a warning where the model may take none."""
    if takes_images is False:
        return
    columns = _readable(_columns, part, key) or []
    rows = _readable(_first_rows, part, key)
    if builder_of(part.name) == "parquet" and data.image_key is not None and column_of(data.image_key, columns) is None:
        rows = [*rows, *_readable(partial(_filled_rows, unread_image_columns(columns, data)), part, key)]
    try:
        column = check_images_are_read(name, rows, columns, data)
    except UserError as error:
        if takes_images:
            raise
        logger.warning("%s", error)
        return
    if column is not None:
        logger.warning(
            "%s: column %r holds images in rows where data.image_key=%s has none; %s",
            name, column, data.image_key, image_remedy(column),
        )  # fmt: skip


def _data_files(folder: Path, split: str, key: str) -> list[Path]:
    """List the files of one split of a folder: a saved data set, or files named after the split or after none."""
    if (folder / split / "state.json").is_file():
        folder = folder / split
    if (folder / "state.json").is_file():
        state = json_object(folder / "state.json", key)
        try:
            return [folder / part["filename"] for part in state["_data_files"]]
        except (KeyError, TypeError):
            raise UserError(f"{key}: {folder / 'state.json'} lists no _data_files; save the data set again") from None
    files = sorted(path for path in folder.rglob("*") if builder_of(path.name) and path.is_file())
    if loud := next((path for path in files if path.suffix not in BUILDERS), None):
        raise UserError(
            f"{key}: {str(loud)!r} would be passed over: in folders suffixes are in small letters "
            f"({', '.join(BUILDERS)}); rename it"
        )
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())) for path in files}
    named = [path for path in files if split.lower() in words[path]]
    return named or [path for path in files if not words[path] & {"train", "test", "validation", "val", "dev"}]


def _readable(read: Callable[[Path], Result], path: Path, key: str) -> Result:
    """Return what `read` finds in a data file. Raises: UserError naming the file it cannot read."""
    if builder_of(path.name) is None:
        raise UserError(f"{key}: unknown kind of file {str(path)!r}; known: {', '.join(BUILDERS)}")
    try:
        return read(path)
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise UserError(f"{key}: cannot read {str(path)!r}: {str(error).splitlines()[0]}") from None


def _columns(path: Path) -> list[str] | None:
    """Return the column names of a data file, from its schema or first row; None if that takes reading it all."""
    if builder_of(path.name) == "parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)
    if builder_of(path.name) == "arrow":
        return list(_open_arrow(path).schema.names)
    if builder_of(path.name) == "csv":
        with path.open(encoding=_TEXT, newline="") as file:
            return next(csv_rows(file), [])
    rows = _first_json_rows(path, 1)
    return list(rows[0]) if rows else None


def _first_rows(path: Path) -> list[dict[str, Any]]:
    """Return rows of a data file with all their columns, from its beginning; few or none where rows are large."""
    if builder_of(path.name) == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=ROWS_LOOKED_AT)
            return next((batch.to_pylist() for batch in batches), [])
    if builder_of(path.name) == "arrow":
        reader = _open_arrow(path)
        batch = reader.get_batch(0) if hasattr(reader, "get_batch") else reader.read_next_batch()
        return list(batch.slice(0, ROWS_LOOKED_AT).to_pylist())
    if builder_of(path.name) == "csv":
        with path.open(encoding=_TEXT, newline="") as file:
            lines = csv_rows(file)
            header = next(lines, [])
            filled = list(itertools.islice((line for line in lines if line), ROWS_LOOKED_AT))
        for place, line in enumerate(filled):
            check_cells(line, header, place)
        return [dict(itertools.zip_longest(header, line)) for line in filled]
    return _first_json_rows(path, ROWS_LOOKED_AT)


def _filled_rows(columns: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Return the first cell of each column of a Parquet file that is not null, in a row of its own."""
    import pyarrow.parquet

    rows = []
    with pyarrow.parquet.ParquetFile(path) as file:
        for column in columns:
            batches = file.iter_batches(batch_size=ROWS_LOOKED_AT, columns=[column])
            filled = (batch.column(0).drop_null() for batch in batches)
            rows += [{column: cells[0].as_py()} for cells in itertools.islice((one for one in filled if len(one)), 1)]
    return rows


def _open_arrow(path: Path) -> Any:
    """Open an Arrow stream (what `datasets` writes) or file."""
    import pyarrow

    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source)


def _first_json_rows(path: Path, most: int) -> list[dict[str, Any]]:
    """Return the first objects of JSON lines or of a JSON list, as far as they lie in the first megabyte."""
    with path.open(encoding=_TEXT) as file:
        head = file.read(2**20).lstrip()
    decoder = json.JSONDecoder()
    rows: list[dict[str, Any]] = []
    position = len(head) - len(head.removeprefix("[").lstrip())
    while len(rows) < most and position < len(head):
        try:
            row, position = decoder.raw_decode(head, position)
        except json.JSONDecodeError:
            if not rows and len(head) < 2**19:
                raise
            break  # a row that is cut: images inside; or the end of the list
        if not isinstance(row, dict):
            raise ValueError("its rows are not objects")
        rows.append(row)
        position += len(head[position:]) - len(head[position:].lstrip(", \t\r\n")) if len(rows) < most else 0
    return rows


def _count_rows(path: Path) -> int | None:
    if builder_of(path.name) == "parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    if builder_of(path.name) == "arrow":
        return sum(_arrow_batches(path))
    if path.stat().st_size > _MAX_COUNTED_BYTES or builder_of(path.name) == "csv":
        return None  # quoted line breaks: a CSV is counted by reading it
    with path.open(encoding=_TEXT) as file:
        if file.read(2**16).lstrip().startswith("["):
            file.seek(0)
            return len(json.load(file))
        file.seek(0)
        return sum(1 for line in file if line.strip())


def _arrow_batches(path: Path) -> Iterator[int]:
    reader = _open_arrow(path)
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
    else:
        yield from (batch.num_rows for batch in reader)
