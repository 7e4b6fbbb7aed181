"""Plans of micro-batches: budgets, balance, the same number on every rank."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr1_ds.engine.micro_batches import balance, by_prompts, by_tokens, first_fit, in_turn, spread


def needing(others=1):
    """Agree with other ranks, which need this many micro-batches at most."""
    return lambda own: max(own, others)


def total(lengths, part):
    return sum(lengths[i] for i in part)


def test_in_turn():
    assert in_turn(7, 3, needing()) == [[0, 1, 2], [3, 4, 5], [6]]
    assert in_turn(2, 5, needing()) == [[0, 1]]


LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=40)


@given(LENGTHS, st.integers(100, 300), st.integers(1, 40))
def test_every_sequence_once_within_the_budget(lengths, budget, needed):
    needed = min(needed, len(lengths))
    parts = by_tokens(lengths, budget, needing(needed))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(part and total(lengths, part) <= budget for part in parts)
    assert len(parts) == max(needed, len(first_fit(lengths, budget)))
    assert all(part == sorted(part) for part in parts)


def fewest_bins(lengths, budget):
    """By brute force: the smallest number of bins that take all."""
    best = len(lengths)

    def place(i, bins):
        nonlocal best
        if len(bins) >= best:
            return
        if i == len(lengths):
            best = len(bins)
            return
        for k in range(len(bins)):
            if bins[k] + lengths[i] <= budget:
                place(i + 1, [*bins[:k], bins[k] + lengths[i], *bins[k + 1 :]])
        place(i + 1, [*bins, lengths[i]])

    place(0, [])
    return best


@pytest.mark.parametrize("seed", range(20))
def test_nearly_as_few_as_possible(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, 9).tolist()
    fewest = fewest_bins(lengths, 70)
    assert fewest <= len(first_fit(lengths, 70)) <= 11 * fewest / 9 + 6 / 9


def test_a_sequence_over_the_budget_is_alone():
    assert by_tokens([3, 50, 4], 10, needing()) in ([[0, 2], [1]], [[1], [0, 2]])


@pytest.mark.parametrize(("count", "number"), [(64, 7), (401, 13), (5, 5)])
def test_parts_cost_alike(count, number):
    lengths = np.random.default_rng(1).lognormal(5, 0.6, count).astype(int).tolist()
    sums = [total(lengths, part) for part in spread(lengths, number)]
    # Longest first is never over the mean by more than the last sequence placed on top (Graham 1969: 4/3 - 1/3m).
    assert max(sums) <= max(max(lengths), 4 / 3 * sum(lengths) / number)
    assert min(sums) > 0
    if count > 20:
        assert max(sums) - min(sums) <= 0.1 * sum(lengths) / number


def test_tight_bins_are_cut_when_the_others_need_more():
    lengths = [60, 40, 60, 40, 55, 45]  # three bins of exactly 100; longest first would overfill one of three
    parts = by_tokens(lengths, 100, needing(4))
    assert len(parts) == 4 and all(total(lengths, part) <= 100 for part in parts)


@pytest.mark.parametrize("seed", range(12))
def test_groups_are_balanced_nearly_as_well_as_can_be(seed):
    random = np.random.default_rng(seed)
    tokens = random.lognormal(6, 0.5, 8).astype(int).tolist()

    def heaviest(order):
        return max(sum(tokens[i] for i in order[:4]), sum(tokens[i] for i in order[4:]))

    order = balance(tokens, 2)
    assert sorted(order) == list(range(8))
    assert heaviest(order) <= 1.03 * min(heaviest(found) for found in permutations(range(8)))


@pytest.mark.parametrize(("groups", "ranks"), [(512, 64), (96, 3), (7, 7), (5, 1), (6, 2)])
def test_ranks_have_equally_many_groups(groups, ranks):
    random = np.random.default_rng(3)
    tokens = (8 * random.lognormal(6, 0.6, groups)).astype(int).tolist()
    order = np.array(balance(tokens, ranks)).reshape(ranks, -1)
    assert sorted(order.reshape(-1)) == list(range(groups))
    totals, before = np.array(tokens)[order].sum(axis=1), np.array(tokens).reshape(ranks, -1).sum(axis=1)
    assert totals.max() <= before.max()
    if groups > 50:
        assert totals.max() < 1.05 * totals.mean() < before.max()


def test_what_is_even_stays_in_place():
    assert balance([5] * 12, 3) == list(range(12))
    assert balance([100, 101, 101, 100], 2) == [0, 1, 2, 3]
    assert sorted(balance([0, 0, 0, 0], 2)) == [0, 1, 2, 3]


def test_responses_to_a_prompt_stay_together_and_count_it_once():
    # Three prompts of 10 tokens with 4 responses of 5: 30 tokens each, two fit into 60 and three do not.
    prompts, lengths = [7] * 4 + [8] * 4 + [9] * 4, [5] * 12
    parts = by_prompts(prompts, [10] * 12, lengths, 60, needing())
    assert sorted(sorted({prompts[i] for i in part}) for part in parts) in ([[7], [8, 9]], [[7, 8], [9]], [[7, 9], [8]])
    assert sorted(i for part in parts for i in part) == list(range(12))
    # A group over the budget is cut; every part counts the prompt again.
    parts = by_prompts([1] * 9, [10] * 9, [8] * 9, 40, needing())
    assert sorted(len(part) for part in parts) == [3, 3, 3]


def test_a_rank_with_few_runs_makes_as_many_micro_batches_as_another_needs():
    parts = by_prompts([1] * 6, [10] * 6, [1] * 6, 100, needing(4))
    assert len(parts) == 4 and all(parts) and sorted(i for part in parts for i in part) == list(range(6))


@pytest.mark.parametrize("others", [1, 4, 7])
def test_a_rank_with_few_sequences_makes_empty_ones_at_the_end(others):
    """Groups of different sizes: others may need more micro-batches than this rank has sequences."""
    for parts in (
        in_turn(3, 2, needing(others)),
        by_tokens([5, 9, 2], 100, needing(others)),
        by_prompts([1, 1, 2], [3, 3, 4], [5, 9, 2], 100, needing(others)),
    ):
        assert sorted(i for part in parts for i in part) == [0, 1, 2]
        filled = [bool(part) for part in parts]
        assert filled == sorted(filled, reverse=True) and len(parts) == max(others, sum(filled))
