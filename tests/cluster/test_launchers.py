"""One run through the deepspeed launcher with a hostfile and through mpirun: the same draws and the same weights."""

import json
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from fixtures.launching import ROOT, environment, processes_with, wait_until
from fixtures.tiny_run import assert_same_run, write_run

pytestmark = pytest.mark.slow

NUM_STEPS = 12


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun (package openmpi-bin)")
def test_deepspeed_with_a_hostfile_and_mpirun_train_alike_and_mpirun_passes_a_stop_on(tmp_path):
    config = write_run(tmp_path, NUM_STEPS)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    marker = uuid.uuid4().hex

    def start(script: str, name: str, **variables: str) -> subprocess.Popen:
        arguments = [f"config={config}", f"trainer.run_dir={tmp_path / name}"]
        with (tmp_path / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                ["bash", str(ROOT / "launch" / script), "2", "mmr1_ds.train", *arguments],
                env=environment(PYTHON=sys.executable, MMR1_TEST_MARKER=marker, **variables),
                stdout=log, stderr=log, cwd=tmp_path,
            )  # fmt: skip

    def end(process: subprocess.Popen, name: str) -> int:
        code = process.wait(180)
        wait_until(lambda: not processes_with(marker), 60, f"no process left, {processes_with(marker)}")
        assert code in (0, 75), (tmp_path / f"{name}.log").read_text()[-4000:]
        return code

    assert end(start("deepspeed.sh", "deepspeed", HOSTFILE=str(tmp_path / "hosts")), "deepspeed") == 0
    process = start("mpi.sh", "mpi")
    wait_until(lambda: num_lines(tmp_path / "mpi" / "metrics.jsonl") >= 3, 120, "two steps")
    process.send_signal(signal.SIGTERM)
    assert end(process, "mpi") == 75
    done = json.loads((tmp_path / "mpi" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 2 <= done < NUM_STEPS
    assert end(start("mpi.sh", "mpi"), "mpi") == 0
    assert f"going on from {tmp_path}/mpi/checkpoints/global_step_{done}:" in (tmp_path / "mpi.log").read_text()
    assert_same_run(tmp_path / "deepspeed", tmp_path / "mpi")


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
