"""Draws and learns step by step with the real coordinator and checkpoints, until it is done or killed.

    curriculum_until_killed.py FOLDER full|online NUM_STEPS SEED

Each rank appends its draws to FOLDER/drawn.RANK.jsonl. Every third step is checkpointed, after its refresh, as the
trainer does. Pass rates are made up from prompt and step, so that a repeated step observes the same.
"""

import json
import sys
from pathlib import Path

import numpy as np

from mmr1_ds.cluster.exits import leave
from mmr1_ds.cluster.launch import launch_environment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.loop.checkpoint import Checkpoints

folder, refresh, num_steps, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
P, B, N = 61, 12, 8
ranks = Ranks(launch_environment(), timeout_seconds=60)
data = DataConfig(
    rollout_batch_size=B, seed=seed, sampling_strategy="curriculum", curriculum_refresh=refresh,
    curriculum_update_freq=4, curriculum_rollout_batch_size=17, curriculum_metrics=["learnability", "self-bleu"],
    curriculum_metric_weights=[0.8, 0.2], curriculum_probe_fraction=0.1,
)  # fmt: skip
ids, categories = [f"p{i}" for i in range(P)], [f"c{i % 3}" for i in range(P)]
features = np.random.default_rng(seed).integers(-96, 97, (P, 7), dtype=np.int8) if refresh == "online" else None
coordinator = Coordinator(data, ids, categories, "abc", N, num_steps, ranks, features=features)
checkpoints = Checkpoints(folder / "checkpoints", -1, ranks)
kept = folder / "checkpoints" / "refresh.safetensors"


def answers(indices: np.ndarray, step: int, num_responses: int, is_probe: bool = False) -> list[PromptStatistics]:
    """This rank's part of what a made-up policy does; the groups of a prompt drawn twice differ."""
    found = []
    for slot in range(ranks.rank, len(indices), ranks.size):
        random = np.random.default_rng((seed, step, slot, num_responses))
        rate = random.binomial(num_responses, 0.9 * indices[slot] / P) / num_responses
        bleu, variance = random.random(), rate * (1 - rate)
        of_prompt = int(indices[slot]), num_responses, rate, rate, variance, bleu, 0.5
        tokens = int(random.integers(1, 401, num_responses).sum())
        found.append(PromptStatistics(*of_prompt, is_probe=is_probe, num_tokens=tokens))
    return found


def refresh_if_due(step: int) -> None:
    if coordinator.refresh_due(step):
        coordinator.resume_refresh(kept, f"before step {step}")
        for chunk in coordinator.refresh_chunks():
            coordinator.observe_refresh(answers(chunk, 1000 + step, N))
            coordinator.save_refresh(kept, f"before step {step}")
        coordinator.finish_refresh(step)


def save(path: Path) -> None:
    if ranks.rank == 0:
        (path / "curriculum").mkdir()
    coordinator.save(path / "curriculum")


done = 0
newest = checkpoints.newest()
if newest is not None:
    done = newest[0]
    coordinator.load(newest[1] / "curriculum")
refresh_if_due(done + 1)
with open(folder / f"drawn.{ranks.rank}.jsonl", "a", encoding="utf-8") as log:
    for step in range(done + 1, num_steps + 1):
        # Two or three draws in some steps, as online filtering makes them.
        batches = []
        for attempt in range(1 + step % 3):
            groups = coordinator.next_groups(step)
            batches.append(groups.indices)
            own = answers(batches[-1], 10 * step + attempt, N)
            probes = coordinator.next_probes(step)[0] if attempt == 0 else np.empty(0, dtype=np.int64)
            own += answers(probes, step, coordinator.num_probe_responses, is_probe=True)
            expected = groups.expected_tokens.tolist()
            log.write(json.dumps([step, attempt, [batches[-1].tolist(), expected], probes.tolist()]) + "\n")
            log.flush()
            coordinator.observe(step, own)
        coordinator.finish_step(step, np.concatenate(batches)[::2][:B])
        refresh_if_due(step + 1)
        if step % 3 == 0 or step == num_steps:
            checkpoints.save(step, save)
ranks.close()
leave(0)
