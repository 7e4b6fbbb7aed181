from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.stats import chi2

from mmr1_ds.curriculum.sampler import PromptSampler


def uniform(num_prompts):
    return np.ones(num_prompts, dtype=np.float32)


def draws(sampler, steps, weights=None):
    weights = uniform(sampler.num_prompts) if weights is None else weights
    return np.concatenate([sampler.draw(step, weights) for step in range(1, steps + 1)])


def chi_square_p(counts, probabilities):
    expected = counts.sum() * probabilities
    used = expected > 0
    return chi2.sf(((counts - expected)[used] ** 2 / expected[used]).sum(), used.sum() - 1)


@pytest.mark.parametrize(("num_prompts", "batch_size"), [(401, 7), (10, 3), (7, 7), (3, 11), (1, 5), (1, 1)])
def test_shuffle_visits_every_prompt_before_any_comes_again(num_prompts, batch_size):
    sampler = PromptSampler(num_prompts, batch_size, seed=3)
    drawn = draws(sampler, steps=5 * num_prompts // batch_size + 3)
    assert drawn.dtype == np.int64
    for start in range(0, len(drawn) - num_prompts + 1, num_prompts):
        assert sorted(drawn[start : start + num_prompts]) == list(range(num_prompts))


def test_epochs_have_different_orders():
    drawn = draws(PromptSampler(100, 50, seed=3), steps=4)
    assert (drawn[:100] != drawn[100:]).any()
    assert (drawn[:100] != np.arange(100)).any()


def test_the_random_part_walks_every_prompt_across_epochs():
    sampler = PromptSampler(23, 10, seed=1, strategy="curriculum", mixture_ratio=0.3)
    # With all the weight on one prompt, whatever else is drawn is of the walk.
    weights = np.zeros(23, dtype=np.float32)
    weights[5] = 1.0
    counts = np.zeros(23, dtype=int)
    for step in range(1, 24):  # 23 steps of 7 walked prompts: exactly 7 epochs
        batch = sampler.draw(step, weights)
        assert len(batch) == 10
        counts += np.bincount(batch, minlength=23)
    counts[5] -= 23 * 3
    assert (counts == 7).all()


@pytest.mark.parametrize("strategy", ["shuffle", "sequential", "curriculum"])
def test_a_draw_depends_on_seed_step_and_weights_alone(strategy):
    weights = np.random.default_rng(0).random(50).astype(np.float32)
    in_order = PromptSampler(50, 8, 7, strategy, 0.5)
    batches = {step: in_order.draw(step, weights) for step in range(1, 30)}
    fresh = PromptSampler(50, 8, 7, strategy, 0.5)
    for step in (29, 3, 12, 1):
        np.testing.assert_array_equal(fresh.draw(step, weights), batches[step])
    if strategy != "sequential":
        other_seed = PromptSampler(50, 8, 8, strategy, 0.5)
        assert any((other_seed.draw(step, weights) != batches[step]).any() for step in batches)


def test_draws_are_these_numbers():
    """Resumed runs must draw what they drew before: a change of numpy or of ours that breaks that must be seen."""
    weights = np.arange(1, 14, dtype=np.float32)
    with_replacement = PromptSampler(13, 6, 42, "curriculum", 0.5)
    without = PromptSampler(13, 6, 42, "curriculum", 0.5, replacement=False)
    assert with_replacement.draw(1, weights).tolist() == [11, 5, 0, 12, 12, 8]
    assert with_replacement.draw(9, weights).tolist() == [5, 9, 8, 11, 6, 1]
    assert without.draw(1, weights).tolist() == [10, 5, 0, 12, 11, 8]


def test_sequential_goes_in_order_and_wraps():
    drawn = draws(PromptSampler(5, 3, 1, "sequential"), steps=4)
    assert drawn.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_weighted_draws_follow_the_weights():
    weights = np.random.default_rng(1).random(41).astype(np.float32) ** 3
    weights[[0, 17, 40]] = 0.0
    sampler = PromptSampler(41, 500, 11, "curriculum", mixture_ratio=1.0)
    counts = np.bincount(draws(sampler, 100, weights), minlength=41)
    assert counts[[0, 17, 40]].sum() == 0
    p = chi_square_p(counts, weights / weights.sum(dtype=np.float64))
    assert 1e-3 < p < 0.999


def test_rounding_never_draws_a_weight_of_zero():
    class Extremes:
        def random(self, count):
            return np.array([0.0, 1.0])  # numpy gives less than 1, but times the total it may round up to it

    sampler = PromptSampler(5, 2, 1, "curriculum", 1.0)
    drawn = sampler._draw_with_replacement(np.array([0, 0.1, 0, 0.7, 0], dtype=np.float32), Extremes())
    assert drawn.tolist() == [1, 3]


def test_draws_without_replacement_follow_the_weights():
    weights = np.array([5, 4, 3, 2, 1, 0], dtype=np.float32)
    sampler = PromptSampler(6, 2, 2, "curriculum", 1.0, replacement=False)
    counts = np.zeros(6, dtype=int)
    num_steps = 6000
    for step in range(1, num_steps + 1):
        batch = sampler.draw(step, weights)
        assert len(set(batch.tolist())) == 2
        counts[batch] += 1
    # Probability to be among two drawn one after the other: w_i + sum_j w_j w_i / (1 - w_j).
    w = weights / weights.sum()
    included = np.array([w[i] + sum(w[j] * w[i] / (1 - w[j]) for j in range(6) if j != i) for i in range(6)])
    assert included.sum() == pytest.approx(2.0)
    spread = np.sqrt(num_steps * included * (1 - included))
    assert (np.abs(counts - num_steps * included) <= 4 * spread + 1e-9).all()


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("weight", [0.0, 1.0, 1e-38])
def test_equal_weights_are_uniform(replacement, weight):
    sampler = PromptSampler(20, 8, 5, "curriculum", 1.0, replacement)
    counts = np.bincount(draws(sampler, 1000, np.full(20, weight, dtype=np.float32)), minlength=20)
    assert chi_square_p(counts, np.full(20, 0.05)) > 1e-3


def test_without_replacement_takes_the_positive_ones_first():
    weights = np.array([0, 1, 0, 2, 0, 0], dtype=np.float32)
    sampler = PromptSampler(6, 4, 5, "curriculum", 1.0, replacement=False)
    extra = np.zeros(6, dtype=int)
    for step in range(1, 301):
        batch = sampler.draw(step, weights).tolist()
        assert len(set(batch)) == 4 and {1, 3} <= set(batch)
        extra[batch] += 1
    assert (extra[[0, 2, 4, 5]] > 90).all()  # the others follow uniformly


@pytest.mark.parametrize(("num_prompts", "batch_size"), [(3, 7), (1, 4), (3, 6)])
def test_without_replacement_from_too_small_a_pool(num_prompts, batch_size):
    sampler = PromptSampler(num_prompts, batch_size, 5, "curriculum", 1.0, replacement=False)
    counts = np.bincount(sampler.draw(1, uniform(num_prompts)), minlength=num_prompts)
    assert counts.sum() == batch_size
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("ratio", "batch_size", "weighted"),
    [(0.0, 9, 0), (1.0, 9, 9), (0.5, 9, 4), (0.29, 100, 29), (0.1, 30, 3), (0.7, 10, 7), (1e-9, 10, 0)],
)
def test_share_of_the_weighted_part(ratio, batch_size, weighted):
    sampler = PromptSampler(50, batch_size, 1, "curriculum", ratio)
    assert (sampler.num_weighted, sampler.num_walked) == (weighted, batch_size - weighted)
    assert len(sampler.draw(1, uniform(50))) == batch_size


