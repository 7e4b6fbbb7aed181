"""What a run would pass over in silence: videos."""

from __future__ import annotations

import pytest
from fixtures.data_fixtures import load, png, text_rows, write_jsonl, write_kind, write_text_model, write_vision_model

from mmr1_ds.errors import UserError


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    return write_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    "row",
    [
        {"videos": ["a.mp4"]},
        {"videos": "a.mp4"},
        {"video": {"path": "a.mp4", "bytes": None}},
        {"Video_Path": "clips/a.mp4"},
        {"video_url": "s3://bucket/a.mp4"},
        {"prompt": "what happens in <video>?"},
        {"prompt": [{"role": "system", "content": "<video>"}, {"role": "user", "content": "what?"}]},
        {"prompt": [{"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "what?"}]}]},
    ],
)
@pytest.mark.parametrize("kind", ["vision", "text"])
def test_a_row_with_a_video_is_refused(tmp_path, vision_model, text_model, row, kind):
    model = {"vision": vision_model, "text": text_model}[kind]
    rows = [{**dict.fromkeys(row), **good, "answer": "1"} for good in text_rows(3)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "what?", "answer": "1", **row}])
    with pytest.raises(UserError, match=r"a.jsonl row 3 .*video"):
        load(path, model)


def test_the_column_of_videos_may_have_another_name(tmp_path, vision_model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "1", "film": "a.mp4"}])
    assert len(load(path, vision_model)) == 1
    with pytest.raises(UserError, match=r"row 0 .*column 'film' holds a video"):
        load(path, vision_model, video_key="film")


@pytest.mark.parametrize("empty", [None, "", [], {"path": None, "bytes": None}, [None]])
def test_rows_without_videos_are_read(tmp_path, vision_model, empty):
    row = {"prompt": "p", "answer": "1", "videos": empty, "video_id": "v1", "num_videos": 3}
    assert len(load(write_kind("parquet", tmp_path, [row]), vision_model)) == 1


def test_a_column_named_as_videos_may_be_read_as_images(tmp_path, vision_model):
    row = {"prompt": "p", "answer": "1", "video": [{"bytes": png(28, 28)}]}
    assert load(write_kind("parquet", tmp_path, [row]), vision_model, image_key="video").max_images == 1
