"""What becomes of images: transparent, deep and turned ones, before size and pixels are taken."""

from __future__ import annotations

import io

import numpy as np
import pytest
from fixtures.data_fixtures import encoder_of, image, load, write_jsonl, write_kind, write_vision_model
from PIL import Image, ImageOps

from mmr1_ds.data.images import ImageSource
from mmr1_ds.errors import UserError

SOURCE = ImageSource(None)


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def loaded(content):
    return np.asarray(SOURCE.load(content, "row 0"))


def grey(values, dtype):
    return Image.fromarray(np.asarray(values, dtype=dtype).reshape(1, -1))


# --- transparency ---------------------------------------------------------------------------------------------------


def transparent_palette():
    picture = Image.new("P", (3, 3))
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putpixel((0, 0), 1)
    return encoded(picture, transparency=0)


def rgb_with_a_transparent_colour():
    picture = Image.new("RGB", (3, 3), (1, 2, 3))
    picture.putpixel((0, 0), (200, 0, 0))
    return encoded(picture, transparency=(1, 2, 3))


def rgba():
    picture = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    picture.putpixel((0, 0), (200, 0, 0, 255))
    return picture


@pytest.mark.parametrize(
    "content",
    [encoded(rgba()), encoded(rgba(), "WEBP", lossless=True), transparent_palette(), rgb_with_a_transparent_colour()],
    ids=["rgba", "webp", "palette", "colour key"],
)
def test_transparent_parts_become_white(content):
    pixels = loaded(content)
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert np.all(pixels[1:] == 255)


def test_half_transparent_grey_is_mixed_with_white():
    picture = Image.new("LA", (2, 2), (100, 51))  # a fifth
    assert np.all(loaded(encoded(picture)) == round(100 * 0.2 + 255 * 0.8))


# --- depth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "kind", "expected"),
    [
        (grey([0, 257, 32896, 65535], np.uint16), "PNG", [0, 1, 128, 255]),
        (grey([0, 257, 32896, 65535], np.uint16), "TIFF", [0, 1, 128, 255]),
        (grey([0.0, 0.2, 0.5, 1.0], np.float32), "TIFF", [0, 51, 128, 255]),
        (grey([0.0, 51.0, 255.0], np.float32), "TIFF", [0, 51, 255]),
        (grey([-1.0, 0.0, 1.0], np.float32), "TIFF", [0, 128, 255]),
        (grey([np.nan, 0.2, np.inf], np.float32), "TIFF", [0, 51, 255]),
        (grey([7.0, 7.0], np.float32), "TIFF", [7, 7]),
        (grey([0, 128, 255], np.int32), "TIFF", [0, 128, 255]),
        (grey([0, 257, 65535], np.int32), "TIFF", [0, 1, 255]),
        (grey([-1000, 0, 1000], np.int32), "TIFF", [0, 128, 255]),
    ],
)
def test_deep_grey_is_scaled(picture, kind, expected):
    pixels = loaded(encoded(picture, kind))
    assert pixels.shape == (1, len(expected), 3)
    assert pixels[0].tolist() == [[value] * 3 for value in expected]


def test_big_endian_is_read_as_it_is():
    picture = Image.new("I;16B", (2, 1))
    picture.frombytes(bytes([0x80, 0x80, 0xFF, 0xFF]))
    assert loaded(encoded(picture, "TIFF"))[0, :, 0].tolist() == [128, 255]


# --- rotation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image(40, 24, 3), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(loaded(content), np.asarray(expected))
    assert SOURCE.size(content, "row 0") == expected.size == ((24, 40) if orientation > 4 else (40, 24))


def test_size_and_tokens_are_those_of_the_upright_image(tmp_path, vision_model):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(image(112, 28, 3), "JPEG", exif=exif)
    path = write_kind("parquet", tmp_path, [{"prompt": "p", "answer": "1", "images": [{"bytes": content}]}])
    prompt = load(path, vision_model)[0]
    assert prompt.images[0].size == (28, 112)
    assert len(encoder_of(vision_model).expand(prompt).input_ids) == prompt.num_tokens


def test_damaged_exif_is_no_damaged_image():
    content = encoded(image(8, 8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert SOURCE.size(content, "row 0") == (8, 8)
    assert loaded(content).shape == (8, 8, 3)


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_an_image_is_measured_before_it_is_decoded():
    content = encoded(image(40, 30))[:60]  # the header, and next to nothing of the pixels
    source = ImageSource(None, max_pixels=1199)
    for read in (source.size, source.load):
        with pytest.raises(UserError, match=r"row 0: an image of 40 x 30 pixels is over data.max_image_pixels=1199"):
            read(content, "row 0")
    assert ImageSource(None, max_pixels=1200).size(content, "row 0") == (40, 30)


def test_the_bound_may_be_over_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert ImageSource(None, max_pixels=1200).size(encoded(image(40, 30)), "row 0") == (40, 30)
    with pytest.raises(UserError, match=r"row 0: an image has over twice data.max_image_pixels"):
        ImageSource(None, max_pixels=1200).size(encoded(image(80, 60)), "row 0")


@pytest.fixture
def folders(tmp_path):
    """Data, images of a folder beside it, and links that lead there."""
    for name in ("data/pictures", "images", "secret", "data_other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/a.png", "data/pictures/a.png", "images/a.png", "secret/a.png", "data_other/a.png"):
        (tmp_path / name).write_bytes(encoded(image(28, 28)))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret" / "a.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "secret")
    return tmp_path


def read(folders, path, **data):
    file = write_jsonl(folders / "data" / "rows.jsonl", [{"prompt": "p", "answer": "1", "images": [path]}])
    return load(file, write_vision_model(folders), **data)[0].images[0].size


@pytest.mark.parametrize(
    "path",
    ["../secret/a.png", "{}/secret/a.png", "file://{}/secret/a.png", "pictures/../../secret/a.png", "link.png",
     "linked/a.png", "{}/data_other/a.png"],
)  # fmt: skip
def test_paths_that_lead_out_of_the_data_are_refused(folders, path):
    path = path.format(folders)
    with pytest.raises(UserError, match=r"rows.jsonl row 0 .* lies outside the folder of the data and data.image_dir"):
        read(folders, path)
    assert read(folders, path, allow_any_image_path=True) == (28, 28)


def test_paths_inside_are_read(folders):
    for path in ("a.png", "pictures/../a.png", str(folders / "data" / "a.png")):
        assert read(folders, path) == (28, 28)
    for path in ("a.png", str(folders / "images" / "a.png"), str(folders / "data" / "a.png")):
        assert read(folders, path, image_dir=str(folders / "images")) == (28, 28)
