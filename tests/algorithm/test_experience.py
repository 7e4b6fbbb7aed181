"""From scored groups to trajectories: which rewards and advantages reach the actor; ReMax's greedy baseline."""

import dataclasses

import numpy as np
import pytest
from fixtures.batch_makers import SETTINGS, FakeCollector, make, rewards
from fixtures.golden_numbers import OneRank
from fixtures.rank_threads import SingleProcess, Threads, on_ranks
from fixtures.responses import response

from mmr1_ds.algorithm import advantages
from mmr1_ds.algorithm.experience import make_experience
from mmr1_ds.algorithm.kl import KLController
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.loop.drawn import teaches
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import Prompt, RolloutGroup, ScoredGroup

RANK = OneRank()
REWARDS = np.array([[1.0, 0.0, 0.5], [0.25, 0.25, 0.25]])
LENGTHS = np.array([2, 1, 3, 1, 4, 2])


def scored_groups():
    """Two groups of three."""
    found, at = [], 0
    for index, values in enumerate(REWARDS):
        responses = []
        for _ in values:
            tokens = range(LENGTHS[at])
            responses.append(response(tokens, [-0.1 * token for token in tokens]))
            at += 1
        group = RolloutGroup(Prompt(index, f"p{index}", (1,), (), ""), tuple(responses), 0)
        found.append(ScoredGroup(group, rewards(values)))
    return found


def log_probs():
    """Of the old policy and of the reference, one array a response."""
    packed = np.random.default_rng(1).normal(-2, 0.5, (2, LENGTHS.sum())).astype(np.float32)
    return tuple(np.split(row, np.cumsum(LENGTHS)[:-1]) for row in packed)


def experience(with_kl=False, values=None, baselines=None, **settings):
    algorithm = AlgorithmConfig(**settings)
    old, ref = log_probs() if with_kl else (None, None)
    controller = KLController(algorithm)
    return make_experience(
        scored_groups(), algorithm, controller, RANK, old=old, ref=ref, values=values, baselines=baselines
    )


def by_token(found):
    """The advantages as the actor reads them, (T,)."""
    return np.concatenate([item.advantages for item in found.trajectories])


def test_a_trajectory_is_its_response_in_arrays():
    found = experience()
    for item, length in zip(found.trajectories, LENGTHS, strict=True):
        assert item.token_ids.dtype == np.int32 and item.token_ids.tolist() == list(range(length))
        np.testing.assert_array_equal(item.rollout_logprobs, (-0.1 * np.arange(length)).astype(np.float32))
        assert item.rollout_logprobs.dtype == item.advantages.dtype == np.float32
        assert item.old_logprobs is item.ref_logprobs is item.values is item.returns is None
    assert [item.prompt.index for item in found.trajectories] == [0, 0, 0, 1, 1, 1]
    assert found.rewards_B.tolist() == REWARDS.reshape(-1).tolist() and found.metrics == {}


def plain_token_rewards():
    return advantages.token_rewards(REWARDS.reshape(-1), LENGTHS, np.zeros(LENGTHS.sum()))


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", lambda: np.repeat(advantages.grpo(REWARDS), LENGTHS)),
        ("dr_grpo", lambda: np.repeat(advantages.dr_grpo(REWARDS), LENGTHS)),
        ("rloo", lambda: np.repeat(advantages.rloo(REWARDS), LENGTHS)),
        ("grpo_passk", lambda: np.repeat([0.5 / (0.5 + 1e-6), 0, 0, 0, 0, 0], LENGTHS)),
        ("reinforce_plus_plus_baseline", lambda: advantages.reinforce_plus_plus_baseline(REWARDS, LENGTHS, RANK)),
        ("reinforce_plus_plus", lambda: advantages.reinforce_plus_plus(plain_token_rewards(), LENGTHS, 0.9, RANK)[0]),
        ("remax", lambda: np.repeat(REWARDS.reshape(-1) - np.repeat([0.75, 0.125], 3), LENGTHS)),
    ],
)
def test_each_estimator_reaches_the_actor(estimator, expected):
    found = experience(baselines=(0.75, 0.125), adv_estimator=estimator, gamma=0.9)
    np.testing.assert_array_equal(by_token(found), expected().astype(np.float32))


def test_the_loss_gets_log_probabilities_of_the_reference_that_the_reward_did_not():
    old, ref = log_probs()
    for is_loss in (True, False):
        found = experience(with_kl=True, use_kl_loss=is_loss).trajectories
        for i, item in enumerate(found):
            np.testing.assert_array_equal(item.old_logprobs, old[i])
            np.testing.assert_array_equal(item.ref_logprobs, ref[i] if is_loss else None)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_the_kl_is_taken_off_the_reward(estimator):
    old, ref = (np.concatenate(part).astype(np.float64) for part in log_probs())
    penalties = 0.3 * (old - ref)
    off = np.array([part.sum() for part in np.split(penalties, np.cumsum(LENGTHS)[:-1])])
    after = REWARDS - off.reshape(REWARDS.shape)
    found = experience(with_kl=True, adv_estimator=estimator, kl_penalty="kl", kl_coef=0.3, use_kl_loss=False)
    np.testing.assert_allclose(found.rewards_B, after.reshape(-1), atol=1e-12)
    if estimator == "reinforce_plus_plus":
        token_rewards = advantages.token_rewards(REWARDS.reshape(-1), LENGTHS, penalties)
        expected = advantages.reinforce_plus_plus(token_rewards, LENGTHS, 1.0, RANK)[0]
    else:
        expected = np.repeat({"grpo": advantages.grpo, "rloo": advantages.rloo}[estimator](after), LENGTHS)
    np.testing.assert_allclose(by_token(found), expected, rtol=1e-7, atol=1e-12)
    assert found.metrics == {"actor/ref_kl": pytest.approx((old - ref).mean()), "actor/kl_coef": 0.3}


def critic_values():
    """One array a response."""
    packed = np.random.default_rng(2).normal(0.3, 0.5, LENGTHS.sum()).astype(np.float32)
    return np.split(packed, np.cumsum(LENGTHS)[:-1])


def advantages_by_definition(rewards, values, gamma, lam):
    """The exponentially weighted average of the k-step advantages (arXiv 1506.02438, eq. 16), of one response."""
    num_tokens = len(rewards)
    after = np.append(values, 0.0)  # the end of a response is worth nothing
    found = np.zeros(num_tokens)
    for t in range(num_tokens):
        steps = [
            sum(gamma**i * rewards[t + i] for i in range(k)) + gamma**k * after[t + k] - values[t]
            for k in range(1, num_tokens - t + 1)
        ]
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, num_tokens - t)] + [lam ** (num_tokens - t - 1)]
        found[t] = np.dot(weights, steps)
    return found


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_gae_for_many_responses_of_different_lengths(gamma, lam, with_kl):
    old, ref = (np.concatenate(part).astype(np.float64) for part in log_probs())
    token_rewards = -0.3 * (old - ref) if with_kl else np.zeros(LENGTHS.sum())
    cuts = np.cumsum(LENGTHS)
    token_rewards[cuts - 1] += REWARDS.reshape(-1)
    parts = [
        advantages_by_definition(rewards, values.astype(np.float64), gamma, lam)
        for rewards, values in zip(np.split(token_rewards, cuts[:-1]), critic_values(), strict=True)
    ]
    raw, values = np.concatenate(parts), np.concatenate(critic_values()).astype(np.float64)
    settings = {"adv_estimator": "gae", "gamma": gamma, "lam": lam, "kl_penalty": "kl", "kl_coef": 0.3}
    found = experience(with_kl=with_kl, values=critic_values(), use_kl_loss=not with_kl, **settings)
    np.testing.assert_allclose(by_token(found), (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8), atol=1e-6)
    assert [len(item.returns) for item in found.trajectories] == LENGTHS.tolist()
    returns = np.concatenate([item.returns for item in found.trajectories])
    np.testing.assert_array_equal(np.concatenate([item.values for item in found.trajectories]), values)
    np.testing.assert_allclose(returns, raw + values, atol=1e-6)
    metrics = found.metrics
    explained = 1 - (returns - values).var(ddof=1) / (returns.var(ddof=1) + 1e-5)
    assert metrics["critic/vf_explained_var"] == pytest.approx(explained, abs=1e-5)
    for name, column in (("values", values), ("returns", returns)):
        for bound in ("mean", "max", "min"):
            assert metrics[f"critic/{name}/{bound}"] == pytest.approx(getattr(column, bound)(), abs=1e-6)
    assert ("actor/ref_kl" in metrics) == with_kl


