"""From the groups of a step to what the actor learns from: rewards less the KL, and advantages.

Shape letters: G groups, N responses a group, the most of any where they differ, B responses, T tokens of all of them,
end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmr1_ds.algorithm import advantages
from mmr1_ds.algorithm.kl import KLController, kl_penalty
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.config.schema import names_a_file
from mmr1_ds.config.user_files import load_function
from mmr1_ds.records import Pair, ScoredGroup, Trajectory

_BY_TOKEN = ("reinforce_plus_plus", "remax", "gae")  # estimators that look at the reward of each token


@dataclass(frozen=True)
class Experience:
    """This rank's part of what a step learns from."""

    trajectories: list[Trajectory]
    rewards_B: np.ndarray  # (B,) float64, of each trajectory, the KL taken off where it is taken off the reward
    group_sizes: list[int]  # trajectories of each group, in their order
    metrics: dict[str, float]


def pairs_of(groups: Sequence[ScoredGroup]) -> list[Pair]:
    """The prompt and the tokens of every response of every group, in order."""
    return [
        (item.group.prompt, response.token_ids)
        for item in groups
        for response in item.group.responses
    ]


def experts_of(groups: Sequence[ScoredGroup]) -> list[np.ndarray] | None:
    """The experts that the rollout engine sent the tokens of every response to, in order; None where nobody asked."""
    found = [response.experts for item in groups for response in item.group.responses]
    return None if found[0] is None else [experts for experts in found if experts is not None]


def kl_off_reward(algorithm: AlgorithmConfig) -> bool:
    """Whether the KL to the reference is taken off the reward; else it is a term of the loss."""
    return not algorithm.disable_kl and not algorithm.use_kl_loss


def make_experience(
    groups: Sequence[ScoredGroup],
    algorithm: AlgorithmConfig,
    controller: KLController,
    ranks: Ranks,
    *,
    old: Sequence[np.ndarray] | None = None,
    ref: Sequence[np.ndarray] | None = None,
    entropies: Sequence[np.ndarray] | None = None,
    values: Sequence[np.ndarray] | None = None,
    experts: Sequence[np.ndarray] | None = None,
    baselines: Sequence[float] | None = None,
    reward_weights: Mapping[str, float] | None = None,
) -> Experience:
    """Compute the advantages of every response of every group, in order. Collective.

    Args: old, ref: log-probabilities of the old policy and of the reference, one array (T,) a response each. Where the
        KL is taken off the reward both are needed, and the controller takes the step's KL in; else they go into the
        loss as they are. entropies: of the old policy, likewise, where they choose the tokens that train. values: gae:
        the critic's, of the state before each token, one array (T,) a response. baselines: remax: the reward of each
        prompt's greedy response, one a group. reward_weights: gdpo: of the parts of the reward that are standardised
        by themselves, by their names. experts: where the update sends the tokens of each response.
    """
    pairs, sizes = pairs_of(groups), [len(item.group.responses) for item in groups]
    lengths_B = np.array([len(token_ids) for _, token_ids in pairs])
    cuts = np.cumsum(lengths_B)[:-1]
    rewards_B = np.concatenate([item.rewards.overall for item in groups]).astype(np.float64)
    is_unknown_B = np.concatenate([item.rewards.is_unknown for item in groups])
    metrics: dict[str, float] = {}
    if ref is not None and kl_off_reward(algorithm):
        assert old is not None
        penalties_T, metrics = _penalties(algorithm.kl_penalty, old, ref, controller, ranks)
        token_rewards_T = advantages.token_rewards(rewards_B, lengths_B, penalties_T)
        rewards_B = np.array([part.sum() for part in np.split(token_rewards_T, cuts)])
        ref = None  # the loss does not hold the policy to it once more
    elif algorithm.adv_estimator in _BY_TOKEN or names_a_file(algorithm.adv_estimator):
        token_rewards_T = advantages.token_rewards(rewards_B, lengths_B, np.zeros(int(lengths_B.sum())))
    else:
        token_rewards_T = None  # a million float64 that nobody would read
    returns: list[np.ndarray] | None = None
    if algorithm.adv_estimator == "gae":
        assert values is not None and token_rewards_T is not None
        values_T = np.concatenate(values).astype(np.float64)
        gamma, lam = algorithm.gamma, algorithm.lam
        known_T = np.repeat(~is_unknown_B, lengths_B)
        advantages_T, returns_T = advantages.gae(token_rewards_T, values_T, lengths_B, gamma, lam, ranks, known_T)
        returns_T = np.where(known_T, returns_T, values_T)  # nor does the critic learn from an unknown reward
        returns = np.split(returns_T.astype(np.float32), cuts)
        metrics |= _value_metrics(values_T, returns_T, ranks)
    else:
        there_GN = np.arange(max(sizes)) < np.array(sizes)[:, None]
        rewards_GN, known_GN, lengths_GN = np.zeros(there_GN.shape), there_GN.copy(), np.zeros_like(there_GN, dtype=int)
        rewards_GN[there_GN], known_GN[there_GN], lengths_GN[there_GN] = rewards_B, ~is_unknown_B, lengths_B
        parts = _parts(groups, reward_weights, known_GN) if algorithm.adv_estimator == "gdpo" else []
        lengths = lengths_GN.reshape(-1)
        step = StepRewards(rewards_GN, known_GN, lengths, token_rewards_T, baselines, ranks, algorithm, parts)
        advantages_T = estimate(algorithm.adv_estimator, step)
    advantages_T = np.where(np.repeat(is_unknown_B, lengths_B), 0.0, advantages_T)
    responses = [response for item in groups for response in item.group.responses]
    trains = [
        not is_unknown and (response.finished or not algorithm.mask_truncated)
        for response, is_unknown in zip(responses, is_unknown_B, strict=True)
    ]
    if algorithm.mask_truncated:
        own = {"masked": float(trains.count(False)), "responses": float(len(trains))}
        totals = ranks.sum(own, "count masked responses")
        metrics["actor/masked_fraction"] = totals["masked"] / max(1.0, totals["responses"])
    advantages_of = np.split(advantages_T.astype(np.float32, copy=False), cuts)
    trajectories = [
        Trajectory(
            prompt,
            token_ids,
            responses[i].logprobs,
            advantages_of[i],
            float(rewards_B[i]),
            trains=trains[i],
            old_logprobs=None if old is None else old[i],
            old_entropies=None if entropies is None else entropies[i],
            ref_logprobs=None if ref is None else ref[i],
            values=None if values is None else values[i],
            returns=None if returns is None else returns[i],
            experts=None if experts is None else experts[i],
        )
        for i, (prompt, token_ids) in enumerate(pairs)
    ]
    return Experience(trajectories, rewards_B, sizes, metrics)


