"""Does it matter which questions a pretrained model trains on? Arm beside arm at equal rollouts, seed by seed.

    python benchmarks/real_model/experiment.py --out FOLDER [--seeds 0 1 2] [--arms shuffle shipped mopps dapo]
        [--budget 3072] [--questions 128]
    python benchmarks/real_model/experiment.py report FOLDER --json FILE --plot FILE

SmolLM2-135M-Instruct (made by `make real`), full fine-tuning with the config of examples/real_text, on 1,134 questions
of 13 families (pool.py), or on the first N of them so that each comes several times, validated on 226 others, four
answers each at temperature 1. Every sampled response counts, those of groups that dynamic sampling throws away and of
full's refreshes too. No arm is told the families. Each training writes
FOLDER/ARM_seedN.json; finished ones are skipped, and several processes share the work.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pool import EXAMPLE, write_pool

ROOT = EXAMPLE.parents[1]
ASSETS = ROOT / "runs" / "real_text_assets"
STEP = 64  # responses
VALIDATE_EVERY = {"dapo": 3}  # steps: its steps spend several times the rollouts

ARMS: dict[str, list[str]] = {
    "shuffle": ["data.sampling_strategy=shuffle"],
    "shipped": [],  # online as it ships
    "posterior": ["data.curriculum_draw=posterior", "data.curriculum_features=none"],  # the best by a draw from beliefs
    "posterior_text": ["data.curriculum_draw=posterior"],  # the same, which learns from the questions' words besides
    "mopps": ["data.sampling_strategy=shuffle"],  # the draws are replaced, see RIVAL_RULES
    "dapo": ["data.sampling_strategy=shuffle", "algorithm.online_filtering=true"],
    # The published method: four responses to every question before the first step and after each epoch of 128.
    "full": [
        "data.curriculum_refresh=full", "data.curriculum_draw=proportional", "data.curriculum_rollout_n=4",
        "data.curriculum_update_freq=16",
    ],
}  # fmt: skip
RIVAL_RULES = {"mopps": "mopps_geo3k"}  # arm -> name in the laboratory


def main(argv: Sequence[str]) -> int:
    """Returns: the exit code."""
    if argv[:1] == ["report"]:
        from experiment_report import report  # matplotlib

        return report(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["shuffle", "shipped", "mopps", "dapo"])
    parser.add_argument("--budget", type=int, default=48 * STEP, help="rollouts of a training")
    parser.add_argument("--questions", type=int, help="train on the first N questions alone")
    options = parser.parse_args(argv)
    if not ASSETS.exists():
        sys.stderr.write(f"{ASSETS} is missing: `make real` makes the model\n")
        return 2
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_pool(out, options.questions)
    for seed in options.seeds:
        for arm in options.arms:
            with (out / f".{arm}_seed{seed}.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue  # another process trains it
                if not (out / f"{arm}_seed{seed}.json").exists():
                    train(out, arm, seed, options.budget)
    return 0


def train(out: Path, arm: str, seed: int, budget: int) -> None:
    """Train one arm of one seed and keep its figures."""
    run_dir, started = out / f"{arm}_seed{seed}", time.monotonic()
    shutil.rmtree(run_dir, ignore_errors=True)
    validate_every = VALIDATE_EVERY.get(arm, 12)
    settings = [
        f"data.train_files={out / 'train.json'}", f"data.val_files={out / 'val.json'}", "data.category_key=null",
        f"data.seed={seed}", f"worker.rollout.seed={seed}", f"trainer.max_steps={budget // STEP}",
        f"trainer.run_dir={run_dir}", "trainer.save_freq=-1", "trainer.save_model_only=true",
    ]  # fmt: skip
    command = [
        sys.executable, str(Path(__file__).with_name("trial.py")), RIVAL_RULES.get(arm, "own"), str(budget),
        str(validate_every), f"config={EXAMPLE / 'config.yaml'}", *settings, *ARMS[arm],
    ]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (out / f"{arm}_seed{seed}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    record = {"arm": arm, "seed": seed, "budget": budget, "seconds": round(time.monotonic() - started)}
    record["steps"] = read_steps(run_dir, out / "val.json")
    path = out / f"{arm}_seed{seed}.json"
    path.with_suffix(".tmp").write_text(json.dumps(record), encoding="utf-8")
    path.with_suffix(".tmp").rename(path)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def read_steps(run_dir: Path, val_file: Path) -> list[dict[str, Any]]:
    """A run's figures by step, those of its validations with accuracies by family."""
    families = {row["id"]: row["family"] for row in json.loads(val_file.read_text(encoding="utf-8"))}
    steps: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kept = {
            "rollouts": row.get("perf/num_rollouts"),
            "teach": row.get("curriculum/effective_group_fraction"),
            "accuracy": row.get("val/accuracy_reward"),
            "pass_at_4": row.get("val/pass_at_4"),
            "maj_at_4": row.get("val/maj_at_4"),
        }
        steps[row["step"]] |= {name: value for name, value in kept.items() if value is not None}
    for step, kept in steps.items():
        kept["step"] = step
        if "accuracy" not in kept:
            continue
        by_family: dict[str, list[float]] = defaultdict(list)
        answers = run_dir / "eval" / f"step_{step}" / "answers.jsonl"
        for line in answers.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            by_family[families[row["prompt_id"]]].append(row["accuracy"])
        kept["families"] = {name: sum(values) / len(values) for name, values in sorted(by_family.items())}
    return [steps[step] for step in sorted(steps)]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
