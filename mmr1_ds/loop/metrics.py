"""The figures of a step over all ranks, under EasyR1's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.engine.model.flops import Work, model_flop
from mmr1_ds.records import GroupRewards, RolloutGroup, ScoredGroup
from mmr1_ds.rewards.scoring import COUNTED, RewardCounts

if TYPE_CHECKING:
    from mmr1_ds.engine.model.shapes import ModelShape
    from mmr1_ds.monitoring.clock import StageClock
    from mmr1_ds.records import Trajectory


def reward_metrics(rewards: Sequence[GroupRewards], failures: Sequence[RewardCounts], ranks: Ranks) -> dict[str, float]:
    """Average each figure the reward returned over all responses, as `reward/<key>`, and count failures. Collective.

    A key that only some responses have is averaged over those.
    """
    sums: dict[str, tuple[float, int]] = {}
    for group in rewards:
        overall = np.where(group.is_unknown, np.nan, group.overall)
        figures = {"overall": overall, "accuracy": group.accuracy, **group.parts}
        for name, values in figures.items():
            known = values[np.isfinite(values)]
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + float(known.sum(dtype=np.float64)), count + len(known)
    total_counts = sum(failures, Counter[str]())
    gathered = ranks.all_gather_objects((sums, {name: total_counts[name] for name in COUNTED}), "reward metrics")
    everyone = [part for part, _ in gathered]
    names = sorted({name for part in everyone for name in part})
    metrics = {}
    for name in names:
        total, count = (sum(part.get(name, (0.0, 0))[i] for part in everyone) for i in (0, 1))
        if count:
            metrics[f"reward/{name}"] = total / count
    return metrics | {name: float(sum(counts[name] for _, counts in gathered)) for name in COUNTED}


@dataclass(frozen=True)
class ActorWork:
    """What the share of a device's peak that the actor's update reaches is computed from."""

    shape: ModelShape
    peak_tflops: float  # 1e12 FLOP a second of one rank's device
    num_epochs: int

    def utilisation(self, lengths: np.ndarray, response_tokens: float, seconds: float, num_ranks: int) -> float:
        """Return the MFU of an update on sequences of these lengths, in tokens."""
        flop = self.num_epochs * model_flop(self.shape, Work(lengths.tolist(), response_tokens))[1]
        return flop / (seconds * self.peak_tflops * 1e12 * num_ranks)


def step_metrics(
    groups: Sequence[ScoredGroup],
    trajectories: Sequence[Trajectory],
    rewards_B: np.ndarray,
    clock: StageClock,
    max_prompt_length: int,
    work: ActorWork | None,
    ranks: Ranks,
) -> dict[str, float]:
    """Compute the score, advantage, length, time and throughput figures of a training step. Collective.

    Args: rewards_B: of the trajectories, less the KL where it is taken off the reward; work: None without MFU.
    """
    local = np.array(
        [
            (reward, len(item.token_ids), not response.finished, item.prompt.num_tokens)
            for item, (reward, response) in zip(
                trajectories,
                ((r, s) for g in groups for r, s in zip(g.rewards.overall, g.group.responses, strict=True)),
                strict=True,
            )
        ],
        dtype=np.float64,
    )
    advantages = np.array(
        [item.advantages.mean(dtype=np.float64) if item.token_ids.size else 0.0 for item in trajectories]
    )
    own = np.column_stack([local, advantages, rewards_B])
    largest = clock.metrics()
    if clock.memory is not None and ranks.on_gpu:
        largest |= clock.memory.peaks_of_the_run()
    everyone = ranks.all_gather_objects((own, largest, psutil.Process().memory_info().rss / 1e9), "step metrics")
    table = np.concatenate([part for part, _, _ in everyone])
    score, length, clipped, prompt_length, advantage, reward = table.T
    metrics = {
        **_spread("critic/score", score),
        **_spread("critic/rewards", reward),
        **_spread("critic/advantages", advantage),
        **_spread("critic/returns", advantage),  # as EasyR1 has it without a critic
        **_lengths("", length, clipped, prompt_length, max_prompt_length),
    }
    metrics |= {name: max(figures[name] for _, figures, _ in everyone) for name in sorted(largest)}
    metrics["perf/cpu_memory_used_gb"] = sum(memory for _, _, memory in everyone)
    tokens, seconds = float(length.sum() + prompt_length.sum()), metrics["timing_s/step"]
    metrics |= {
        "perf/total_num_tokens": tokens,
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / seconds / ranks.size,
    }
    if work is not None and "timing_s/update_actor" in metrics:
        metrics["perf/mfu_actor"] = work.utilisation(
            length + prompt_length, float(length.sum()), metrics["timing_s/update_actor"], ranks.size
        )
    for stage in _STAGES_BY_TOKEN.keys() & clock.seconds.keys():
        num_tokens = float(length.sum()) if _STAGES_BY_TOKEN[stage] == "responses" else tokens
        metrics[f"timing_per_token_ms/{stage}"] = metrics[f"timing_s/{stage}"] * 1000 / num_tokens
    return metrics


# Which tokens a stage's time is divided by for `timing_per_token_ms`, as EasyR1 does.
_STAGES_BY_TOKEN = dict.fromkeys(("gen", "reward"), "responses") | dict.fromkeys(
    ("ref", "old", "values", "adv", "update_critic", "update_actor"), "sequences"
)


def stage_metrics(clock: StageClock, ranks: Ranks) -> dict[str, float]:
    """Gather `timing_s/*`, `memory_gb/*` and the clock's counts, each of the rank that has most. Collective."""
    return ranks.max(clock.metrics(), "stages")


