"""Opening the images of a row, and computing the size that each is resized to."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import struct
import urllib.parse
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mmr1_ds.errors import UserError, first_line

# What Pillow raises for a file that is missing, truncated, or no image at all.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_SCHEME = re.compile(r"(data(?=:)|[a-z][a-z0-9+.-]*(?=://)|file(?=:))", re.IGNORECASE)
_CARRIERS = ("bytes", "image", "image_url", "input_image", "url", "path", "base64", "b64_json", "data", "source")
_LEAST_BASE64 = 40  # characters: the smallest images have more
_BASE64 = re.compile(r"\W*(b['\"]|data:[^,]*,)?[\w+/=%\s-]{60,}\W*")  # a path has a suffix
_MOST_SHOWN = 160  # characters of a name or a reason in an error
MAX_RESIZE_ROUNDS = 8  # the processor's rule settles in one or two; a cycle means limits no size can meet

# EXIF's orientation -> what turns the image upright; 1, and what is no orientation, leave it as it is.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))  # width and height change places

ImageReference = Any  # bytes, a path, data URL or base64, a PIL image, or a mapping that carries one of these


def image_references(cell: object) -> list[ImageReference]:
    """Return the images of a row's cell, which holds none, one, or a list of them."""
    if cell is None or cell == "":
        return []
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]


@dataclass(frozen=True)
class ImageSource:
    """Opens image references of one data file; relative paths start at `folder`.

    Data may come from strangers: an image is not decoded before its size is known, and a path does not lead anywhere.
    """

    folder: str | None
    roots: tuple[str, ...] | None = None  # folders that images lie in; None = anywhere
    max_pixels: int | None = None  # of an image as it came

    def __post_init__(self) -> None:
        if self.max_pixels is not None:  # Pillow's own bound would come before
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, self.max_pixels)

    def size(self, reference: ImageReference, where: str) -> tuple[int, int]:
        """Return (width, height) of the upright image from the header alone.

        Raises: UserError naming the row when it is unreadable.
        """
        with self._open(reference, where) as image:
            width, height = image.size
            return (height, width) if _turn(image) in _SIDEWAYS else (width, height)

    def load(self, reference: ImageReference, where: str) -> Image.Image:
        """Return the whole image as RGB: upright, as its EXIF says, on white where it is transparent.

        Raises: UserError naming the row when it is unreadable.
        """
        with self._open(reference, where) as image:
            turn = _turn(image)
            try:
                rgb = _rgb(image)
            except UNREADABLE as error:
                raise _unreadable(reference, where, error) from error
        return rgb if turn is None else rgb.transpose(turn)

    def _open(self, reference: ImageReference, where: str) -> Image.Image:
        found = as_reference(reference)
        if isinstance(found, Image.Image):
            return found.copy()  # the caller closes what it gets; the row's own stays usable
        try:
            if found is None:
                raise ValueError("neither bytes nor a path")
            place = self.place(found, where) if isinstance(found, str) else found
            image = Image.open(io.BytesIO(place) if isinstance(place, bytes) else place)
        except Image.DecompressionBombError:
            raise UserError(f"{where}: an image has over twice data.max_image_pixels; remove the row") from None
        except UNREADABLE as error:
            if isinstance(error, UserError):
                raise
            raise _unreadable(reference, where, error) from error
        if self.max_pixels is not None and image.width * image.height > self.max_pixels:
            image.close()
            raise UserError(
                f"{where}: an image of {image.width} x {image.height} pixels is over data.max_image_pixels="
                f"{self.max_pixels}; raise it, shrink the image or remove the row"
            )
        return image

    def place(self, text: str, where: str, kind: str = "image") -> str | bytes:
        """Return the path that a text names, or the bytes that it holds. Raises: UserError for what must be fetched."""
        bare = _unquoted(text)
        scheme = _SCHEME.match(bare)
        if scheme is None:
            paths = [os.path.join(self.folder, one) if self.folder else one for one in (text, bare)]
            path = next((one for one in paths if os.path.isfile(one)), None)
            if path is None and (content := _from_base64(bare)):
                return content
            return self._inside(path or paths[0], where)
        if scheme[1].lower() == "data":
            return _from_data_url(bare)
        if scheme[1].lower() == "file":
            parts = urllib.parse.urlsplit(bare)
            if parts.netloc in ("", "localhost"):
                return self._inside(urllib.request.url2pathname(parts.path), where)
        raise UserError(f"{where}: the {kind} {shown(text)} is not fetched; download it and give the path of the file")

    def _inside(self, path: str, where: str) -> str:
        """Return the path. Raises: UserError when it leads out of the roots, by `..` or by links too."""
        real = os.path.realpath(path)
        if self.roots is None or any(_lies_in(real, os.path.realpath(root)) for root in self.roots):
            return path
        raise UserError(
            f"{where}: {shown(path)} lies outside the folder of the data and data.image_dir; set data.image_dir to "
            "its folder, or data.allow_any_image_path=true where the data is trusted"
        )


def _unquoted(text: str) -> str:
    """Return a text without space and quotes around it, as Python prints a string or bytes."""
    quoted = re.fullmatch(r"\s*b?(['\"])(.*)\1\s*", text, re.DOTALL)
    return (quoted[2] if quoted else text).strip()