def _parts(
    groups: Sequence[ScoredGroup], weights: Mapping[str, float] | None, known_GN: np.ndarray
) -> list[tuple[float, np.ndarray]]:
    """Each weighted part of the rewards and its weight, (G, N) float64.

    0 where no reward is known, NaN where this one does not apply.
    """
    found = []
    for name, weight in (weights or {}).items():
        values_GN = np.zeros(known_GN.shape)
        for values_N, item in zip(values_GN, groups, strict=True):
            part = item.rewards.parts.get(name, np.zeros(0))  # a group whose rewards all failed has no parts
            values_N[: len(part)] = part
        found.append((weight, np.where(known_GN, values_GN, 0.0)))
    return found


def _penalties(
    kind: str, old: Sequence[np.ndarray], ref: Sequence[np.ndarray], controller: KLController, ranks: Ranks
) -> tuple[np.ndarray, dict[str, float]]:
    """What is taken off each token's reward, (T,), and the metrics of it. Collective."""
    old_T, ref_T = (torch.from_numpy(np.concatenate(item, dtype=np.float64)) for item in (old, ref))
    kl_T = kl_penalty(kind, old_T, ref_T).numpy()
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


@dataclass(frozen=True)
class StepRewards:
    """What an estimator without a critic sees of a step: this rank's part.

    N is the size of the largest group; places of a smaller one that are left over hold no token and are not known.
    """

    rewards_GN: np.ndarray  # float64, the KL taken off where it is taken off the reward
    known_GN: np.ndarray  # bool; the others are in no statistic, and their advantages are left out
    lengths_B: np.ndarray  # (G * N,), tokens of each response
    token_rewards_T: np.ndarray | None  # the reward at each token; None for estimators that do not look at it
    baselines_G: Sequence[float] | None  # remax: the reward of each prompt's greedy response
    ranks: advantages.Totals  # sums over all ranks: what looks beyond its groups asks them
    algorithm: AlgorithmConfig
    parts: Sequence[tuple[float, np.ndarray]] = ()  # gdpo: the weight of each reward and its values, (G, N)

    @property
    def known_T(self) -> np.ndarray:
        """Whether the reward of each token's response is known."""
        return np.repeat(self.known_GN.reshape(-1), self.lengths_B)


def _reinforce_plus_plus(step: StepRewards) -> np.ndarray:
    assert step.token_rewards_T is not None
    gamma = step.algorithm.gamma
    return advantages.reinforce_plus_plus(step.token_rewards_T, step.lengths_B, gamma, step.ranks, step.known_T)[0]


def _remax(step: StepRewards) -> np.ndarray:
    assert step.baselines_G is not None and step.token_rewards_T is not None
    baselines_B = np.repeat(np.array(step.baselines_G, dtype=np.float64), step.rewards_GN.shape[1])
    return advantages.remax(step.token_rewards_T, step.lengths_B, baselines_B)[0]


def _gdpo(step: StepRewards) -> np.ndarray:
    weights, rewards = zip(*step.parts, strict=True)
    return advantages.gdpo(np.stack(rewards), weights, step.ranks, step.known_GN)


ESTIMATORS: dict[str, Callable[[StepRewards], Any]] = {  # beside gae, which has a critic; advantages (G, N) or (T,)
    "grpo": lambda step: advantages.grpo(step.rewards_GN, step.known_GN),
    "dr_grpo": lambda step: advantages.dr_grpo(step.rewards_GN, step.known_GN),
    "rloo": lambda step: advantages.rloo(step.rewards_GN, step.known_GN),
    "grpo_passk": lambda step: advantages.grpo_passk(step.rewards_GN, step.known_GN),
    "reinforce_plus_plus_baseline": lambda step: advantages.reinforce_plus_plus_baseline(
        step.rewards_GN, step.lengths_B, step.ranks, step.known_GN
    ),
    "reinforce_plus_plus": _reinforce_plus_plus,
    "remax": _remax,
    "gdpo": _gdpo,
}


def estimate(name: str, step: StepRewards) -> np.ndarray:
    """The advantage of each token, (T,), by a name in ESTIMATORS or path/file.py:function. Collective."""
    function = ESTIMATORS.get(name) or load_function("algorithm.adv_estimator", name)
    found: np.ndarray = function(step)
    if found.shape == step.rewards_GN.shape:
        return np.repeat(found.astype(np.float32).reshape(-1), step.lengths_B)
    assert found.shape == (int(step.lengths_B.sum()),), found.shape
    return found
