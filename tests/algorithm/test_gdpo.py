"""GDPO: several rewards, each standardised in its group before they are summed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from fixtures.golden_numbers import OneRank
from fixtures.responses import response

from mmr1_ds.algorithm import advantages
from mmr1_ds.algorithm.experience import make_experience
from mmr1_ds.algorithm.kl import KLController
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.records import GroupRewards, Prompt, RolloutGroup, ScoredGroup

CASES = json.loads((Path(__file__).parents[1] / "golden" / "gdpo.json").read_text())["cases"]
GDPO = AlgorithmConfig(adv_estimator="gdpo")


def scored(parts, weights, unknown=()):
    """Groups of one token a response. Args: parts: name -> (G, N); unknown: slots (group, response)."""
    found = []
    for place in range(len(next(iter(parts.values())))):
        own = {name: np.array(values[place], dtype=np.float32) for name, values in parts.items()}
        overall = sum(weights[name] * own[name] for name in own)
        accuracy = np.ones_like(overall)
        for group, slot in unknown:
            if group == place:
                accuracy[slot] = np.nan
                own = {name: np.where(np.arange(len(values)) == slot, np.nan, values) for name, values in own.items()}
        rewards = GroupRewards(overall, accuracy, np.isnan(accuracy), own)
        group = RolloutGroup(Prompt(place, "", (1,), (), ""), tuple(response([5]) for _ in overall), 0)
        found.append(ScoredGroup(group, rewards))
    return found


def advantages_of(groups, weights):
    found = make_experience(groups, GDPO, KLController(GDPO), OneRank(), reward_weights=weights)
    return np.array([item.advantages[0] for item in found.trajectories])


@pytest.mark.parametrize("case", CASES)
def test_the_published_formula(case):
    rewards = np.array(case["rewards"])
    found = advantages.gdpo(rewards, case["weights"], OneRank())
    np.testing.assert_allclose(found, case["advantages"], atol=1e-6)
    names = [f"part{number}" for number in range(len(rewards))]
    weights = dict(zip(names, case["weights"], strict=True))
    found = advantages_of(scored(dict(zip(names, rewards, strict=True)), weights), weights)
    np.testing.assert_allclose(found, np.reshape(case["advantages"], -1), atol=1e-5)


def test_a_reward_that_does_not_apply_is_in_no_statistic():
    """Each of two rewards says nothing of half of the responses: their advantages are those of two groups."""
    nan = np.nan
    parts = {"a": [[0, 1, nan, nan], [0, 2, 1, 5]], "b": [[nan, nan, 3, 3], [nan] * 4]}
    groups = scored(parts, {"a": 0, "b": 0})
    for item in groups:
        item.rewards.overall[:] = 1.0
    found = advantages_of(groups, {"a": 1, "b": 1})
    alone = [advantages.grpo(np.array([[0.0, 1.0]])), advantages.grpo(np.array([[0.0, 2.0, 1.0, 5.0]]))]
    sums = np.concatenate([alone[0][0], [0.0, 0.0], alone[1][0]])
    np.testing.assert_allclose(found, (sums - sums.mean()) / (sums.std(ddof=1) + 1e-6), atol=1e-4)


def test_combinations_that_sum_to_the_same_stay_apart():
    """The paper's own case: (0, 1) and (0, 2) give one advantage by their sum, and two by GDPO."""
    parts = {"a": [[0, 1], [0, 1]], "b": [[0, 0], [0, 1]]}
    found = advantages_of(scored(parts, {"a": 1, "b": 1}), {"a": 1, "b": 1}).reshape(2, 2)
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-5)
    summed = advantages.grpo(np.array([[0.0, 1.0], [0.0, 2.0]]))
    np.testing.assert_allclose(summed[0], summed[1], rtol=1e-5)


def test_an_unknown_reward_is_as_a_response_that_was_never_sampled():
    weights = {"a": 1.0, "b": 0.5}
    parts = {"a": [[0, 1, 1], [1, 0, 0]], "b": [[3, 1, 9], [2, 2, 5]]}
    found = advantages_of(scored(parts, weights, [(0, 2), (1, 0)]), weights)
    kept = {"a": [[0, 1], [0, 0]], "b": [[3, 1], [2, 5]]}
    expected = advantages_of(scored(kept, weights), weights)
    np.testing.assert_allclose(found[[0, 1, 4, 5]], expected, rtol=1e-6)
    assert found[2] == found[3] == 0


def test_a_group_whose_rewards_all_failed_has_no_parts():
    weights = {"a": 1.0}
    groups = scored({"a": [[0, 1], [1, 0]]}, weights, [(1, 0), (1, 1)])
    groups[1] = dataclasses.replace(groups[1], rewards=dataclasses.replace(groups[1].rewards, parts={}))
    found = advantages_of(groups, weights)
    np.testing.assert_allclose(found, [-(0.5**0.5), 0.5**0.5, 0, 0], rtol=1e-4)


def test_equal_rewards_teach_nothing():
    weights = {"a": 1, "b": 1}
    assert not advantages_of(scored({"a": [[0.1] * 3] * 2, "b": [[0.7] * 3] * 2}, weights), weights).any()
