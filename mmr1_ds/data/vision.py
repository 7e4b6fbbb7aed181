"""Images and videos after the model's own processor: patches, the tokens in the text, and where they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.data.positions import Block
from mmr1_ds.records import Video

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedConfig

# Of the video processor, here and in vLLM: frames come chosen, and at their final size.
VIDEO_OPTIONS = {"do_resize": False, "do_sample_frames": False, "cap_pixels_per_frame": False}

Grid = tuple[int, int, int]  # patches in time, height, width


@dataclass(frozen=True)
class Seen:
    """An image or a video after its processor."""

    token_ids: list[int]  # in place of its placeholder
    pixels: torch.Tensor  # (patches, channels * patch volume) float32
    grid: Grid
    blocks: list[Block]


class Vision:
    """The part of a model's processor that sees."""

    def __init__(self, processor: Any, config: PreTrainedConfig) -> None:
        self._processor = processor
        self._tokens_per_second = config.to_dict()["vision_config"].get("tokens_per_second")
        self.takes_videos = getattr(processor, "video_processor", None) is not None
        # Whether pixels of images and videos become numbers alike.
        self.normalises_alike = not self.takes_videos or _scales(processor.video_processor) == _scales(
            processor.image_processor
        )

    def images(self, images: Sequence[Image]) -> Iterator[Seen]:
        """Process the images of a prompt in one call, and yield each."""
        if not images:
            return
        found = self._processor.image_processor(images=list(images), return_tensors="pt")
        for grid, pixels in _each(found["image_grid_thw"], found["pixel_values"]):
            block = self._block(grid)
            yield Seen([int(self._processor.image_token_id)] * math.prod(block[:3]), pixels, grid, [block])

    def videos(self, videos: Sequence[Video]) -> Iterator[Seen]:
        """Process the videos of a prompt in one call, and yield each."""
        if not videos:
            return
        frames = [video.frames for video in videos]
        found = self._processor.video_processor(videos=frames, return_tensors="pt", **VIDEO_OPTIONS)
        grids = _each(found["video_grid_thw"], found["pixel_values_videos"])
        for video, (grid, pixels) in zip(videos, grids, strict=True):
            token_ids = self._video_ids(video, grid)
            blocks = [self._block(grid, self._time_step(video))]
            if len(token_ids) > math.prod(blocks[0][:3]):  # the times of its frames stand between them
                blocks = [self._block((1, *grid[1:]))] * grid[0]
            yield Seen(token_ids, pixels, grid, blocks)

    def num_tokens(self, video: Video) -> int:
        """Return how many tokens a video becomes, the times between its frames included."""
        processor, (count, height, width, _) = self._processor.video_processor, video.frames.shape
        patch, in_time = processor.patch_size, processor.temporal_patch_size
        return len(self._video_ids(video, (-(-count // in_time), height // patch, width // patch)))

    def _block(self, grid: Grid, step: float = 1.0) -> Block:
        merge = self._processor.image_processor.merge_size
        return grid[0], grid[1] // merge, grid[2] // merge, step

    def _time_step(self, video: Video) -> float:
        """Return the positions from one pair of frames to the next. In float32 first, as vLLM computes it."""
        if self._tokens_per_second is None:
            return 1.0
        seconds = self._processor.video_processor.temporal_patch_size / _metadata(video).sampled_fps
        return float(np.float32(seconds)) * self._tokens_per_second

    def _video_ids(self, video: Video, grid: Grid) -> list[int]:
        """Return the tokens that the processor puts in place of a video's placeholder."""
        import torch

        inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [_metadata(video)]}
        text = self._processor.replace_video_token(inputs, 0)
        token_ids: list[int] = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids


def _scales(processor: Any) -> tuple[list[float], list[float], float]:
    return list(processor.image_mean), list(processor.image_std), processor.rescale_factor


def _metadata(video: Video) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(**video.metadata)


def _each(grids: torch.Tensor, pixels: torch.Tensor) -> Iterator[tuple[Grid, torch.Tensor]]:
    """Yield the grid and the pixels of each image or video. Args: grids: (I, 3); pixels: of all, end to end."""
    for grid, own in zip(grids.tolist(), pixels.split(grids.prod(dim=1).tolist()), strict=True):
        yield tuple(grid), own
