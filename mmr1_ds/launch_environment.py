"""Which process this is, as its launcher says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mmr1_ds.errors import UserError

# launcher -> (rank, number of ranks, rank on the node)
_LAUNCHER_VARIABLES = {
    "environment": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # deepspeed, torchrun
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


@dataclass(frozen=True)
class LaunchEnvironment:
    """Which process this is, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # environment (deepspeed, torchrun) | slurm | mpi | none


def launch_environment(environ: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """Read the rank from whatever launched the process; one rank of one when nothing did.

    Raises: UserError when a launcher's variables are there in part, or are not numbers in range.
    """
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
