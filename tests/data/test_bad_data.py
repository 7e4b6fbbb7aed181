"""Bad data through the real program: one line, exit code 2, no model loaded."""

import json
import logging
import shutil

import numpy as np
import pytest
from fixtures.tiny_models import save_vision_model
from PIL import Image

from mmr1_ds.train import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_vision_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path, model, capfd, monkeypatch):
    """Runs the program on rows of data; returns its exit code and its error lines."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    package = logging.getLogger("mmr1_ds")
    before = package.handlers[:], package.propagate

    def run_on(rows, *overrides):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main(
            [
                f"data.train_files={data}",
                f"worker.actor.model.model_path={model}",
                "trainer.n_gpus_per_node=1",
                "data.rollout_batch_size=2",
                "worker.actor.global_batch_size=2",
                "data.min_pixels=784",
                "data.max_pixels=12544",
                f"trainer.run_dir={tmp_path / 'run'}",
                *overrides,
            ]
        )
        lines = capfd.readouterr().err.splitlines()
        assert not any("loading" in line for line in lines)
        assert not (tmp_path / "run").exists()
        return code, [line for line in lines if line.startswith("mmr1-ds: error: ")]

    yield run_on
    package.handlers[:], package.propagate = before


def good_row(i):
    return {"prompt": f"what is {i}?", "answer": str(i), "images": []}


def test_a_row_without_an_answer_is_named(run):
    code, errors = run([good_row(0), good_row(1), {**good_row(2), "answer": ""}])
    assert code == 2
    assert len(errors) == 1
    assert "row 2" in errors[0] and "answer" in errors[0] and "data.jsonl" in errors[0]


def test_an_unreadable_image_is_named_by_row(run, tmp_path):
    Image.fromarray(np.zeros((28, 28, 3), dtype=np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of the kind")
    rows = [
        {"prompt": "<image>a", "answer": "1", "images": ["good.png"]},
        {"prompt": "<image>b", "answer": "2", "images": ["bad.png"]},
    ]
    code, errors = run(rows)
    assert code == 2
    assert len(errors) == 1
    assert "row 1" in errors[0] and "bad.png" in errors[0]


def test_a_missing_image_is_named_by_row(run):
    code, errors = run([{"prompt": "<image>a", "answer": "1", "images": ["nowhere.png"]}])
    assert code == 2
    assert len(errors) == 1
    assert "row 0" in errors[0] and "nowhere.png" in errors[0]


def test_a_model_folder_without_weights_is_refused(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    code, errors = run([good_row(0), good_row(1)], f"worker.actor.model.model_path={tmp_path / 'empty'}")
    assert code == 2
    assert len(errors) == 1
    assert "empty" in errors[0] and "safetensors" in errors[0]


def test_a_reward_file_that_does_not_import_is_refused(run, tmp_path):
    (tmp_path / "reward.py").write_text("import no_such_module\n\ndef score(items):\n    return []\n")
    code, errors = run([good_row(0), good_row(1)], f"worker.reward.reward_function={tmp_path / 'reward.py'}:score")
    assert code == 2
    assert len(errors) == 1
    assert "no_such_module" in errors[0]