def _lies_in(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _from_data_url(text: str) -> bytes:
    head, comma, content = text.partition(",")
    if not comma:
        raise ValueError("a data URL without a comma")
    content = urllib.parse.unquote(content)
    if head.lower().endswith(";base64"):
        return _decoded(content)
    return content.encode("latin-1")


def _from_base64(text: str) -> bytes | None:
    """Return an image file that is written in base64; None for what is more likely a path."""
    if len(text) < _LEAST_BASE64:
        return None
    try:
        content = _decoded(text)
    except ValueError:
        return None
    try:
        Image.open(io.BytesIO(content)).close()
    except UnidentifiedImageError:
        return None
    except UNREADABLE:  # an image, damaged
        pass
    return content


def _decoded(text: str) -> bytes:
    """Decode base64 of either alphabet, with or without line breaks and padding. Raises: ValueError."""
    plain = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def as_reference(cell: object, carriers: Sequence[str] = _CARRIERS) -> bytes | str | Image.Image | None:
    """Return the bytes, text (path, URL, base64) or PIL image in a cell or in a part of a message; None without any.

    carriers: keys of a mapping that may hold it.
    """
    if isinstance(cell, Mapping):
        found = (as_reference(cell.get(key), carriers) for key in carriers)
        return next((one for one in found if one is not None), None)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return bytes(cell) or None
    if isinstance(cell, str):
        return cell if cell.strip() else None
    return cell if isinstance(cell, Image.Image) else None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns the image upright, by the orientation in its header; None for an upright one."""
    if image.format == "TIFF":  # Pillow turns it, and gives the size after that
        return None
    try:
        # Not the format's own method: that of PNG decodes the whole image, for an EXIF part behind the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except (*UNREADABLE, TypeError, KeyError, IndexError, AttributeError):  # damaged EXIF is no damaged image
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB. `convert("RGB")` alone makes transparent parts black, and clips deep grey values."""
    image.load()
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Return grey values of 16 bits, 32 bits or floats as 0..255.

    I;16 spans 0..65535. I and F say nothing of their span: the least usual one that holds all values is taken (0..1 for
    floats, 0..255, 0..65535), else that of the values.
    """
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    spans = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(mode, (65535.0,))
    span = next((span for span in spans if low >= 0 and high <= span), None)
    bottom, top = (low, max(high, low + 1e-12)) if span is None else (0.0, span)
    return np.rint((np.clip(values, bottom, top) - bottom) * (255.0 / (top - bottom))).astype(np.uint8)


def update_digest(digest: hashlib.blake2b, reference: ImageReference) -> None:
    """Feed an image's identity to a digest: its bytes, or its path as the data set writes it."""
    found = as_reference(reference)
    if isinstance(found, bytes):
        digest.update(b"bytes:%d:" % len(found))
        digest.update(found)
    elif isinstance(found, Image.Image):
        digest.update(f"pixels:{found.mode}:{found.size}:".encode())
        digest.update(found.tobytes())
    else:
        digest.update(f"path:{found}:".encode())


def _unreadable(reference: ImageReference, where: str, error: BaseException) -> UserError:
    found = as_reference(reference)
    if isinstance(found, bytes) and isinstance(reference, Mapping):
        found = reference.get("path")
    name = shown(found) if isinstance(found, str) and found else "the image"
    # UnidentifiedImageError says no more than the name, or an address in memory.
    is_unknown = isinstance(error, UnidentifiedImageError)
    reason = "of no format that Pillow knows" if is_unknown else first_line(error)
    if len(reason) > _MOST_SHOWN or "... (" in name:  # it repeats a name that is no path
        reason = (error.strerror if isinstance(error, OSError) else None) or reason[:_MOST_SHOWN]
    return UserError(f"{where}: {name} cannot be read as an image ({reason}); replace it or remove the row")


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the image at this (width, height)."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def shown(text: str) -> str:
    """Return a path or URL for an error. Base64 is cut: no one reads it."""
    is_path = len(text) <= _MOST_SHOWN and _BASE64.fullmatch(text) is None
    return repr(text) if is_path else f"{text[:40]!r}... ({len(text)} characters)"


@dataclass(frozen=True)
class PixelLimits:
    """The sizes that images are resized to, so that no processor resizes them again.

    The rule is that of the Qwen-VL processors (`smart_resize` in transformers, which vLLM uses too): both sides
    a multiple of `factor`, the area inside the limits, the aspect ratio kept as well as those allow. The run's
    limits apply inside the processor's own, which are the tighter bound.
    """

    factor: int  # pixels: patch size times merge size
    min_pixels: int
    max_pixels: int
    processor_min_pixels: int

    @staticmethod
    def of(
        factor: int, processor_min: int, processor_max: int, min_pixels: int | None, max_pixels: int | None
    ) -> PixelLimits:
        """Return the limits of a run; None leaves a bound to the processor."""

        def inside(pixels: int) -> int:
            return min(max(pixels, processor_min), processor_max)

        low = processor_min if min_pixels is None else inside(min_pixels)
        high = processor_max if max_pixels is None else inside(max_pixels)
        return PixelLimits(factor, min(low, high), high, processor_min)

    def target(self, width: int, height: int, where: str) -> tuple[int, int]:
        """Return (width, height) in pixels for an image, a size that both processors leave as it is.

        vLLM's is bound by `max_pixels` too: it keeps memory for the largest image that its processor lets through.

        Raises: UserError naming the row when the image is too narrow for the model (one side over 200 times
        the other) or no size satisfies the limits.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        try:
            high, wide = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
            for _ in range(MAX_RESIZE_ROUNDS):
                settled = smart_resize(high, wide, self.factor, self.processor_min_pixels, self.max_pixels)
                if settled == (high, wide):
                    return wide, high
                high, wide = settled
        except ValueError as error:
            raise UserError(f"{where}: an image of {width} x {height} pixels is refused: {error}") from error
        raise UserError(
            f"{where}: no size for an image of {width} x {height} pixels is a multiple of {self.factor} and within "
            f"{self.processor_min_pixels}..{self.max_pixels} pixels; raise data.max_pixels or the processor's limits"
        )
