"""One pass over the rows before training: ids, lengths, categories, and every mistake a row can show early."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.config import DataConfig
from mmr1_ds.data.columns import ROWS_LOOKED_AT, check_videos_are_read
from mmr1_ds.data.rows import Row, RowReader
from mmr1_ds.data.text_features import SKETCH_BYTES, SKETCH_VERSION, sketch
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from mmr1_ds.data.encoding import PromptEncoder, PromptText

logger = logging.getLogger(__name__)

BATCH_ROWS = 256
CACHE_FOLDER = "mmr1_ds_scans_6"  # inside the cache of `datasets`; counted up when the columns of a scan change
ROWS_A_PROCESS = 20_000  # below this, starting processes costs more than it saves
_ROWS_A_VIDEO = 100  # opening one takes so many times as long as measuring a row of text
ROWS_KEPT = 1_000  # below this, a scan is not worth a file
_TOLD_SECONDS = 30.0
_SLICE = 1 << 16  # rows held as Python values at a time


@dataclass(frozen=True)
class Scan:
    """What the scan found about all R rows, over-long ones included, in the order of the files.

    Columns of Arrow, a chunk a source: those of a large source are pages of a file that the ranks of a machine share.
    """

    prompt_ids: pa.ChunkedArray  # (R,) strings
    renamed: Mapping[int, str]  # rows whose id an earlier row has, and what they are called: then all are different
    lengths: pa.ChunkedArray  # (R,) int32 tokens, images and videos included
    categories: pa.ChunkedArray  # (R,) strings
    num_images: pa.ChunkedArray  # (R,) int32
    num_videos: pa.ChunkedArray  # (R,) int32
    has_answer: pa.ChunkedArray  # (R,) bool: the assistant's last turn was taken off the prompt
    passed_over: pa.ChunkedArray  # (R,) strings: the column of an image beside an empty data.image_key; null = none
    sketches: pa.ChunkedArray | None  # (R,) of SKETCH_BYTES each, if asked for; see `text_features`


def scan_rows(
    readers: list[RowReader], data: DataConfig, prompt_encoder: PromptEncoder, with_sketches: bool = False
) -> Scan:
    """Scan all sources. The result is the same on every rank. Raises: UserError naming the first bad row found."""
    import pyarrow as pa

    # Source by source: one that is mapped and in one piece is not copied, as all of them together would be.
    tables = [_scan_reader(reader, data, prompt_encoder, with_sketches).combine_chunks() for reader in readers]
    table = pa.concat_tables(tables)
    return Scan(
        prompt_ids=table["prompt_id"],
        renamed=_renamed(table["prompt_id"], data),
        lengths=table["length"],
        categories=table["category"],
        num_images=table["num_images"],
        num_videos=table["num_videos"],
        has_answer=table["has_answer"],
        passed_over=table["passed_over"],
        sketches=table["sketch"] if with_sketches else None,
    )


def sketches_in(column: pa.ChunkedArray) -> np.ndarray:
    """The sketches as rows of bytes, (R, SKETCH_BYTES) uint8."""
    parts = [np.empty(0, dtype=np.uint8)]
    for chunk in column.chunks:
        if len(chunk) > 0:
            start, stop = chunk.offset * SKETCH_BYTES, (chunk.offset + len(chunk)) * SKETCH_BYTES
            parts.append(np.frombuffer(chunk.buffers()[1], dtype=np.uint8)[start:stop])
    return np.concatenate(parts).reshape(-1, SKETCH_BYTES)


class BatchScan:
    """A callable that scans a batch of rows; a class, so that it can be sent to worker processes."""

    def __init__(self, reader: RowReader, prompt_encoder: PromptEncoder, with_sketches: bool = False) -> None:
        self._reader = reader
        self._with_sketches = with_sketches
        self._encoder = prompt_encoder

    def __call__(self, table: pa.Table, indices: Sequence[int]) -> pa.Table:
        import pyarrow as pa

        rows = self._reader.decode(table)
        places = [self._reader.where(index) for index in indices]
        lengths, prompts, sizes = self._measure(rows, places)
        columns = {
            "prompt_id": [self._reader.prompt_id(row, where) for row, where in zip(rows, places, strict=True)],
            "length": lengths,
            "category": [self._reader.category(row) for row in rows],
            "num_images": [len(prompt.image_order) for prompt in prompts],
            "num_videos": [len(prompt.video_order) for prompt in prompts],
            "has_answer": [prompt.has_answer for prompt in prompts],
            "passed_over": [
                None if prompt.image_order else self._reader.passes_over(row, where)
                for row, prompt, where in zip(rows, prompts, places, strict=True)
            ],
        }
        kinds = [("prompt_id", pa.string()), ("length", pa.int32()), ("category", pa.string())]
        kinds += [("num_images", pa.int32()), ("num_videos", pa.int32()), ("has_answer", pa.bool_())]
        kinds += [("passed_over", pa.string())]
        if self._with_sketches:
            columns["sketch"] = sketch([prompt.text for prompt in prompts], lengths, sizes)
            kinds.append(("sketch", pa.binary(SKETCH_BYTES)))
        return pa.table(columns, schema=pa.schema(kinds))

    def _measure(
        self, rows: list[Row], places: list[str]
    ) -> tuple[list[int], list[PromptText], list[list[tuple[int, int]]]]:
        """Return the tokens of each prompt, images and videos included, the prompt, and the sizes of its images."""
        references = [self._reader.references(row) for row in rows]
        videos = [self._reader.video_references(row) for row in rows]
        prompts = []
        for row, its_images, its_videos, where in zip(rows, references, videos, places, strict=True):
            check_videos_are_read(row, self._reader.unread_videos, where)
            self._reader.ground_truth(row, where)  # raises for a missing answer
            cell = self._reader.prompt(row)
            prompts.append(self._encoder.prompt_text(cell, len(its_images), len(its_videos), where))
        lengths, image_sizes = [], []
        tokenized = self._encoder.tokenize([prompt.text for prompt in prompts])
        for token_ids, its_images, its_videos, prompt, where in zip(
            tokenized, references, videos, prompts, places, strict=True
        ):
            self._encoder.check_placeholders(token_ids, len(prompt.image_order), len(prompt.video_order), where)
            sizes = [self._reader.image_source.size(reference, where) for reference in its_images]
            tokens = [self._encoder.num_image_tokens(*size, where) for size in sizes]
            clips = [self._reader.video_source.open(reference, where) for reference in its_videos]
            video_tokens = [self._encoder.num_video_tokens(clip, where) for clip in clips]
            length = len(token_ids) + sum(tokens[place] - 1 for place in prompt.image_order)
            lengths.append(length + sum(video_tokens[place] - 1 for place in prompt.video_order))
            image_sizes.append(sizes)
        return lengths, prompts, image_sizes


def rows_key(reader: RowReader) -> tuple[str, str, int]:
    """Return what says that the rows of a source are those of another start."""
    return reader.name, reader.rows._fingerprint, len(reader)


def work_of(reader: RowReader) -> int:
    """Return the work of scanning a source, in rows of text."""
    return len(reader) * (_ROWS_A_VIDEO if reader.reads_videos else 1)


def _scan_reader(reader: RowReader, data: DataConfig, prompt_encoder: PromptEncoder, with_sketches: bool) -> pa.Table:
    scan = BatchScan(reader, prompt_encoder, with_sketches)
    # Files beside the rows may change without them: their scan is kept where it takes long alone.
    least = 2 * ROWS_A_PROCESS if _names_files(reader) else ROWS_KEPT
    if len(reader) < least:
        return _scan_in_place(reader, scan)
    try:
        return _kept_scan(reader, scan, data, prompt_encoder, with_sketches)
    except OSError as error:
        logger.warning("the scan of %s cannot be kept (%s): every rank scans it", reader.name, error)
        return _scan_in_place(reader, scan)


def _names_files(reader: RowReader) -> bool:
    """Whether the first rows have images or videos that they do not hold themselves."""
    for row in reader.decode(reader.rows[: min(len(reader), ROWS_LOOKED_AT)]):
        for item in (*reader.references(row), *reader.video_references(row)):
            held = item.get("bytes") if isinstance(item, Mapping) else item
            if isinstance(held, str) or held is None:
                return True
    return False


def _scan_in_place(reader: RowReader, scan: BatchScan) -> pa.Table:
    import pyarrow as pa

    parts, told = [], time.monotonic()
    for start in range(0, len(reader), BATCH_ROWS):
        stop = min(start + BATCH_ROWS, len(reader))
        parts.append(scan(reader.rows[start:stop], range(start, stop)))
        if time.monotonic() - told > _TOLD_SECONDS:
            told = time.monotonic()
            logger.info("scanned %d of %d rows of %s", stop, len(reader), reader.name)
    return pa.concat_tables(parts)


def _kept_scan(
    reader: RowReader, scan: BatchScan, data: DataConfig, prompt_encoder: PromptEncoder, with_sketches: bool
) -> pa.Table:
    """Scan a source once a machine, a large one in several processes: other ranks and later starts map the result."""
    import datasets
    from filelock import FileLock
    from pyarrow import feather

    processes = min(data.filter_overlong_prompts_workers, os.cpu_count() or 1, work_of(reader) // ROWS_A_PROCESS)
    key = hashlib.blake2b(digest_size=16)
    settings = (
        data.prompt_key, data.answer_key, data.image_key, data.video_key, data.id_key, data.category_key,
        data.image_dir, data.allow_any_image_path, data.max_image_pixels, data.video_fps,
        *((SKETCH_VERSION,) if with_sketches else ()), *reader.unread_images,
    )  # fmt: skip
    key.update(repr((rows_key(reader), settings, prompt_encoder.fingerprint())).encode())
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, CACHE_FOLDER)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, key.hexdigest() + ".arrow")
    with FileLock(path + ".lock"):
        if not os.path.exists(path):
            logger.info(
                "scanning %d rows of %s; ranks of this machine and later starts read the result",
                len(reader),
                reader.name,
            )
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                if processes > 1:
                    found = reader.rows.map(
                        scan,
                        batched=True,
                        batch_size=BATCH_ROWS,
                        with_indices=True,
                        num_proc=processes,
                        desc="scanning prompts",
                        remove_columns=reader.rows.column_names,
                        new_fingerprint=key.hexdigest(),
                        cache_file_name=os.path.join(scratch, "part.arrow"),
                    ).data.table
                else:
                    found = _scan_in_place(reader, scan)
                whole = os.path.join(scratch, "whole.arrow")
                # In one piece and not compressed, so that the ranks of a machine map the same pages.
                feather.write_feather(found.combine_chunks(), whole, compression="uncompressed", chunksize=len(found))
                os.replace(whole, path)
        return feather.read_table(path, memory_map=True)


def in_slices(column: pa.ChunkedArray) -> Iterator[tuple[int, list[Any]]]:
    """Yield where each slice begins, and its values as Python has them: all at once would take gigabytes."""
    for start in range(0, len(column), _SLICE):
        yield start, column.slice(start, _SLICE).to_pylist()


def _renamed(prompt_ids: pa.ChunkedArray, data: DataConfig) -> dict[int, str]:
    """Names for rows whose id an earlier row has: `#1`, `#2` behind it, in the order of the files.

    By hashes first, 8 bytes a row: a table of all ids would take gigabytes of every rank.
    """
    hashes = np.empty(len(prompt_ids), dtype=np.int64)
    for start, ids in in_slices(prompt_ids):
        hashes[start : start + len(ids)] = np.fromiter(map(hash, ids), dtype=np.int64, count=len(ids))
    ordered = np.sort(hashes)
    candidates = _of_hashes(prompt_ids, hashes, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
    counts = Counter(candidates.values())
    repeated = [prompt_id for prompt_id, count in counts.items() if count > 1]
    if not repeated:
        return {}
    logger.warning("%d prompts occur more than once (first: id %s)", len(repeated), repeated[0])
    seen: Counter[str] = Counter()
    renamed = {}
    for row, prompt_id in candidates.items():
        if seen[prompt_id] > 0:
            renamed[row] = f"{prompt_id}#{seen[prompt_id]}"
        seen[prompt_id] += 1
    names = {*renamed.values()}
    taken = _of_hashes(prompt_ids, hashes, np.unique(np.fromiter(map(hash, names), dtype=np.int64, count=len(names))))
    if len(names) < len(renamed) or any(prompt_id in names for row, prompt_id in taken.items() if row not in renamed):
        raise UserError(f"data.id_key {data.id_key!r}: ids repeat even after numbering; give every row its own id")
    return renamed


def _of_hashes(prompt_ids: pa.ChunkedArray, hashes: np.ndarray, wanted: np.ndarray) -> dict[int, str]:
    """The rows with one of these hashes, ascending, and their ids. Args: wanted: sorted."""
    found: dict[int, str] = {}
    for start in range(0, len(hashes) if len(wanted) else 0, _SLICE):
        part = hashes[start : start + _SLICE]
        places = np.flatnonzero(wanted[np.minimum(np.searchsorted(wanted, part), len(wanted) - 1)] == part)
        if len(places):
            ids = prompt_ids.slice(start, len(part)).take(places).to_pylist()
            found |= zip((start + places).tolist(), ids, strict=True)
    return found
