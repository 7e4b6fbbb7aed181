"""Seconds, tokens a second and memory of a training step: ours beside TRL's GRPOTrainer, the same work, in turns.

    pip install --no-deps -r requirements/bench.txt
    python benchmarks/step/bench_step.py [--json FILE] [--setups ...] [--steps 10] [--warm-up 3] [--micro-batch 16]

The work of a step: 8 prompts x 8 responses of 64 new tokens from a Qwen2 of 0.6 M parameters, a reward that looks at
the letters, reference log-probabilities, and one optimiser step with the KL in the loss; float32 on the CPU. A prompt
is a question with an instruction (the number of its tokens is printed); --short-prompts leaves the question alone.
Setups:

  zero3_two_ranks_transformers  two ZeRO-3 ranks, transformers generates (ours: worker.rollout.engine=hf)
  one_rank_vllm                 one rank with colocated vLLM (ours: ZeRO-3 of one rank; TRL: without DeepSpeed)

No response can end early: the model gives its end-of-sequence token a logit near -70 (bench_step_sides.prepare),
and a run in which a response is shorter than 64 tokens fails.

Both sides are started and then take turns, step by step: while one works the other one sleeps. The machine drifts, and
this way it drifts under both; what is compared is the medians, and the ratio of each pair of steps. Two threads in
all: two ranks with one each, or one rank with two. OpenMP's threads wait passively on both sides, the micro-batch is
the same, neither recomputes activations, both clip and cap importance weights as they do by default.

Memory: the most that a process has had resident from its start to its end, of the rank that has most (Linux).

The JSON file holds a list of rows: trainer (mmr1_ds, trl), setup, seconds_per_step (median), tokens_per_second (new
tokens), peak_memory_bytes, cpu_seconds (of a step, all ranks; median), rounds (seconds of each step, in turn), stages
(median seconds).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_step_sides import INSTRUCTION, NEW_TOKENS, PROMPTS, RESPONSES, prepare, prompt_tokens

from mmr1_ds.cluster.launch import free_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SETUPS = {"zero3_two_ranks_transformers": 2, "one_rank_vllm": 1}  # ranks
TRAINERS = ("mmr1_ds", "trl")
WANTED_RATIO = 1.5
PATIENCE_SECONDS = 300  # for one step; the first one includes the start
REMEDY = "pip install --no-deps -r requirements/bench.txt"


class Side:
    """One trainer's processes."""

    def __init__(self, trainer: str, setup: str, folder: Path, micro_batch: int, num_steps: int) -> None:
        self.trainer, self.folder, self._num_ranks = trainer, folder / setup / trainer, SETUPS[setup]
        self.folder.mkdir(parents=True)
        program = HERE / f"bench_step_{trainer}.py"
        command = [sys.executable, str(program), str(folder), setup, str(micro_batch), str(num_steps)]
        threads = str(2 // self._num_ranks)
        shared = {"WORLD_SIZE": str(self._num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._processes = []
        for rank in range(self._num_ranks):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads}
            with (self.folder / f"rank{rank}.log").open("wb") as log:
                process = subprocess.Popen(command, env=_environment(own), stdout=log, stderr=subprocess.STDOUT)
            self._processes.append(process)

    def step(self, number: int) -> dict[str, Any]:
        """Let it do one step. Returns: the slowest rank's seconds, all ranks' tokens, the largest rank's memory."""
        waiting = self.folder / "go.next"
        waiting.write_text(str(number))
        waiting.replace(self.folder / "go")
        end = time.monotonic() + PATIENCE_SECONDS
        while len(lines := self._lines(number)) < self._num_ranks:
            failed = [rank for rank, process in enumerate(self._processes) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                log = self.folder / f"rank{failed[0] if failed else 0}.log"
                sys.exit(f"{self.trainer}: step {number} failed, see {log}:\n{log.read_text()[-3000:]}")
            time.sleep(0.01)
        slowest = max(lines, key=lambda line: line["seconds"])
        slowest["cpu_seconds"] = sum(line["cpu_seconds"] for line in lines)
        tokens = sum(line["tokens"] for line in lines)
        assert tokens == PROMPTS * RESPONSES * NEW_TOKENS and not any(line["cut"] for line in lines), lines
        return slowest | {"tokens": tokens, "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines)}

    def _lines(self, number: int) -> list[dict[str, Any]]:
        texts = [path.read_text() for path in self.folder.glob("rank*.jsonl")]
        written = [line for text in texts for line in text.splitlines(keepends=True)]
        lines = [json.loads(line) for line in written if line.endswith("\n")]  # the last may be half written
        return [line for line in lines if line["step"] == number]

    def wait(self) -> None:
        for process in self._processes:
            process.wait(timeout=PATIENCE_SECONDS)

    def stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _environment(own: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(HERE)]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
        "OMP_WAIT_POLICY": "passive",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # What colocated vLLM needs on a CPU. Ours sets these itself, TRL does not.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **own,
    }


def measure(setup: str, folder: Path, micro_batch: int, warm_up: int, num_steps: int) -> list[dict[str, Any]]:
    """The rows of a setup."""
    total = warm_up + num_steps
    sides: list[Side] = []
    steps: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in TRAINERS}
    try:
        for trainer in TRAINERS:
            sides.append(Side(trainer, setup, folder, micro_batch, total))
            steps[trainer].append(sides[-1].step(1))  # one starts after the other: the start is not what is measured
        for number in range(2, total + 1):
            for side in sides if number % 2 else reversed(sides):
                steps[side.trainer].append(side.step(number))
        for side in sides:
            side.wait()
    finally:
        for side in sides:
            side.stop()
    return [_row(trainer, setup, steps[trainer][warm_up:], steps[trainer][-1]) for trainer in TRAINERS]


def _row(trainer: str, setup: str, steps: list[dict[str, Any]], last: dict[str, Any]) -> dict[str, Any]:
    seconds = statistics.median(step["seconds"] for step in steps)
    names = dict.fromkeys(name for step in steps for name in step["stages"])
    return {
        "trainer": trainer,
        "setup": setup,
        "seconds_per_step": seconds,
        "tokens_per_second": PROMPTS * RESPONSES * NEW_TOKENS / seconds,
        "peak_memory_bytes": last["peak_memory_bytes"],
        "cpu_seconds": statistics.median(step["cpu_seconds"] for step in steps),
        "rounds": [step["seconds"] for step in steps],
        "stages": {name: statistics.median(step["stages"].get(name, 0.0) for step in steps) for name in names},
    }


def report(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'setup':30}{'trainer':10}{'s/step':>8}{'CPU s':>8}{'tokens/s':>10}{'GB':>7}  seconds by stage"]
    for row in rows:
        stages = "  ".join(f"{name} {value:.3f}" for name, value in row["stages"].items() if value >= 0.0005)
        memory = row["peak_memory_bytes"] / 1e9
        lines.append(
            f"{row['setup']:30}{row['trainer']:10}{row['seconds_per_step']:8.3f}{row['cpu_seconds']:8.3f}"
            f"{row['tokens_per_second']:10.0f}{memory:7.2f}  {stages}"
        )
    for setup in dict.fromkeys(row["setup"] for row in rows):
        ours, theirs = (next(r for r in rows if r["setup"] == setup and r["trainer"] == name) for name in TRAINERS)
        ratio = theirs["seconds_per_step"] / ours["seconds_per_step"]
        paired = statistics.median(b / a for a, b in zip(ours["rounds"], theirs["rounds"], strict=True))
        memory = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
        held = "holds" if ratio >= WANTED_RATIO and memory <= 1 else "DOES NOT HOLD"
        lines.append(
            f"{setup}: ours is {ratio:.2f} times faster (median of pairs {paired:.2f}; wanted {WANTED_RATIO}) at "
            f"{memory:.2f} of the memory (wanted 1): {held}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--steps", type=int, default=10, help="measured, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=16, help="responses a forward and backward, on both sides")
    parser.add_argument("--short-prompts", action="store_true", help="the bare question")
    parser.add_argument("--keep", type=Path, help="folder for models, logs and figures; it must not exist")
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit(f"TRL, the other side of this benchmark, is not installed: {REMEDY}")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="bench_step_"))
    prepare(folder, "" if options.short_prompts else INSTRUCTION)
    sys.stdout.write(f"prompts of {prompt_tokens(folder)} tokens, micro-batches of {options.micro_batch} responses\n")
    rows: list[dict[str, Any]] = []
    for setup in options.setups:
        rows += measure(setup, folder, options.micro_batch, options.warm_up, options.steps)
    sys.stdout.write(report(rows) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