def test_lambda_zero_is_shuffle():
    curriculum, shuffle = PromptSampler(17, 5, 9, "curriculum", 0.0), PromptSampler(17, 5, 9, "shuffle", 0.5)
    np.testing.assert_array_equal(draws(curriculum, 9), draws(shuffle, 9))


def test_weighted_and_walked_are_mixed():
    weights = np.zeros(1000, dtype=np.float32)
    weights[7] = 1.0
    sampler = PromptSampler(1000, 32, 1, "curriculum", 0.5)
    in_first_half = [(sampler.draw(step, weights)[:16] == 7).sum() for step in range(1, 101)]
    assert 7 < np.mean(in_first_half) < 9
    assert 0 < np.std(in_first_half) < 4


def test_random_position():
    sampler = PromptSampler(10, 8, 1, "curriculum", 0.5)
    assert [sampler.random_position(step) for step in (0, 1, 2, 3)] == [0, 4, 8, 2]


def test_new_weights_are_noticed():
    sampler = PromptSampler(4, 3, 1, "curriculum", 1.0)
    first, second = np.array([1, 0, 0, 0], dtype=np.float32), np.array([0, 0, 1, 0], dtype=np.float32)
    first.flags.writeable = second.flags.writeable = False
    assert sampler.draw(1, first).tolist() == [0, 0, 0]
    assert sampler.draw(1, second).tolist() == [2, 2, 2]
    writeable = np.array([0, 0, 0, 1], dtype=np.float32)
    assert sampler.draw(1, writeable).tolist() == [3, 3, 3]
    writeable[:] = [0, 1, 0, 0]
    assert sampler.draw(1, writeable).tolist() == [1, 1, 1]