def test_gae_is_the_same_on_any_number_of_ranks():
    algorithm = AlgorithmConfig(adv_estimator="gae", lam=0.9)
    whole = experience(values=critic_values(), adv_estimator="gae", lam=0.9)

    def share(control):
        groups, values = scored_groups(), critic_values()
        part = slice(control.rank, control.rank + 1)
        controller, ranks = KLController(algorithm), Threads(control)
        mine = values[3 * control.rank : 3 * control.rank + 3]
        return make_experience(groups[part], algorithm, controller, ranks, values=mine)

    parts = on_ranks(2, share)
    np.testing.assert_allclose(np.concatenate([by_token(part) for part in parts]), by_token(whole), atol=1e-6)
    for part in parts:
        assert part.metrics == {name: pytest.approx(value, abs=1e-9) for name, value in whole.metrics.items()}


def test_the_controller_learns_from_the_kl_off_the_reward():
    algorithm = AlgorithmConfig(
        kl_penalty="mse", kl_coef=0.3, use_kl_loss=False, kl_type="adaptive", kl_target=1e-3, kl_horizon=60.0
    )
    controller = KLController(algorithm)
    old, ref = log_probs()
    found = make_experience(scored_groups(), algorithm, controller, RANK, old=old, ref=ref)
    assert found.metrics["actor/kl_coef"] == 0.3  # what this step used
    assert controller.coefficient == pytest.approx(0.3 * (1 + 0.2 * 6 / 60))  # far over the target, six responses


class WithGreedy(FakeCollector):
    """Greedy answers are worth a quarter of the prompt's index; every fifth prompt's fails."""

    def __init__(self):
        super().__init__()
        self.greedy = []

    def collect(self, requests, settings, clock, shared=None):
        groups, counts = super().collect(requests, settings, clock)
        if settings.temperature == 0:
            self.greedy.append((requests, settings))
            groups = [
                ScoredGroup(item.group, rewards([item.group.prompt.index / 4] * len(item.group.responses)))
                for item in groups
            ]
            for item in groups:
                item.rewards.failed[:] = item.group.prompt.index % 5 == 0
        return groups, counts


def test_remax_takes_one_greedy_response_a_prompt():
    collector = WithGreedy()
    maker, _ = make(SingleProcess(), collector, online_filtering=False)
    maker._algorithm.adv_estimator = "remax"
    batch = maker.make(1, dataclasses.replace(SETTINGS, top_p=0.9, top_k=5), StageClock())
    ((requests, settings),) = collector.greedy
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.0, 1.0, -1)
    assert settings.max_tokens == SETTINGS.max_tokens
    assert [request.prompt.index for request in requests] == [g.group.prompt.index for g in batch.groups]
    assert {request.num_responses for request in requests} == {1}
    for group, baseline in zip(batch.groups, batch.baselines, strict=True):
        index = group.group.prompt.index
        # Of a reward that failed nothing is known: the mean of the group stands in.
        assert baseline == (float(group.rewards.overall.mean()) if index % 5 == 0 else index / 4)
    assert batch.metrics["reward/baseline"] == pytest.approx(np.mean(batch.baselines))
    num_sampled = sum(len(group.group.responses) for group in batch.groups)
    assert batch.metrics["reward/num_responses"] == num_sampled  # greedy ones are not counted in


def test_without_remax_nothing_is_sampled_greedily():
    collector = WithGreedy()
    maker, _ = make(SingleProcess(), collector, online_filtering=False)
    batch = maker.make(1, SETTINGS, StageClock())
    assert collector.greedy == [] and batch.baselines is None
    assert "reward/baseline" not in batch.metrics


MASKING = [
    "grpo", "dr_grpo", "rloo", "grpo_passk", "reinforce_plus_plus_baseline", "reinforce_plus_plus", "remax", "gae",
]  # fmt: skip