def validation_lengths(groups: Sequence[RolloutGroup], max_prompt_length: int, ranks: Ranks) -> dict[str, float]:
    """Compute `val_response_length/*` and `val_prompt_length/*`, in tokens, over all responses. Collective."""
    own = [
        (len(response.token_ids), not response.finished, group.prompt.num_tokens)
        for group in groups
        for response in group.responses
    ]
    gathered = ranks.all_gather_array(np.array(own, dtype=np.float64).reshape(-1, 3), "validation lengths")
    length, clipped, prompt_length = np.concatenate(gathered).T
    return _lengths("val_", length, clipped, prompt_length, max_prompt_length)


def _lengths(
    prefix: str, length: np.ndarray, clipped: np.ndarray, prompt_length: np.ndarray, max_prompt_length: int
) -> dict[str, float]:
    return {
        **_spread(f"{prefix}response_length", length),
        f"{prefix}response_length/clip_ratio": float(clipped.mean()),
        **_spread(f"{prefix}prompt_length", prompt_length),
        f"{prefix}prompt_length/clip_ratio": float((prompt_length == max_prompt_length).mean()),
    }


def policy_lag_metrics(groups: Sequence[RolloutGroup], version: int, ranks: Ranks) -> dict[str, float]:
    """Measure how far behind `version` the policies are that sampled a batch, in optimiser steps a token. Collective.

    `rollout/mixed_fraction` is the share of responses that more than one policy sampled.
    """
    responses = [(response, group.policy_version) for group in groups for response in group.responses]
    own = {"tokens": 0.0, "lag": 0.0, "responses": float(len(responses)), "mixed": 0.0}
    most = 0.0
    for response, oldest in responses:
        spans = response.policy_versions or ((oldest, len(response.token_ids)),)
        own["tokens"] += sum(count for _, count in spans)
        own["lag"] += sum((version - sampled_by) * count for sampled_by, count in spans)
        own["mixed"] += len(spans) > 1
        most = max(most, *(float(version - sampled_by) for sampled_by, _ in spans))
    totals, largest = ranks.sum_and_max(own, {"most": most}, "policy lag")
    return {
        "rollout/policy_lag_mean": totals["lag"] / max(1.0, totals["tokens"]),
        "rollout/policy_lag_max": largest["most"],
        "rollout/mixed_fraction": totals["mixed"] / max(1.0, totals["responses"]),
    }


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }
