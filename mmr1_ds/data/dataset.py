"""The prompts of a run: rows of the user's files, scanned once for ids and lengths, encoded when drawn."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.config import DataConfig
from mmr1_ds.data.chat import load_format_prompt
from mmr1_ds.data.columns import image_remedy
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.rows import RowReader, open_readers
from mmr1_ds.data.scan import Scan, rows_key, scan_rows, sketches_in
from mmr1_ds.data.sources import open_sources
from mmr1_ds.errors import UserError
from mmr1_ds.records import Prompt

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_DECODING_THREADS = 4  # a rank


class TextColumn(Sequence[str]):
    """A column of texts that stays in Arrow's memory, or in the file it is mapped from: a value is made on access."""

    def __init__(
        self, values: pa.ChunkedArray, rows: np.ndarray | None = None, renamed: Mapping[int, str] | None = None
    ) -> None:
        """
        Args:
            rows: (P,), the places in `values` that the column has, ascending; None = all.
            renamed: other texts for some of the places.
        """
        self._values, self._rows = values, rows
        self._renamed = {} if renamed is None else renamed
        self._renamed_rows = np.array(sorted(self._renamed), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._values) if self._rows is None else len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._read(start, stop) if step == 1 else [self[place] for place in range(start, stop, step)]
        place = range(len(self))[int(index)]  # from the end, or an error
        row = place if self._rows is None else int(self._rows[place])
        return self._renamed.get(row) or self._values[row].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 65536):
            yield from self._read(start, min(start + 65536, len(self)))

    def _read(self, start: int, stop: int) -> list[str]:
        if stop <= start:
            return []
        rows = np.arange(start, stop) if self._rows is None else self._rows[start:stop]
        first, last = int(rows[0]), int(rows[-1])
        texts = self._values.slice(first, last + 1 - first).to_pylist()
        for row in self._renamed_rows[slice(*np.searchsorted(self._renamed_rows, [first, last + 1]))].tolist():
            texts[row - first] = self._renamed[row]
        return texts if len(texts) == len(rows) else [texts[row - first] for row in rows.tolist()]


