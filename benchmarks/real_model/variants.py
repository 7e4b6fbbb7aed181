"""Full fine-tuning and LoRA of a pretrained model, on one and two ranks: stopped and resumed, beside a run left alone.

    python benchmarks/real_model/variants.py --out FOLDER [--variants full_1 full_2 lora_1 lora_2]

Two runs a variant, of six steps of 4 x 8 responses with examples/real_text's model and data. One is left alone. The
other gets SIGTERM once its third step is logged, saves, ends with exit code 75 (143 under the launcher of two
ranks), and is started again with the same command. A step has two optimiser steps here, so that
log-probabilities before the update are computed, too, and micro-batches are small, so that two ranks fit. The table's
lines:

- drift: vLLM's log-probabilities against the trainer's, nats a token: mean of the steps, and the largest of any token
- memory: the peak of any rank, resident
- seconds of a stage: of the quickest of the twelve steps, as other work may share the cores; of the save at the stop
- start: from the command until the first step begins, of a new run and of the resumed one, which also loads
- same draws, same metrics, same checkpoint: of the resumed run and the one left alone, to the last bit; metrics are all
  but seconds and memory, and the checkpoint is the last one, with the optimiser's states

What is done is not done again. Prints a table in Markdown, from FOLDER/VARIANT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "real_text" / "config.yaml"
STEPS, STOP_AFTER = 6, 3
DONE, PREEMPTED = {0}, {75, 143}  # exit codes
LORA = ["worker.actor.model.lora.rank=16", "worker.actor.model.lora.alpha=32", "worker.actor.optim.lr=2e-4"]
VARIANTS: dict[str, tuple[str, int, list[str]]] = {  # name, ranks, settings
    "full_1": ("full, one rank", 1, []),
    "full_2": ("full, two ranks", 2, []),
    "lora_1": ("LoRA, one rank", 1, LORA),
    "lora_2": ("LoRA, two ranks", 2, LORA),
}
SETTINGS = [
    f"trainer.max_steps={STEPS}", "trainer.save_freq=-1", "trainer.val_freq=-1", "trainer.val_before_train=false",
    "trainer.best_metric=null", "data.rollout_batch_size=4", "worker.actor.global_batch_size=2",
    "worker.actor.micro_batch_size_per_device_for_update=8",
    "worker.actor.micro_batch_size_per_device_for_experience=16",
]  # fmt: skip
STAGES = {"sampling": "gen", "log-probabilities before the update": "old", "update": "update_actor", "sync": "sync"}
MEASURED = ("timing", "memory", "perf/")  # what begins so is of the clock and the machine, but for:
COUNTED = ("perf/num_rollouts", "perf/total_num_tokens", "perf/sync_bytes")
Rows = dict[int, dict[str, float]]  # step -> its metrics


def main(argv: Sequence[str]) -> int:
    """Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args(argv)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in options.variants:
        if not (out / f"{name}.json").exists():
            record = measure(name, out)
            (out / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    found = {name: out / f"{name}.json" for name in VARIANTS}
    records = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}
    sys.stdout.write(table(records))
    return 0


def measure(name: str, out: Path) -> dict[str, Any]:
    """Run a variant alone, and stopped and resumed. Returns: its figures."""
    alone, stopped = out / f"{name}_alone", out / f"{name}_stopped"
    for run_dir in (alone, stopped):
        shutil.rmtree(run_dir, ignore_errors=True)
    start_new = train(name, alone, DONE)
    train(name, stopped, PREEMPTED, stop_after=STOP_AFTER)
    stopped_after = max(read_rows(stopped))
    if not (stopped / "checkpoints" / f"global_step_{stopped_after}" / "manifest.json").exists():
        sys.exit(f"{name}: nothing was saved after step {stopped_after}, see {stopped.with_suffix('.log')}")
    start_resumed = train(name, stopped, DONE)
    starts = {"start_new": start_new, "start_resumed": start_resumed}
    return {"stopped_after": stopped_after} | starts | compare(alone, stopped)


