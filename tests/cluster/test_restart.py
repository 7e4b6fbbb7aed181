"""A run that crashed is started again so often, and not when that cannot help."""

import json
import subprocess
import sys

import psutil
import pytest
from fixtures.launching import ROOT, environment, wait_until

from mmr1_ds.cluster import restart


def saved(folder, step):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "latest").write_text(f"global_step_{step}\n")


def test_restarts_are_counted_and_progress_gives_them_back(tmp_path, capsys):
    settings = ["config=demo", f"trainer.run_dir={tmp_path}", "trainer.max_restarts=2"]
    assert [restart.main(settings) for _ in range(3)] == [0, 0, 1]
    assert "2 restarts from step 0, trainer.max_restarts=2" in capsys.readouterr().err
    saved(tmp_path, 7)
    assert [restart.main(settings) for _ in range(3)] == [0, 0, 1]
    assert json.loads((tmp_path / restart.COUNT).read_text()) == {"restarts": 2, "step": 7}
    (tmp_path / restart.COUNT).write_text("{torn")
    assert restart.main(settings) == 0


@pytest.mark.parametrize(
    "setting", ["trainer.max_restarts=0", "trainer.resume=false", "trainer.val_only=true", "trainer.run_dir=no/such"]
)
def test_what_a_restart_would_not_help_ends(tmp_path, setting, capsys):
    assert restart.main(["config=demo", f"trainer.run_dir={tmp_path}", setting]) == 1
    assert "is not started again" in capsys.readouterr().err
    assert restart.main(["config=demo", "trainer.run_dirr=x"]) == 2


STAND_IN = """#!/usr/bin/env bash
# In place of the interpreter: a run ends with the next of the given statuses; asked for a restart, it counts.
case "$*" in
  *mmr1_ds.cluster.restart*) echo ask >> "$FOLDER/said"; [[ "$*" == *max_restarts=0* ]] && exit 1; exit 0 ;;
  *socket*) echo 1234; exit 0 ;;
esac
echo run >> "$FOLDER/said"
number=$(grep -c run "$FOLDER/said")
read -ra statuses <<< "$STATUSES"
exit "${statuses[number - 1]}"
"""
SCRIPTS = {"train.sh": ([], {"NUM_GPUS": "1"}), "deepspeed.sh": (["2", "mmr1_ds.train"], {}),
           "mpi.sh": (["1", "mmr1_ds.train"], {})}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("statuses", "setting", "code", "runs"),
    [("1 137 0", "a=1", 0, 3), ("2", "a=1", 2, 1), ("75", "a=1", 75, 1), ("1", "trainer.max_restarts=0", 1, 1)],
)
def test_the_launch_scripts_start_a_crashed_run_again(tmp_path, script, statuses, setting, code, runs):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (tmp_path / "mpirun").write_text('#!/bin/bash\n[ "$1" = --version ] && exit 0\nshift 2; exec "$@"\n')
    (tmp_path / "mpirun").chmod(0o755)
    arguments, added = SCRIPTS[script]
    variables = environment(PYTHON=str(stand_in), FOLDER=str(tmp_path), STATUSES=statuses, **added)
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    command = ["bash", str(ROOT / "launch" / script), *arguments, setting]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "said").read_text().split().count("run") == runs


RUNNER = """#!/usr/bin/env bash
# In place of the interpreter: the deepspeed runner, gone at once when it is told to end, and a rank that saves first.
runner=$$
rank() {
  trap '' TERM
  echo > "$FOLDER/begun"
  while kill -0 "$runner" 2> /dev/null; do :; done
  sleep 1
  echo > "$FOLDER/saved"
}
rank &
wait
"""


def test_the_script_of_several_ranks_ends_when_they_have_saved(tmp_path):
    (tmp_path / "python").write_text(RUNNER)
    (tmp_path / "python").chmod(0o755)
    variables = environment(PYTHON=str(tmp_path / "python"), FOLDER=str(tmp_path), NUM_GPUS="2")
    script = subprocess.Popen(["bash", str(ROOT / "launch" / "train.sh")], env=variables)
    wait_until((tmp_path / "begun").exists, 60, "the stand-in for a rank")
    script.terminate()
    assert script.wait(60) == 143
    assert (tmp_path / "saved").exists()


GUARDED = """
import os, pathlib, signal, sys
from mmr1_ds.cluster.guard import LaunchGuard

guard = LaunchGuard()
guard.patience_seconds = 0.0
pathlib.Path(sys.argv[1] + ".new").write_text(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
signal.pause()
"""
LAUNCHER = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]


@pytest.mark.parametrize("between", [[], LAUNCHER], ids=["one rank", "several"])
def test_a_script_that_is_killed_takes_its_ranks_along(tmp_path, between):
    begun = tmp_path / "begun"
    script = ["bash", "-c", 'export MMR1_DS_SCRIPT_PID=$$; "$@" & wait', "-"]
    parent = subprocess.Popen([*script, *between, sys.executable, "-c", GUARDED, str(begun)], env=environment())
    wait_until(begun.exists, 60, "the guarded process")
    guarded = psutil.Process(int(begun.read_text()))
    parent.kill()
    parent.wait()
    guarded.wait(30)
