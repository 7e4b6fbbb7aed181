"""Bad data through the real program: one line, exit code 2, no model loaded."""

import json
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
def refused(tmp_path, model, own_logging, capfd, monkeypatch):
    """Runs the program on rows of data, which it refuses; returns its one error line."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
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
                "data.max_prompt_length=256",
                "data.max_response_length=256",
                "data.min_pixels=784",
                "data.max_pixels=12544",
                f"trainer.run_dir={tmp_path / 'run'}",
                *overrides,
            ]
        )
        lines = capfd.readouterr().err.splitlines()
        assert not any("loading" in line for line in lines)
        assert not (tmp_path / "run").exists()
        (error,) = [line for line in lines if line.startswith("mmr1-ds: error: ")]
        assert code == 2
        return error

    return run_on


def good_row(i):
    return {"prompt": f"what is {i}?", "answer": str(i), "images": []}


def with_image(name):
    return {"prompt": "<image>a", "answer": "1", "images": [name]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([good_row(0), good_row(1), {**good_row(2), "answer": ""}], ["row 2", "answer", "data.jsonl"]),
        ([with_image("good.png"), with_image("bad.png")], ["row 1", "bad.png"]),
        ([with_image("nowhere.png")], ["row 0", "nowhere.png"]),
    ],
)
def test_a_bad_row_is_named(refused, tmp_path, rows, words):
    Image.fromarray(np.zeros((28, 28, 3), dtype=np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of the kind")
    error = refused(rows)
    assert [word for word in words if word not in error] == []


def test_a_model_folder_without_weights_is_refused(refused, model, tmp_path):
    shutil.copytree(model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    error = refused([good_row(0), good_row(1)], f"worker.actor.model.model_path={tmp_path / 'empty'}")
    assert "empty" in error and "safetensors" in error


def test_a_reward_file_that_does_not_import_is_refused(refused, tmp_path):
    (tmp_path / "reward.py").write_text("import no_such_module\n\ndef score(items):\n    return []\n")
    rows, reward = [good_row(0), good_row(1)], f"worker.reward.reward_function={tmp_path / 'reward.py'}:score"
    assert "no_such_module" in refused(rows, reward)
