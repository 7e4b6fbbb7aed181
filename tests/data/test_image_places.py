"""Images in every form that carries one, and the markers that say where each goes."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from fixtures.data_fixtures import (
    image,
    load,
    png,
    user_text,
    write_jsonl,
    write_kind,
)

from mmr1_ds.data.images import ImageSource
from mmr1_ds.errors import UserError

PAD = "<|vision_start|><|image_pad|><|vision_end|>"


def in_base64(content):
    return base64.b64encode(content).decode()


def pixels(picture):
    return np.asarray(picture)


def seeds(dataset, index):
    """Which of the pictures, told by their seeds, stand at the places of a prompt."""
    known = [pixels(image(28, 28, seed)) for seed in range(4)]
    return [next(i for i, one in enumerate(known) if np.array_equal(pixels(p), one)) for p in dataset[index].images]


# --- forms ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / "a.png").write_bytes(png(56, 28, 3))
    return tmp_path


@pytest.mark.parametrize(
    "form",
    [
        lambda folder: f"data:image/png;base64,{in_base64(png(56, 28, 3))}",
        lambda folder: f"DATA:image/png;base64,{in_base64(png(56, 28, 3)).replace('+', '%2B')}",
        lambda folder: in_base64(png(56, 28, 3)),
        lambda folder: base64.encodebytes(png(56, 28, 3)).decode(),
        lambda folder: base64.urlsafe_b64encode(png(56, 28, 3)).decode().rstrip("="),
        lambda folder: {"bytes": in_base64(png(56, 28, 3)), "path": None},
        lambda folder: (folder / "my pictures" / "a.png").as_uri(),
        lambda folder: f"file://localhost{folder}/my%20pictures/a.png",
        lambda folder: {"url": (folder / "my pictures" / "a.png").as_uri()},
        lambda folder: {"type": "image_url", "image_url": {"url": f"data:;base64,{in_base64(png(56, 28, 3))}"}},
        lambda folder: {"type": "base64", "media_type": "image/png", "data": in_base64(png(56, 28, 3))},
        lambda folder: {"type": "image", "source": {"type": "base64", "data": in_base64(png(56, 28, 3))}},
        lambda folder: "my pictures/a.png",
        lambda folder: " my pictures/a.png\n",
        lambda folder: f" data:image/png;base64,{in_base64(png(56, 28, 3))}",
        lambda folder: repr(in_base64(png(56, 28, 3)).encode()),
        lambda folder: f'"{in_base64(png(56, 28, 3))}"',
    ],
)
def test_forms_that_need_no_network(folder, form):
    source = ImageSource(str(folder))
    assert np.array_equal(pixels(source.load(form(folder), "row 0")), pixels(image(56, 28, 3)))
    assert source.size(form(folder), "row 0") == (56, 28)


@pytest.mark.parametrize(
    "url",
    ["http://host/a.png", "HTTPS://host/a.png", "s3://bucket/a.png", "hf://datasets/a.png", "file://host/a.png"],
)
def test_what_must_be_fetched_is_refused_in_words(url):
    with pytest.raises(UserError, match=r"row 0: the image '.*' is not fetched; download it") as refused:
        ImageSource(None).size({"path": url}, "row 0")
    assert url in str(refused.value)


@pytest.mark.parametrize(
    "text", ["data:image/png;base64," + "A" * 5000, "data:image/png", "x" * 5000 + ".png", "AAAA" * 2000, "a\0b"]
)
def test_what_is_no_image_is_refused_in_a_short_line(text):
    with pytest.raises(UserError, match=r"row 0: .* cannot be read as an image") as refused:
        ImageSource("folder").size(text, "row 0")
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["iVBORw0KGgo" * 9, "b'" + "iVBORw0KGgo" * 9 + "'", " data:image/png;base64," + "A" * 99]
)
def test_no_one_reads_base64_in_an_error(text):
    with pytest.raises(UserError, match=r"row 0: .{42,45}\.\.\. \(\d+ characters\) cannot be read") as refused:
        ImageSource("folder").size(text, "row 0")
    assert text[60:] not in str(refused.value)


# --- markers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "order"),
    [
        ("<image1> or <image2>?", f"{PAD} or {PAD}?", [0, 1]),
        ("<image_2> or <image_1>?", f"{PAD} or {PAD}?", [1, 0]),
        ("<IMAGE> or <Image>?", f"{PAD} or {PAD}?", [0, 1]),
        ("<image 1>, <Image 2>, <image 1>", f"{PAD}, {PAD}, {PAD}", [0, 1, 0]),
        ("<image_0> or <image_1>?", f"{PAD} or {PAD}?", [0, 1]),
        ("<|image_1|><|image_2|>", f"{PAD}{PAD}", [0, 1]),
        ("<image><image>compare <image1> with <image2>", f"{PAD}{PAD}compare <image1> with <image2>", [0, 1]),
        ("compare", f"{PAD}{PAD}compare", [0, 1]),
    ],
)
def test_numbered_markers_say_which_image(tmp_path, vision_model, prompt, text, order):
    images = [{"bytes": png(28, 28, seed)} for seed in (0, 1)]
    path = write_kind("parquet", tmp_path, [{"prompt": prompt, "answer": "1", "images": images}])
    dataset = load(path, vision_model)
    assert user_text(dataset, 0) == text
    assert seeds(dataset, 0) == order
    assert dataset.max_images == len(order)
    assert len(dataset.encoder.expand(dataset[0]).input_ids) == dataset[0].num_tokens


@pytest.mark.parametrize(
    "prompt", ["<image1>", "<image1> <image3>", "<image> <image2>", "<image_1> <image_2> <image_3>"]
)
def test_numbers_that_do_not_fit_are_refused(tmp_path, vision_model, prompt):
    images = [{"bytes": png(28, 28)}] * 2
    path = write_kind("parquet", tmp_path, [{"prompt": prompt, "answer": "1", "images": images}])
    with pytest.raises(UserError, match=r"row 0 .*the prompt marks images by <image.* and the row has 2"):
        load(path, vision_model)


def test_a_text_model_reads_markers_as_text(tmp_path, text_model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "<image1> <image>", "answer": "1"}])
    assert user_text(load(path, text_model), 0) == "<image1> <image>"


# --- parts of messages ----------------------------------------------------------------------------------------------


def chat(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "b.png"},
        {"type": "image", "path": "b.png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{in_base64(png(28, 28, 1))}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{in_base64(png(28, 28, 1))}"},
        {"image": "b.png"},
    ],
)
def test_image_parts_carry_their_image(tmp_path, vision_model, part):
    (tmp_path / "b.png").write_bytes(png(28, 28, 1))
    rows = [{"prompt": chat({"type": "text", "text": "see "}, part, {"type": "text", "text": "!"}), "answer": "1"}]
    dataset = load(write_jsonl(tmp_path / "a.jsonl", rows), vision_model)
    assert user_text(dataset, 0) == f"see {PAD}!"
    assert seeds(dataset, 0) == [1]
    assert len(dataset.encoder.expand(dataset[0]).input_ids) == dataset[0].num_tokens


def test_bytes_in_parts_and_images_of_the_column_stand_where_they_are_marked(tmp_path, vision_model):
    own = {"type": "image", "text": None, "image": {"bytes": png(28, 28, 2), "path": None}}
    marked = {"type": "image", "text": None, "image": None}
    rows = [{"prompt": chat(marked, own, {"type": "text", "text": "?", "image": None}, marked), "answer": "1"}]
    rows[0]["images"] = [{"bytes": png(28, 28, seed)} for seed in (0, 1)]
    dataset = load(write_kind("parquet", tmp_path, rows), vision_model, format_prompt="{{ content }}!")
    assert user_text(dataset, 0) == f"{PAD}{PAD}?{PAD}!"
    assert seeds(dataset, 0) == [0, 2, 1]


def test_ids_tell_images_of_parts_apart(tmp_path, vision_model):
    parts = [{"type": "image", "image": {"bytes": png(28, 28, seed)}} for seed in (0, 1)]
    path = write_kind("parquet", tmp_path, [{"prompt": chat(part), "answer": "1"} for part in parts])
    assert len({prompt_id.split("#")[0] for prompt_id in load(path, vision_model).prompt_ids}) == 2


def test_a_text_model_refuses_images_of_parts(tmp_path, text_model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": chat({"type": "image", "image": "b.png"}), "answer": "1"}])
    with pytest.raises(UserError, match=r"a.jsonl row 0 .*1 images but the model takes text only"):
        load(path, text_model)
