"""The files a run names: data, model folder, reward file, format prompt, checkpoint."""

from pathlib import Path

import pytest
from fixtures.configs import check, refused
from fixtures.data_fixtures import write_kind
from fixtures.dry_runs import write_rows

from mmr1_ds.errors import UserError
from mmr1_ds.preflight.files import check_output_folder

ROWS = [{"q": f"question {k}", "a": k} for k in range(5)]


def test_missing_data_file(valid):
    assert "no such file or folder '/nowhere/x.parquet'" in refused(valid, "data.train_files=/nowhere/x.parquet")
    assert "data.val_files: no such file" in refused(valid, "data.val_files=/nowhere/x.parquet")


def test_missing_checkpoint(valid):
    assert "no such folder '/nowhere'" in refused(valid, "trainer.load_checkpoint_path=/nowhere")


def test_hub_names_are_let_through(valid):
    plan = check(valid, "data.train_files=[hiyouga/geometry3k@train,gsm8k]")
    assert [file.is_local for file in plan.train_data.files] == [False, False]
    assert plan.train_data.num_rows is None and plan.total_steps is None


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "arrow", "csv", "folder", "folder@test", "saved"])
def test_columns_and_counts_of_every_kind_of_file(valid, tmp_path, kind):
    (tmp_path / "data").mkdir()
    path = write_kind(kind, tmp_path / "data", ROWS)
    plan = check(valid, f"data.train_files={path}", "data.prompt_key=q", "data.answer_key=a")
    assert plan.train_data.num_rows == (None if kind == "csv" else 5)
    message = refused(valid, f"data.train_files={path}", "data.answer_key=a")
    assert "no column 'problem' (data.prompt_key); it has q, a" in message


def test_empty_and_unreadable_data(valid, tmp_path):
    empty = write_rows(tmp_path, "empty.json", [])
    assert "has no rows" in refused(valid, f"data.train_files={empty}")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really")
    assert f"cannot read '{broken}'" in refused(valid, f"data.train_files={broken}")
    state = Path(write_kind("saved", tmp_path, ROWS)) / "state.json"
    for content in ("{", "[1]", "{}", '{"_data_files": [1]}'):
        state.write_text(content)
        assert str(state) in refused(valid, f"data.train_files={state.parent}", "data.prompt_key=q")
    (tmp_path / "none").mkdir()
    assert "holds no data files" in refused(valid, f"data.train_files={tmp_path / 'none'}")


def test_rows_of_csv(valid, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('"what, now",answer\nr,3\n')
    assert check(valid, f"data.train_files={path}", "data.prompt_key=what, now").train_data.files[0].has_images is False
    path.write_text("prompt,answer\nr,3\n\nq,1,2\n")
    message = refused(valid, f"data.train_files={path}", "data.prompt_key=prompt")
    assert "row 1 (counted from 0) has 3 cells, the header 2; put texts with commas in quotes" in message


def test_suffixes_in_capitals(valid, tmp_path):
    """A file is read; in a folder `datasets` passes over it."""
    (tmp_path / "data").mkdir()
    path = write_rows(tmp_path / "data", "TRAIN.JSON")
    assert check(valid, f"data.train_files={path}").train_data.num_rows == 7
    message = refused(valid, f"data.train_files={path.parent}")
    assert "TRAIN.JSON' would be passed over: in folders suffixes are in small letters" in message


def test_model_folder(valid, tmp_path):
    def model(path):
        return refused(valid, f"worker.actor.model.model_path={path}")

    assert "no such folder '/nowhere/model'" in model("/nowhere/model")
    assert "needs a config.json" in model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "has no model_type" in model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert "has no weights" in model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "convert them to safetensors" in model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    check(valid, f"worker.actor.model.model_path={tmp_path}")
    assert "tokenizer_path: no such folder" in refused(valid, "worker.actor.model.tokenizer_path=./nowhere")
    assert "model_path is not set" in refused(valid, "worker.actor.model.model_path=null")


@pytest.mark.parametrize("content", ["{", "[1]", '{"text_config": [1]}', b"\xff"])
def test_damaged_config_of_a_model(valid, tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / "config.json").write_text('{"model_type": "qwen2", "text_config": null}')
        check(valid, f"worker.actor.model.model_path={tmp_path}")
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert str(tmp_path / name) in refused(valid, f"worker.actor.model.model_path={tmp_path}")
        assert str(tmp_path / name) in refused(valid, f"worker.actor.model.tokenizer_path={tmp_path}")
        (tmp_path / name).unlink()


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_a_byte_order_mark_is_passed_over(valid, tmp_path, kind):
    path = Path(write_kind(kind, tmp_path, ROWS))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    check(valid, f"data.train_files={path}", "data.prompt_key=q", "data.answer_key=a")


@pytest.mark.parametrize("key", ["trainer.run_dir", "trainer.save_checkpoint_path"])
def test_output_below_a_file(valid, tmp_path, key):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        assert f"{key}: '{path}' cannot be made, '{tmp_path / 'file'}' is not a folder" in refused(
            valid, f"{key}={path}"
        )
    check(valid, f"{key}={tmp_path / 'new' / 'folder'}")
    assert not (tmp_path / "new").exists()


def test_output_that_is_not_writable(valid, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))  # root may write everywhere
    message = refused(valid, f"trainer.run_dir={tmp_path / 'new'}")
    assert f"'{tmp_path}' is not writable" in message


