"""Reading rows by the run's keys: prompt, answer, images, videos, id, category."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.config import DataConfig
from mmr1_ds.data.answers import feature_at
from mmr1_ds.data.chat import IMAGES, VIDEOS
from mmr1_ds.data.columns import (
    ROWS_LOOKED_AT,
    check_images_are_read,
    image_in,
    image_remedy,
    needed_columns,
    unread_image_columns,
    unread_videos,
)
from mmr1_ds.data.images import ImageReference, ImageSource, image_references, update_digest
from mmr1_ds.data.paths import at_path, column_of
from mmr1_ds.data.reward_columns import RewardColumns, check_reward_columns, undecoded_features
from mmr1_ds.data.sources import Source
from mmr1_ds.data.videos import Clip, VideoReference, VideoSource, update_video_digest, video_references
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from PIL.Image import Image

Row = Mapping[str, Any]
_VERL_ANSWER = "reward_model.ground_truth"


@dataclass(frozen=True)
class RowContent:
    """The content of a row, ready to be encoded."""

    prompt: object  # the prompt column's cell: a string or a chat
    images: list[Image]  # RGB, as large as they came
    videos: list[Clip]  # not decoded yet
    ground_truth: str


class RowReader:
    """One source seen through the run's keys."""

    def __init__(self, source: Source, data: DataConfig, takes_images: bool = False) -> None:
        """Check the keys. Args: takes_images: whether the model does.

        Raises: UserError naming a key that is no column, and the columns that exist; or, for a model that takes
            images, a column with images that would be passed over.
        """
        self._source = source
        self._data = data
        check_columns(source.name, source.rows.column_names, data)
        names = source.rows.column_names
        self._image_key = data.image_key if data.image_key and column_of(data.image_key, names) else None
        self._video_key = data.video_key if data.video_key and column_of(data.video_key, names) else None
        self.unread_videos = unread_videos(names, data)
        self.unread_images = self._columns_beside(names) if takes_images else []
        columns = list(dict.fromkeys([*needed_columns(data, names), *self.unread_videos, *self.unread_images]))
        # As Arrow tables: `datasets` would decode images itself, and its errors do not name the row.
        self.rows: Dataset = source.rows.select_columns(columns).with_format("arrow")
        self._features = undecoded_features(source.rows, columns)
        self._answer_type = getattr(feature_at(source.rows.features, data.answer_key), "dtype", None)
        self.reward_columns = RewardColumns(source.name, source.rows, data)
        self.image_source = ImageSource(
            _image_folder(source, data), _image_roots(source, data), data.max_image_pixels
        )
        self.video_source = VideoSource(self.image_source, data.video_fps)

    @property
    def media_keys(self) -> tuple[str | None, str | None]:
        """Return the folder that images are looked for in, and the column of videos."""
        return self._data.image_dir, self._video_key

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def name(self) -> str:
        """The source as the user wrote it."""
        return self._source.name

    @property
    def reads_videos(self) -> bool:
        """Whether there is a column of videos."""
        return self._video_key is not None

    def where(self, row: int) -> str:
        """Return the name of a row, as errors give it."""
        return self._source.where(row)

    def read(self, index: int) -> RowContent:
        """Read one row, decode its images and open its videos. Raises: UserError naming the row."""
        (row,) = self.decode(self.rows[index : index + 1])
        where = self.where(index)
        images = [self.image_source.load(reference, where) for reference in self.references(row)]
        videos = [self.video_source.open(reference, where) for reference in self.video_references(row)]
        return RowContent(self.prompt(row), images, videos, self.ground_truth(row, where))

    def decode(self, table: pa.Table) -> list[Row]:
        """Return rows of a table as Python values, images still encoded."""
        return [self._features.decode_example(row) for row in table.to_pylist()]

    def _columns_beside(self, names: Sequence[str]) -> list[str]:
        """Return the columns to look into for images that are passed over: by their name, or by the first rows."""
        first = self._source.rows.select(range(min(ROWS_LOOKED_AT, len(self._source.rows)))).with_format("arrow")
        features = undecoded_features(self._source.rows, self._source.rows.column_names)
        # Row by row: a row with all its images may be large.
        rows = (features.decode_example(first[at : at + 1].to_pylist()[0]) for at in range(len(first)))
        found = check_images_are_read(self.name, rows, names, self._data)
        named = unread_image_columns(names, self._data)
        return named if found is None else [*named, str(column_of(found, names))]

    def passes_over(self, row: Row, where: str) -> str | None:
        """Return the column of an image that is passed over, for a row from which none is read.

        Raises: UserError naming the row and the column, where `data.image_key` is no column that may be meant.
        """
        column = image_in(row, self.unread_images)
        if column is not None and self._image_key is None:
            raise UserError(f"{where}: column {column!r} holds an image that no one would see; {image_remedy(column)}")
        return column

    def prompt(self, row: Row) -> object:
        return at_path(row, self._data.prompt_key)

    def references(self, row: Row) -> list[ImageReference]:
        """Return the row's images: those of its column, then those that its messages carry."""
        column = [] if self._image_key is None else image_references(at_path(row, self._image_key))
        return [*column, *IMAGES.in_messages(self.prompt(row))]

    def video_references(self, row: Row) -> list[VideoReference]:
        """Return the row's videos: those of its column, then those that its messages carry."""
        column = [] if self._video_key is None else video_references(at_path(row, self._video_key))
        return [*column, *VIDEOS.in_messages(self.prompt(row))]

    def ground_truth(self, row: Row, where: str) -> str:
        """Return the answer as a string. Raises: UserError when the row has no answer."""
        answer = at_path(row, self._data.answer_key)
        if answer is None or _is_nan(answer) or (isinstance(answer, str) and not answer.strip()):
            raise UserError(f"{where}: no answer in column {self._data.answer_key!r}; fill it in or remove the row")
        if isinstance(answer, float) and self._answer_type in ("float16", "float32"):
            answer = np.dtype(self._answer_type).type(answer)  # 0.1, not 0.10000000149011612
        elif not isinstance(answer, (str, int, float, Decimal)):
            raise UserError(f"{where}: the answer is {answer!r:.80}; give a string or a number")
        return str(answer)

    def prompt_id(self, row: Row, where: str) -> str:
        """Return the row's own id, or a digest of the content that is the same on every machine."""
        key = self._data.id_key
        if key is None:
            return self._digest(row, where)
        value = at_path(row, key)
        if value is None or str(value) == "":
            raise UserError(f"{where}: no id in column {key!r} (data.id_key); fill it in or leave data.id_key out")
        return str(value)

    def category(self, row: Row) -> str:
        key = self._data.category_key
        value = None if key is None else at_path(row, key)
        return "" if value is None else str(value)

    def _digest(self, row: Row, where: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        content = [self.prompt(row), self.ground_truth(row, where)]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=_digested)
        digest.update(text.encode())
        for reference in self.references(row):
            update_digest(digest, reference)
        for reference in self.video_references(row):
            update_video_digest(digest, reference)
        return digest.hexdigest()