@pytest.mark.parametrize("estimator", MASKING)
@pytest.mark.parametrize("with_kl", [False, True])
def test_an_unknown_reward_is_as_a_response_that_was_never_sampled(estimator, with_kl):
    """The others' advantages equal those of groups without it, and its own are 0."""
    algorithm = AlgorithmConfig(adv_estimator=estimator, use_kl_loss=not with_kl)
    old, ref = log_probs()
    values = [np.full(length, 0.25) for length in LENGTHS] if estimator == "gae" else None
    baselines = [0.5, 0.25] if estimator == "remax" else None
    whole = scored_groups()
    hidden, left_out = [0, 4], [1, 2, 3, 5]  # of all six responses
    masked, without = [], []
    for place, item in enumerate(whole):
        unknown = np.isin(np.arange(3 * place, 3 * place + 3), hidden)
        accuracy = np.where(unknown, np.nan, 1.0).astype(np.float32)
        overall = np.where(unknown, item.rewards.overall[~unknown].mean(), item.rewards.overall)
        masked.append(ScoredGroup(item.group, dataclasses.replace(item.rewards, accuracy=accuracy, overall=overall)))
        kept = tuple(one for one, is_hidden in zip(item.group.responses, unknown, strict=True) if not is_hidden)
        group = dataclasses.replace(item.group, responses=kept)
        without.append(ScoredGroup(group, rewards(item.rewards.overall[~unknown])))

    def make_of(groups, places):
        chosen = [None if arrays is None else [arrays[place] for place in places] for arrays in (old, ref, values)]
        return make_experience(
            groups, algorithm, KLController(algorithm), RANK,
            old=chosen[0], ref=chosen[1], values=chosen[2], baselines=baselines,
        ).trajectories  # fmt: skip

    found, expected = make_of(masked, range(6)), make_of(without, left_out)
    for place, item in zip(left_out, expected, strict=True):
        np.testing.assert_allclose(found[place].advantages, item.advantages, rtol=1e-6, atol=1e-7)
    for place in hidden:
        assert not found[place].advantages.any()
        if estimator == "gae":
            np.testing.assert_array_equal(found[place].returns, found[place].values)


def cut_groups():
    """The first and the last two responses were cut at the limit."""
    found = scored_groups()
    cut = iter([True, False, False, False, True, True])
    return [
        dataclasses.replace(item, group=dataclasses.replace(item.group, responses=tuple(
            dataclasses.replace(answer, finished=not next(cut)) for answer in item.group.responses
        )))
        for item in found
    ]  # fmt: skip


def test_responses_cut_at_the_limit_train_nothing_and_are_counted():
    def make_with(**settings):
        algorithm = AlgorithmConfig(**settings)
        return make_experience(cut_groups(), algorithm, KLController(algorithm), RANK)

    masked, plain = make_with(mask_truncated=True), make_with()
    assert [item.trains for item in masked.trajectories] == [False, True, True, True, False, False]
    assert masked.metrics == {"actor/masked_fraction": 0.5} and plain.metrics == {}
    assert all(item.trains for item in plain.trajectories)
    np.testing.assert_array_equal(by_token(masked), by_token(plain))  # the rewards count in the groups as they did


def test_a_group_of_cut_responses_teaches_nothing():
    first = cut_groups()[0]
    cut = tuple(dataclasses.replace(answer, finished=False) for answer in first.group.responses)
    all_cut = dataclasses.replace(first, group=dataclasses.replace(first.group, responses=cut))
    assert teaches(first, AlgorithmConfig(mask_truncated=True))
    assert not teaches(all_cut, AlgorithmConfig(mask_truncated=True))
    assert teaches(all_cut, AlgorithmConfig())


SIZES = (2, 5, 3, 4)


