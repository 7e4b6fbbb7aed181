"""A checkpoint that an earlier version wrote is resumed: the same prompts, and an update from the same weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.launching import environment

# A run of three steps by the version before the modules were given rooms: its state after step 2, its figures of
# step 3 (but the mean reward, which took probes in). It was sampled by transformers, on one rank.
EARLIER = Path(__file__).with_name("earlier_checkpoint")


@pytest.mark.slow
def test_it_is_resumed(tmp_path):
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    command = [sys.executable, "-m", "mmr1_ds.train", "config=run.yaml", "trainer.run_dir=run"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = json.loads((EARLIER / "step_3.json").read_text())
    draws = [json.loads(line) for line in (tmp_path / "run" / "draws.jsonl").read_text().splitlines()]
    assert draws == [{"step": 3, "prompts": expected["prompts"]}]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [3]
    found = {name: metrics[0][name] for name in expected["metrics"]}
    assert found == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6)
