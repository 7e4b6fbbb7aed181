"""launch/slurm.sbatch on a real SLURM of two nodes: a run that is stopped there goes on as if it never was."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from fixtures.launching import ROOT, environment, processes_with, wait_until
from fixtures.slurm_cluster import missing, slurm_cluster
from fixtures.tiny_run import assert_same_run, write_run

pytestmark = pytest.mark.slow

NUM_STEPS = 12
OPTIONS = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=30"]


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing():
        pytest.skip(missing())
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


RANK = """#!/usr/bin/env bash
# In place of the interpreter: a rank that saves and ends with 75 when it is told to.
told() { echo "told by $1"; exit 75; }
trap 'told TERM' TERM
trap 'told USR1' USR1
echo "rank is up"
for (( k = 0; k < 1200; k++ )); do sleep 0.05; done
"""
TOLD = {  # the arguments of scancel -> how often the job is requeued, its state, what the ranks heard
    ("--signal=USR1",): (1, "PENDING", "USR1"),
    ("--batch", "--signal=USR1"): (1, "PENDING", "USR1"),
    ("--batch", "--signal=TERM"): (1, "PENDING", "TERM"),
    (): (0, "CANCELLED", "TERM"),
}


@pytest.mark.parametrize("arguments", TOLD, ids=" ".join)
def test_a_job_that_is_told_to_end_saves_and_one_that_is_cancelled_stays_away(cluster, tmp_path, arguments):
    times, state, heard = TOLD[arguments]
    stand_in = tmp_path / "rank"
    stand_in.write_text(RANK)
    stand_in.chmod(0o755)
    output = tmp_path / "job.out"
    job = cluster.run(
        "sbatch", "--parsable", *OPTIONS, f"--output={output}", str(ROOT / "launch" / "slurm.sbatch"),
        PYTHON=str(stand_in), MMR1_DS_ROOT=str(ROOT), MASTER_ADDR="127.0.0.1",
    )  # fmt: skip

    def said() -> str:
        return output.read_text() if output.exists() else ""

    try:
        wait_until(lambda: said().count("rank is up") == 2, 60, "both ranks")
        cluster.run("scancel", *arguments, job)
        wait_until(lambda: cluster.state(job)["JobState"] == state, 60, f"{state}: {said()}")
        assert said().count(f"told by {heard}") == 2
        assert cluster.num_requeued(job) == times
    finally:
        cluster.run("scancel", job)


CRASHING = """#!/usr/bin/env bash
# In place of the interpreter: the second rank crashes, unless a user is at fault.
case "$*" in *cluster.restart*) exec "$REAL_PYTHON" "$@" ;; esac
(( SLURM_PROCID == 1 )) && exit "$CRASH"
exit 0
"""


@pytest.mark.parametrize(("crash", "restarts", "times"), [("1", "2", 1), ("2", "2", 0), ("1", "0", 0)])
def test_a_job_that_crashes_is_requeued_and_counted(cluster, tmp_path, crash, restarts, times):
    stand_in, output = tmp_path / "rank", tmp_path / "job.out"
    stand_in.write_text(CRASHING)
    stand_in.chmod(0o755)
    (tmp_path / "run").mkdir()
    settings = ["config=demo", f"trainer.run_dir={tmp_path}/run", f"trainer.max_restarts={restarts}"]
    variables = environment(PYTHON=str(stand_in), REAL_PYTHON=sys.executable, CRASH=crash, MMR1_DS_ROOT=str(ROOT))
    job = cluster.run(
        "sbatch", "--parsable", *OPTIONS, f"--output={output}", str(ROOT / "launch" / "slurm.sbatch"), *settings,
        **variables, MASTER_ADDR="127.0.0.1",
    )  # fmt: skip
    try:
        state = "PENDING" if times else "FAILED"
        wait_until(
            lambda: cluster.state(job)["JobState"] == state and cluster.num_requeued(job) == times, 90,
            state,
        )  # fmt: skip
        assert (tmp_path / "run" / "restarts.json").exists() == bool(times)
    finally:
        cluster.run("scancel", job)


def test_a_job_that_is_warned_is_requeued_and_ends_as_one_that_was_not(tmp_path, cluster):
    config = write_run(tmp_path, NUM_STEPS)
    variables = environment(
        PYTHON=sys.executable, MMR1_DS_ROOT=str(ROOT), MASTER_ADDR="127.0.0.1", OMP_WAIT_POLICY="passive"
    )
    marker = uuid.uuid4().hex
    variables |= {"MMR1_TEST_MARKER": marker}

    def submit(name: str) -> str:
        """Start the run `name` and return the job's number."""
        output = f"--output={tmp_path / name}.out"
        arguments = [
            str(ROOT / "launch" / "slurm.sbatch"),
            f"config={config}",
            f"trainer.run_dir={tmp_path / name}",
        ]
        return cluster.run("sbatch", "--parsable", *OPTIONS, output, *arguments, **variables)

    def wait_for_end(name: str, job: str) -> None:
        wait_until(
            lambda: cluster.state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"),
            240,
            "its end",
        )
        said = (tmp_path / f"{name}.out").read_text()
        assert cluster.state(job)["JobState"] == "COMPLETED", said[-4000:]
        wait_until(lambda: not processes_with(marker), 30, "no process of the job left")

    wait_for_end("whole", submit("whole"))
    job = submit("stopped")
    wait_until(lambda: steps_done(tmp_path / "stopped") >= 3, 120, "three steps")
    cluster.run("scancel", "--signal=USR1", job)
    wait_until(lambda: cluster.num_requeued(job) == 1, 60, "the job requeued")
    assert steps_done(tmp_path / "stopped") < NUM_STEPS
    # SLURM lets a requeued job wait for minutes; in the second of its end it would refuse the job as revoked.
    cluster.run("scontrol", "update", f"jobid={job}", "starttime=now+2")
    wait_for_end("stopped", job)
    said = (tmp_path / "stopped.out").read_text()
    assert "SIGUSR1 received" in said and "going on from" in said
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_script_says_what_it_lacks(tmp_path):
    def run(**variables: str) -> str:
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "slurm.sbatch"), "config=demo"],
            env={"PATH": os.environ["PATH"]} | variables, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode != 0 and len(done.stderr.splitlines()) == 1
        return done.stderr

    assert "start this with sbatch" in run()
    assert f"{tmp_path} is not the project's folder" in run(SLURM_SUBMIT_DIR=str(tmp_path))
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_NUM_NODES": "2"}
    assert "no tasks on 2 nodes; ask for --ntasks-per-node" in run(**job)
    assert "3 tasks on 2 nodes" in run(**job, SLURM_NTASKS="3")
