"""How long responses are expected to be: learned from what was seen, the same on any ranks and after a resume."""

import dataclasses
import json

import numpy as np
import pytest
from fixtures.coordinators import B, P, answer, make, refresh, share
from fixtures.rank_threads import on_ranks
from safetensors.numpy import load_file, save_file

from mmr1_ds.curriculum.lengths import ResponseLengths

ONLINE = {"curriculum_refresh": "online", "curriculum_probe_fraction": 0.3}


def seen(index, num_tokens, num_responses=1):
    return dataclasses.replace(answer(index, 0, num_responses), num_tokens=num_tokens)


def test_what_is_expected():
    lengths = ResponseLengths(7)
    everything = np.arange(7)
    assert lengths.expected(everything).tolist() == [0] * 7
    lengths.observe([seen(2, 401), seen(5, 30, 3)])
    mean = (401 + 30) / 4  # of all responses
    assert lengths.expected(everything).tolist() == [108, 108, 401, 108, 108, 10, 108]
    lengths.observe([seen(2, 101), seen(3, 0), seen(0, 7, 7), seen(0, 49, 7)])  # nobody counted those of 3
    mean = (mean + (101 + 7 + 49) / 15) / 2
    assert round(mean) == 59
    assert lengths.expected(everything).tolist() == [4, 59, 251, 59, 59, 10, 59]
    lengths.observe([seen(3, 0)])
    assert lengths.expected(everything).tolist() == [4, 59, 251, 59, 59, 10, 59]
    assert lengths.arrays()["response_tokens"].nbytes == 4 * 7


def test_it_does_not_depend_on_the_order_that_the_ranks_give_groups_in():
    random = np.random.default_rng(3)
    pairs = zip(random.integers(0, 11, 401).tolist(), random.integers(1, 9999, 401).tolist(), strict=True)
    groups = [seen(index, tokens, 7) for index, tokens in pairs]
    found = []
    for order in (range(401), random.permutation(401)):
        lengths = ResponseLengths(11)
        lengths.observe([groups[k] for k in order])
        found.append((lengths.arrays()["response_tokens"].tolist(), lengths.numbers()))
    assert found[0] == found[1]


def train(coordinator, steps):
    """What is drawn and expected in each step, of the training groups and of the probes."""
    found = []
    for step in steps:
        if coordinator.refresh_due(step):
            found += [coordinator.expected_tokens(np.arange(P)).tolist()]
            refresh(coordinator, step)
        indices, _, tokens = coordinator.next_groups(step)
        probes, of_probes = coordinator.next_probes(step)
        asked = [answer(i, step) for i in indices]
        asked += [answer(i, step, coordinator.num_probe_responses, is_probe=True) for i in probes]
        coordinator.observe(step, share(asked, coordinator.control))
        coordinator.finish_step(step, indices)
        found.append([array.tolist() for array in (indices, tokens, probes, of_probes)])
    return found


@pytest.mark.parametrize("settings", [{}, ONLINE, {"sampling_strategy": "shuffle"}], ids=["full", "online", "shuffle"])
def test_any_number_of_ranks_and_a_resumed_run_expect_the_same(tmp_path, settings):
    whole = train(make(**settings), range(1, 12))
    assert on_ranks(3, lambda control: train(make(control, **settings), range(1, 12))) == [whole] * 3
    begun, resumed = make(**settings), make(**settings)
    train(begun, range(1, 6))
    begun.save(tmp_path)
    resumed.load(tmp_path)
    rest = train(resumed, range(6, 12))
    assert rest == whole[-len(rest) :]
    assert len({*rest[-1][1]}) > B / 2


def test_the_mean_of_each_prompt_is_that_of_a_plain_loop():
    coordinator = make(sampling_strategy="shuffle")
    known, mean = {}, 0.0
    for step, (indices, tokens, _, _) in enumerate(train(coordinator, range(1, 20)), start=1):
        assert tokens == [int(np.rint(known.get(index, mean))) for index in indices], step
        counts = {}
        for index in indices:  # an epoch ends inside a batch: a prompt may be in it twice
            counts.setdefault(index, []).append(answer(index, step).num_tokens / 8)
        for index, of_groups in counts.items():
            new = sum(of_groups) / len(of_groups)
            known[index] = np.float32((known[index] + new) / 2 if index in known else new)
        of_step = [value for of_groups in counts.values() for value in of_groups]
        mean = (mean + np.mean(of_step)) / 2 if mean else np.mean(of_step)


@pytest.mark.parametrize("size", [1, 2])
def test_a_refresh_says_how_long_all_responses_are_though_it_was_interrupted(tmp_path, size):
    def begin(control):
        coordinator = make(control)
        chunks = coordinator.refresh_chunks()
        for _ in range(2):
            coordinator.observe_refresh([answer(i, 1) for i in share(next(chunks), control)])
        coordinator.save(tmp_path)

    def finish(control):
        coordinator = make(control)
        coordinator.load(tmp_path)
        assert coordinator.expected_tokens(np.arange(P)).tolist() == [0] * P  # before it has ended
        refresh(coordinator, 1)
        return coordinator.expected_tokens(np.arange(P)).tolist()

    on_ranks(2, begin)
    expected = [round(answer(i, 1).num_tokens / 8) for i in range(P)]
    assert on_ranks(size, finish) == [expected] * size


def test_a_checkpoint_of_before_knows_of_none(tmp_path):
    coordinator = make()
    train(coordinator, range(1, 4))
    chunks = coordinator.refresh_chunks()
    coordinator.observe_refresh([answer(i, 4) for i in next(chunks)])
    coordinator.save(tmp_path)
    arrays = load_file(tmp_path / "curriculum.safetensors")
    del arrays["table.response_tokens"], arrays["refresh.num_tokens"]
    save_file(arrays, tmp_path / "curriculum.safetensors")
    numbers = json.loads((tmp_path / "curriculum.json").read_text())
    del numbers["numbers"]["mean_response_tokens"]
    (tmp_path / "curriculum.json").write_text(json.dumps(numbers))
    resumed = make()
    resumed.load(tmp_path)
    assert resumed.expected_tokens(np.arange(P)).tolist() == [0] * P
    refresh(resumed, 4)  # what it had found before is not counted
    known = resumed.expected_tokens(np.arange(P))
    assert known[7:].tolist() == [round(answer(i, 4).num_tokens / 8) for i in range(7, P)]
    assert len({*known[:7].tolist()}) == 1
