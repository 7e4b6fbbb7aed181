"""The prompts of a run: rows of the user's files, scanned once for ids and lengths, encoded when drawn."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.config import DataConfig
from mmr1_ds.data.chat import load_format_prompt
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.rows import RowReader, open_readers
from mmr1_ds.data.scan import Scan, scan_rows
from mmr1_ds.data.sources import open_sources
from mmr1_ds.errors import UserError
from mmr1_ds.records import Prompt

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_DECODING_THREADS = 4  # a rank


class TextColumn(Sequence[str]):
    """A list of strings held in Arrow memory: ten million ids take hundreds of megabytes less than a list."""

    def __init__(self, values: pa.Array) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self._values[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 65536):
            yield from self._values.slice(start, 65536).to_pylist()


class PromptDataset:
    """The P prompts of a run, in the order of the files. A row is read and decoded on access.

    `prompt_ids` and `categories` are sequences of P strings; `sources` is (P,) int64, places in `source_names`.
    """

    def __init__(self, readers: list[RowReader], scan: Scan, data: DataConfig, prompt_encoder: PromptEncoder) -> None:
        self._readers = readers
        self._starts = list(itertools.accumulate((len(reader) for reader in readers), initial=0))
        self.encoder = prompt_encoder
        self._max_length = data.max_prompt_length
        self._lengths = scan.lengths
        self._rows = _kept_rows(scan.lengths, data)
        self._num_images, self._num_videos = scan.num_images, scan.num_videos
        self._sketches = scan.sketches
        self.num_filtered = len(scan.lengths) - len(self._rows)
        self.prompt_ids = TextColumn(scan.prompt_ids.take(self._rows))
        self.categories = TextColumn(scan.categories.take(self._rows))
        self.fingerprint = _fingerprint(self.prompt_ids, data, self.max_videos > 0)
        self.sources = np.searchsorted(self._starts, self._rows, side="right") - 1
        self.source_names = _short_names([reader.name for reader in readers])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        """Return the prompt at `index` in [0, P). Raises: UserError naming the row when it cannot be used."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        row = int(self._rows[index])
        reader, local = self._place(row)
        if self._lengths[row] > self._max_length:
            raise UserError(
                f"{reader.where(local)}: the prompt has {self._lengths[row]} tokens, over data.max_prompt_length="
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
            num_tokens=int(self._lengths[row]),
            columns=partial(reader.reward_columns.read, local),
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
        sketches, self._sketches = self._sketches, None
        return None if sketches is None else sketches[self._rows]

    @property
    def max_images(self) -> int:
        """The number of images of the prompt that has the most."""
        return int(self._num_images[self._rows].max(initial=0))

    @property
    def max_videos(self) -> int:
        """The number of videos of the prompt that has the most."""
        return int(self._num_videos[self._rows].max(initial=0))

    def check_images(self, limit: int) -> None:
        """Check the number of images. Raises: UserError naming the first prompt with more than `limit` images."""
        over = self._rows[self._num_images[self._rows] > limit]
        if len(over):
            reader, local = self._place(int(over[0]))
            raise UserError(
                f"{reader.where(local)}: the prompt has {self._num_images[over[0]]} images, over "
                f"worker.rollout.limit_images={limit}; raise it, or set it to 0 for as many as the data has"
            )

    def check_no_videos(self, reason: str) -> None:
        """Check that no prompt has a video. Raises: UserError naming the first one that has, and the reason."""
        rows = self._rows[self._num_videos[self._rows] > 0]
        if len(rows):
            reader, local = self._place(int(rows[0]))
            raise UserError(f"{reader.where(local)}: the prompt has a video and {reason}")

    def _place(self, row: int) -> tuple[RowReader, int]:
        """The reader of a row of the scan, and the row in it."""
        source = bisect.bisect_right(self._starts, row) - 1
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
    readers = open_readers(open_sources(files, key, data.answer_key), data, prompt_encoder.is_multimodal)
    scan = scan_rows(readers, data, prompt_encoder, with_sketches)
    dataset = PromptDataset(readers, scan, data, prompt_encoder)
    if scan.has_answer.any():
        logger.warning(
            "%s: %d of %d prompts end with a message of the assistant, which is taken off as the answer; "
            "data.assistant_prefill=true continues it",
            key, scan.has_answer.sum(), len(scan.has_answer),
        )  # fmt: skip
    if dataset.num_filtered:
        logger.warning(
            "%s: dropped %d of %d prompts longer than data.max_prompt_length=%d tokens",
            key, dataset.num_filtered, len(scan.lengths), data.max_prompt_length,
        )  # fmt: skip
    if len(dataset) == 0:
        raise UserError(
            f"{key}: all {len(scan.lengths)} prompts are longer than data.max_prompt_length={data.max_prompt_length} "
            f"tokens (the shortest has {int(scan.lengths.min())}); raise it"
        )
    if limit_images > 0:
        dataset.check_images(limit_images)
    return dataset


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the files' names without folder and suffix; with their places where two are alike."""
    stems = [PurePath(name).stem for name in names]
    return [stem if stems.count(stem) == 1 else f"{place}_{stem}" for place, stem in enumerate(stems)]


def _kept_rows(lengths: np.ndarray, data: DataConfig) -> np.ndarray:
    if not data.filter_overlong_prompts:
        return np.arange(len(lengths))
    return np.flatnonzero(lengths <= data.max_prompt_length)


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
