"""Where does variance-aware sampling pay? The demo task trained with the real parts, arm beside arm, seed by seed.

    python benchmarks/vas_experiment/vas_experiment.py --out FOLDER [--shares 2 5 15 50] [--sizes 512 2048 8192]
        [--steps 160] [--rollouts 10240] [--seeds 0 1 2 3 4]
        [--arms shuffle filtering mopps dps dps_math vade pools greso pilot full online posterior text shipped textless
        sized] [--ratios .5] [--categories yes no]
    python benchmarks/vas_experiment/vas_experiment.py --out FOLDER --shares 15 --sizes 512 --seeds 0 --arms shuffle
        --record-traces FILE.npz
    python benchmarks/vas_experiment/vas_experiment.py report FOLDER --json FILE --plots FOLDER

A trial trains the demo's tiny Qwen2.5-VL (DeepSpeed ZeRO-3 actor, colocated vLLM, one rank) on a pool of which a given
share is learnable, and validates greedily on 512 held-out learnable questions every few steps; at its end it answers
each eight times at temperature 1, for pass@k. Arms of a seed share the model, the pool and the seeds of data and
sampling. A trial ends with the step in which its rollouts reach the budget, which is that of its steps of 64 responses
unless --rollouts says otherwise, and after its steps at the latest. Every response sampled for the training counts:
those of groups that filtering throws away, of probes and of refreshes too. `mopps`, `dps`, `dps_math`, `vade`, `pools`
(difficulty pools), `greso` and `pilot` (Pilot-Commit) draw by their own rules, with their published constants where
there are any (MoPPS as for MATH, DPS as for Geo3K and for MATH); see benchmarks/curriculum/curriculum_lab_rivals.py.

Each trial writes FOLDER/runs/NAME.jsonl; finished ones are skipped, so the experiment can be stopped, resumed, and
spread over processes: each takes the next trial that no other has.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vas_experiment_trials import ARMS, Trial, all_trials


def main(argv: Sequence[str]) -> int:
    """Returns: the exit code."""
    if argv[:1] == ["report"]:
        return report(argv[1:])
    options = training_parser().parse_args(argv)
    trials = all_trials(
        options.shares,
        options.sizes,
        options.arms,
        options.seeds,
        options.steps,
        options.ratios,
        [word == "yes" for word in options.categories],
        options.probe_fraction,
        options.refresh_every,
        options.mini_batches,
        [word == "dead" for word in options.rest],
        options.beta2,
        options.rollouts,
    )
    if options.record_traces is not None and len(trials) != 1:
        sys.stderr.write(f"--record-traces needs the options to name one trial, they name {len(trials)}\n")
        return 2
    train(trials, options)
    return 0


def training_parser() -> argparse.ArgumentParser:
    """Of the training command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of models, pools and runs")
    parser.add_argument(
        "--shares", "--pools", type=int, nargs="+", default=[2, 5, 15, 50], help="learnable prompts, %%"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048, 8192], help="prompts of a pool")
    parser.add_argument(
        "--rest",
        nargs="+",
        choices=["dead", "mixed"],
        default=["dead"],
        help="the other prompts: products that are never right, or the demo's mixture of easy and too hard ones",
    )
    parser.add_argument("--steps", type=int, default=160, help="at most")
    parser.add_argument("--rollouts", type=int, help="sampled responses that end a trial; 64 a step unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=["shuffle", "filtering", "mopps", "dps", "shipped"],
    )
    parser.add_argument("--ratios", "--ratio", type=float, nargs="+", default=[0.5], help="lambda of full and online")
    parser.add_argument(
        "--categories", nargs="+", choices=["yes", "no"], default=["yes"], help="whether beliefs are told the kinds"
    )
    parser.add_argument("--probe-fraction", type=float, default=0.1, help="of online")
    parser.add_argument("--refresh-every", type=int, default=60, help="steps between refreshes of full")
    parser.add_argument("--mini-batches", type=int, default=1, help="optimiser steps a batch")
    parser.add_argument("--beta2", type=float, default=0.999, help="decay of Adam's second moment")
    parser.add_argument("--validate-every", type=int, default=10, help="steps of 64 rollouts")
    parser.add_argument("--record-traces", type=Path, help="write the pass rates of fixed prompts to this .npz file")
    parser.add_argument("--trace-prompts", type=int, default=256)
    parser.add_argument("--trace-responses", type=int, default=64, help="a prompt and measurement")
    parser.add_argument("--trace-every", type=int, default=10, help="steps")
    return parser


def train(trials: Sequence[Trial], options: argparse.Namespace) -> None:
    """Train those that nobody has trained or is training."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores; more threads would only wait
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.basicConfig(level=logging.WARNING)
    from mmr1_ds.monitoring.logger import configure_logging, quiet_libraries

    configure_logging(is_main=True)
    quiet_libraries()
    from vas_experiment_training import Session

    runs = options.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    trace = None
    if options.record_traces is not None:
        trace = options.record_traces, options.trace_prompts, options.trace_responses, options.trace_every
    with Session(options.out, options.validate_every) as session:
        for trial in trials:
            path = runs / f"{trial.name}{'_traced' if trace else ''}.jsonl"
            with path.with_suffix(".lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if not path.exists():
                    session.train(trial, path, trace)


def report(argv: Sequence[str]) -> int:
    """Tables, JSON and plots of finished runs."""
    parser = argparse.ArgumentParser(prog="vas_experiment.py report")
    parser.add_argument("folder", type=Path, help="what --out was")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plots", type=Path, help="write the plots into this folder")
    options = parser.parse_args(argv)
    from vas_experiment_report import write_report

    sys.stdout.write(write_report(options.folder, options.json, options.plots))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
