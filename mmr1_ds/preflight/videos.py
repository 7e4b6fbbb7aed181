"""A look at the videos of a data file's first rows, without a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmr1_ds.config import DataConfig
from mmr1_ds.data.chat import VIDEOS, no_videos, texts_of
from mmr1_ds.data.columns import check_videos_are_read, unread_videos
from mmr1_ds.data.images import ImageSource
from mmr1_ds.data.paths import at_path
from mmr1_ds.data.videos import VideoSource, video_references
from mmr1_ds.errors import UserError

NOT_BY_SERVERS = "worker.rollout.engine=server takes none; set it to vllm"


def check_first_videos(
    name: str,
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    data: DataConfig,
    takes_images: bool | None,
    engine: str = "auto",
) -> None:
    """Check the videos of the first rows of a file or folder. They are opened where PyAV is installed.

    Args: name: the file as the user wrote it; takes_images: whether the model does; None = unknown;
        engine: worker.rollout.engine.
    Raises: UserError naming the first row whose video is passed over, not taken by model or engine, or unreadable.
    """
    own = str(path if path.is_dir() else path.parent)
    folder = data.image_dir or own
    images = ImageSource(folder, None if data.allow_any_image_path else (own, folder), data.max_image_pixels)
    source = VideoSource(images, data.video_fps)
    can_open = importlib.util.find_spec("av") is not None
    for place, row in enumerate(rows):
        where = f"{name} row {place} (counted from 0)"
        check_videos_are_read(row, unread_videos(list(row), data), where)
        cell = None if data.video_key is None else at_path(row, data.video_key)
        found = [*video_references(cell), *VIDEOS.in_messages(at_path(row, data.prompt_key))]
        marked = any(VIDEOS.pattern.search(text) for text in texts_of(at_path(row, data.prompt_key)))
        if (found or marked) and takes_images is False:
            raise UserError(no_videos(where))
        if marked and not found:
            raise UserError(f"{where}: the prompt has <video> and the row no video; set data.video_key, or take it out")
        if found and engine == "server":
            raise UserError(f"{where}: the prompt has a video and {NOT_BY_SERVERS}")
        for reference in found if can_open else []:
            source.open(reference, where)
