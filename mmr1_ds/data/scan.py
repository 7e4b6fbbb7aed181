"""One pass over the rows before training: ids, lengths, categories, and every mistake a row can show early."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
CACHE_FOLDER = "mmr1_ds_scans_5"  # inside the cache of `datasets`; counted up when the columns of a scan change
ROWS_A_PROCESS = 20_000  # below this, starting processes costs more than it saves
_ROWS_A_VIDEO = 100  # opening one takes so many times as long as measuring a row of text
ROWS_KEPT = 1_000  # below this, a scan is not worth a file
_TOLD_SECONDS = 30.0


@dataclass(frozen=True)
class Scan:
    """What the scan found about all R rows, over-long ones included, in the order of the files."""

    prompt_ids: pa.Array  # (R,) strings, all different
    lengths: np.ndarray  # (R,) int32 tokens, images and videos included
    categories: pa.Array  # (R,) strings
    num_images: np.ndarray  # (R,) int32
    num_videos: np.ndarray  # (R,) int32
    has_answer: np.ndarray  # (R,) bool: the assistant's last turn was taken off the prompt
    sketches: np.ndarray | None  # (R, SKETCH_BYTES) uint8, if asked for; see `text_features`


def scan_rows(
    readers: list[RowReader], data: DataConfig, prompt_encoder: PromptEncoder, with_sketches: bool = False
) -> Scan:
    """Scan all sources. The result is the same on every rank. Raises: UserError naming the first bad row found."""
    import pyarrow as pa

    tables = [_scan_reader(reader, data, prompt_encoder, with_sketches) for reader in readers]
    table = pa.concat_tables(tables).combine_chunks()
    return Scan(
        prompt_ids=_distinct(_flat(table["prompt_id"]), data),
        lengths=table["length"].to_numpy().astype(np.int32),
        categories=_flat(table["category"]),
        num_images=table["num_images"].to_numpy().astype(np.int32),
        num_videos=table["num_videos"].to_numpy().astype(np.int32),
        has_answer=table["has_answer"].to_numpy(),
        sketches=sketches_in(table["sketch"]) if with_sketches else None,
    )


def sketches_in(column: pa.ChunkedArray) -> np.ndarray:
    """The sketches as rows of bytes, (R, SKETCH_BYTES) uint8."""
    parts = [np.empty(0, dtype=np.uint8)]
    for chunk in column.chunks:
        if len(chunk) > 0:
            start, stop = chunk.offset * SKETCH_BYTES, (chunk.offset + len(chunk)) * SKETCH_BYTES
            parts.append(np.frombuffer(chunk.buffers()[1], dtype=np.uint8)[start:stop])
    return np.concatenate(parts).reshape(-1, SKETCH_BYTES)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    return column.cast(pa.large_string()).combine_chunks()  # 64-bit offsets: ten million ids pass 2 GiB


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
        }
        kinds = [("prompt_id", pa.string()), ("length", pa.int32()), ("category", pa.string())]
        kinds += [("num_images", pa.int32()), ("num_videos", pa.int32()), ("has_answer", pa.bool_())]
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
        *((SKETCH_VERSION,) if with_sketches else ()),
    )  # fmt: skip
    rows = (reader.name, reader.rows._fingerprint, len(reader))
    key.update(repr((rows, settings, prompt_encoder.fingerprint())).encode())
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


def _distinct(prompt_ids: pa.Array, data: DataConfig) -> pa.Array:
    """Ids made different: later rows with the same id get `#1`, `#2`, in the order of the files."""
    import pyarrow as pa
    import pyarrow.compute as pc

    counts = pc.value_counts(prompt_ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated) == 0:
        return prompt_ids
    logger.warning("%d prompts occur more than once (first: id %s)", len(repeated), repeated[0].as_py())
    positions = np.flatnonzero(pc.is_in(prompt_ids, repeated).to_numpy(zero_copy_only=False))
    seen: Counter[str] = Counter()
    renamed = []
    for prompt_id in prompt_ids.take(positions).to_pylist():
        renamed.append(prompt_id if seen[prompt_id] == 0 else f"{prompt_id}#{seen[prompt_id]}")
        seen[prompt_id] += 1
    mask = np.zeros(len(prompt_ids), dtype=bool)
    mask[positions] = True
    distinct = pc.replace_with_mask(prompt_ids, mask, pa.array(renamed, pa.large_string()))
    if pc.count_distinct(distinct).as_py() != len(distinct):
        raise UserError(f"data.id_key {data.id_key!r}: ids repeat even after numbering; give every row its own id")
    return distinct
