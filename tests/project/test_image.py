"""The images of launch/, which nothing here can build: each step against the lock, and what runs them."""

import itertools
import re
import subprocess

import pytest
from fixtures.launching import ROOT

DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()
APPTAINER = (ROOT / "launch" / "apptainer.def").read_text()
LOCK = (ROOT / "requirements" / "gpu.lock").read_text()
LOCKED = dict(re.findall(r"^([\w.-]+)={2,3}(\S+)$", LOCK, re.MULTILINE))
IMAGE = "registry/team/mmr1_ds:3"


def section(name):
    """The lines of a section of apptainer.def, stripped."""
    return [line.strip() for line in APPTAINER.split(f"%{name}\n")[1].split("\n%")[0].splitlines() if line.strip()]


def instructions(name):
    """The arguments of a Dockerfile's instructions of that name, continued lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def copied():
    return [source for words in instructions("COPY") for source in words.split()[1:-1]]


def test_python_is_the_lock_s_and_the_base_is_pinned():
    (base,) = instructions("FROM")
    assert base == re.search(r"^From: (.*)$", APPTAINER, re.MULTILINE)[1]
    version = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-\w+", base)[1]
    assert f"with Python {version}" in LOCK
    assert f"PYTHON=python{version} bash launch/setup.sh gpu" in DOCKERFILE
    assert f"PYTHON=python{version} bash launch/setup.sh gpu" in APPTAINER


def test_versions_are_the_lock_s():
    (label,) = instructions("LABEL")
    labels = dict(re.findall(r'(\w+)="([^"]*)"', label))
    assert labels == dict(line.split() for line in section("labels"))
    assert labels.pop("cuda") == ".".join(LOCKED["nvidia-cuda-runtime"].split(".")[:2])
    assert labels.keys() == {"torch", "vllm", "deepspeed"}
    assert labels == {name: LOCKED[name] for name in labels}
    assert LOCKED["nvidia-cuda-nvcc"].startswith("13.")  # of the base image there is none


def test_what_is_copied_exists_and_is_all_that_the_set_up_reads():
    assert [path for path in copied() if not (ROOT / path).exists()] == []
    assert sorted(line.split()[0] for line in section("files")) == sorted(copied())
    assert all(line.split()[1] == f"/opt/mmr1_ds/{line.split()[0]}" for line in section("files"))
    read = re.search(r'digest="\$\(cat "\$lock" (.*?) "\$', (ROOT / "launch" / "setup.sh").read_text())[1].split()
    assert all(any(path.startswith(source) for source in copied()) for path in ["requirements/gpu.lock", *read])


def test_both_gpus_no_root_and_no_host_of_packages():
    for text in (DOCKERFILE, APPTAINER):
        assert 'TORCH_CUDA_ARCH_LIST="9.0;10.0"' in text
        assert "://" not in text and "--index-url" not in text
        assert "libnuma1" in text and "g++" in text
    assert instructions("USER")[-1] != "root"
    for line in [*instructions("RUN"), "\n".join(section("post"))]:
        subprocess.run(["bash", "-n", "-c", line], check=True)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(image, **variables): the words that the container program gets, of container.sh with `python3 -m x 'a b'`."""
    for name in ("docker", "apptainer"):
        (tmp_path / name).write_text(
            '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@" "PYTHONPATH=${PYTHONPATH:-}"\n'
        )
        (tmp_path / name).chmod(0o755)

    def call(image, **variables):
        command = ["bash", str(ROOT / "launch" / "container.sh"), image, "python3", "-m", "x", "a b"]
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": "/host"}
        done = subprocess.run(command, cwd=tmp_path, env=path | variables, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return call


def test_docker_runs_an_image_that_is_a_name(run, tmp_path):
    words = run(IMAGE, CONTAINER_MOUNTS="/data:/data,/models:/m", JUDGE_KEY="secret", CUDA_VISIBLE_DEVICES="4,5")
    assert words[:2] == ["docker", "run"] and words[-6:] == [IMAGE, "python3", "-m", "x", "a b", "PYTHONPATH="]
    options = words[2:-6]
    assert {"--ipc=host", "--network=host", "--gpus"} <= set(options)
    mounts = [word for before, word in itertools.pairwise(options) if before == "--volume"]
    assert mounts[:3] == [f"{tmp_path}:{tmp_path}", "/data:/data", "/models:/m"]
    passed = [word for before, word in itertools.pairwise(options) if before == "--env"]
    assert {"JUDGE_KEY", "CUDA_VISIBLE_DEVICES", "HOME"} <= set(passed)
    assert not {"PATH", "PYTHONPATH"} & set(passed)
    assert not [word for word in words if "secret" in word]
    assert "--gpus" not in run(IMAGE, DS_ACCELERATOR="cpu")


def test_apptainer_runs_a_sif(run, tmp_path):
    words = run("/images/a.sif", CONTAINER_MOUNTS="/data:/data")
    binds = ["--bind", f"{tmp_path}:{tmp_path}", "--bind", "/data:/data"]
    command = ["/images/a.sif", "python3", "-m", "x", "a b", "PYTHONPATH="]
    assert words == ["apptainer", "exec", "--pwd", str(tmp_path), *binds, "--nv", *command]
    assert "--nv" not in run("a.sif", DS_ACCELERATOR="cpu")


@pytest.mark.parametrize(("image", "inside"), [("a.sif", True), ("a.sqsh", False)])
def test_a_job_starts_its_tasks_in_the_image(tmp_path, image, inside):
    for name, text in {"srun": 'printf "%s\\n" srun "$@"', "scontrol": "echo n1", "squeue": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "MMR1_DS_ROOT": str(ROOT), "PYTHON": "python3", "CONTAINER_IMAGE": image,
        "CONTAINER_MOUNTS": "/d:/d", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "7",
    }  # fmt: skip
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "data.seed=5"]
    words = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()
    train = words.index("python3")
    assert words[train : train + 4] == ["python3", "-m", "mmr1_ds.train", "data.seed=5"]
    if inside:
        assert words[train - 3 : train] == ["bash", str(ROOT / "launch" / "container.sh"), image]
    else:
        assert words[train - 2 : train] == [f"--container-image={image}", "--container-mounts=/d:/d"]
