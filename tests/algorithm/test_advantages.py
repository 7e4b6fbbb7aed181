"""Advantages against verl's and TRL's numbers, and against the scoring kernel."""

import mmr1_kernels
import numpy as np
import pytest
from fixtures.golden_numbers import CASES, TRL, VERL, OneRank, in_groups, in_rows, mask_of, pack
from fixtures.rank_threads import Threads, on_ranks

from mmr1_ds.algorithm import advantages

RANK = OneRank()


def lengths_of(case):
    return mask_of(case).sum(axis=1)


def packed_output(case, name, field="advantages"):
    return pack(case, case["outputs"]["advantages"][name][field]).numpy()


def token_rewards_of(case, kind):
    table = case["inputs"]["token_level_rewards"] if kind == "outcome" else case["outputs"]["dense_rewards_kl0.1"]
    return pack(case, table).numpy()


def rewards_of(case):
    """verl scores a response by the sum of these."""
    return in_groups(case, np.array(case["inputs"]["token_level_rewards"]).sum(axis=1))


def kernel(rewards_GN):
    """Of each group, by the kernel that the trainer calls."""
    size = rewards_GN.size
    nothing = np.zeros(size, dtype=np.float32)
    tokens = np.zeros(0, dtype=np.int32), np.zeros(size + 1, dtype=np.int64)
    rewards = rewards_GN.reshape(-1).astype(np.float32)
    found = mmr1_kernels.group_statistics(*tokens, rewards, nothing, rewards_GN.shape[1]).advantages
    return found.reshape(rewards_GN.shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("estimate", "key"),
    [
        (advantages.grpo, "grpo_std"),
        (kernel, "grpo_std"),
        (advantages.dr_grpo, "grpo_nostd"),
        (advantages.rloo, "rloo"),
        (advantages.grpo_passk, "grpo_passk_std"),
    ],
)
def test_group_advantages_equal_verl(name, estimate, key):
    case = VERL[name]
    rows = in_rows(case, estimate(rewards_of(case)))
    actual = np.repeat(rows, lengths_of(case))
    np.testing.assert_allclose(actual, packed_output(case, key), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("key", "with_std"), [("group", True), ("none", False)])
def test_group_advantages_equal_trl(name, key, with_std):
    case = TRL[name]
    scores = in_groups(case, case["inputs"]["scores"])
    expected = in_groups(case, case["outputs"]["advantages"][f"scale_rewards={key}"])
    actual = advantages.dr_grpo(scores)
    if with_std:
        std = scores.std(axis=1, ddof=1, keepdims=True)
        actual = advantages.grpo(scores) * (std + 1e-6) / (std + 1e-4)  # TRL's epsilon
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_reinforce_plus_plus_baseline_equals_verl(name):
    case = VERL[name]
    means = in_rows(case, advantages.dr_grpo(rewards_of(case)))
    actual = advantages.standardise(np.repeat(means, lengths_of(case)), RANK)
    np.testing.assert_allclose(actual, packed_output(case, "reinforce_plus_plus_baseline"), atol=1e-6)
    if name == "base":  # rows in the order of the groups
        again = advantages.reinforce_plus_plus_baseline(rewards_of(case), lengths_of(case), RANK)
        np.testing.assert_array_equal(again, actual)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["outcome", "dense"])
@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_reinforce_plus_plus_equals_verl(name, kind, gamma):
    case, key = VERL[name], f"reinforce_plus_plus_{kind}_gamma{gamma}"
    actual, returns = advantages.reinforce_plus_plus(token_rewards_of(case, kind), lengths_of(case), gamma, RANK)
    expected = packed_output(case, key, "returns")
    # verl forgets the reward at a hole in a mask, so that tokens before it get none of it; here a response is its
    # tokens, whatever lay between them.
    mask = mask_of(case)
    has_hole = np.array([mask[row, : np.flatnonzero(mask[row]).max(initial=-1) + 1].all() for row in range(8)]) == 0
    whole = np.repeat(~has_hole, lengths_of(case))
    assert has_hole.sum() == (2 if name == "edge" else 0)
    np.testing.assert_allclose(returns[whole], expected[whole], atol=1e-6)
    np.testing.assert_allclose(advantages.standardise(expected, RANK), packed_output(case, key), atol=1e-6)
    np.testing.assert_array_equal(actual, advantages.standardise(returns, RANK))


@pytest.mark.parametrize("name", CASES)
def test_remax_equals_verl(name):
    """EasyR1's raises for more than one response."""
    case = VERL[name]
    baselines = np.array(case["inputs"]["reward_baselines"])
    actual, returns = advantages.remax(token_rewards_of(case, "outcome"), lengths_of(case), baselines)
    np.testing.assert_allclose(actual, packed_output(case, "remax"), atol=1e-6)
    np.testing.assert_allclose(returns, packed_output(case, "remax", "returns"), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["outcome", "dense"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0)])
def test_gae_equals_verl(name, kind, gamma, lam):
    """EasyR1's raises for more than one response."""
    case, key = VERL[name], f"gae_{kind}_gamma{gamma}_lam{lam}"
    values = pack(case, case["inputs"]["values"]).numpy()
    actual, returns = advantages.gae(token_rewards_of(case, kind), values, lengths_of(case), gamma, lam, RANK)
    np.testing.assert_allclose(actual, packed_output(case, key), atol=1e-6)
    np.testing.assert_allclose(returns, packed_output(case, key, "returns"), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_penalised_rewards_equal_verl(name):
    """0.1 times the k1 KL between the rollout's policy and the reference, taken off each token's reward."""
    case = VERL[name]
    kl = pack(case, np.array(case["inputs"]["old_log_prob"]) - np.array(case["inputs"]["ref_log_prob"])).numpy()
    rewards = np.array(case["inputs"]["token_level_rewards"]).sum(axis=1)
    actual = advantages.token_rewards(rewards, lengths_of(case), 0.1 * kl)
    np.testing.assert_allclose(actual, token_rewards_of(case, "dense"), atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 0.9, -3.3e7, 1e-30])
@pytest.mark.parametrize("size", [2, 3, 7, 401])
def test_constant_groups_give_exactly_zero(reward, size):
    """Where the rounding of the mean, over epsilon, would be an advantage."""
    rewards = np.full((2, size), reward)
    for estimate in (advantages.grpo, advantages.dr_grpo, advantages.rloo, advantages.grpo_passk):
        assert not estimate(rewards).any()
    lengths = np.arange(2 * size)
    assert not advantages.reinforce_plus_plus_baseline(rewards, lengths, RANK).any()
    assert not advantages.standardise(np.full(size, reward), RANK).any()


def test_standardised_over_all_ranks():
    values = np.random.default_rng(5).normal(size=29)
    whole = advantages.standardise(values, RANK)
    assert whole.mean() == pytest.approx(0.0, abs=1e-12) and whole.std(ddof=1) == pytest.approx(1.0, abs=1e-6)
    parts = [values[:9], values[9:9], values[9:]]  # the second rank has none
    found = on_ranks(3, lambda control: advantages.standardise(parts[control.rank], Threads(control)))
    np.testing.assert_allclose(np.concatenate(found), whole, atol=1e-12)


def test_discounted_sums():
    found = advantages.discounted_sums(np.array([1.0, 2.0, 4.0, 8.0]), np.array([3, 0, 1]), 0.5)
    assert found.tolist() == [1 + 1 + 1, 2 + 2, 4, 8]
    assert advantages.discounted_sums(np.zeros(0), np.zeros(0, dtype=np.int64), 0.5).shape == (0,)
