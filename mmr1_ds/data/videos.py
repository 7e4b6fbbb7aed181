"""Opening the videos of a row, and choosing which of their frames the model sees.

PyAV decodes them: its wheels bring FFmpeg with them, so that a machine needs nothing installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.data.images import ImageSource, PixelLimits, as_reference, resized, shown, update_digest
from mmr1_ds.errors import UserError, first_line

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

VideoReference = Any  # bytes, a path or data URL, a list of frames, or a mapping that carries one of these

_CARRIERS = ("bytes", "video", "video_url", "input_video", "url", "path", "data")
# FFmpeg reads playlists and lists of files too, which lead to any other file, and takes an image for a video.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,gif,ogg"
_LEAST_FRAMES = 4  # of a video that has as many; as the Qwen-VL processors
_MOST_LOST = 0.1  # share of the frames in a file's header that may be missing at its end: cuts keep no exact count
# What a message may say of one video, and the run's keys say of all.
_OWN_SETTINGS = (
    "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "video_start", "video_end",
    "resized_height", "resized_width",
)  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """What is known of a video before its frames are decoded."""

    num_frames: int
    fps: float  # frames a second
    width: int  # pixels, upright
    height: int
    # (places of frames, ascending; width and height that they are resized to) -> (F, height, width, 3) uint8
    read: Callable[[Sequence[int], tuple[int, int]], np.ndarray]


def video_references(cell: object) -> list[VideoReference]:
    """Return the videos of a row's cell, which holds none, one, or a list of them; a list in it is one of frames."""
    videos = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    return [video for video in videos if _frames(video) is not None or _carried(video) is not None]


