"""What a run would pass over in silence: a text model's videos, and images and videos in a column of another name."""

from __future__ import annotations

import pytest
from fixtures.data_fixtures import load, png, text_rows, write_jsonl, write_kind

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.data import check_data


@pytest.mark.parametrize(
    "row",
    [
        {"videos": ["a.mp4"]},
        {"videos": "a.mp4"},
        {"video": {"path": "a.mp4", "bytes": None}},
        {"Video_Path": "clips/a.mp4"},
        {"video_url": "s3://bucket/a.mp4"},
        {"prompt": "what happens in <video>?"},
        {"prompt": "<Video>what happens?"},
        {"prompt": [{"role": "system", "content": "<video>"}, {"role": "user", "content": "what?"}]},
        {"prompt": [{"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "what?"}]}]},
    ],
)
def test_a_row_with_a_video_is_refused(tmp_path, text_model, row):
    rows = [{**dict.fromkeys(row), **good, "answer": "1"} for good in text_rows(3)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "what?", "answer": "1", **row}])
    with pytest.raises(UserError, match=r"a.jsonl row 3 .*video"):
        load(path, text_model)
    if "prompt" not in row:
        with pytest.raises(UserError, match=r"a.jsonl row 3 .*video"):
            check_data(DataConfig(train_files=path), "train_files", ModelConfig(model_path=text_model))


@pytest.mark.parametrize("column", ["video", "Video_Path", "video_url"])
def test_a_video_in_a_column_of_another_name_is_no_blind_training(tmp_path, vision_model, column):
    rows = [{"prompt": "p", "answer": "1", column: value} for value in ("", "a.mp4")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=rf"row 1 .*column '{column}' holds a video .*set data.video_key={column}"):
        load(path, vision_model)
    with pytest.raises(UserError, match=rf"row 1 .*column '{column}' holds a video"):
        check_data(DataConfig(train_files=path), "train_files", ModelConfig(model_path=vision_model))
    assert len(load(path, vision_model, video_key=None)) == 2


def test_the_column_of_videos_may_have_another_name(tmp_path, vision_model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "1", "film": "a.mp4"}])
    assert len(load(path, vision_model)) == 1
    with pytest.raises(UserError, match=r"row 0 .*'a.mp4' cannot be read as a video \(No such file or directory\)"):
        load(path, vision_model, video_key="film")
    data = DataConfig(train_files=path, video_key="film")
    with pytest.raises(UserError, match=r"row 0 .*'a.mp4' cannot be read as a video \(No such file or directory\)"):
        check_data(data, "train_files", ModelConfig(model_path=vision_model))
    with pytest.raises(UserError, match=r"no column 'clip' \(data.video_key\)"):
        load(path, vision_model, video_key="clip")


@pytest.mark.parametrize("empty", [None, "", [], {"path": None, "bytes": None}, [None]])
def test_rows_without_videos_are_read(tmp_path, vision_model, empty):
    row = {"prompt": "p", "answer": "1", "videos": empty, "video_id": "v1", "num_videos": 3}
    assert len(load(write_kind("parquet", tmp_path, [row]), vision_model)) == 1


def test_a_column_named_as_videos_may_be_read_as_images(tmp_path, vision_model):
    row = {"prompt": "p", "answer": "1", "video": [{"bytes": png(28, 28)}]}
    assert load(write_kind("parquet", tmp_path, [row]), vision_model, image_key="video").max_images == 1