def test_draws_are_counted_from_one():
    with pytest.raises(ValueError, match="counted from 1, got 0"):
        PromptSampler(4, 3, 1).draw(0, uniform(4))


def test_a_walk_past_a_million_prompts_visits_each_once():
    sampler = PromptSampler(2**20 + 1, 2**18 + 7, seed=3)
    first = draws(sampler, steps=4)[: 2**20 + 1]
    assert np.bincount(first, minlength=2**20 + 1).max() == 1
    np.testing.assert_array_equal(PromptSampler(2**20 + 1, 2**18 + 7, seed=3).draw(2, None), sampler.draw(2, None))


def test_concentrated_weights_without_replacement():
    """A few prompts hold nearly all the weight: repeats are the rule, and the distribution still holds."""
    weights = np.array([1000, 500, 3, 2, 1, 1], dtype=np.float32)
    sampler = PromptSampler(6, 3, 4, "curriculum", 1.0, replacement=False)
    third = np.zeros(6, dtype=int)
    for number in range(1, 4001):
        batch = sampler.draw(number, weights).tolist()
        assert len(set(batch)) == 3
        if {0, 1} <= set(batch):
            third[sum(batch) - 1] += 1
    p = chi_square_p(third[2:], np.array([3, 2, 1, 1]) / 7)
    assert third.sum() > 3900 and 1e-3 < p < 0.999


# The other rules


def test_candidates_are_included_as_often_as_counted_by_hand():
    """Brute force over all equally likely sets of candidates: which two of four are the best of each."""
    weights = np.array([0.1, 0.9, 0.3, 0.3, 0.8, 0.2, 0.0], dtype=np.float32)  # two of them tie
    sampler = PromptSampler(7, 2, 11, "curriculum", 1.0, rule="candidates", num_candidates=2)
    included = np.zeros(7)
    subsets = list(combinations(range(7), 4))
    for subset in subsets:
        for order in permutations(subset):  # ties fall to either
            included[sorted(order, key=lambda k: -weights[k])[:2]] += 1.0 / (24 * len(subsets))
    num_steps = 6000
    counts = np.bincount(draws(sampler, num_steps, weights), minlength=7)
    spread = np.sqrt(num_steps * included * (1 - included))
    assert (np.abs(counts - num_steps * included) <= 4 * spread + 1e-9).all()


