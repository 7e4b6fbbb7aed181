"""Group sizes from beliefs, against brute force and numeric integration; and how a batch carries them."""

import itertools
import json
import logging

import numpy as np
import pytest
from fixtures.coordinators import B, N, P, answer, share
from fixtures.rank_threads import SingleProcess, on_ranks

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.group_sizes import SizeRange, allocate, gains, group_sizes

SIZES = SizeRange(2, 19)


def worth(mean, variance, size):
    """E[p (1-p) (1 - p^n - (1-p)^n)] by the trapezoidal rule."""
    z = mean + np.sqrt(variance) * np.linspace(-9, 9, 4001)
    density = np.exp(-((z - mean) ** 2) / (2 * variance))
    p = 1 / (1 + np.exp(-z))
    return (density * p * (1 - p) * (1 - p**size - (1 - p) ** size)).sum() / density.sum()


@pytest.mark.parametrize("seed", range(7))
def test_no_other_sizes_are_worth_more(seed):
    random = np.random.default_rng(seed)
    mean, variance, mean_size = random.normal(0, 3, 5), random.uniform(0.01, 4, 5), 4
    found = group_sizes(mean, variance, mean_size, SizeRange(2, 7))
    assert found.sum() == 5 * mean_size and found.min() >= 2 and found.max() <= 7
    table = np.array([[worth(m, v, n) for n in range(8)] for m, v in zip(mean, variance, strict=True)])
    best = max(
        sum(table[range(5), sizes])
        for sizes in itertools.product(range(2, 8), repeat=5)
        if sum(sizes) == 5 * mean_size
    )
    assert table[range(5), found].sum() == pytest.approx(best, abs=2e-4)


def test_gains_are_differences_of_the_worth():
    mean, variance = np.array([-4.0, 0.0, 1.5]), np.array([0.5, 0.01, 2.0])
    found = gains(mean.astype(np.float32), variance.astype(np.float32), SizeRange(3, 11))
    for row, m, v in zip(found, mean, variance, strict=True):
        expected = np.diff([worth(m, v, n) for n in range(3, 12)])
        np.testing.assert_allclose(row, expected, atol=1e-4)
    assert (np.diff(found, axis=1) <= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_gains_are_taken(seed):
    random = np.random.default_rng(seed)
    table = np.sort(random.integers(0, 4, (3, 5)), axis=1)[:, ::-1].astype(float)  # many are equal
    for count in range(table.size + 1):
        found = allocate(table, count)
        taken = sum(row[:k].sum() for row, k in zip(table, found, strict=True))
        assert found.sum() == count and taken == np.sort(table.reshape(-1))[::-1][:count].sum()


def test_rare_successes_get_more_than_a_coin_and_certain_prompts_the_least():
    rates = np.array([0.5, 0.05, 1e-5, 1 - 1e-5, 0.95, 0.5])
    z = np.log(rates / (1 - rates))
    found = group_sizes(z, np.full(6, 1e-4), 7, SIZES)
    assert found[2] == found[3] == 2 and found[1] > found[0] > 2
    assert found[1] == found[4] and found[0] == found[5] and found.sum() == 42


def test_of_an_unsure_belief_more_can_be_expected_than_of_a_sure_one():
    found = group_sizes(np.array([-6.0, -6.0]), np.array([0.01, 6.0]), 8, SIZES)
    assert found.tolist() == [2, 14]


def test_prompts_alike_get_the_same():
    assert group_sizes(np.full(401, 0.3), np.full(401, 1.0), 8, SIZES).tolist() == [8] * 401
    assert set(group_sizes(np.full(7, 0.3), np.full(7, 1.0), 9, SizeRange(9, 9))) == {9}
    assert group_sizes(np.array([0.0, 9.0]), np.ones(2), 2, SizeRange(2, 7)).tolist() == [2, 2]


def make(control=None, sizes=SIZES, **changes):
    settings = {
        "rollout_batch_size": B, "seed": 5, "sampling_strategy": "curriculum", "curriculum_refresh": "online",
        "curriculum_draw": "posterior", "curriculum_mixture_ratio": 0.2, "curriculum_probe_fraction": 0.1,
    }  # fmt: skip
    ids = [f"p{i}" for i in range(P)]
    data = DataConfig(**(settings | changes))
    return Coordinator(data, ids, [""] * P, "abc", N, 40, control or SingleProcess(), sizes=sizes)


def train(coordinator, steps):
    found = []
    for step in steps:
        indices, sizes, _ = coordinator.next_groups(step)
        groups = [answer(i, 1, int(n)) for i, n in zip(indices, sizes, strict=True)]
        own = share(groups, coordinator.control)
        probes = share(coordinator.next_probes(step)[0], coordinator.control)
        own += [answer(i, 1, coordinator.num_probe_responses, is_probe=True) for i in probes]
        coordinator.observe(step, own)
        coordinator.finish_step(step, indices)
        found.append((indices.tolist(), sizes.tolist(), coordinator.metrics()))
    return found


def test_a_batch_has_n_responses_a_prompt_on_average_whatever_the_ranks_and_after_a_resume(tmp_path):
    found = train(make(), range(1, 14))
    for of_rank in on_ranks(3, lambda control: train(make(control), range(1, 14))):
        assert [step[:2] for step in of_rank] == [step[:2] for step in found]
    begun, resumed = make(), make()
    train(begun, range(1, 6))
    begun.save(tmp_path)
    resumed.load(tmp_path)
    assert train(resumed, range(6, 14)) == found[5:]
    assert all(sum(sizes) == B * N for _, sizes, _ in found)
    assert len({size for _, sizes, _ in found for size in sizes}) > 4
    indices, sizes, metrics = found[-1]
    assert (metrics["curriculum/group_size_min"], metrics["curriculum/group_size_max"]) == (min(sizes), max(sizes))
    teaching = [n for i, n in zip(indices, sizes, strict=True) if answer(i, 1, n).is_effective]
    assert metrics["curriculum/effective_response_fraction"] == sum(teaching) / sum(sizes)
    extra = metrics["curriculum/extra_rollout_fraction"] * 13 * B * N
    assert extra == pytest.approx(round(extra / 4) * 4)  # probes alone, of four


def test_a_batch_of_equal_groups_is_what_it_was():
    coordinator = make(sizes=None)
    indices, sizes, _ = coordinator.next_groups(1)
    assert sizes.tolist() == [N] * B and len(indices) == B
    np.testing.assert_array_equal(make(sizes=None).next_batch(1), indices)


def test_a_checkpoint_of_other_sizes_is_resumed_and_says_so(tmp_path, caplog):
    begun = make(sizes=None)
    train(begun, range(1, 3))
    begun.save(tmp_path)
    assert json.loads((tmp_path / "curriculum.json").read_text())["settings"]["worker.rollout.n_max"] is None
    with caplog.at_level(logging.WARNING):
        make().load(tmp_path)
    assert "worker.rollout.n_min None -> 2, worker.rollout.n_max None -> 19" in caplog.text
