"""The old and the new way give the same numbers, so that their times compare."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "loop"


@pytest.fixture
def records(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("records")


def test_both_ways_give_the_same(records):
    step = records.Step(num_responses=6, num_tokens=7, group_size=3)
    for name in ("packing for the scores", "for a checkpoint", "collation", "importance weights", "advantages"):
        old, new = (way(step) for way in records.STAGES[name])
        for one, other in zip(*((part if isinstance(part, tuple) else (part,)) for part in (old, new)), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)
    (tuples, rewards), groups = (way(step) for way in records.STAGES["to another rank and back"])
    responses = [response for item in groups.values() for response in item.group.responses]
    assert [tokens for tokens, _ in tuples] == [tuple(response.token_ids.tolist()) for response in responses]
    np.testing.assert_array_equal(rewards, [item.rewards.overall for item in groups.values()])
    assert records.measure(step, 1).keys() == records.STAGES.keys()
    assert records.bytes_a_token(step)[1] == 8.0
