"""DAPO's soft penalty of long responses, against the published formula."""

import dataclasses

import numpy as np
import pytest
from fixtures.batch_makers import rewards
from fixtures.responses import response

from mmr1_ds.algorithm.overlong import OverlongPenalty
from mmr1_ds.records import Prompt, RolloutGroup, ScoredGroup


def published(length, limit, buffer):
    """Equation 13, case by case."""
    if length <= limit - buffer:
        return 0.0
    return ((limit - buffer) - length) / buffer if length <= limit else -1.0


@pytest.mark.parametrize(("limit", "buffer"), [(20, 7), (7, 7), (401, 1)])
def test_the_penalty_is_the_published_one(limit, buffer):
    lengths = np.arange(limit + 1)
    expected = [1.5 * published(length, limit, buffer) for length in lengths]
    np.testing.assert_allclose(OverlongPenalty(limit, buffer, 1.5).of_lengths(lengths), expected, atol=1e-12)


def group(lengths, scored):
    responses = tuple(response(range(n), [-0.1] * n) for n in lengths)
    return ScoredGroup(RolloutGroup(Prompt(0, "p", (1,), (), ""), responses, 0), scored)


def test_it_comes_on_top_of_any_reward():
    found = OverlongPenalty(10, 4, 1.0)(group([3, 8, 10], rewards(np.array([1.0, 1.0, 0.0])))).rewards
    np.testing.assert_allclose(found.overall, [1.0, 0.5, -1.0])
    np.testing.assert_allclose(found.parts["overlong"], [0.0, -0.5, -1.0])


def test_an_unscored_response_still_teaches_neither_way():
    scored = rewards(np.array([1.0, 0.0, 0.5]))
    unknown = np.array([False, False, True])
    accuracy = np.where(unknown, np.nan, scored.accuracy).astype(np.float32)
    scored = dataclasses.replace(scored, failed=unknown, accuracy=accuracy)
    found = OverlongPenalty(10, 4, 1.0)(group([3, 8, 10], scored)).rewards
    np.testing.assert_allclose(found.overall, [1.0, -0.5, 0.25])
    np.testing.assert_array_equal(np.isnan(found.parts["overlong"]), unknown)