class PromptDataset:
    """The P prompts of a run, in the order of the files. A row is read and decoded on access.

    `prompt_ids` and `categories` are sequences of P strings. What a rank holds of each prompt is its row, 4 bytes,
    where some are left out; all else is read where it lies.
    """

    def __init__(self, readers: list[RowReader], scan: Scan, data: DataConfig, prompt_encoder: PromptEncoder) -> None:
        self._readers = readers
        self._starts = list(itertools.accumulate((len(reader) for reader in readers), initial=0))
        self.encoder = prompt_encoder
        self._max_length = data.max_prompt_length
        self._lengths, self._num_images, self._num_videos = scan.lengths, scan.num_images, scan.num_videos
        self._rows = _kept_rows(scan.lengths, data)  # None = all
        self._sketches = scan.sketches
        self.num_filtered = 0 if self._rows is None else len(scan.lengths) - len(self._rows)
        self.prompt_ids = TextColumn(scan.prompt_ids, self._rows, scan.renamed)
        self.categories = TextColumn(scan.categories, self._rows)
        self.max_images, self.max_videos = (self._most(column) for column in (self._num_images, self._num_videos))
        self.fingerprint = _fingerprint(self.prompt_ids, data, self.max_videos > 0)
        self.source_names = _short_names([reader.name for reader in readers])

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, index: int) -> Prompt:
        """Return the prompt at `index` in [0, P). Raises: UserError naming the row when it cannot be used."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        row = self._row(index)
        reader, local = self._place(row)
        num_tokens = self._lengths[row].as_py()
        if num_tokens > self._max_length:
            raise UserError(
                f"{reader.where(local)}: the prompt has {num_tokens} tokens, over data.max_prompt_length="
                f"{self._max_length}; raise it, or set data.filter_overlong_prompts=true"
            )
        content = reader.read(local)
        where = reader.where(local)
        token_ids, images, videos = self.encoder.encode(content.prompt, content.images, where, content.videos)
        return Prompt(
            index=int(index),
            prompt_id=self.prompt_ids[index],
            token_ids=token_ids,
            images=images,
            videos=videos,
            ground_truth=content.ground_truth,
            category=self.categories[index],
            num_tokens=num_tokens,
            columns=partial(reader.reward_columns.read, local),
            messages=partial(reader.reward_columns.messages, local),
        )

    def prompts(self, indices: Sequence[int] | np.ndarray) -> list[Prompt]:
        """Return the prompts at these places. Rows with videos are decoded in threads, which FFmpeg lets run."""
        places = [int(index) for index in indices]
        if self.max_videos == 0:
            return [self[place] for place in places]
        with ThreadPoolExecutor(_DECODING_THREADS, "videos") as threads:
            return list(threads.map(self.__getitem__, places))

    def take_sketches(self) -> np.ndarray | None:
        """Return the sketches of the prompts, (P, SKETCH_BYTES) uint8, if they were asked for, and let go of them."""
        column, self._sketches = self._sketches, None
        if column is None:
            return None
        sketches = sketches_in(column)
        return sketches if self._rows is None else sketches[self._rows]

    @property
    def rows_fingerprint(self) -> str:
        """A digest of the rows that the files hold, whatever their ids, and of where their images lie."""
        found = [(rows_key(reader), reader.media_keys) for reader in self._readers]
        return hashlib.blake2b(repr(found).encode()).hexdigest()

    @property
    def sources(self) -> np.ndarray:
        """Each prompt's place in `source_names`, (P,) uint16, made anew."""
        sources = np.repeat(np.arange(len(self._readers), dtype=np.uint16), np.diff(self._starts))
        return sources if self._rows is None else sources[self._rows]

    def source_name(self, index: int) -> str:
        """Return the name of the prompt's source."""
        return self.source_names[self._source(self._row(index))]

    def check_images(self, limit: int) -> None:
        """Check the number of images. Raises: UserError naming the first prompt with more than `limit` images."""
        row = self._first_over(self._num_images, limit)
        if row is not None:
            reader, local = self._place(row)
            raise UserError(
                f"{reader.where(local)}: the prompt has {self._num_images[row]} images, over "
                f"worker.rollout.limit_images={limit}; raise it, or set it to 0 for as many as the data has"
            )

    def check_no_videos(self, reason: str) -> None:
        """Check that no prompt has a video. Raises: UserError naming the first one that has, and the reason."""
        row = self._first_over(self._num_videos, 0)
        if row is not None:
            reader, local = self._place(row)
            raise UserError(f"{reader.where(local)}: the prompt has a video and {reason}")

    def _most(self, column: pa.ChunkedArray) -> int:
        """The largest number of a prompt."""
        found = [counts[kept].max(initial=0) for _, counts, kept in self._parts(column)]
        return int(max(found, default=0))

    def _first_over(self, column: pa.ChunkedArray, limit: int) -> int | None:
        """The row of the first prompt with a larger number."""
        for start, counts, kept in self._parts(column):
            over = np.flatnonzero((counts > limit) & kept)
            if len(over):
                return start + int(over[0])
        return None

    def _parts(self, column: pa.ChunkedArray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the first row of each chunk of a column, its numbers, and which of them are of prompts."""
        start = 0
        for chunk, lengths in zip(column.chunks, self._lengths.chunks, strict=True):  # of one table: cut alike
            kept = np.ones(len(chunk), dtype=bool)
            if self._rows is not None:
                kept = lengths.to_numpy() <= self._max_length
            yield start, chunk.to_numpy(), kept
            start += len(chunk)

    def _row(self, index: int) -> int:
        return int(index) if self._rows is None else int(self._rows[index])

    def _source(self, row: int) -> int:
        return bisect.bisect_right(self._starts, row) - 1

    def _place(self, row: int) -> tuple[RowReader, int]:
        """The reader of a row of the scan, and the row in it."""
        source = self._source(row)
        return self._readers[source], row - self._starts[source]


def load_dataset(
    files: Any,
    data: DataConfig,
    prompt_encoder: PromptEncoder,
    key: str = "data.train_files",
    limit_images: int = 0,
    with_sketches: bool = False,
) -> PromptDataset:
    """Open `files` and scan every row once: prompt, answer, image headers, length.

    Args: files: as `data.train_files`; key: the config key they came from, for errors; limit_images: most images a
        prompt may have, 0 = any number; with_sketches: also to take down what `text_features` are made from.
    Raises: UserError naming the file, and the row where one is at fault.
    """
    import pyarrow.compute as pc

    readers = open_readers(open_sources(files, key, data.answer_key), data, prompt_encoder.is_multimodal)
    scan = scan_rows(readers, data, prompt_encoder, with_sketches)
    dataset = PromptDataset(readers, scan, data, prompt_encoder)
    num_answered = pc.sum(scan.has_answer).as_py() or 0
    if num_answered:
        logger.warning(
            "%s: %d of %d prompts end with a message of the assistant, which is taken off as the answer; "
            "data.assistant_prefill=true continues it",
            key, num_answered, len(scan.has_answer),
        )  # fmt: skip
    num_blind = len(scan.passed_over) - scan.passed_over.null_count
    if num_blind:
        column = scan.passed_over.drop_null()[0].as_py()
        logger.warning(
            "%s: column %r holds images in %d of %d rows where data.image_key=%s has none, which no one sees; "
            "%s", key, column, num_blind, len(scan.passed_over), data.image_key, image_remedy(column),
        )  # fmt: skip
    if dataset.num_filtered:
        logger.warning(
            "%s: dropped %d of %d prompts longer than data.max_prompt_length=%d tokens",
            key, dataset.num_filtered, len(scan.lengths), data.max_prompt_length,
        )  # fmt: skip
    if len(dataset) == 0:
        raise UserError(
            f"{key}: all {len(scan.lengths)} prompts are longer than data.max_prompt_length={data.max_prompt_length} "
            f"tokens (the shortest has {pc.min(scan.lengths)}); raise it"
        )
    if limit_images > 0:
        dataset.check_images(limit_images)
    return dataset


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the files' names without folder and suffix; with their places where two are alike."""
    stems = [PurePath(name).stem for name in names]
    return [stem if stems.count(stem) == 1 else f"{place}_{stem}" for place, stem in enumerate(stems)]


def _kept_rows(lengths: pa.ChunkedArray, data: DataConfig) -> np.ndarray | None:
    """The rows that are short enough, (P,) int32 where that holds them; None = all are."""
    if not data.filter_overlong_prompts:
        return None
    kept, start = [], 0
    for chunk in lengths.chunks:
        kept.append(start + np.flatnonzero(chunk.to_numpy() <= data.max_prompt_length))
        start += len(chunk)
    rows = np.concatenate([np.empty(0, dtype=np.int64), *kept])
    if len(rows) == start:
        return None
    return rows.astype(np.int32) if start < 1 << 31 else rows


def _fingerprint(prompt_ids: TextColumn, data: DataConfig, has_videos: bool) -> str:
    """Digest of what the run trains on: the ids in order, and the settings that shape a prompt."""
    digest = hashlib.blake2b(digest_size=16)
    settings = (data.prompt_key, data.answer_key, data.image_key, data.system_prompt)
    template = load_format_prompt(data.format_prompt)  # its text: the file may change under the same name
    more: tuple[Any, ...] = (True,) if data.assistant_prefill else ()
    if has_videos:
        more += (data.video_fps, data.video_max_frames, data.video_min_pixels, data.video_max_pixels)
    digest.update(repr((settings, template, data.min_pixels, data.max_pixels, *more)).encode())
    for prompt_id in prompt_ids:
        digest.update(prompt_id.encode() + b"\0")
    return digest.hexdigest()
