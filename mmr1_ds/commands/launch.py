"""`mmr1-ds launch`: the sbatch command of a run, from its configuration; checked, shown, submitted on request."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import checkpoint_directory, run_directory
from mmr1_ds.config.loading import load_config
from mmr1_ds.config.redaction import redacted, without_secrets
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.checks import check_config
from mmr1_ds.preflight.deepspeed import resolve_engines

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
# Inside the package when installed, else beside it in the repository.
SCRIPT = (PACKAGE if (PACKAGE / "launch").is_dir() else ROOT) / "launch" / "slurm.sbatch"
DESCRIPTION = """Check a run and print the sbatch command that starts it, launch/slurm.sbatch with nodes and GPUs as
trainer.nnodes and trainer.n_gpus_per_node say; with --submit also call it. Credentials belong into the environment,
which sbatch hands on. On machines without GPUs export DS_ACCELERATOR=cpu: then the job requests none."""
_CPUS_BESIDE_REWARDS = 4  # a rank needs them for itself, the loading of its data, vLLM
# sbatch's own forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
_SERVERS = ("worker.rollout.engine=server", "worker.rollout.server_urls=[http://servers:8000]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser."""
    parser.description = DESCRIPTION
    parser.add_argument("--time", required=True, help="limit of the job, as 24:00:00; the run saves 300 s earlier")
    parser.add_argument("--partition", help="partition; default: the cluster's")
    parser.add_argument("--account", help="account that pays; default: yours")
    parser.add_argument("--server-nodes", type=int, default=0, metavar="N", help="further nodes, for rollout servers")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="for a rank; default: its reward workers and 4")
    parser.add_argument(
        "--container", metavar="IMAGE", help="image whose python3 runs: a .sif by apptainer, else by pyxis"
    )
    parser.add_argument("--mounts", help="FROM:TO,... in the container; default: the project's and the run's folders")
    parser.add_argument("--sbatch", default="", metavar="OPTIONS", help='further options of sbatch: "--qos=high -x n3"')
    parser.add_argument("--submit", action="store_true", help="call the command, instead of only printing it")


def main(arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Print the command. Returns: the exit code, sbatch's own after --submit. Raises: UserError."""
    variables, command = plan_submission(arguments, environ)
    words = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
    sys.stdout.write(words + " \\\n    ".join(map(shlex.quote, command)) + "\n")
    sys.stdout.flush()
    if not arguments.submit:
        return 0
    try:
        return subprocess.run(command, env={**environ, **variables}, check=False).returncode
    except FileNotFoundError as error:
        remedy = "call this where jobs are submitted, or without --submit"
        raise UserError(f"sbatch is not installed here; {remedy}") from error


def plan_submission(arguments: argparse.Namespace, environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Check the run as its ranks will.

    Returns: the variables that the command needs beside the present environment, the command. Raises: UserError.
    """
    settings, num_servers = list(arguments.settings), arguments.server_nodes
    _refuse_secrets(settings)
    _check_arguments(arguments)
    loaded = load_config([*settings, *(_SERVERS if num_servers else ())])
    for line in loaded.warnings:
        sys.stderr.write(f"mmr1-ds: {line}\n")
    config = loaded.config
    trainer, on_gpu = config.trainer, environ.get("DS_ACCELERATOR") != "cpu"
    world_size = trainer.nnodes * trainer.n_gpus_per_node
    check_config(config, world_size)
    resolve_engines(config, world_size, on_gpu)

    command = ["sbatch", *_component(config, arguments, trainer.nnodes, trainer.n_gpus_per_node, on_gpu)]
    command += [f"--job-name={trainer.experiment_name}"]
    if num_servers:
        size = config.worker.rollout.tensor_parallel_size
        if trainer.n_gpus_per_node % size:
            raise UserError(
                f"worker.rollout.tensor_parallel_size={size} does not divide the "
                f"{trainer.n_gpus_per_node} GPUs of a server node (trainer.n_gpus_per_node)"
            )
        tasks = trainer.n_gpus_per_node // size
        command += [":", *_component(config, arguments, num_servers, tasks, on_gpu)]
    return _variables(config, arguments, environ), [*command, str(SCRIPT), *settings]


def _component(
    config: RunConfig, arguments: argparse.Namespace, nodes: int, tasks_per_node: int, on_gpu: bool
) -> list[str]:
    """Return the options of one component of the job: sbatch does not hand all of them from one to the next."""
    cpus = arguments.cpus_per_task or config.worker.reward.num_workers + _CPUS_BESIDE_REWARDS
    options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks_per_node}", f"--cpus-per-task={cpus}"]
    if on_gpu:
        options.append(f"--gpus-per-node={config.trainer.n_gpus_per_node}")
    options.append(f"--time={arguments.time}")
    for name in ("partition", "account"):
        if getattr(arguments, name):
            options.append(f"--{name}={getattr(arguments, name)}")
    return options + shlex.split(arguments.sbatch)


def _variables(config: RunConfig, arguments: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that launch/slurm.sbatch reads."""
    found = {"MMR1_DS_ROOT": str(ROOT)}
    if arguments.container:
        found |= {"CONTAINER_IMAGE": arguments.container, "PYTHON": environ.get("PYTHON", "python3")}
        found["CONTAINER_MOUNTS"] = arguments.mounts or ",".join(f"{path}:{path}" for path in _mounted(config))
    else:
        found["PYTHON"] = environ.get("PYTHON", sys.executable)
    return found


def _mounted(config: RunConfig) -> list[Path]:
    """Return the project's folder, and those of the run, its checkpoints, models and data that lie on this machine."""
    data, worker = config.data, config.worker
    listed = [[names] if isinstance(names, str) else names for names in (data.train_files, data.val_files)]
    files = [str(name) for names in listed for name in names]
    given = [worker.actor.model.model_path, worker.actor.model.tokenizer_path, data.image_dir]
    given += [file.partition("@")[0].strip() for file in files]
    paths = [Path(name).expanduser().absolute() for name in given if name]
    folders = [path if path.is_dir() else path.parent for path in paths if path.exists()]
    # Those of the run may not exist yet, and what contains them does.
    for path in (run_directory(config).absolute(), checkpoint_directory(config).absolute()):
        folders.append(next(parent for parent in (path, *path.parents) if parent.is_dir()))
    return list(dict.fromkeys([ROOT, *(folder for folder in folders if folder != Path("/"))]))


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Check the options. Raises: UserError."""
    if not SCRIPT.is_file():
        raise UserError(f"{SCRIPT} is missing; install the project from its folder (pip install --editable)")
    if not _TIME.fullmatch(arguments.time):
        raise UserError(f"--time {arguments.time}: expected minutes, hours:minutes:seconds or days-hours, as 24:00:00")
    if arguments.server_nodes < 0:
        raise UserError(f"--server-nodes must be >= 0, got {arguments.server_nodes}")
    if arguments.cpus_per_task is not None and arguments.cpus_per_task < 1:
        raise UserError(f"--cpus-per-task must be >= 1, got {arguments.cpus_per_task}")
    if arguments.mounts and not arguments.container:
        raise UserError("--mounts is for a container; name its image by --container")


def _refuse_secrets(settings: list[str]) -> None:
    """Refuse credentials, as every user of the cluster can read the arguments of a job. Raises: UserError."""
    for word in settings:
        key, _, value = word.partition("=")
        if without_secrets({key: value}) != {key: value} or redacted(value) != value:
            raise UserError(
                f"{key}: its value is a credential, and everybody can read the arguments of a job; leave it out and "
                "put it into an environment variable"
            )