def unequal_groups():
    """Groups of different sizes, one without variance, one with an unknown reward; lengths differ too."""
    random, found = np.random.default_rng(4), []
    for index, size in enumerate(SIZES):
        overall = random.integers(0, 3, size) / 2
        if index == 2:
            overall[:] = 0.5
        accuracy = overall.copy()
        if index == 3:
            accuracy[1], overall[1] = np.nan, overall[[0, 2, 3]].mean()
        responses = tuple(response(range(1 + (index + 3 * k) % 5)) for k in range(size))
        values = rewards(overall, accuracy, a=overall * 2, b=random.random(size))
        found.append(ScoredGroup(RolloutGroup(Prompt(index, f"p{index}", (1,), (), ""), responses, 0), values))
    return found


def by_hand(estimator, groups, baselines):
    """Advantages of each response, one after the other, and the number of its tokens. Plain loops."""
    whole = []
    for item, baseline in zip(groups, baselines, strict=True):
        known = [i for i, value in enumerate(item.rewards.accuracy) if not np.isnan(value)]
        values = {i: float(item.rewards.overall[i]) for i in known}
        mean = sum(values.values()) / len(known)
        sd = (sum((x - mean) ** 2 for x in values.values()) / (len(known) - 1)) ** 0.5
        ranked = sorted(values.values())
        for i in range(len(item.group.responses)):
            x = values.get(i, mean)
            others = [values[k] for k in known if k != i]
            a = {
                "grpo": (x - mean) / (sd + 1e-6),
                "dr_grpo": x - mean,
                "rloo": x - sum(others) / max(1, len(others)),
                "grpo_passk": (ranked[-1] - ranked[-2]) / (sd + 1e-6) if x == ranked[-1] else 0.0,
                "remax": x - baseline,
                "reinforce_plus_plus_baseline": x - mean,
                "reinforce_plus_plus": x,
            }[estimator]
            whole.append((a, i in values, len(item.group.responses[i].token_ids)))
    if estimator.startswith("reinforce"):
        tokens = np.array([a for a, known, length in whole if known for _ in range(length)])
        whole = [((a - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8), known, n) for a, known, n in whole]
    return np.array([a if known else 0.0 for a, known, length in whole for _ in range(length)])


ESTIMATED = ["grpo", "dr_grpo", "rloo", "grpo_passk", "remax", "reinforce_plus_plus_baseline", "reinforce_plus_plus"]


@pytest.mark.parametrize("estimator", ESTIMATED)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_groups_of_different_sizes(estimator, num_ranks):
    groups, baselines = unequal_groups(), [0.5, 0.25, 0.0, 1.0]
    algorithm = AlgorithmConfig(adv_estimator=estimator)

    def work(control):
        own = slice(control.rank, None, num_ranks)
        found = make_experience(
            groups[own], algorithm, KLController(algorithm), Threads(control), baselines=baselines[own]
        )
        assert found.group_sizes == list(SIZES[own])
        return found.trajectories

    of_ranks = on_ranks(num_ranks, work)
    trajectories = sorted((item for part in of_ranks for item in part), key=lambda item: item.prompt.index)
    found = np.concatenate([item.advantages for item in trajectories])
    np.testing.assert_allclose(found, by_hand(estimator, groups, baselines), atol=2e-6)


def test_several_rewards_of_groups_of_different_sizes():
    groups, algorithm = unequal_groups(), AlgorithmConfig(adv_estimator="gdpo")
    weights = {"a": 0.7, "b": 0.3}
    found = make_experience(groups, algorithm, KLController(algorithm), RANK, reward_weights=weights).trajectories
    sums, known, lengths = [], [], []
    for item in groups:
        is_known = ~np.isnan(item.rewards.accuracy)
        total = np.zeros(len(is_known))
        for name, weight in weights.items():
            values = item.rewards.parts[name].astype(np.float64)
            mean, sd = values[is_known].mean(), values[is_known].std(ddof=1)
            total += weight * (values - mean) / (sd + 1e-6)
        sums, known = [*sums, *total], [*known, *is_known]
        lengths += [len(one.token_ids) for one in item.group.responses]
    sums, known = np.array(sums), np.array(known)
    expected = np.where(known, (sums - sums[known].mean()) / np.sqrt(sums[known].var(ddof=1) + 1e-8), 0.0)
    np.testing.assert_allclose(
        np.concatenate([item.advantages for item in found]), np.repeat(expected, lengths), atol=2e-5
    )
