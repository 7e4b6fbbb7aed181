"""Launch environments, and control traffic on real processes."""

import json
import os
import sys

import pytest
import torch
from fixtures.launching import run_ranks

from mmr1_ds.cluster.launch import LaunchEnvironment, device_number, launch_environment
from mmr1_ds.cluster.ranks import Ranks, initialise_gpu
from mmr1_ds.errors import UserError


def test_each_launcher_is_recognised():
    master = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    assert launch_environment({}) == LaunchEnvironment(0, 1, 0, "none")
    deepspeed = {"RANK": "3", "WORLD_SIZE": "7", "LOCAL_RANK": "1", **master}
    assert launch_environment(deepspeed) == LaunchEnvironment(3, 7, 1, "environment")
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1", **master}
    assert launch_environment(slurm) == LaunchEnvironment(5, 6, 1, "slurm")
    mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", **master}
    assert launch_environment(mpi) == LaunchEnvironment(0, 2, 0, "mpi")
    # mpirun's daemons were started by srun: one task a node.
    assert launch_environment(mpi | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}).rank == 0
    assert launch_environment(slurm | {"PMI_SIZE": "6", "PMI_RANK": "5"}).launcher == "slurm"  # srun speaks PMI
    assert launch_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).launcher == "none"  # inside sbatch, no srun


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK not"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"RANK=2 must be in \[0, WORLD_SIZE=2\)"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "n1"},
            "MASTER_PORT not set for 2 ranks",
        ),
    ],
)
def test_a_partial_or_wrong_environment_is_explained(environ, message):
    with pytest.raises(UserError, match=message):
        launch_environment(environ)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_without_mpi4py_the_remedy_is_told(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it fails
    with pytest.raises(UserError, match=r"mpi4py does not import .* export MASTER_ADDR and MASTER_PORT"):
        launch_environment({name: "2"})


@pytest.mark.parametrize(("visible", "expected"), [(1, 0), (4, 3), (8, 3)])
def test_a_rank_takes_its_gpu_or_the_only_one_that_it_is_shown(monkeypatch, visible, expected):
    # srun --gpus-per-task=1, or --gpu-bind=single, shows the fourth task of a node one GPU, which is number 0 there.
    taken = []

    class Taken(Exception):
        """What follows needs a GPU."""

    def take(device):
        taken.append(device)
        raise Taken

    for name in ("DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored after
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    with pytest.raises(Taken):
        Ranks(LaunchEnvironment(11, 16, 3, "slurm"), timeout_seconds=1)
    assert taken == [torch.device("cuda", expected)]
    assert os.environ["LOCAL_RANK"] == str(expected)  # by which DeepSpeed and vLLM take theirs
    assert os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(expected)) == str(expected)  # DeepSpeed compares


def test_a_rank_for_which_no_gpu_is_left_says_so():
    with pytest.raises(UserError, match="process 3 of this node sees 2 GPUs; start one process a GPU"):
        device_number(2, 2)


@pytest.mark.parametrize("accelerator", ["", "cpu"])
def test_a_gpu_that_does_not_work_is_named_by_its_number(monkeypatch, accelerator):
    def broken(size, device):
        raise RuntimeError(f"CUDA error: uncorrectable ECC error on {device}\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "zeros", broken)
    launch = LaunchEnvironment(11, 16, 3, "slurm")
    if accelerator == "cpu":
        assert initialise_gpu(launch) is False
        return
    with pytest.raises(UserError, match=r"GPU 3 cannot be used \(CUDA error: .* on cuda:3\)") as found:
        initialise_gpu(launch)
    assert "\n" not in str(found.value)


@pytest.mark.slow
def test_control_traffic_between_three_processes(tmp_path):
    run_ranks("control_traffic.py", tmp_path, num_ranks=3, timeout_seconds=60, warm=False)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for counted in zip(*(result["counted"] for result in results), strict=True):
        assert sorted(number for own in counted for number in own) == [*range(21)]
        assert all(own == sorted(own) for own in counted)
    for rank, result in enumerate(results):
        assert result["exchanged"] == [
            {},
            {f"1 to {rank}": [[0, 2]], "flag": [rank < 1]},
            {f"2 to {rank}": [[0, 2], [4, 6]], "flag": [rank < 2]},
        ]
        assert result["broadcast"] == [5, 7, 2**40]
        assert result["gathered"] == [[], [[1.5, 0.0]], [[2.5, 0.0], [2.5, 1.0]]]
        assert result["sum"] == {"a": 3.0, "b": 30.0}
        assert result["max"] == {"a": 2.0}
        assert result["any"] == [True, False]
        own = "a" if rank else "b"
        assert result["refused"] == f"the ranks have different figures in stage 'of one rank alone', this one {own}"
