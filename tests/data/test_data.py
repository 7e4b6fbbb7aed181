"""Data sets from every kind of file, what a row becomes, and the mistakes that are named."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from fixtures.data_fixtures import (
    VOCABULARY,
    config,
    image,
    load,
    png,
    text_rows,
    user_text,
    write_jsonl,
    write_kind,
)
from PIL import Image

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data import scan
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.sources import list_names, open_sources
from mmr1_ds.errors import UserError

CHAT_TOKENS = 3 + 2 + 3  # start user newline, end newline, start assistant newline


# --- kinds of files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["parquet", "json", "jsonl", "csv", "saved", "saved@split", "arrow", "folder", "folder@test"],
)
def test_kinds_of_files(kind, tmp_path, text_model):
    rows = text_rows(7)
    dataset = load(write_kind(kind, tmp_path, rows), text_model)
    assert len(dataset) == 7
    assert [user_text(dataset, i) for i in range(7)] == [row["prompt"] for row in rows]
    assert [dataset[i].ground_truth for i in range(7)] == [row["answer"] for row in rows]
    assert [dataset[i].index for i in range(7)] == list(range(7))


def test_several_files_in_order_and_with_different_columns(tmp_path, vision_model):
    first = write_jsonl(tmp_path / "a.jsonl", text_rows(3))
    second = tmp_path / "b.parquet"
    datasets.Dataset.from_list([{"prompt": "see", "answer": 5, "images": [{"bytes": png(28, 28)}]}]).to_parquet(second)
    for files in ([first, str(second)], f"{first}, {second}"):
        dataset = load(files, vision_model)
        assert [prompt.ground_truth for prompt in dataset] == ["0", "1", "2", "5"]
        assert [len(prompt.images) for prompt in dataset] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("", "data.train_files is empty"),
        (["nowhere/a/b.parquet"], "no such file or folder 'nowhere/a/b.parquet'"),
        ("./nowhere@train", "no such file or folder './nowhere'"),
        ("rows.parquet", "no such file or folder 'rows.parquet'"),
    ],
)
def test_missing_files_are_named(files, message):
    with pytest.raises(UserError, match=message):
        list_names(files)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, content in [("broken.parquet", b"PAR1 nothing"), ("notes.txt", b"hello"), ("empty.jsonl", b"")]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=name) as raised:
            open_sources(str(path))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("comma.jsonl", '{"prompt": "q", "answer": "1",}\n', "Missing a name for object member. in row 0"),
        ("cut.jsonl", '{"prompt": "q", "answer": "1"}\n{"prompt": "q", "ans', "in row 1"),
        # pandas would take the first cell of each row for its name, and read the others one column too far left.
        ("more.csv", "prompt,answer\nq,1,2\nr,3\n", r"row 0 .counted from 0. has 3 cells, the header 2; put texts"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"cannot read '.*{name}': .*{message}"):
        open_sources(str(tmp_path / name), answer_key="answer")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_suffixes_may_be_in_capitals(tmp_path, text_model, kind):
    path = Path(write_kind(kind, tmp_path, text_rows(2)))
    path = path.rename(path.with_suffix(path.suffix.upper()))
    assert len(load(str(path), text_model)) == 2


def test_cells_of_csv_may_be_as_long_as_an_image(tmp_path):
    (tmp_path / "long.csv").write_text(f"prompt,answer\n{'q' * 200_000},1\n")
    assert len(open_sources(str(tmp_path / "long.csv"))[0].rows[0]["prompt"]) == 200_000


@pytest.mark.parametrize("written", [json.dumps, str])
def test_messages_that_are_text_are_refused(tmp_path, text_model, written):
    """As a column of lists is after CSV: the model would be shown brackets and quotes."""
    rows = [*text_rows(1), {"prompt": written([{"role": "user", "content": "q [1]"}]), "answer": "1"}]
    with pytest.raises(UserError, match=r"row 1 .*a list of messages as text.*; give the list itself"):
        load(write_jsonl(tmp_path / "a.jsonl", rows), text_model)
    kept = [{"prompt": text, "answer": "1"} for text in ('[{"role": 1}] is what?', '[{"x": 3}, {"x": 4}]')]
    assert len(load(write_jsonl(tmp_path / "b.jsonl", kept), text_model)) == 2


def test_a_split_there_is_not_is_named(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(text_rows(2))}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no split 'test'; there are train"):
        open_sources(f"{tmp_path / 'saved'}@test")
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(2))
    with pytest.raises(UserError, match=r"cannot read .*a.jsonl@test"):
        open_sources(f"{path}@test")


def test_a_path_with_an_at_sign(tmp_path, text_model):
    path = write_jsonl(tmp_path / "rows@home.jsonl", text_rows(2))
    assert len(load(path, text_model)) == 2


# --- prompts ------------------------------------------------------------------------------------------------------


def test_chat_system_and_format_prompt(tmp_path, text_model):
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two "},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": chat, "answer": 2}])
    template = tmp_path / "think.jinja"
    template.write_text("\n{{ content | trim }} Think.\n")
    for format_prompt in (str(template), "{{ content | trim }} Think."):
        dataset = load(path, text_model, prompt_key="problem", system_prompt="Be brief.", format_prompt=format_prompt)
        assert dataset.encoder.tokenizer.decode(dataset[0].token_ids) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
            "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\ntwo Think.<|im_end|>\n<|im_start|>assistant\n"
        )


def test_a_rows_own_system_message_wins(tmp_path, text_model):
    chat = [{"role": "system", "content": "mine"}, {"role": "user", "content": "one"}]
    dataset = load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": chat, "answer": 2}]), text_model, system_prompt="run")
    decoded = dataset.encoder.tokenizer.decode(dataset[0].token_ids)
    assert "mine" in decoded and "run" not in decoded


@pytest.mark.parametrize(
    ("format_prompt", "message"),
    [
        ("missing.jinja", "no such file 'missing.jinja'"),
        ("Think first.", "neither a file nor a template that uses {{ content }}"),
        ("{{ content", "not a jinja template"),
    ],
)
def test_format_prompts_that_cannot_work(text_model, format_prompt, message):
    with pytest.raises(UserError, match=message):
        PromptEncoder(ModelConfig(model_path=text_model), DataConfig(format_prompt=format_prompt))


def test_cells_of_mixed_types(tmp_path, text_model):
    """Strings beside chats and numbers beside strings: JSON allows it."""
    chat = [{"role": "user", "content": "two"}]
    rows = [{"prompt": "one", "answer": 1}, {"prompt": chat, "answer": "b"}, {"prompt": "three", "answer": 0.5}]
    dataset = load(write_jsonl(tmp_path / "a.jsonl", rows), text_model)
    assert [user_text(dataset, i) for i in range(3)] == ["one", "two", "three"]
    assert [prompt.ground_truth for prompt in dataset] == ["1", "b", "0.5"]


def test_image_parts_of_a_chat_are_markers(tmp_path, vision_model):
    parts = [{"type": "text", "text": "see "}, {"type": "image", "text": None}, {"type": "text", "text": "!"}]
    rows = [{"prompt": [{"role": "user", "content": parts}], "answer": "1", "images": "a.png"}]
    (tmp_path / "a.png").write_bytes(png(28, 28))
    dataset = load(write_jsonl(tmp_path / "a.jsonl", rows), vision_model)
    assert user_text(dataset, 0) == "see <|vision_start|><|image_pad|><|vision_end|>!"


@pytest.mark.parametrize(
    "prompt", [None, "", " ", 5, [], [{"content": "no role"}], [{"role": "assistant", "content": "a"}]]
)
def test_rows_without_a_prompt_are_named(tmp_path, text_model, prompt):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "answer": "1"}])
    with pytest.raises(UserError, match=r"a.jsonl row 0"):
        load(path, text_model)


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "expected"), [(7, "7"), (0.5, "0.5"), ("7 ", "7 "), (True, "True"), (0, "0")])
def test_answers_become_strings(tmp_path, text_model, answer, expected):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": answer}])
    assert load(path, text_model)[0].ground_truth == expected


@pytest.mark.parametrize(
    ("kind", "answer"), [("jsonl", None), ("jsonl", " "), ("csv", None), ("parquet", float("nan"))]
)
def test_a_row_without_an_answer_is_named(tmp_path, text_model, kind, answer):
    rows = [{"prompt": f"p{i}", "answer": 1.0 if isinstance(answer, float) else "1"} for i in range(300)]
    rows[270]["answer"] = answer
    path = write_kind(kind, tmp_path, rows)
    with pytest.raises(UserError, match=rf"rows.{kind} row 270 \(counted from 0\): no answer in column 'answer'"):
        load(path, text_model)


def test_prompts_know_their_source_and_sources_alike_keep_their_place(tmp_path, text_model):
    names = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "more/a.jsonl")]
    names[2].parent.mkdir()
    long = {"prompt": "what is " * 99, "answer": "1"}
    files = [write_jsonl(path, [long, *text_rows(count)]) for path, count in zip(names, (2, 1, 3), strict=True)]
    dataset = load(files, text_model, max_prompt_length=30)
    assert dataset.sources.tolist() == [0, 0, 1, 2, 2, 2]  # of those that are left
    assert dataset.source_names == ["0_a", "b", "2_a"]


def test_the_second_file_is_named_with_its_own_row(tmp_path, text_model):
    first = write_jsonl(tmp_path / "a.jsonl", text_rows(5))
    second = write_jsonl(tmp_path / "b.jsonl", [*text_rows(2), {"prompt": "p", "answer": None}])
    with pytest.raises(UserError, match=r"b.jsonl row 2"):
        load([first, second], text_model)


@pytest.mark.parametrize("key", ["prompt_key", "answer_key", "image_key", "id_key", "category_key"])
def test_a_key_that_is_no_column_is_named(tmp_path, text_model, key):
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(1))
    with pytest.raises(UserError, match=rf"no column 'nope' \(data.{key}\); it has prompt, answer"):
        load(path, text_model, **{key: "nope"})


# --- images -------------------------------------------------------------------------------------------------------


def pixels(picture):
    return np.asarray(picture)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("form", ["bytes dict", "bytes", "path", "path dict", "feature"])
def test_forms_of_images(tmp_path, vision_model, form, single):
    expected = image(56, 28, seed=3)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(56, 28, 3))
    cell = {
        "bytes dict": {"bytes": png(56, 28, 3), "path": "gone.png"},
        "bytes": png(56, 28, 3),
        "path": "pictures/a.png",
        "path dict": {"bytes": None, "path": "pictures/a.png"},
        "feature": expected,
    }[form]
    features = None
    if form == "feature":
        feature = datasets.Image() if single else datasets.List(datasets.Image())
        features = datasets.Features(
            {"prompt": datasets.Value("string"), "answer": datasets.Value("string"), "images": feature}
        )
    rows = {"prompt": ["what?"], "answer": ["1"], "images": [cell if single else [cell]]}
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    prompt = load(str(path), vision_model)[0]
    assert [picture.mode for picture in prompt.images] == ["RGB"]
    assert np.array_equal(pixels(prompt.images[0]), pixels(expected))
    assert prompt.token_ids.count(VOCABULARY["<|image_pad|>"]) == 1


def test_image_dir_is_the_root_of_relative_paths(tmp_path, vision_model):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(png(28, 28, 1))
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "1", "images": ["a.png"]}])
    dataset = load(path, vision_model, image_dir=str(tmp_path / "elsewhere"))
    assert np.array_equal(pixels(dataset[0].images[0]), pixels(image(28, 28, 1)))
    with pytest.raises(UserError, match=r"a.jsonl row 0.*'a.png' cannot be read as an image"):
        load(path, vision_model)
    with pytest.raises(UserError, match=r"data.image_dir: no such folder"):
        load(path, vision_model, image_dir=str(tmp_path / "nowhere"))


def test_unmarked_images_come_first_and_marked_ones_where_marked(tmp_path, vision_model):
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    (tmp_path / "a.png").write_bytes(png(28, 28))
    rows = [
        {"prompt": "look", "answer": "1", "images": ["a.png", "a.png"]},
        {"prompt": "x<image>y<image>", "answer": "1", "images": ["a.png", "a.png"]},
    ]
    dataset = load(write_jsonl(tmp_path / "a.jsonl", rows), vision_model)
    assert user_text(dataset, 0) == pad + pad + "look"
    assert user_text(dataset, 1) == f"x{pad}y{pad}"


@pytest.mark.parametrize(("prompt", "images"), [("<image> a <image>", 1), ("<image>", 2), ("<image>", 0)])
def test_markers_that_do_not_fit_the_images_name_the_row(tmp_path, vision_model, prompt, images):
    (tmp_path / "a.png").write_bytes(png(28, 28))
    rows = [
        {"prompt": "p", "answer": "1", "images": []},
        {"prompt": prompt, "answer": "1", "images": ["a.png"] * images},
    ]
    with pytest.raises(
        UserError, match=rf"a.jsonl row 1.* {prompt.count('<')} <image> markers and the row {images} images"
    ):
        load(write_jsonl(tmp_path / "a.jsonl", rows), vision_model)


def test_an_unreadable_image_is_named_before_training(tmp_path, vision_model):
    rows = [{"prompt": "p", "answer": "1", "images": [{"bytes": content}]} for content in (png(28, 28), b"no image")]
    path = write_kind("parquet", tmp_path, rows)
    with pytest.raises(UserError, match=r"rows.parquet row 1.*cannot be read as an image"):
        load(path, vision_model)


def test_a_truncated_image_is_named_when_drawn(tmp_path, vision_model):
    rows = [{"prompt": "p", "answer": "1", "images": [{"bytes": png(280, 280)[:2000]}]}]
    path = write_kind("parquet", tmp_path, rows)
    dataset = load(path, vision_model)
    with pytest.raises(UserError, match=r"rows.parquet row 0.*cannot be read as an image"):
        dataset[0]


def test_grey_and_transparent_images_become_rgb(tmp_path, vision_model):
    cells = []
    for mode in ("L", "RGBA", "P", "1"):
        buffer = io.BytesIO()
        Image.new(mode, (28, 28)).save(buffer, "PNG")
        cells.append({"prompt": "p", "answer": "1", "images": [{"bytes": buffer.getvalue()}]})
    path = write_kind("parquet", tmp_path, cells)
    assert {prompt.images[0].mode for prompt in load(path, vision_model)} == {"RGB"}


def test_pixel_limits_apply(tmp_path, vision_model):
    path = write_kind("parquet", tmp_path, [{"prompt": "p", "answer": "1", "images": [{"bytes": png(90, 80)}]}])
    assert load(path, vision_model)[0].images[0].size == (84, 84)
    assert load(path, vision_model, max_pixels=3200)[0].images[0].size == (56, 28)
    assert load(path, vision_model, min_pixels=10000)[0].images[0].size == (112, 112)


# --- filter, ids, fingerprint -------------------------------------------------------------------------------------


def long_rows():
    """Prompts of 1, 2, ... 9 characters."""
    return [{"prompt": "x" * (i + 1), "answer": "1", "kind": f"k{i}"} for i in range(9)]


def test_overlong_prompts_are_dropped_and_counted(tmp_path, text_model, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", long_rows())
    with caplog.at_level(logging.WARNING):
        dataset = load(path, text_model, max_prompt_length=CHAT_TOKENS + 4, category_key="kind")
    assert len(dataset) == 4 and dataset.num_filtered == 5
    assert "dropped 5 of 9 prompts longer than data.max_prompt_length" in caplog.text
    assert list(dataset.categories) == ["k0", "k1", "k2", "k3"]
    assert max(len(prompt.token_ids) for prompt in dataset) == CHAT_TOKENS + 4


def test_lengths_count_image_tokens(tmp_path, vision_model):
    (tmp_path / "a.png").write_bytes(png(112, 28))  # 4 tokens
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "see", "answer": "1", "images": ["a.png"]}])
    length = CHAT_TOKENS + 3 + 2 + 4
    dataset = load(path, vision_model, max_prompt_length=length)
    assert len(dataset.encoder.expand(dataset[0]).input_ids) == length
    with pytest.raises(UserError, match=f"all 1 prompts are longer .*the shortest has {length}"):
        load(path, vision_model, max_prompt_length=length - 1)


def test_overlong_prompts_are_named_when_drawn_without_the_filter(tmp_path, text_model):
    path = write_jsonl(tmp_path / "a.jsonl", long_rows())
    dataset = load(path, text_model, max_prompt_length=CHAT_TOKENS + 4, filter_overlong_prompts=False)
    assert len(dataset) == 9 and dataset.num_filtered == 0
    assert dataset[3].ground_truth == "1"
    with pytest.raises(UserError, match=f"a.jsonl row 4 .*the prompt has {CHAT_TOKENS + 5} tokens"):
        dataset[4]


def test_ids_are_stable_and_repeats_numbered(tmp_path, text_model):
    rows = [*text_rows(3), *text_rows(2), *text_rows(1)]
    ids = list(load(write_jsonl(tmp_path / "a.jsonl", rows), text_model).prompt_ids)
    moved = list(load(write_jsonl(tmp_path / "b.jsonl", rows[2:]), text_model).prompt_ids)
    assert ids[:3] == [moved[1], moved[2], moved[0]]
    assert ids[3:] == [ids[0] + "#1", ids[1] + "#1", ids[0] + "#2"]
    assert all(len(prompt_id) >= 16 for prompt_id in ids)


def test_ids_depend_on_prompt_answer_and_image(tmp_path, vision_model):
    rows = [
        {"prompt": prompt, "answer": answer, "images": [{"bytes": png(28, 28, seed)}]}
        for prompt, answer, seed in [("a", "1", 0), ("b", "1", 0), ("a", "2", 0), ("a", "1", 1)]
    ]
    path = write_kind("parquet", tmp_path, rows)
    assert len({prompt_id.split("#")[0] for prompt_id in load(path, vision_model).prompt_ids}) == 4


def test_ids_of_the_data_set(tmp_path, text_model, caplog):
    rows = [{"prompt": f"p{i}", "answer": "1", "key": key} for i, key in enumerate([7, 8, 7])]
    with caplog.at_level(logging.WARNING):
        dataset = load(write_jsonl(tmp_path / "a.jsonl", rows), text_model, id_key="key")
    assert list(dataset.prompt_ids) == ["7", "8", "7#1"] == [prompt.prompt_id for prompt in dataset]
    assert dataset.prompt_ids[-1] == "7#1" and dataset.prompt_ids[1:] == ["8", "7#1"]
    assert "more than once" in caplog.text
    rows[1]["key"] = None
    with pytest.raises(UserError, match=r"b.jsonl row 1.*no id in column 'key'"):
        load(write_jsonl(tmp_path / "b.jsonl", rows), text_model, id_key="key")


def test_fingerprint_follows_content_order_and_settings(tmp_path, text_model):
    rows = text_rows(3)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    reference = load(path, text_model).fingerprint
    assert load(write_jsonl(tmp_path / "copy.jsonl", rows), text_model).fingerprint == reference
    assert load(write_jsonl(tmp_path / "turned.jsonl", rows[::-1]), text_model).fingerprint != reference
    assert load(path, text_model, system_prompt="Be brief.").fingerprint != reference


def test_scan_in_processes_equals_scan_in_place(tmp_path, vision_model, monkeypatch):
    """The parallel scan, its cache, and an error that crosses the process boundary."""
    rows = [{"prompt": f"what is {i}?", "answer": str(i), "images": [{"bytes": png(28 + i, 28, i)}]} for i in range(41)]
    path = write_kind("parquet", tmp_path, rows)
    settings = {"format_prompt": "{{ content }} Think."}
    expected = load(path, vision_model, **settings)
    monkeypatch.setattr(scan, "ROWS_KEPT", 20)
    monkeypatch.setattr(scan, "ROWS_A_PROCESS", 20)
    monkeypatch.setattr(scan, "BATCH_ROWS", 8)
    measured, number = [], PromptEncoder.num_image_tokens
    monkeypatch.setattr(PromptEncoder, "num_image_tokens", lambda *size: measured.append(1) or number(*size))
    copy = str(tmp_path / "copy.parquet")
    shutil.copy(path, copy)
    # In this process, and kept; read from what was kept; in two processes; read.
    for file, cores, count in ((path, 1, 41), (path, 1, 0), (copy, 2, 0), (copy, 1, 0)):
        monkeypatch.setattr(scan.os, "cpu_count", lambda cores=cores: cores)
        measured.clear()
        dataset = load(file, vision_model, **settings)
        assert len(measured) == count
        assert list(dataset.prompt_ids) == list(expected.prompt_ids)
        assert dataset.fingerprint == expected.fingerprint
        assert np.array_equal(dataset._lengths, expected._lengths)
        assert dataset.max_images == expected.max_images == 1
    for index in range(41):  # beside the rows, and not in them: they may change without them
        (tmp_path / f"{index}.png").write_bytes(png(28 + index, 28, index))
    rows = [{"prompt": f"what is {i}?", "answer": str(i), "images": [f"{i}.png"]} for i in range(41)]
    named = write_jsonl(tmp_path / "named.jsonl", rows)
    monkeypatch.setattr(scan, "ROWS_A_PROCESS", 30)
    for _ in range(2):
        measured.clear()
        load(named, vision_model, **settings)
        assert len(measured) == 41
    monkeypatch.setattr(scan, "ROWS_A_PROCESS", 20)
    bad = write_jsonl(tmp_path / "bad.jsonl", [*text_rows(40), {"prompt": "p", "answer": None}])
    with pytest.raises(UserError, match=r"bad.jsonl row 40"):
        load(bad, vision_model)


def test_number_of_images(tmp_path, vision_model, text_model):
    image = {"bytes": png(28, 28)}
    rows = [
        {"prompt": "p" * size, "answer": "1", "images": [image] * count} for size, count in [(1, 1), (2, 3), (99, 5)]
    ]
    path = write_kind("parquet", tmp_path, rows)
    settings = config(max_prompt_length=CHAT_TOKENS + 60)
    encoder = PromptEncoder(ModelConfig(model_path=vision_model), settings)
    dataset = load_dataset(path, settings, encoder)
    assert dataset.num_filtered == 1 and dataset.max_images == 3  # of those kept
    assert len(load_dataset(path, settings, encoder, limit_images=3)) == 2
    with pytest.raises(UserError, match=r"row 1 .*the prompt has 3 images, over worker.rollout.limit_images=2"):
        load_dataset(path, settings, encoder, limit_images=2)
    assert load(write_jsonl(tmp_path / "text.jsonl", text_rows(2)), text_model).max_images == 0


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"_data_files": [1]}'])
def test_a_damaged_saved_data_set_is_named(tmp_path, content):
    folder = write_kind("saved", tmp_path, text_rows(2))
    (tmp_path / "saved" / "state.json").write_text(content)
    with pytest.raises(UserError, match=f"cannot read '{folder}'"):
        open_sources(folder)


def test_a_format_prompt_that_fails_on_a_row_names_it(tmp_path, text_model):
    path = write_jsonl(tmp_path / "a.jsonl", [*text_rows(2), {"prompt": "7", "answer": "7"}])
    with pytest.raises(UserError, match=r"a.jsonl row 2 .*data.format_prompt cannot be rendered"):
        load(path, text_model, format_prompt="{{ content if content|length > 1 else content / 2 }}")


def test_index_out_of_range(tmp_path, text_model):
    dataset = load(write_jsonl(tmp_path / "a.jsonl", text_rows(2)), text_model)
    for index in (2, -1):
        with pytest.raises(IndexError):
            dataset[index]