# --- columns of images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("image", {"bytes": png(28, 28), "path": None}),
        ("img", [{"bytes": png(28, 28), "path": None}]),
        ("picture", "shots/0001"),
        ("Image_Path", "a.png"),
        ("decoded", png(28, 28)),
        ("sheet", "scans/a.jpeg"),
        ("photo", "https://host/a"),
        ("shot", "data:image/png;base64,iVBORw0KGgo="),
    ],
)
def test_images_in_a_column_of_another_name_are_no_blind_training(tmp_path, vision_model, text_model, column, cell):
    rows = [{"prompt": f"p{i}", "answer": "1", column: value} for i, value in enumerate([None, cell])]
    path = write_kind("parquet", tmp_path, rows)
    with pytest.raises(UserError, match=rf"rows.parquet: column '{column}' holds images .*set data.image_key={column}"):
        load(path, vision_model)
    with pytest.raises(UserError, match=rf"column '{column}' holds images"):
        check_data(DataConfig(train_files=path), "train_files", ModelConfig(model_path=vision_model))
    assert len(load(path, vision_model, image_key=None)) == 2
    assert len(load(path, text_model)) == 2
    check_data(DataConfig(train_files=path), "train_files", ModelConfig(model_path=text_model))


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "arrow", "saved", "folder"])
def test_a_dry_run_finds_them_in_every_kind_of_file(tmp_path, vision_model, kind):
    rows = [{"prompt": f"p{i}", "answer": "1", "image": f"{i}.png"} for i in range(5)]
    data = DataConfig(train_files=write_kind(kind, tmp_path, rows))
    with pytest.raises(UserError, match=r"column 'image' holds images .*set data.image_key=image"):
        check_data(data, "train_files", ModelConfig(model_path=vision_model))


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("image_id", 7), ("num_images", 1), ("caption", "a cat in a photo.png file, he said"), ("image", ""),
        ("image", "a cat on a mat"), ("has_image", True), ("figure", "Figure 1"), ("path", "rows/a.txt"),
    ],
)  # fmt: skip
def test_columns_that_hold_no_images_are_left_alone(tmp_path, vision_model, column, cell):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "1", column: cell}])
    assert len(load(path, vision_model)) == 1


def test_images_that_are_read_need_no_other_column(tmp_path, vision_model):
    (tmp_path / "a.png").write_bytes(png(28, 28))
    found = enumerate([[], ["a.png"]])
    rows = [{"prompt": f"p{i}", "answer": "1", "images": images, "image": "b.png"} for i, images in found]
    assert load(write_jsonl(tmp_path / "a.jsonl", rows), vision_model).max_images == 1
    chat = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    rows = [{"prompt": chat, "answer": "1", "image": "b.png"}]
    assert load(write_jsonl(tmp_path / "b.jsonl", rows), vision_model).max_images == 1


def test_an_empty_column_beside_a_full_one_is_a_warning(tmp_path, vision_model, caplog):
    rows = [{"prompt": "p", "answer": "1", "images": [], "image": "b.png"}]
    load(write_jsonl(tmp_path / "a.jsonl", rows), vision_model)
    assert "column 'image' holds images in 1 of 1 rows where data.image_key=images has none" in caplog.text


def test_one_image_that_is_read_hides_no_others(tmp_path, vision_model, caplog):
    (tmp_path / "a.png").write_bytes(png(28, 28))
    rows = [{"prompt": f"p{i}", "answer": "1", "images": ["a.png"][i:], "image": "a.png"} for i in range(5)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    load(path, vision_model)
    assert "column 'image' holds images in 4 of 5 rows where data.image_key=images has none" in caplog.text
    caplog.clear()
    check_data(DataConfig(train_files=path), "train_files", ModelConfig(model_path=vision_model))
    assert "column 'image' holds images in rows where data.image_key=images has none" in caplog.text


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_images_that_begin_late_are_no_blind_training(tmp_path, vision_model, kind):
    rows = [{"prompt": f"p{i}", "answer": "1", "image": None if i < 300 else "a.png"} for i in range(303)]
    path = write_kind(kind, tmp_path, rows)
    with pytest.raises(UserError, match=r"row 300 .*column 'image' holds an image .*set data.image_key=image"):
        load(path, vision_model)
    assert len(load(path, vision_model, image_key=None)) == 303
    if kind == "parquet":  # where columns lie apart, a dry run looks for the first
        with pytest.raises(UserError, match=r"column 'image' holds images .*set data.image_key=image"):
            check_data(DataConfig(train_files=path), "train_files", ModelConfig(model_path=vision_model))
