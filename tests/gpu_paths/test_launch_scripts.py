"""What the launch scripts hand to the ranks of a GPU node: stub nvidia-smi, DeepSpeed's own launcher, no GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.launching import ROOT, environment

BARE_PATH = "/usr/local/bin:/usr/bin:/bin"  # as a shell has it that did not activate the virtual environment


@pytest.mark.parametrize("module", ["mmr1_ds.train", "mmr1_ds.commands.cli", "mmr1_ds.commands.demo.__main__"])
def test_ninja_is_found_by_an_interpreter_that_was_not_activated(module):
    # DeepSpeed asks torch, torch asks PATH.
    code = (
        f"import contextlib, sys; from {module} import main\n"
        "sys.argv[1:] = ['keys', 'no such key', '--nothing']\n"
        "with contextlib.suppress(SystemExit): main() if main.__code__.co_argcount == 0 else main(['keys'])\n"
        "import shutil; print(shutil.which('ninja'))"
    )
    variables = environment() | {"PATH": BARE_PATH}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == str(Path(sys.executable).parent / "ninja"), done.stderr


def gpu_node(folder: Path, num_gpus: int) -> dict[str, str]:
    """Variables of a node with as many GPUs: an nvidia-smi that lists them, DeepSpeed's launcher on its CPU devices.

    The launcher starts tests/programs/launched_rank.py in the place of mmr1_ds.train.
    """
    listed = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}{i}aa-bb)\\n" for i in range(num_gpus))
    stubs = {
        "nvidia-smi": f"printf '{listed}'",
        "python": f"""export DS_ACCELERATOR=cpu LOCAL_SIZE={num_gpus}
            for word; do shift; [ "$word" = mmr1_ds.train ] && word=programs.launched_rank; set -- "$@" "$word"; done
            exec {sys.executable} "$@" """,
    }
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    variables = environment(PYTHON=str(folder / "python"), MMR1_TEST_FOLDER=str(folder))
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        variables.pop(name, None)
    return variables | {"PATH": f"{folder}:{variables['PATH']}"}


def start(script: str, num_gpus: str, variables: dict[str, str]) -> subprocess.CompletedProcess:
    arguments = [num_gpus, "mmr1_ds.train"] if script == "deepspeed.sh" else []
    variables = variables if script == "deepspeed.sh" or not num_gpus else variables | {"NUM_GPUS": num_gpus}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", ["train.sh", "deepspeed.sh", "mpi.sh"])
def test_without_a_virtual_environment_python3_runs_and_a_missing_hostfile_is_told(tmp_path, script):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "bin").mkdir()
    for name, text in (("python3", 'echo "ran $*"'), ("mpirun", "shift 2; exec python3 \"$@\"")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = environment(MASTER_PORT="29500", NUM_GPUS="0")
    variables.pop("PYTHON", None)
    variables["PATH"] = f"{tmp_path / 'bin'}:{BARE_PATH}"
    words = ["bash", str(tmp_path / "launch" / script), *([] if script == "train.sh" else ["1", "mmr1_ds.train"])]

    def done(**further):
        return subprocess.run(words, env=variables | further, capture_output=True, text=True, timeout=60)

    assert "mmr1_ds.train" in (found := done()).stdout and "ran " in found.stdout, found.stderr
    if script != "train.sh":
        refused = done(HOSTFILE="no_hosts")
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr.startswith("HOSTFILE=no_hosts: no such file; write one")
        assert refused.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "visible", "num_gpus", "expected"),
    [
        ("train.sh", "4,5", "", ["4", "5"]),
        ("train.sh", None, "", ["0", "1", "2", "3", "4", "5", "6"]),
        pytest.param("train.sh", "3,6,1", "2", ["3", "6"], marks=pytest.mark.nightly),
        pytest.param("deepspeed.sh", "4,5", "2", ["4", "5"], marks=pytest.mark.nightly),
        ("deepspeed.sh", "GPU-66aa-bb,GPU-22aa", "2", ["6", "2"]),
        pytest.param("deepspeed.sh", None, "3", ["0", "1", "2"], marks=pytest.mark.nightly),
    ],
)
def test_a_rank_takes_a_gpu_of_those_that_the_user_shows(tmp_path, script, visible, num_gpus, expected):
    variables = gpu_node(tmp_path, 7) | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    done = start(script, num_gpus, variables)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("[0-9].json"))]
    # DeepSpeed, under train.sh, sorts them.
    taken = [rank["CUDA_VISIBLE_DEVICES"].split(",")[int(rank["LOCAL_RANK"])] for rank in found]
    assert taken == expected
    assert {rank["MMR1_DS_VISIBLE_DEVICES"] for rank in found} == {visible}


@pytest.mark.parametrize("script", ["train.sh", "deepspeed.sh"])
@pytest.mark.parametrize(
    ("visible", "num_gpus", "message"),
    [
        ("4,5", "3", "3 processes, but this machine shows 2 GPUs"),
        ("4,9", "2", "CUDA_VISIBLE_DEVICES=4,9: nvidia-smi -L lists no GPU 9"),
    ],
)
def test_gpus_that_are_not_there_are_refused(tmp_path, script, visible, num_gpus, message):
    done = start(script, num_gpus, gpu_node(tmp_path, 7) | {"CUDA_VISIBLE_DEVICES": visible})
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.glob("*.json"))