def train(name: str, run_dir: Path, expected: set[int], stop_after: int | None = None) -> float:
    """Start a variant or go on with it, and wait for its end.

    Args:
        expected: exit codes; stop_after: the step after which it is told to end.
    Returns: seconds from the command until its first step began.
    """
    _, num_ranks, settings = VARIANTS[name]
    environment = os.environ | {
        "PYTHON": sys.executable, "CONFIG": str(CONFIG), "NUM_GPUS": str(num_ranks),
        "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = ["bash", "launch/train.sh", *SETTINGS, *settings, f"trainer.run_dir={run_dir}"]
    known, begun = max(read_rows(run_dir), default=0), time.monotonic()
    start = float("nan")
    with run_dir.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.1)
            rows = read_rows(run_dir)
            if start != start and (new := rows.get(known + 1, {}).get("timing_s/step")) is not None:
                start = time.monotonic() - begun - new
            if stop_after is not None and stop_after in rows:
                process.send_signal(signal.SIGTERM)
                stop_after = None
    if process.returncode not in expected:
        sys.exit(f"{name}: exit code {process.returncode}, expected {expected}, see {run_dir.with_suffix('.log')}")
    return start


def read_rows(run_dir: Path) -> Rows:
    """The metrics of each step that is logged so far."""
    path = run_dir / "metrics.jsonl"
    rows: Rows = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            row = json.loads(line)
            rows.setdefault(row["step"], {}).update(row)
    return rows


def compare(alone: Path, stopped: Path) -> dict[str, Any]:
    """The figures of a pair of runs, and what is not the same in both."""
    left, resumed = read_rows(alone), read_rows(stopped)
    rows = [*left.values(), *resumed.values()]
    stages = {
        stage: min(row[f"timing_s/{key}"] for row in rows if f"timing_s/{key}" in row)
        for stage, key in STAGES.items()
    }
    saves = [row["timing_s/save_checkpoint"] for row in resumed.values() if "timing_s/save_checkpoint" in row]
    return {
        "drift_mean": fmean(row["rollout/logprob_diff_mean"] for row in rows if "rollout/logprob_diff_mean" in row),
        "drift_max": max(row.get("rollout/logprob_diff_max", 0.0) for row in rows),
        "memory_gb": max(value for row in rows for key, value in row.items() if key.startswith("memory_gb/")),
        "seconds": stages | {"save": saves[0]},
        "same_draws": read_draws(alone) == read_draws(stopped),
        "differing_metrics": differing(left, resumed),
        "same_checkpoint": digests(alone) == digests(stopped),
    }


def differing(left: Rows, right: Rows) -> list[str]:
    """Steps and names of the metrics that are not the same to the last bit; seconds and memory are not compared."""
    found = []
    for step in sorted(left.keys() | right.keys()):
        one, other = left.get(step, {}), right.get(step, {})
        names = [key for key in sorted(one.keys() | other.keys()) if key in COUNTED or not key.startswith(MEASURED)]
        found += [f"{step} {key}" for key in names if one.get(key) != other.get(key)]
    return found


def read_draws(run_dir: Path) -> list[Any]:
    """The prompts of every step."""
    return [json.loads(line) for line in (run_dir / "draws.jsonl").read_text(encoding="utf-8").splitlines()]


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint's files; the config is left out, which names the run's folder."""
    manifest = run_dir / "checkpoints" / f"global_step_{STEPS}" / "manifest.json"
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return {name: file["sha256"] for name, file in files.items() if name != "config.yaml"}


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A table in Markdown, a column a variant."""
    columns = [cells(record) for record in records.values()]
    lines = [["", *(VARIANTS[name][0] for name in records)], ["---"] * (len(records) + 1)]
    lines += [[title, *(column[title] for column in columns)] for title in columns[0]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(record: Mapping[str, Any]) -> dict[str, str]:
    """A variant's column: title of the line -> what stands there."""
    seconds, differ = record["seconds"], len(record["differing_metrics"])
    return {
        "drift, mean and largest": f"{record['drift_mean']:.1e}, {record['drift_max']:.1e}",
        "memory of a rank": f"{record['memory_gb']:.1f} GB",
        **{f"{stage}, s": f"{value:.1f}" for stage, value in seconds.items()},
        "start, new and resumed, s": f"{record['start_new']:.0f}, {record['start_resumed']:.0f}",
        "stopped after step": str(record["stopped_after"]),
        "same draws": "yes" if record["same_draws"] else "no",
        "same metrics": f"no, {differ} differ" if differ else "yes",
        "same last checkpoint": "yes" if record["same_checkpoint"] else "no",
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
