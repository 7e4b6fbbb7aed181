"""Columns that look as if they held images or videos, for data in which these would otherwise be passed over."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmr1_ds.config import DataConfig
from mmr1_ds.data.images import as_reference, image_references
from mmr1_ds.data.paths import at_path, column_of
from mmr1_ds.errors import UserError

ROWS_LOOKED_AT = 64

_NAME = re.compile(
    r"(images?|imgs?|pictures?|photos?|pics?|screenshots?)([ _-]?(paths?|files?|urls?|bytes|base64|b64|data|list))?",
    re.IGNORECASE,
)
# As data sets call them; not video_id, num_videos and the like.
_VIDEO_NAME = re.compile(r"videos?|(videos?|clips?)[ _-]?(paths?|files?|urls?|bytes)|mp4", re.IGNORECASE)
_SUFFIX = re.compile(r"\S.*\.(png|jpe?g|webp|gif|bmp|tiff?|avif)(\?\S*)?", re.IGNORECASE)
# What PNG, JPEG, GIF, WebP and TIFF files begin with, and the same in base64. BMP's two letters say too little.
_BYTES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_TEXTS = ("data:image/", "iVBORw0K", "/9j/", "R0lGOD", "UklGR")


def unread_images(rows: Iterable[Mapping[str, Any]], data: DataConfig) -> str | None:
    """Return the column, as `data.image_key` would name it, that holds images in rows from which none is read.

    Args: rows: with all their columns, images not decoded.
    """
    read = {data.prompt_key, data.answer_key, data.image_key, data.id_key, data.category_key}
    for row in rows:
        if any(as_reference(part) is not None for part in _parts(at_path(row, data.prompt_key))):
            continue
        if data.image_key is not None and image_references(at_path(row, data.image_key)):
            continue
        found = image_in(row, [name for name in row if name not in read])
        if found is not None:
            return found
    return None


def image_in(row: Mapping[str, Any], columns: Iterable[str]) -> str | None:
    """Return which of these columns of a row holds an image, as `data.image_key` would name it; None without any."""
    return next((found for name in columns if (found := _images_in(name, row[name])) is not None), None)


def unread_image_columns(columns: Sequence[str], data: DataConfig) -> list[str]:
    """Return the columns that are named after images and that the run does not read; none if it is to read none."""
    if data.image_key is None:
        return []
    read = set(needed_columns(data, columns))
    return [name for name in columns if name not in read and _NAME.fullmatch(name)]


def check_images_are_read(
    name: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], data: DataConfig
) -> str | None:
    """Check rows of `name` for a model that takes images: training without them would be blind.

    Args: columns: of `name`, all of them.
    Returns: a column that holds images in rows where that of `data.image_key` has none, which may be meant.
    Raises: UserError naming a column that holds images where `data.image_key` is no column.
    """
    column = None if data.image_key is None else unread_images(rows, data)
    if column is not None and column_of(str(data.image_key), columns) is None:
        raise UserError(
            f"{name}: column {column!r} holds images that no one would see: data.image_key={data.image_key} is no "
            f"column; {image_remedy(column)}"
        )
    return column


def image_remedy(column: str) -> str:
    """Say what to do about a column of images that is passed over."""
    return f"set data.image_key={column}, or data.image_key=null to train on the text alone"


def needed_columns(data: DataConfig, names: Sequence[str]) -> list[str]:
    """Return the columns that a run reads of those that there are."""
    keys = [data.prompt_key, data.answer_key, data.id_key, data.category_key, data.image_key, data.video_key]
    columns = [column_of(key, names) for key in keys if key is not None]
    return list(dict.fromkeys(column for column in columns if column is not None))


def unread_videos(columns: Sequence[str], data: DataConfig) -> list[str]:
    """Return the columns that hold videos by their names and that the run does not read; none if it is to read none."""
    if data.video_key is None:
        return []
    read = set(needed_columns(data, columns))
    return [name for name in columns if name not in read and _VIDEO_NAME.fullmatch(name)]


def check_videos_are_read(row: Mapping[str, Any], unread: Sequence[str], where: str) -> None:
    """Check for videos that are passed over. Raises: UserError naming the row and the column that has one.

    unread: as `unread_videos` returns them.
    """
    for column in unread:
        if not _is_empty(row[column]):
            raise UserError(
                f"{where}: column {column!r} holds a video that no one would see; set data.video_key={column}, or "
                "data.video_key=null to train without"
            )


def _is_empty(cell: object) -> bool:
    """Return whether a cell holds nothing: null, an empty text or list, or lists and mappings of such."""
    if isinstance(cell, Mapping):
        return all(_is_empty(value) for value in cell.values())
    if isinstance(cell, (list, tuple)):
        return all(_is_empty(value) for value in cell)
    is_blank = isinstance(cell, (str, bytes)) and not cell.strip()
    return cell is None or is_blank or (isinstance(cell, float) and math.isnan(cell))


def _parts(prompt: object) -> Iterable[object]:
    """Yield the image parts of a prompt's messages."""
    for message in prompt if isinstance(prompt, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from (part for part in (content if isinstance(content, list) else []) if isinstance(part, Mapping))


def _images_in(name: str, cell: object) -> str | None:
    """Return the dotted name of the column, or of its part, that holds an image; None without any."""
    last = name.rpartition(".")[2]
    for item in cell if isinstance(cell, (list, tuple)) else [cell]:
        if isinstance(item, Mapping):
            if as_reference(item) is not None and (_NAME.fullmatch(last) or _looks_like_image(as_reference(item))):
                return name
            inside = (_images_in(f"{name}.{key}", value) for key, value in item.items())
            if found := next((part for part in inside if part is not None), None):
                return found
        elif _looks_like_image(item) or (_NAME.fullmatch(last) and _may_be_image(item)):
            return name
    return None


def _looks_like_image(item: object) -> bool:
    if isinstance(item, str):
        return item.startswith(_TEXTS) or _SUFFIX.fullmatch(item) is not None
    return isinstance(item, bytes) and item.startswith(_BYTES)


def _may_be_image(item: object) -> bool:
    """Return whether a cell of a column that is named after images may be one: bytes, or a text that is no sentence."""
    return (isinstance(item, bytes) and bool(item)) or (isinstance(item, str) and bool(item) and " " not in item)