def test_candidates_leave_out_who_is_walked_and_lambda_is_the_share_of_the_best():
    weights = np.arange(40, dtype=np.float32)
    sampler = PromptSampler(40, 10, 3, "curriculum", 0.6, rule="candidates", num_candidates=1000)
    walked = np.zeros(40, dtype=int)
    for number in range(1, 21):
        batch, turn = sampler.draw(number, weights), sampler.walk(4 * (number - 1), 4)
        assert len(set(batch.tolist())) == 10
        best = [k for k in range(39, -1, -1) if k not in turn][:6]
        assert sorted(batch) == sorted([*best, *turn])
        walked[turn] += 1
    assert (walked == 2).all()  # every prompt within 1 / (1 - lambda) epochs


def test_posterior_takes_the_best_and_passes_over_whom_it_saw():
    scores = np.arange(40, dtype=np.float32)
    sampler = PromptSampler(40, 10, 3, "curriculum", 0.8, rule="posterior")
    turn = sampler.walk(2 * 4, 2)  # of the fifth draw; the turn comes again after 20 draws
    for unseen, taken in ((19, []), (20, list(turn))):
        batch = sampler.draw(5, scores, np.full(40, unseen))
        best = [k for k in range(39, -1, -1) if k not in taken][: 10 - len(taken)]
        assert sorted(batch) == sorted([*best, *taken])


def test_posterior_ties_fall_at_random():
    sampler = PromptSampler(20, 8, 5, "curriculum", 1.0, rule="posterior")
    equal = np.zeros(20, dtype=np.float32)
    counts = np.bincount(np.concatenate([sampler.draw(n, equal, equal) for n in range(1, 1001)]), minlength=20)
    assert chi_square_p(counts, np.full(20, 0.05)) > 1e-3


def test_every_prompt_is_seen_within_a_turn_and_then_within_three():
    """Scores that never change: what they leave out comes in turn, whether it is seen elsewhere or not."""
    random = np.random.default_rng(0)
    sampler = PromptSampler(57, 8, 3, "curriculum", 0.75, rule="posterior")
    scores, last_seen = random.random(57).astype(np.float32), np.full(57, -1000)
    turn = 57 / 2  # draws
    for number in range(1, 200):
        batch = sampler.draw(number, scores, number - last_seen)
        assert len(batch) == 8
        if number > turn + 1:
            assert (number - last_seen).max() <= 3 * turn
        last_seen[batch] = number


@pytest.mark.parametrize("rule", ["candidates", "posterior"])
@pytest.mark.parametrize("ratio", [0.0, 0.37, 1.0])
@pytest.mark.parametrize(("num_prompts", "batch_size"), [(401, 7), (7, 7), (5, 4), (3, 11), (1, 5), (1, 1)])
def test_rules_fill_any_batch_from_any_pool(rule, ratio, num_prompts, batch_size):
    sampler = PromptSampler(num_prompts, batch_size, 3, "curriculum", ratio, rule=rule)
    weights = np.random.default_rng(1).random(num_prompts).astype(np.float32)
    for number in range(1, 12):
        for scores in (weights, np.zeros_like(weights), np.full_like(weights, -np.inf)):
            batch = sampler.draw(number, scores, np.full(num_prompts, number))
            assert batch.dtype == np.int64 and len(batch) == batch_size
            assert batch.min() >= 0 and batch.max() < num_prompts
            assert np.array_equal(batch, sampler.draw(number, scores, np.full(num_prompts, number)))


def test_draws_of_the_other_rules_are_these_numbers():
    """See `test_draws_are_these_numbers`."""
    weights = np.arange(1, 14, dtype=np.float32)
    candidates = PromptSampler(13, 6, 42, "curriculum", 0.5, rule="candidates", num_candidates=2)
    posterior = PromptSampler(13, 6, 42, "curriculum", 0.5, rule="posterior")
    assert candidates.draw(1, weights).tolist() == [9, 5, 0, 12, 10, 8]
    scores = weights * posterior.noise(1)
    assert posterior.draw(1, scores, np.full(13, 9)).tolist() == [4, 5, 0, 3, 12, 8]