@dataclass(frozen=True)
class VideoLimits:
    """Which frames of a video the model sees, and how large."""

    fps: float  # frames a second
    max_frames: int
    pixels: PixelLimits  # of a frame

    def places(self, clip: Clip) -> tuple[int, ...]:
        """Return the frames to take, ascending: evenly from the first to the last, an even number of them.

        Models see frames in pairs. The rule is that of qwen-vl-utils; a video of one frame gives it twice.
        """
        wanted = max(clip.num_frames / clip.fps * self.fps, _LEAST_FRAMES)
        count = max(2, int(min(wanted, self.max_frames, clip.num_frames)) // 2 * 2)
        return tuple(np.linspace(0, clip.num_frames - 1, count).round().astype(int).tolist())

    def size(self, clip: Clip, where: str) -> tuple[int, int]:
        """Return (width, height) of the frames in pixels. Raises: UserError naming the row when no size fits."""
        return self.pixels.target(clip.width, clip.height, f"{where}: of a video")


@dataclass(frozen=True)
class VideoSource:
    """Opens video references of one data file, from where its images may come too.

    Data may come from strangers: a file is read as a video or not at all, whatever it says of other files.
    """

    images: ImageSource
    fps: float  # of lists of frames that do not say it

    def open(self, reference: VideoReference, where: str) -> Clip:
        """Look at the header and the first frame. Raises: UserError naming the row when the video is unreadable."""
        settings = reference if isinstance(reference, Mapping) else {}
        frames = _frames(reference)
        own = [key for key in _OWN_SETTINGS if settings.get(key) is not None]
        own += ["fps"] if frames is None and settings.get("fps") is not None else []
        if own:
            raise UserError(f"{where}: a video has {own[0]} of its own; remove it, data.video_* hold for all videos")
        return self._file(reference, where) if frames is None else self._list(frames, settings.get("fps"), where)

    def _list(self, frames: Sequence[Any], fps: Any, where: str) -> Clip:
        """Return a list of frames as a video."""
        fps = self.fps if fps is None else fps
        if not isinstance(fps, (int, float)) or not fps > 0:
            raise UserError(f"{where}: the fps of a video is {fps!r:.40}; give the frames a second of its list")
        sizes = [self.images.size(frame, where) for frame in frames]
        odd = next((place for place, size in enumerate(sizes) if size != sizes[0]), None)
        if odd is not None:
            width, height = sizes[odd]
            raise UserError(
                f"{where}: frame {odd} of a video has {width} x {height} pixels, the first has {sizes[0][0]} x "
                f"{sizes[0][1]}; make them equal"
            )

        def read(places: Sequence[int], size: tuple[int, int]) -> np.ndarray:
            return np.stack([np.asarray(resized(self.images.load(frames[place], where), size)) for place in places])

        return Clip(len(frames), float(fps), *sizes[0], read)

    def _file(self, reference: VideoReference, where: str) -> Clip:
        with self._opened(reference, where) as (container, stream):
            num_frames, fps = _length(container, stream)
            container.seek(0)
            first = next(container.decode(stream), None)
            if first is None or num_frames < 1:
                raise ValueError("it has no frames")
            width, height = first.width, first.height
            if first.rotation % 180:
                width, height = height, width
        most = self.images.max_pixels
        if most is not None and width * height > most:
            raise UserError(
                f"{where}: a video of {width} x {height} pixels is over data.max_image_pixels={most}; raise it, shrink "
                "the video or remove the row"
            )

        def read(places: Sequence[int], size: tuple[int, int]) -> np.ndarray:
            with self._opened(reference, where) as (container, stream):
                seconds = [place / fps for place in places]
                slack = _MOST_LOST * num_frames / fps
                return np.stack([_pixels(frame, size) for frame in _at(container, stream, seconds, slack)])

        return Clip(num_frames, fps, width, height, read)

    @contextlib.contextmanager
    def _opened(self, reference: VideoReference, where: str) -> Iterator[tuple[InputContainer, VideoStream]]:
        """Open a file. Raises: UserError naming the row for what goes wrong there, inside the context too."""
        try:
            import av
        except ImportError as error:
            raise UserError(f"{where}: a video is decoded by PyAV, which is missing; pip install av") from error
        found = _carried(reference)
        try:
            if found is None or not isinstance(found, (str, bytes)):
                raise ValueError("neither bytes nor a path")
            place = self.images.place(found, where, "video") if isinstance(found, str) else found
            with open(place, "rb") if isinstance(place, str) else io.BytesIO(place) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                if size == 0:
                    raise ValueError("the file is empty")
                with av.open(file, "r", options={"format_whitelist": _FORMATS}) as container:
                    streams = [one for one in container.streams.video if not one.disposition & _COVER]
                    if not streams:
                        raise ValueError("it has no video stream")
                    streams[0].thread_type = "AUTO"
                    if any(entry.pos + entry.size > size for entry in streams[0].index_entries):
                        raise ValueError("the file is cut off")
                    yield container, streams[0]
        except UserError:
            raise
        except (OSError, ValueError, EOFError, MemoryError, av.error.FFmpegError) as error:
            name = shown(found) if isinstance(found, str) else "the video"
            reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
            if isinstance(error, (av.error.InvalidDataError, av.error.ArgumentError)):
                reason = "of no format that is read"
            raise UserError(
                f"{where}: {name} cannot be read as a video ({reason}); replace it or remove the row"
            ) from error


_COVER = 0x400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC: the picture of a sound file


def update_video_digest(digest: hashlib.blake2b, reference: VideoReference) -> None:
    """Feed a video's identity to a digest: its bytes, its path as the data set writes it, or its frames."""
    frames = _frames(reference)
    digest.update(b"video:%d:" % (-1 if frames is None else len(frames)))
    if frames is None:
        update_digest(digest, _carried(reference))
    else:
        fps = reference.get("fps") if isinstance(reference, Mapping) else None
        digest.update(repr(fps).encode())
        for frame in frames:
            update_digest(digest, frame)


def _frames(reference: VideoReference) -> Sequence[Any] | None:
    """Return the frames of a video that is a list of images; None for any other."""
    if isinstance(reference, Mapping):
        return next((reference[key] for key in ("frames", "video") if _frames(reference.get(key)) is not None), None)
    is_list = isinstance(reference, (list, tuple)) and any(as_reference(frame) is not None for frame in reference)
    return reference if is_list else None


def _carried(reference: VideoReference) -> bytes | str | Image | None:
    return as_reference(reference, _CARRIERS)


def _length(container: InputContainer, stream: VideoStream) -> tuple[int, float]:
    """Return the number of frames and how many there are a second. Counts them where the header does not say it."""
    import av

    num_frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if not rate and container.duration and num_frames:
        rate = num_frames * av.time_base / container.duration
    if not rate:
        raise ValueError("it says nothing of its frames a second")
    return num_frames, rate


def _at(container: InputContainer, stream: VideoStream, seconds: Sequence[float], slack: float) -> Iterator[VideoFrame]:
    """Yield the frame that is seen at each of these times, which ascend, counted from the first frame.

    Between them it jumps to key frames where the file's index names one. slack: seconds that may be missing at the end.
    """
    base = float(stream.time_base or 1)
    origin = float(stream.start_time or 0) * base
    keys = [entry.timestamp * base for entry in stream.index_entries if entry.is_keyframe]
    decoded = container.decode(stream)
    shown_now, coming = next(decoded, None), next(decoded, None)
    for wanted in seconds:
        time = origin + wanted + _EPSILON
        before = bisect_right(keys, time - _REORDERED)
        if before and coming is not None and (coming.time or 0.0) < keys[before - 1]:
            container.seek(int(keys[before - 1] / base), stream=stream)
            decoded = container.decode(stream)
            shown_now, coming = next(decoded, None), next(decoded, None)
        while coming is not None and (coming.time or 0.0) <= time:
            shown_now, coming = coming, next(decoded, None)
        if shown_now is None or (coming is None and (shown_now.time or 0.0) + slack < time - 2 * _EPSILON):
            raise ValueError(f"it ends before second {wanted:.1f}")
        yield shown_now


_EPSILON = 1e-3  # seconds: a frame's time is a multiple of its stream's base, never quite the one asked for
_REORDERED = 1.0  # seconds: an index has the order of decoding, in which a key frame comes earlier than it is seen


def _pixels(frame: VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """Return a frame as (height, width, 3) uint8, upright."""
    image = frame.to_image()
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    return np.asarray(resized(image, size))
