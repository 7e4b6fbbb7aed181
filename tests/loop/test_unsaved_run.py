"""A run whose checkpoints cannot be written trains to its end, says so, and does not look like one that is done."""

import json

import pytest
from fixtures.launching import run_training
from fixtures.tiny_run import write_run

# The folder of the checkpoints turns into a file when the run is under way.
TAKES_THE_FOLDER = """
from pathlib import Path

(Path(__file__).parent / "checkpoints").touch()
"""


@pytest.mark.slow
def test_a_run_goes_on_unsaved_and_ends_with_an_error(tmp_path):
    config = write_run(tmp_path, 2)
    reward = tmp_path / "reward.py"
    reward.write_text(reward.read_text() + TAKES_THE_FOLDER)
    folders = [f"trainer.run_dir={tmp_path / 'run'}", f"trainer.save_checkpoint_path={tmp_path / 'checkpoints'}"]
    done = run_training(f"config={config}", "trainer.n_gpus_per_node=1", *folders)
    assert done.returncode == 1, done.stderr[-3000:]
    for step in (1, 2):
        assert f"the checkpoint of step {step} was not saved in {tmp_path / 'checkpoints'}: rank 0: " in done.stderr
    assert "the run ends unsaved: the checkpoint of step 2 was not saved" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["checkpoint/save_failed"]) for line in lines[-2:]] == [(1, 1.0), (2, 1.0)]
