"""What the curriculum adds to a step: drawing, scoring, collectives and learning, without any engine.

    python benchmarks/curriculum/curriculum_overhead.py [--prompts 15000] [--batch 512] [--responses 8] [--tokens 2048]
        [--ranks 2] [--steps 7] [--metrics RUN/metrics.jsonl] [--json FILE]

Real coordinators on real ranks (gloo), responses made up. Each part is timed after a barrier, so that no rank's wait
for another is counted; of the ranks the slowest counts, of the steps the median. With --metrics, the sums are given
as a share of the median step of that run, which should have had the same batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import PromptStatistics, score_batch
from mmr1_ds.records import GroupRewards, Prompt, Response, RolloutGroup, ScoredGroup

STRATEGIES = {
    "shuffle": {"sampling_strategy": "shuffle"},
    "full": {"sampling_strategy": "curriculum", "curriculum_refresh": "full"},
    "online": {"sampling_strategy": "curriculum", "curriculum_refresh": "online", "curriculum_probe_fraction": 0.0},
}
PARTS = ("draw", "score", "observe", "learn")


def main() -> None:
    arguments = _parser().parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(rank, port, arguments, results)) for rank in range(arguments.ranks)]
    for worker in workers:
        worker.start()
    measured = results.get()
    for worker in workers:
        worker.join()
    step_seconds = _median_step(arguments.metrics) if arguments.metrics else None
    rows = []
    for strategy, seconds in measured.items():
        row = {"strategy": strategy, **seconds, "total": sum(seconds.values())}
        row["beyond_shuffle"] = row["total"] - sum(measured["shuffle"].values())
        if step_seconds is not None:
            row["step_seconds"], row["share_of_step"] = step_seconds, row["total"] / step_seconds
        rows.append(row)
    sys.stdout.write(_table(rows))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=15_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--metrics")
    parser.add_argument("--json")
    return parser


def _rank(rank: int, port: int, arguments: argparse.Namespace, results: multiprocessing.SimpleQueue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    ranks = Ranks(LaunchEnvironment(rank, arguments.ranks, rank, "environment"), timeout_seconds=300)
    measured = {}
    for name, settings in STRATEGIES.items():
        seconds = defaultdict(list)
        for step in _steps(arguments, settings, ranks):
            slowest = ranks.max(step, "times")
            for part in PARTS:
                seconds[part].append(slowest[part])
        measured[name] = {part: statistics.median(values) for part, values in seconds.items()}
    if rank == 0:
        results.put(measured)
    ranks.close()


def _steps(arguments: argparse.Namespace, settings: dict, ranks: Ranks):
    """Seconds by part, a step at a time, after one step of warm-up."""
    data = DataConfig(rollout_batch_size=arguments.batch, curriculum_update_freq=10**6, **settings)
    ids = [f"prompt {index}" for index in range(arguments.prompts)]
    categories = [f"source {index % 9}" for index in range(arguments.prompts)]
    coordinator = Coordinator(data, ids, categories, "fingerprint", arguments.responses, arguments.steps, ranks)
    if coordinator.refresh_due(1):
        _refresh(coordinator, arguments, ranks)
    for step in range(1, arguments.steps + 2):
        ranks.barrier("draw")
        times = [time.perf_counter()]
        indices = coordinator.next_batch(step)
        coordinator.next_probes(step)
        times.append(time.perf_counter())
        groups = [_group(int(index), step, arguments) for index in indices[ranks.rank :: ranks.size]]
        ranks.barrier("score")
        begin = time.perf_counter()
        found = score_batch(groups, (), data.curriculum_metrics)
        scored = time.perf_counter() - begin
        ranks.barrier("observe")
        begin = time.perf_counter()
        coordinator.observe(step, found)
        observed = time.perf_counter() - begin
        begin = time.perf_counter()
        coordinator.finish_step(step, indices)
        learned = time.perf_counter() - begin
        if step > 1:
            yield dict(zip(PARTS, (times[1] - times[0], scored, observed, learned), strict=True))


def _refresh(coordinator: Coordinator, arguments: argparse.Namespace, ranks: Ranks) -> None:
    for chunk in coordinator.refresh_chunks():
        random = np.random.default_rng(int(chunk[0]))
        rates = random.binomial(arguments.responses, 0.4, len(chunk)) / arguments.responses
        found = [
            PromptStatistics(int(index), arguments.responses, rate, rate, rate * (1 - rate), 0.3, 0.5)
            for index, rate in zip(chunk, rates, strict=True)
        ]
        coordinator.observe_refresh(found[ranks.rank :: ranks.size])
    coordinator.finish_refresh(1)


def _group(index: int, step: int, arguments: argparse.Namespace) -> ScoredGroup:
    random = np.random.default_rng((index, step))
    accuracy = (random.random(arguments.responses) < index / arguments.prompts).astype(np.float32)
    responses = tuple(
        Response((random.zipf(1.3, arguments.tokens) % 150_000).astype(np.int32), np.empty(0, np.float32), True)
        for _ in accuracy
    )
    rewards = GroupRewards(accuracy, accuracy, np.zeros(len(accuracy), dtype=bool), {})
    return ScoredGroup(RolloutGroup(Prompt(index, str(index), (1,), (), ""), responses, 0), rewards)


def _median_step(path: str) -> float:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return statistics.median(line["timing_s/step"] for line in lines if "timing_s/step" in line)


def _table(rows: list[dict]) -> str:
    names = ["strategy", *PARTS, "total", "beyond_shuffle"]
    text = "  ".join(name.rjust(14) for name in names) + ("  share of step" if "share_of_step" in rows[0] else "")
    for row in rows:
        text += "\n" + "  ".join([row["strategy"].rjust(14), *(f"{row[name] * 1000:11.1f} ms" for name in names[1:])])
        if "share_of_step" in row:
            text += f"  {row['share_of_step']:12.2%}"
    return text + "\n"


if __name__ == "__main__":
    main()
