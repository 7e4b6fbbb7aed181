"""The place of this process among the ranks, as its launcher states it."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmr1_ds.errors import UserError

# launcher -> (rank, number of ranks, rank on the node)
_LAUNCHER_VARIABLES = {
    "environment": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # deepspeed, torchrun
    # Before SLURM: in an allocation, mpirun starts its daemons by srun, and the ranks inherit those variables.
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI; MPICH and Intel MPI; MVAPICH


@dataclass(frozen=True)
class LaunchEnvironment:
    """The place of this process among the ranks, as its launcher states it."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # environment (deepspeed, torchrun) | slurm | mpi | none


def launch_environment(environ: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """Read the rank from whatever launched the process; one rank of one when nothing did.

    Under mpirun, MPI is asked for what the environment lacks; MASTER_ADDR and MASTER_PORT are then set.
    Raises: UserError when a launcher's variables are set in part, or are not numbers in range.
    """
    if _asks_mpi(environ):
        return _by_mpi()
    for launcher, names in _LAUNCHER_VARIABLES.items():
        present = [name for name in names if name in environ]
        if not present or (launcher == "slurm" and "SLURM_STEP_NUM_TASKS" not in environ):
            continue  # an sbatch script outside srun has SLURM_PROCID, but is no rank
        if len(present) < len(names):
            missing = ", ".join(name for name in names if name not in environ)
            raise UserError(
                f"launch environment is partial: {', '.join(present)} set, {missing} not; "
                "start with deepspeed, torchrun, srun or mpirun, or unset them for a single process"
            )
        try:
            rank, world_size, local_rank = (int(environ[name]) for name in names)
        except ValueError:
            values = ", ".join(f"{name}={environ[name]!r}" for name in names)
            raise UserError(f"launch environment is not made of numbers: {values}") from None
        if not 0 <= rank < world_size:
            raise UserError(f"{names[0]}={rank} must be in [0, {names[1]}={world_size})")
        unset = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if world_size > 1 and unset:
            # A port that each rank picked for itself would be a silent wait for the deadline.
            raise UserError(f"{' and '.join(unset)} not set for {world_size} ranks; export the same on every rank")
        return LaunchEnvironment(rank, world_size, local_rank, launcher)
    return LaunchEnvironment(0, 1, 0, "none")


def _asks_mpi(environ: Mapping[str, str]) -> bool:
    """Whether mpirun started this process and the variables above are incomplete."""
    sizes = [name for name in _MPI_SIZES if environ.get(name, "0").isdigit() and int(environ.get(name, "0")) > 1]
    if not sizes or "RANK" in environ or (sizes == ["PMI_SIZE"] and "SLURM_STEP_NUM_TASKS" in environ):
        return False  # srun speaks PMI too
    return any(name not in environ for name in (*_LAUNCHER_VARIABLES["mpi"], "MASTER_ADDR", "MASTER_PORT"))


def _by_mpi() -> LaunchEnvironment:
    """The rank as MPI counts it; rank 0's host and one of its free ports become the master. Collective."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"mpirun started this process, but mpi4py does not import ({error}); install it, or export "
            "MASTER_ADDR and MASTER_PORT to every rank (mpirun -x) and use Open MPI"
        ) from None
    world = MPI.COMM_WORLD
    local_rank = world.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
    master = None
    if world.Get_rank() == 0:
        master = socket.gethostname(), str(free_port(""))
    host, port = world.bcast(master)
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", port)
    launch = LaunchEnvironment(world.Get_rank(), world.Get_size(), local_rank, "mpi")
    MPI.Finalize()  # it is needed no longer; mpirun would take a process that ends before this for a crash
    return launch


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on at this machine's address; empty = on any of its addresses."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def put_own_programs_on_path(environ: MutableMapping[str, str] = os.environ) -> None:
    """Prepend the interpreter's folder to PATH: DeepSpeed and vLLM look for the ninja of the virtual environment there.

    Launch scripts and srun call its interpreter without activating it.
    """
    own, path = str(Path(sys.executable).parent), environ.get("PATH", os.defpath)
    if own not in path.split(os.pathsep):
        environ["PATH"] = own + os.pathsep + path


def device_number(local_rank: int, num_visible: int) -> int:
    """The number of a rank's GPU among those it sees: its rank on the node, or 0 where it is shown one alone.

    SLURM shows a task one GPU with --gpus-per-task or --gpu-bind=single. Raises: UserError when there is none for it.
    """
    if num_visible == 1:
        return 0
    if local_rank >= num_visible:
        raise UserError(
            f"process {local_rank + 1} of this node sees {num_visible} GPUs; start one process a GPU, or show each "
            "process its own GPU alone"
        )
    return local_rank


@contextmanager
def long_imports() -> Iterator[None]:
    """Keep Python's garbage collector out of what is imported within, for good: a fifth of an import's time, and most
    of that of every full collection later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def gpu_is_here(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine shows a GPU, without asking torch, which takes seconds to import."""
    if environ.get("DS_ACCELERATOR") == "cpu" or environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()
