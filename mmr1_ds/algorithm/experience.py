"""From the groups of a step to what the actor learns from: rewards less the KL, and advantages.

Shape letters: G groups, N responses a group, B = G * N responses, T tokens of all of them, end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmr1_ds.algorithm import advantages
from mmr1_ds.algorithm.kl import KLController, kl_penalty
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.records import ScoredGroup, Trajectory


@dataclass(frozen=True)
class Experience:
    """This rank's part of what a step learns from."""

    trajectories: list[Trajectory]
    rewards_B: np.ndarray  # (B,) float64, of each trajectory, the KL taken off where it is taken off the reward
    returns: list[Tensor] | None  # gae: what the critic learns, one float32 tensor (T,) a trajectory
    metrics: dict[str, float]


def make_experience(
    groups: Sequence[ScoredGroup],
    algorithm: AlgorithmConfig,
    log_probs: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    controller: KLController,
    ranks: Ranks,
    values: Sequence[Tensor] | None = None,
    baselines: Sequence[float] | None = None,
) -> Experience:
    """Advantages of every response of every group, in order. Collective.

    Args: log_probs: of the old policy and of the reference, one tensor (T,) a response each, where the KL is taken
        off the reward; its controller then takes the step's KL in. None: rewards are the reward function's own.
        values: gae: the critic's, of the state before each token, one tensor (T,) a response.
        baselines: remax: the reward of the greedy response to each group's prompt.
    """
    responses = [response for item in groups for response in item.group.responses]
    lengths_B = np.array([len(response.token_ids) for response in responses])
    cuts = np.cumsum(lengths_B)[:-1]
    rewards_B = np.concatenate([item.rewards.overall for item in groups]).astype(np.float64)
    penalties_T = np.zeros(int(lengths_B.sum()))
    metrics: dict[str, float] = {}
    if log_probs is not None:
        penalties_T, metrics = _penalties(algorithm.kl_penalty, *log_probs, controller, ranks)
    token_rewards_T = advantages.token_rewards(rewards_B, lengths_B, penalties_T)
    if log_probs is not None:
        rewards_B = np.array([part.sum() for part in np.split(token_rewards_T, cuts)])
    returns: list[Tensor] | None = None
    if algorithm.adv_estimator == "gae":
        assert values is not None
        values_T = torch.cat(list(values)).double().numpy()
        gamma, lam = algorithm.gamma, algorithm.lam
        advantages_T, returns_T = advantages.gae(token_rewards_T, values_T, lengths_B, gamma, lam, ranks)
        returns = list(torch.from_numpy(returns_T).float().split(lengths_B.tolist()))
        metrics |= _value_metrics(values_T, returns_T, ranks)
    else:
        advantages_T = _estimate(len(groups), algorithm, rewards_B, token_rewards_T, lengths_B, ranks, baselines)
    prompts = [item.group.prompt for item in groups for _ in item.group.responses]
    trajectories = [
        Trajectory(
            prompt,
            tuple(response.token_ids.tolist()),
            tuple(response.logprobs.tolist()),
            *_one_or_each(part),
            float(reward),
        )
        for prompt, response, part, reward in zip(
            prompts, responses, np.split(advantages_T, cuts), rewards_B, strict=True
        )
    ]
    return Experience(trajectories, rewards_B, returns, metrics)


def _penalties(
    kind: str, old: Sequence[Tensor], ref: Sequence[Tensor], controller: KLController, ranks: Ranks
) -> tuple[np.ndarray, dict[str, float]]:
    """What is taken off each token's reward, (T,), and the metrics of it. Collective."""
    kl_T = kl_penalty(kind, torch.cat(list(old)).double(), torch.cat(list(ref)).double()).numpy()
    own = {"kl": float(kl_T.sum()), "tokens": float(len(kl_T)), "responses": float(len(old))}
    totals = ranks.sum(own, "KL to the reference")
    mean = totals["kl"] / max(1.0, totals["tokens"])
    coefficient = controller.coefficient
    controller.update(mean, int(totals["responses"]))
    return coefficient * kl_T, {"actor/ref_kl": mean, "actor/kl_coef": coefficient}


def _value_metrics(values_T: np.ndarray, returns_T: np.ndarray, ranks: Ranks) -> dict[str, float]:
    """Values and returns at the tokens of all ranks, and how much of the returns the values explain. Collective."""
    own = {"count": float(len(values_T))}
    columns = {"values": values_T, "returns": returns_T, "errors": returns_T - values_T}
    totals = ranks.sum(own | {name: float(column_T.sum()) for name, column_T in columns.items()}, "values")
    count = max(1.0, totals["count"])
    means = {name: totals[name] / count for name in columns}
    squares = {name: float(((column_T - means[name]) ** 2).sum()) for name, column_T in columns.items()}
    variances = {name: total / max(1.0, count - 1) for name, total in ranks.sum(squares, "values").items()}
    metrics = {"critic/vf_explained_var": 1 - variances["errors"] / (variances["returns"] + 1e-5)}  # as EasyR1
    for name in ("values", "returns"):
        column_T = columns[name]
        bounds = {"most": float(column_T.max(initial=-np.inf)), "least": float((-column_T).max(initial=-np.inf))}
        bounds = ranks.max(bounds, "values")
        metrics |= {f"critic/{name}/mean": means[name], f"critic/{name}/max": bounds["most"]}
        metrics[f"critic/{name}/min"] = -bounds["least"]
    return metrics


def _estimate(
    num_groups: int,
    algorithm: AlgorithmConfig,
    rewards_B: np.ndarray,
    token_rewards_T: np.ndarray,
    lengths_B: np.ndarray,
    ranks: Ranks,
    baselines: Sequence[float] | None,
) -> np.ndarray:
    """The advantage of each token, (T,) float64. Collective."""
    rewards_GN = rewards_B.reshape(num_groups, -1)
    match algorithm.adv_estimator:
        case "grpo":
            return np.repeat(advantages.grpo(rewards_GN), lengths_B)
        case "dr_grpo":
            return np.repeat(advantages.dr_grpo(rewards_GN), lengths_B)
        case "rloo":
            return np.repeat(advantages.rloo(rewards_GN), lengths_B)
        case "reinforce_plus_plus_baseline":
            return advantages.reinforce_plus_plus_baseline(rewards_GN, lengths_B, ranks)
        case "reinforce_plus_plus":
            return advantages.reinforce_plus_plus(token_rewards_T, lengths_B, algorithm.gamma, ranks)[0]
        case _:
            assert algorithm.adv_estimator == "remax", algorithm.adv_estimator
            assert baselines is not None
            baselines_B = np.repeat(np.array(baselines, dtype=np.float64), rewards_GN.shape[1])
            return advantages.remax(token_rewards_T, lengths_B, baselines_B)[0]


def _one_or_each(advantages_T: np.ndarray) -> tuple[float, tuple[float, ...] | None]:
    """A trajectory's advantage, and those of its tokens if they differ."""
    if len(advantages_T) == 0:
        return 0.0, None
    if (advantages_T == advantages_T[0]).all():
        return float(advantages_T[0]), None
    return float(advantages_T.mean()), tuple(advantages_T.tolist())
