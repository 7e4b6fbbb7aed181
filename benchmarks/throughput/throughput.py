"""Throughput of whole training runs: tokens a second, seconds a step by stage, memory, with and without the curriculum.

    python benchmarks/throughput/throughput.py                the demo's model: shuffle, full VAS, online VAS
    python benchmarks/throughput/throughput.py --config mmr1_h100 --models Qwen/Qwen2.5-VL-7B-Instruct \\
        --lengths 2048:4096 -- data.train_files=/path/to/training/data
    python benchmarks/throughput/throughput.py --compare old.json new.json

Every cell of the grid is a real run, started as users start theirs; cells take turns, so that a machine that drifts
slows all of them. docs/throughput.md has the schema of what is written.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from throughput_figures import Settings, model_shape, over_repeats, read_rows, run_figures
from throughput_report import SCHEMA, compare, plot, read, table, write

from mmr1_ds.cluster.launch import gpu_is_here
from mmr1_ds.config import RunConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.engine.model.flops import peak_tflops
from mmr1_ds.errors import UserError
from mmr1_ds.monitoring.environment import describe_environment

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = {
    "shuffle": ("data.sampling_strategy=shuffle",),
    "full": ("data.sampling_strategy=curriculum", "data.curriculum_refresh=full"),
    "online": ("data.sampling_strategy=curriculum", "data.curriculum_refresh=online"),
}
QUIET = (  # of what a benchmark does not measure
    "trainer.val_before_train=false",
    "trainer.val_freq=-1",
    "trainer.save_freq=-1",
    "trainer.resume=false",
    "trainer.report_freq=null",
    "trainer.logger=[console]",
)
STOP_SECONDS = 10.0  # that a run has to end after a signal; there is nothing to save
ERROR_LINES = 5  # of a failed run's log that are kept
_ERRORS = (  # the first of these that a log has is what a run failed of
    r"mmr1-ds: error",
    r"(?!.*CollectiveError)(\w+\.)*\w*(Error|Exception)\b",
    r"mmr1-ds: fault",
)


@dataclass(frozen=True)
class Cell:
    model: str | None  # None: the config's
    ranks: int
    engine: str
    lengths: str | None  # prompt:response in tokens
    sampling: str

    def settings(self) -> list[str]:
        found = [*SAMPLING[self.sampling], f"worker.rollout.engine={self.engine}"]
        if self.model is not None:
            found.append(f"worker.actor.model.model_path={self.model}")
        if self.lengths is not None:
            prompt, response = self.lengths.split(":")
            found += [f"data.max_prompt_length={prompt}", f"data.max_response_length={response}"]
        return found


@dataclass
class Measured:
    """A cell of the grid, and what was measured of it so far."""

    cell: Cell
    config: RunConfig
    runs: list[dict[str, float]] = field(default_factory=list)  # figures of each repeat
    error: str | None = None

    def as_row(self) -> dict[str, Any]:
        return {
            "model": self.config.worker.actor.model.model_path,
            "ranks": self.cell.ranks,
            "engine": self.cell.engine,
            "lengths": f"{self.config.data.max_prompt_length}:{self.config.data.max_response_length}",
            "sampling": self.cell.sampling,
            "refresh_steps": self.config.data.curriculum_update_freq if self.cell.sampling == "full" else None,
            "figures": {} if self.error else over_repeats(self.runs),
            "error": self.error,
        }


def main(argv: Sequence[str]) -> int:
    """Returns: 1 when a cell failed, 2 for a user's mistake."""
    options = parser().parse_args(argv)
    try:
        if options.compare:
            sys.stdout.write(compare(*(read(path) for path in options.compare)) + "\n")
            return 0
        found = measure(options)
    except UserError as error:
        sys.stderr.write(f"throughput: error: {error}\n")
        return 2
    whole = [cell for cell in found["cells"] if not cell["error"]]
    if whole:
        plot(found, options.work_dir / "throughput.png")
    sys.stdout.write(f"\n{table(found)}\n\n{options.work_dir / 'throughput.json'}\n")
    return 0 if len(whole) == len(found["cells"]) else 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the grid, and write what is known after every run.

    Raises: UserError before the first run for settings that cannot be.
    """
    on_gpu = gpu_is_here()
    ranks = options.ranks or [describe_environment(1, on_gpu)["num_gpus"] or 2]
    lengths = options.lengths or [None]
    for length in filter(None, lengths):
        if not all(part.isdigit() for part in length.split(":")) or length.count(":") != 1:
            raise UserError(f"--lengths {length}: give prompt:response in tokens, as 1024:2048")
    base = [f"config={options.config}", *options.settings]
    grid = itertools.product(options.models or [None], ranks, options.engines, lengths, options.sampling)
    cells = [Cell(*part) for part in grid]
    measured = [Measured(cell, load_config([*base, *cell.settings()]).config) for cell in cells]
    found = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "environment": describe_environment(ranks[0], on_gpu),
        "settings": {
            "config": options.config, "steps": options.steps, "warmup": options.warmup, "repeats": options.repeats,
            "overrides": options.settings, "peak_tflops": _peak(options, on_gpu),
        },
        "cells": [],
    }  # fmt: skip
    for repeat in range(options.repeats):
        for number, part in enumerate(measured):
            if part.error:
                continue
            sys.stderr.write(f"run {repeat * len(cells) + number + 1} of {options.repeats * len(cells)}: {part.cell}\n")
            _measure_once(part, options, f"{number}_{part.cell.sampling}_{repeat}", on_gpu)
            found["cells"] = [part.as_row() for part in measured if part.runs or part.error]
            write(found, options.work_dir / "throughput.json")
    return found


def _measure_once(part: Measured, options: argparse.Namespace, name: str, on_gpu: bool) -> None:
    """Run the cell once more, and keep its figures, or its error."""
    cell, config, run_dir = part.cell, part.config, options.work_dir / name
    refreshed = [f"data.curriculum_update_freq={options.warmup}"] if cell.sampling == "full" else []
    command = [
        *shlex.split(options.launcher.format(ranks=cell.ranks)), "mmr1_ds.train", f"config={options.config}",
        *options.settings, *cell.settings(), *QUIET, *refreshed, f"trainer.max_steps={options.warmup + options.steps}",
        f"trainer.n_gpus_per_node={cell.ranks}", f"trainer.run_dir={run_dir}",
    ]  # fmt: skip
    part.error = _run(command, options.work_dir / f"{name}.log", cell.ranks, on_gpu)
    if part.error is not None:
        return
    settings = Settings(
        options.warmup, config.data.rollout_batch_size * config.worker.rollout.n,
        config.data.curriculum_update_freq or 1, cell.ranks, _peak(options, on_gpu),
    )  # fmt: skip
    shape = model_shape(config.worker.actor.model.model_path) if settings.peak_tflops else None
    try:
        part.runs.append(run_figures(read_rows(run_dir / "metrics.jsonl"), settings, shape))
    except KeyError as error:
        part.error = f"{run_dir / 'metrics.jsonl'} lacks {error}"
    except (OSError, ValueError) as error:
        part.error = str(error)


def _run(command: Sequence[str], log: Path, ranks: int, on_gpu: bool) -> str | None:
    """Run it, and leave no process of it behind. Returns: what the log says of a run that failed."""
    variables = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"  # DeepSpeed looks for ninja there
    variables["STOP_SECONDS"] = f"{STOP_SECONDS:g}"  # of launch/deepspeed.sh
    if not on_gpu:
        variables |= {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive"}
        variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait()
        finally:
            _stop(process)
    if code == 0:
        return None
    return error_in(log.read_text(encoding="utf-8", errors="replace")) or f"exit code {code}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a run that is still going, so that nothing of it takes time from the next one."""
    for number, seconds in ((signal.SIGTERM, 2 * STOP_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def error_in(log: str) -> str:
    """The lines of a failed run's log up to its error, which is the last; the launcher says more after it."""
    lines = log.splitlines()
    for pattern in _ERRORS:
        found = [number for number, line in enumerate(lines, 1) if re.match(pattern, line)]
        if found:
            return "\n".join(lines[max(0, found[-1] - ERROR_LINES) : found[-1]])
    return "\n".join(lines[-ERROR_LINES:])


def _peak(options: argparse.Namespace, on_gpu: bool) -> float | None:
    """1e12 FLOP a second of one device: as given, else by the datasheet of a GPU whose name is known."""
    if options.peak_tflops is not None or not on_gpu:
        return options.peak_tflops
    device = describe_environment(1, on_gpu)["device"]
    return peak_tflops(device)


def _commit() -> str | None:
    found = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """End the run that is going, then this program."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word}: give a whole number of at least 1")
    return int(word)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every run, after --")
    parser.add_argument("--config", default="configs/demo.yaml", help="run config (default: the demo's)")
    parser.add_argument("--models", nargs="+", metavar="PATH", help="default: the config's")
    parser.add_argument("--ranks", nargs="+", type=_positive, help="default: all GPUs, 2 on the CPU")
    parser.add_argument("--engines", nargs="+", default=["vllm"], choices=["vllm", "hf", "server"])
    parser.add_argument("--lengths", nargs="+", metavar="PROMPT:RESPONSE", help="default: the config's")
    parser.add_argument("--sampling", nargs="+", default=list(SAMPLING), choices=list(SAMPLING))
    parser.add_argument("--steps", type=_positive, default=12, help="measured (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="left out before them (default: %(default)s)")
    parser.add_argument("--repeats", type=_positive, default=2, help="of every cell (default: %(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="of one device, for MFU (default: by the GPU's name)")
    parser.add_argument("--launcher", default="bash launch/deepspeed.sh {ranks}", help="what starts the ranks")
    work = Path("runs/throughput")
    parser.add_argument(
        "--work-dir", type=lambda path: Path(path).resolve(), default=work.resolve(), help=f"(default: {work})"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="two results side by side; runs nothing")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(main(sys.argv[1:]))
