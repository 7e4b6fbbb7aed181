"""Batches with a fixed share of each source: exact at every step, each source drawn as it would be alone."""

import numpy as np
import pytest
from fixtures.coordinators import answer
from fixtures.rank_threads import SingleProcess
from hypothesis import given
from hypothesis import strategies as st

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.mixture import MixedSampler, quotas, source_metrics
from mmr1_ds.curriculum.sampler import PromptSampler
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.errors import UserError

SOURCES = np.array([0] * 7 + [1] * 23 + [2] * 401)  # of very different sizes
WEIGHTS, B = [0.5, 0.3, 0.2], 20


@pytest.mark.parametrize(
    ("weights", "size", "expected"),
    [([0.5, 0.3, 0.2], 20, [10, 6, 4]), ([1, 1, 1], 20, [7, 7, 6]), ([0.1, 0.2, 0.7], 10, [1, 2, 7]), ([3], 5, [5])],
)
def test_quotas(weights, size, expected):
    assert quotas(weights, size) == expected


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=9), st.integers(1, 999))
def test_quotas_fill_the_batch_and_miss_no_share_by_one(weights, size):
    found = quotas(weights, size)
    assert sum(found) == size
    exact = [size * weight / sum(weights) for weight in weights]
    assert all(abs(count - share) < 1 + 1e-6 for count, share in zip(found, exact, strict=True))


@pytest.mark.parametrize("strategy", ["shuffle", "sequential", "curriculum"])
def test_each_source_is_drawn_as_it_would_be_alone(strategy):
    table = np.random.default_rng(3).random(len(SOURCES)).astype(np.float32)
    mixed = MixedSampler(SOURCES, WEIGHTS, B, 5, strategy, 0.5, True)
    alone = PromptSampler(7, 10, 5, strategy, 0.5, True)
    for number in range(1, 30):
        drawn = mixed.draw(number, table)
        assert np.bincount(SOURCES[drawn]).tolist() == [10, 6, 4]
        assert sorted(drawn[SOURCES[drawn] == 0]) == sorted(alone.draw(number, table[:7]))
        assert np.array_equal(drawn, MixedSampler(SOURCES, WEIGHTS, B, 5, strategy, 0.5, True).draw(number, table))
    if strategy != "curriculum":  # 401 prompts, 4 a step: none comes again before all have come
        seen = np.concatenate([mixed.draw(number, table) for number in range(1, 101)])
        assert len(set(seen[SOURCES[seen] == 2])) == 400


@pytest.mark.parametrize("rule", ["candidates", "posterior"])
def test_rules_keep_the_quotas(rule):
    mixed = MixedSampler(SOURCES, WEIGHTS, B, 5, "curriculum", 0.8, True, rule)
    for number in range(1, 30):
        drawn = mixed.draw(number, mixed.noise(number), np.full(len(SOURCES), number))
        assert np.bincount(SOURCES[drawn]).tolist() == [10, 6, 4]
        assert not np.array_equal(mixed.noise(number), mixed.noise(number + 1))


def test_lambda_holds_within_each_source():
    """A weight on one prompt of each source: half of each quota is that prompt, the rest of the walk."""
    table = np.zeros(len(SOURCES), dtype=np.float32)
    table[[2, 9, 99]] = 1
    drawn = MixedSampler(SOURCES, WEIGHTS, B, 5, "curriculum", 0.5, True).draw(1, table)
    counts = np.bincount(drawn, minlength=len(SOURCES))
    assert counts[2] >= 5 and counts[9] >= 3 and counts[99] >= 2


def coordinator(**changes):
    settings = {"rollout_batch_size": B, "sampling_strategy": "curriculum", "curriculum_refresh": "online"}
    data = DataConfig(**(settings | {"train_weights": WEIGHTS} | changes))
    ids = [f"p{i}" for i in range(len(SOURCES))]
    return Coordinator(data, ids, [""] * len(ids), "abc", 8, 40, SingleProcess(), SOURCES, ["a", "b", "c"])


def test_a_coordinator_keeps_the_quotas_and_resumes_them(tmp_path):
    straight, resumed = coordinator(), coordinator()
    for step in range(1, 7):
        if step == 4:
            straight.save(tmp_path)
            resumed = coordinator()
            resumed.load(tmp_path)
        for one in (straight, resumed):
            drawn = one.next_batch(step)
            own = [answer(i, step) for i in drawn]
            one.observe(step, own)
            one.finish_step(step, drawn)
            metrics = one.metrics()
            assert [metrics[f"source/{name}/share"] for name in "abc"] == WEIGHTS
            of_a = [prompt.pass_rate for prompt in own if SOURCES[prompt.index] == 0]
            assert metrics["source/a/accuracy"] == pytest.approx(np.mean(of_a))
        assert straight.metrics() == resumed.metrics()


def test_without_weights_all_is_as_it_was_and_the_sources_are_counted():
    plain, drawn = coordinator(train_weights=[]), []
    expected = PromptSampler(len(SOURCES), B, 1, "curriculum", 0.5, True).draw(1, plain.table.sampling_weights)
    drawn = plain.next_batch(1)
    assert np.array_equal(drawn, expected)


def test_a_source_without_prompts_is_refused():
    with pytest.raises(UserError, match="no prompt of d is short enough"):
        data = DataConfig(rollout_batch_size=B, train_weights=[1, 1, 1, 1])
        ids = [f"p{i}" for i in range(len(SOURCES))]
        Coordinator(data, ids, [""] * len(ids), "abc", 8, 40, SingleProcess(), SOURCES, ["a", "b", "c", "d"])


def test_a_group_of_unknown_rewards_counts_in_a_source_s_share_alone():
    known = PromptStatistics(0, 4, 0.5, 0.5, 0.25, 0.0, 0.0)
    unknown = PromptStatistics(1, 4, float("nan"), 0.0, 0.0, 0.0, 0.0)
    metrics = source_metrics([known, unknown], np.zeros(2, int), ["a"])
    assert metrics == {"source/a/share": 1.0, "source/a/accuracy": 0.5, "source/a/reward": 0.5}