REWARDS = """
import json
from math import floor

def good(items, scale=1.0):
    return []

def old_style(response, ground_truth):
    return 0.0

def nothing():
    return 0.0

def keyword(items, *, weight):
    return []

try:
    import numpy
except ImportError:
    numpy = None
else:
    def within(items):
        return []

annotated: object = lambda items: []

@floor
def decorated():
    return []
"""


def test_reward_file(valid, tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(REWARDS)

    def reward(name, *more):
        return refused(valid, f"worker.reward.reward_function={path}:{name}", *more)

    check(valid, f"worker.reward.reward_function={path}:good")
    check(valid, f"worker.reward.reward_function={path}:floor")
    weight = "worker.reward.reward_function_kwargs={weight: 0.5}"
    check(valid, f"worker.reward.reward_function={path}:keyword", weight)
    for name in ("within", "annotated", "decorated"):
        check(valid, f"worker.reward.reward_function={path}:{name}")
    assert "has no function 'goood'; its functions are: good, old_style, nothing, keyword" in reward("goood")
    check(valid, f"worker.reward.reward_function={path}:old_style")
    assert "keyword needs weight" in reward("keyword")
    assert "names no argument" in reward("nothing")
    path.write_text("def f(:\n")
    assert f"{path}, line 1: not Python" in reward("f")
    path.write_bytes(b"x = 'caf\xe9'\ndef f(items):\n    return []\n")
    assert f"{path}, line " in reward("f")
    path.write_bytes(b"# -*- coding: latin-1 -*-\n" + path.read_bytes())
    check(valid, f"worker.reward.reward_function={path}:f")
    path.write_text("from math import *\n")
    check(valid, f"worker.reward.reward_function={path}:f")
    assert "no such file '/nowhere.py'" in refused(valid, "worker.reward.reward_function=/nowhere.py:f")
    assert "is unknown; use math, r1v, openr1" in refused(valid, "worker.reward.reward_function=maths")


def test_format_prompt(valid, tmp_path):
    assert "no such file 'nowhere.jinja'" in refused(valid, "data.format_prompt=nowhere.jinja")
    check(valid, "data.format_prompt={{ content }} Answer in \\boxed{}.")
    check(valid, "data.format_prompt={{ content }}" + " Think." * 100)  # longer than a file's name may be
    for part in ("{{ foo.bar }}", "{{ foo }}", "{{ content / 2 }}", "{{ content.__class__.mro() }}"):
        said = refused(valid, f"data.format_prompt={{{{ content }}}}{part}")
        assert "data.format_prompt cannot be rendered" in said
    path = tmp_path / "prompt.jinja"
    path.write_bytes(b"{{ content }} caf\xe9")
    assert f"cannot read '{path}'" in refused(valid, f"data.format_prompt={path}")


@pytest.mark.parametrize(
    "path", ["/proc/nope", "/proc/nope/deeper", "/sys/nope", "/dev/null/x", "a" * 300, "a/" + "b" * 300, "a\0b"]
)
@pytest.mark.parametrize("key", ["trainer.run_dir", "trainer.save_checkpoint_path"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, key, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{key}: .*cannot be .*name another") as refused:
        check_output_folder(Path(path), key)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_links_to_nowhere_and_in_circles_are_refused(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("nowhere", "circle"):
        for path in (tmp_path / name, tmp_path / name / "run"):
            with pytest.raises(UserError, match="is not a folder; name another"):
                check_output_folder(path, "trainer.run_dir")
