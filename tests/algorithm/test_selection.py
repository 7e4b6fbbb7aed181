"""The k-th largest of numbers over ranks, as a sort of all of them finds it."""

import numpy as np
import pytest
import torch
from fixtures.golden_numbers import OneRank
from fixtures.rank_threads import Threads, on_ranks

from mmr1_ds.algorithm.selection import highest_covariances, top_bound

RANDOM = np.random.default_rng(3)
CASES = {
    "entropies": np.abs(RANDOM.normal(size=401)).astype(np.float32),
    "both signs": RANDOM.normal(0, 1e-4, 77).astype(np.float32),
    "ties": RANDOM.integers(-2, 3, 50).astype(np.float32),
    "one": np.array([0.25], dtype=np.float32),
    "far apart": np.array([0.0, 1e-38, -1e-38, 3e38, -3e38, 1.0], dtype=np.float32),
}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
@pytest.mark.parametrize("share", [1e-3, 0.2, 0.5, 0.85, 1.0])
def test_the_same_as_a_quantile_of_everything_on_any_ranks(values, share):
    bound = top_bound(values, share, OneRank())
    # TRL chooses what is at or above this (interpolated) quantile.
    expected = torch.tensor(values) >= torch.quantile(torch.tensor(values).double(), 1 - share).float()
    np.testing.assert_array_equal(values >= bound, expected)
    assert bound in values
    parts = [values[:7], values[7:7], values[7:]]  # the second rank has none
    assert set(on_ranks(3, lambda control: top_bound(parts[control.rank], share, Threads(control)))) == {bound}


def test_the_highest_covariances_are_numpy_s_on_any_ranks():
    lengths = [5, 0, 17, 1, 9, 30]
    logprobs, advantages = ([RANDOM.normal(size=length).astype(np.float32) for length in lengths] for _ in range(2))
    logprobs = [values - 1 for values in logprobs]
    chosen = highest_covariances(logprobs, advantages, 0.1, OneRank())
    assert [len(part) for part in chosen] == lengths
    flat = np.concatenate(logprobs).astype(np.float64), np.concatenate(advantages).astype(np.float64)
    products = (flat[0] - flat[0].mean()) * (flat[1] - flat[1].mean())
    assert products.mean() == pytest.approx(np.cov(*flat, ddof=0)[0, 1])  # what they sum to
    order = np.argsort(-products)
    assert set(np.flatnonzero(np.concatenate(chosen))) == set(order[: np.concatenate(chosen).sum()].tolist())
    assert np.concatenate(chosen).sum() == 7  # of 62: those at or above the .9 quantile
    cuts = [(0, 2), (2, 2), (2, 6)]

    def share(control):
        part = slice(*cuts[control.rank])
        return highest_covariances(logprobs[part], advantages[part], 0.1, Threads(control))

    found = [part for of_rank in on_ranks(3, share) for part in of_rank]
    for one, other in zip(chosen, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_to_choose_from():
    assert highest_covariances([], [], 0.2, OneRank()) == []
    assert top_bound(np.zeros(0, dtype=np.float32), 0.2, OneRank()) == -np.inf
