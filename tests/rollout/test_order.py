"""In which order engines begin what they are asked for, which changes nothing but the time."""

import json
from types import SimpleNamespace

import pytest
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

from mmr1_ds.records import Prompt, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.base import longest_first
from mmr1_ds.rollout.hf.engine import TransformersRollout


def requests(expected, num_responses=3, can_wait=()):
    return [
        RolloutRequest(Prompt(i, f"p{i}", (5, i), (), ""), num_responses, 100 * i, None, i in can_wait, tokens)
        for i, tokens in enumerate(expected)
    ]


@pytest.mark.parametrize(
    ("expected", "num_at_once", "order"),
    [
        ([7, 401, 30, 401, 1], 14, [1, 3, 2, 0, 4]),
        ([7, 401, 30, 401, 1], 15, [0, 1, 2, 3, 4]),  # all fit
        ([0, 0, 0, 0, 0], 1, [0, 1, 2, 3, 4]),  # nothing is known
        ([0, 9, 0, 30], 1, [0, 2, 3, 1]),  # what is cut at a budget comes before probes
        ([], 1, []),
    ],
)
def test_the_longest_begin_first_where_some_wait(expected, num_at_once, order):
    assert longest_first(requests(expected), num_at_once) == order


def test_probes_are_among_the_others_by_their_length():
    """Behind all others, a long one would be sampled alone in the end."""
    assert longest_first(requests([30, 10, 20], can_wait=(2,)), 1) == [0, 2, 1]


def test_transformers_samples_those_of_one_length_together(monkeypatch):
    asked = []

    def sample(self, requests, part, settings):
        asked.append(part)
        return [SimpleNamespace(seed=seed) for _, seed in part]

    monkeypatch.setattr(TransformersRollout, "__init__", lambda self: None)
    monkeypatch.setattr(TransformersRollout, "_sample", sample)
    rollout = TransformersRollout()
    rollout._policy = SimpleNamespace(num_updates_done=7, weights=lambda as_held: iter(()))
    rollout._max_num_seqs, rollout._model = 3, SimpleNamespace(named_parameters=dict, parameters=list)
    wanted = requests([9, 30, 20])
    found = rollout.collect(rollout.submit(wanted, SamplingSettings(1.0, 1.0, -1, 9)))
    assert [[seed for _, seed in part] for part in asked] == [[100, 101, 102], [200, 201, 202], [0, 1, 2]]
    assert [[response.seed for response in group.responses] for group in found] == [
        [request.seed + k for k in range(3)] for request in wanted
    ]


@pytest.mark.slow
def test_vllm_answers_each_request_as_in_any_order_in_fewer_steps(tmp_path):
    """Two at once; what is expected is how long the responses turned out in the order in which they were asked for."""
    run_ranks("longest_first.py", save_text_model(tmp_path / "model"), tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["begun"]["in order"] == [*range(len(found["begun"]["in order"]))]
    lengths = found["lengths"]
    assert [lengths[place] for place in found["begun"]["longest"]] == sorted(lengths, reverse=True)
    assert len({*lengths}) > 5
    assert found["tokens"]["longest"] == found["tokens"]["in order"]
    assert found["steps"]["longest"] < found["steps"]["in order"]
    assert found["stopped"] == {"longest": [True], "rest": [False]}