def open_readers(sources: list[Source], data: DataConfig, takes_images: bool) -> list[RowReader]:
    """Return one reader for each source, for a model that takes images or none.

    Raises: UserError naming a missing column, or one with images that would be passed over.
    """
    return [RowReader(source, data, takes_images) for source in sources]


def check_columns(name: str, columns: Sequence[str], data: DataConfig) -> None:
    """Check the columns. Raises: UserError naming the first one that `data` asks for and `name` lacks.

    A text source may lack the default columns of images and videos, not one asked for by name.
    """
    wanted = {"prompt_key": data.prompt_key, "answer_key": data.answer_key}
    wanted |= {"id_key": data.id_key} if data.id_key is not None else {}
    wanted |= {"category_key": data.category_key} if data.category_key is not None else {}
    wanted |= {"image_key": data.image_key} if data.image_key not in (None, DataConfig.image_key) else {}
    wanted |= {"video_key": data.video_key} if data.video_key not in (None, DataConfig.video_key) else {}
    for key, column in wanted.items():
        if column_of(column, columns) is None:
            raise UserError(
                f"{name} has no column {column!r} (data.{key}); it has {', '.join(columns)}{_instead(key, columns)}"
            )
    check_reward_columns(name, columns, data)


def _instead(key: str, columns: Sequence[str]) -> str:
    """What to do about a missing column where that is known."""
    if key in ("id_key", "category_key"):
        return f"; name one of them, or set data.{key}=null"
    if key == "answer_key" and column_of(_VERL_ANSWER, columns) is not None:
        return f"; rows of verl have it in data.{key}={_VERL_ANSWER}"
    return ""


def _digested(image: object) -> str:
    """Return what stands for an image or video in a message; its bytes are in the row's digest beside it."""
    return type(image).__name__


def _is_nan(cell: object) -> bool:
    return isinstance(cell, float) and math.isnan(cell)


def _image_roots(source: Source, data: DataConfig) -> tuple[str, ...] | None:
    """Return the folders that images may lie in: of the data, data.image_dir; of a hub data set, its cache."""
    if data.allow_any_image_path:
        return None
    import datasets

    own = source.folder or str(datasets.config.HF_CACHE_HOME)
    return (own,) if data.image_dir is None else (own, data.image_dir)


def _image_folder(source: Source, data: DataConfig) -> str | None:
    if data.image_dir is None:
        return source.folder
    if not os.path.isdir(data.image_dir):
        raise UserError(f"data.image_dir: no such folder {data.image_dir!r}")
    return data.image_dir
