"""Commands of the documentation, run for real with trainer.dry_run=true, or as far as they go without a process."""

import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launching import ROOT, environment

from mmr1_ds.config_checks import check_config
from mmr1_ds.config_loading import load_config
from mmr1_ds.deepspeed_config import critic_deepspeed, reference_deepspeed, resolve_deepspeed
from mmr1_ds.plan import describe_plan

GUIDE = Path(__file__).parent / "guide"
ROWS = [{"problem": f"<image>What is {k} + {k}?", "answer": str(2 * k), "images": []} for k in range(7)]


def write_rows(folder: Path, name: str = "train.json", rows: list[dict] | None = None) -> Path:
    """A tiny data file."""
    path = folder / name
    path.write_text(json.dumps(ROWS if rows is None else rows))
    return path


def valid_run(folder: Path) -> list[str]:
    """Arguments of a run that passes all checks on 2 ranks."""
    return [
        "worker.actor.model.model_path=Qwen/Qwen2.5-VL-3B-Instruct",
        f"data.train_files={write_rows(folder)}",
        "data.prompt_key=problem",
        "data.rollout_batch_size=12",
        "worker.actor.global_batch_size=6",
        "worker.actor.micro_batch_size_per_device_for_update=3",
        "worker.rollout.n=5",
        "trainer.n_gpus_per_node=2",
    ]


def paragraphs(text: str) -> list[str]:
    """Shell commands separated by blank lines, comments left out, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    commands = "\n".join(lines).replace("\\\n", " ").split("\n\n")
    return [" ".join(command.split()) for command in commands if command.strip()]


def commands(text: str) -> list[str]:
    """Shell commands, one a line: comments left out, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [found for line in lines if (found := shlex.join(shlex.split(line, comments=True)))]


def planned(arguments: Sequence[str]) -> str:
    """The plan of a run, as its dry run says it on GPUs: the same checks, without a process of its own."""
    config = load_config(arguments).config
    world_size = config.trainer.nnodes * config.trainer.n_gpus_per_node
    plan = check_config(config, world_size)
    actor = resolve_deepspeed(config, world_size, on_gpu=True)
    reference = reference_deepspeed(config, actor, on_gpu=True)
    critic = None
    if config.algorithm.adv_estimator == "gae":
        critic = critic_deepspeed(config, actor, world_size, on_gpu=True)
    return describe_plan(config, plan, actor, reference, critic, on_gpu=True)


def training_arguments(command: str, cwd: Path) -> list[str]:
    """What a launch script hands to mmr1_ds.train: the interpreter and mpirun are replaced by one that tells."""
    tells = cwd / "tells"
    (tells / "mpirun").parent.mkdir(exist_ok=True)
    for name in ("python", "mpirun"):
        (tells / name).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        (tells / name).chmod(0o755)
    variables = environment(PYTHON=str(tells / "python"), MASTER_PORT="29500", NUM_GPUS="0")
    variables["PATH"] = f"{tells}:{variables['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{command} trainer.dry_run=true"],
        cwd=cwd, env=variables, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\nexited with {done.returncode}:\n{done.stdout}{done.stderr}"
    words = done.stdout.splitlines()
    return words[words.index("mmr1_ds.train") + 1 :]


def dry_run(command: str, cwd: Path, *overrides: str) -> str:
    """Run a shell command with `overrides` and trainer.dry_run=true added. Returns: what it printed."""
    added = shlex.join([*overrides, "trainer.dry_run=true"])
    done = subprocess.run(
        ["bash", "-c", f"{command} {added}"],
        cwd=cwd,
        env=environment(NUM_GPUS="0"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}\nexited with {done.returncode}:\n{output}"
    assert "plan of" in output, output
    return output


def linked_checkout(folder: Path) -> Path:
    """A folder in which the documentation's relative paths lead to this checkout's files."""
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder
