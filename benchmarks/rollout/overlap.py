"""What sampling ahead of the training saves: the demo in turn and one step ahead, on one training rank and one server.

    python benchmarks/rollout/overlap.py --json overlap.json

Both sides of every seed run one after the other with the same server, the trainer on one core and the server on
another, so that neither takes the other's time. Needs the demo's assets (`make demo` makes them).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRAINER_CORE, SERVER_CORE = 0, 1
WARM_UP = 5  # steps that no time is taken of


def main() -> None:
    """Run every seed with every staleness, print the table, write the rows."""
    options = parse()
    key = secrets.token_urlsafe(32)
    environment = {**os.environ, "MMR1_DS_SERVER_KEY": key, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment["DS_ACCELERATOR"] = "cpu"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = [f"config={ROOT / 'configs/demo.yaml'}", "worker.rollout.engine=server", *options.overrides]
    log = options.runs / "overlap_server.log"
    options.runs.mkdir(parents=True, exist_ok=True)
    serve = [sys.executable, "-m", "mmr1_ds.commands.cli", "serve", *common, f"--port={port}"]
    with log.open("wb") as output:
        server = subprocess.Popen(pinned(serve, SERVER_CORE), env=environment, cwd=ROOT, stdout=output, stderr=output)
    rows = []
    try:
        for seed in options.seeds:
            for staleness in options.staleness:
                row = train(common, f"http://127.0.0.1:{port}", seed, staleness, options, environment)
                rows.append(row)
                sys.stdout.write(describe(row) + "\n")
                sys.stdout.flush()
    finally:
        server.terminate()
        server.wait()
    sys.stdout.write(summary(rows))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1], help="the first is compared with")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs are written")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="keys of the run configuration, key=value")
    return parser.parse_args()


def pinned(command: list[str], core: int) -> list[str]:
    """The command on one core."""
    return ["taskset", "-c", str(core), *command]


def train(
    common: list[str], url: str, seed: int, staleness: int, options: argparse.Namespace, environment: dict[str, str]
) -> dict[str, Any]:
    """One run. Returns: its row."""
    name = f"overlap_{staleness}_{seed}"
    shutil.rmtree(options.runs / name, ignore_errors=True)
    command = [
        sys.executable, "-m", "mmr1_ds.train", *common, f"worker.rollout.server_urls=[{url}]",
        f"worker.rollout.max_staleness_steps={staleness}", f"data.seed={seed}", f"worker.rollout.seed={seed}",
        f"trainer.run_dir={options.runs / name}", "trainer.n_gpus_per_node=1", f"trainer.max_steps={options.steps}",
        "trainer.report_freq=null",
        f"trainer.val_freq={options.steps}", "trainer.save_freq=-1",
        "trainer.best_metric=null", "trainer.logger=[jsonl]",
    ]  # fmt: skip
    start = time.monotonic()
    log = options.runs / f"{name}.log"
    with log.open("wb") as output:
        done = subprocess.run(pinned(command, TRAINER_CORE), env=environment, cwd=ROOT, stdout=output, stderr=output)
    if done.returncode:
        raise SystemExit(f"{name} failed, see {log}")
    lines = [json.loads(line) for line in (options.runs / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "perf/time_per_step" in line][WARM_UP:]

    def median(key: str) -> float:
        return statistics.median(line.get(key, 0.0) for line in steps)  # ref: none without a KL

    return {
        "seed": seed,
        "max_staleness_steps": staleness,
        "seconds_per_step": median("perf/time_per_step"),
        "seconds_waiting": median("timing_s/gen"),
        "seconds_training": sum(median(f"timing_s/{stage}") for stage in ("ref", "adv", "update_actor")),
        "seconds_sync": median("timing_s/sync"),
        "policy_lag_mean": statistics.mean(line["rollout/policy_lag_mean"] for line in steps),
        "policy_lag_max": max(line["rollout/policy_lag_max"] for line in steps),
        "val_accuracy_first": lines[0]["val/accuracy_reward"],
        "val_accuracy_last": [line for line in lines if "val/accuracy_reward" in line][-1]["val/accuracy_reward"],
        "seconds_of_run": time.monotonic() - start,
    }


def describe(row: dict[str, Any]) -> str:
    """One line."""
    return (
        f"seed {row['seed']}, {row['max_staleness_steps']} ahead: {row['seconds_per_step']:.3f} s a step "
        f"(waiting {row['seconds_waiting']:.3f}, training {row['seconds_training']:.3f}, "
        f"sync {row['seconds_sync']:.3f}), "
        f"lag {row['policy_lag_mean']:.2f} (at most {row['policy_lag_max']:.0f}), "
        f"validation {row['val_accuracy_first']:.3f} -> {row['val_accuracy_last']:.3f}"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """Each staleness beside the first, over all seeds."""
    values = list(dict.fromkeys(row["max_staleness_steps"] for row in rows))
    by = {
        value: sorted((row for row in rows if row["max_staleness_steps"] == value), key=lambda row: row["seed"])
        for value in values
    }
    text = ""
    for value in values:
        ratios = [
            row["seconds_per_step"] / first["seconds_per_step"]
            for row, first in zip(by[value], by[values[0]], strict=True)
        ]
        accuracy = [row["val_accuracy_last"] for row in by[value]]
        listed = ", ".join(f"{number:.2f}" for number in ratios)
        text += f"{value} ahead: {statistics.median(ratios):.2f} of the time a step ({listed}); "
        text += f"validation accuracy {statistics.mean(accuracy):.3f} ({', '.join(f'{a:.3f}' for a in accuracy)})\n"
    return text


if __name__ == "__main__":
    main()
