"""Commands of the documentation, run for real with trainer.dry_run=true."""

import json
import shlex
import subprocess
from pathlib import Path

from launching import ROOT, environment

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
