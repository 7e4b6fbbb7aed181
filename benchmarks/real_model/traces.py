"""Pass rates of every question while a pretrained model trains, for the laboratory to replay.

    python benchmarks/real_model/traces.py --out FOLDER [--npz FILE] [--seed 0] [--responses 32]

Trains the experiment's model for 48 steps on uniform draws (8 questions of 1,134 a step, 8 responses each), keeps the
checkpoints of every twelfth step, and asks each of the five policies every question 32 times, at temperature 1. The
file has what curriculum_lab_worlds.RecordedTrace reads, and the questions' texts. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from experiment import ASSETS, EXAMPLE, ROOT
from pool import write_pool

STEPS, EVERY = 48, 12


def main(argv: Sequence[str]) -> int:
    """Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--npz", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--responses", type=int, default=32)
    options = parser.parse_args(argv)
    if not ASSETS.exists():
        sys.stderr.write(f"{ASSETS} is missing: `make real` makes the model\n")
        return 2
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_pool(out)
    own = [
        f"config={EXAMPLE / 'config.yaml'}", f"data.train_files={out / 'train.json'}", "data.category_key=null",
        f"data.seed={options.seed}", f"worker.rollout.seed={options.seed}",
    ]  # fmt: skip
    checkpoints = out / "run" / "checkpoints"
    if not (checkpoints / f"global_step_{STEPS}").exists():
        start(
            "mmr1_ds.train", *own, f"data.val_files={out / 'val.json'}", "data.sampling_strategy=shuffle",
            f"trainer.max_steps={STEPS}", f"trainer.save_freq={EVERY}", "trainer.save_limit=-1", "trainer.val_freq=-1",
            "trainer.val_before_train=false", f"trainer.run_dir={out / 'run'}",
        )  # fmt: skip
    tables = []
    for step in range(0, STEPS + 1, EVERY):
        table = out / f"step_{step}.jsonl"
        at = [f"trainer.load_checkpoint_path={checkpoints / f'global_step_{step}'}"] if step else []
        start(
            "mmr1_ds.commands.cli", "eval", *own, f"data.val_files={out / 'train.json'}", *at,
            f"trainer.run_dir={out / f'eval_{step}'}", f"n={options.responses}", "--pass-rates", str(table),
        )  # fmt: skip
        tables.append({row["prompt_id"]: row for row in map(json.loads, table.read_text().splitlines())})
    if options.npz is not None:
        write_trace(options.npz, tables, json.loads((out / "train.json").read_text()), options.responses)
    return 0


def start(module: str, *arguments: str) -> None:
    """Run a part of the project on the CPU, to its end."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, check=True)


def write_trace(path: Path, tables: Sequence[dict[str, dict[str, float]]], rows: list[dict], responses: int) -> None:
    """Write the questions that every table has, in the order of the data."""
    asked = [row for row in rows if all(row["id"] in table for table in tables)]
    families = sorted({row["family"] for row in asked})
    np.savez_compressed(
        path,
        steps=np.arange(0, STEPS + 1, EVERY),
        pass_rates=np.array([[table[row["id"]]["pass_rate"] for row in asked] for table in tables], dtype=np.float32),
        num_responses=np.int64(responses),
        responses_per_group=np.int64(8),
        categories=np.array([families.index(row["family"]) for row in asked]),
        prompt_ids=np.array([row["id"] for row in asked]),
        texts=np.array([" ".join(turn["content"] for turn in row["prompt"]) for row in asked]),
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
