"""Batches begun ahead: kept by a checkpoint, shared out again over any number of ranks."""

import numpy as np
import pytest
from fixtures.batch_makers import STEPS, FakeCollector, content, make
from fixtures.rank_threads import SingleProcess
from fixtures.responses import plain, response
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mmr1_ds.loop.in_flight import InFlight, read_in_flight, write_in_flight
from mmr1_ds.loop.sharing import batch_slots
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import Prompt, RolloutGroup, RolloutRequest, SamplingSettings

SETTINGS = SamplingSettings(1.0, 1.0, -1, 16)


def prompt(index):
    return Prompt(index, f"p{index}", (1, 2, index), ("image",), str(index))


@st.composite
def responses(draw):
    tokens = draw(st.lists(st.integers(0, 200_000), max_size=5))
    logprobs = draw(st.lists(st.floats(-50, 0), min_size=len(tokens), max_size=len(tokens)))
    spans = draw(st.sampled_from([(), ((3, len(tokens)),), ((3, 1), (5, len(tokens) - 1))]))
    return response(tokens, logprobs, draw(st.booleans()), spans)


@st.composite
def batches(draw, size, slots):
    """One a rank, of a batch in which some groups are there, some were given up and some are still asked for."""
    found = []
    for rank in range(size):
        own = slots[rank::size]
        num_probes = draw(st.integers(0, 3))
        requests = [RolloutRequest(prompt(slot * 7 % 50), 3, 1000 + slot) for slot in own]
        requests += [RolloutRequest(prompt(40 + rank), 2, rank * 100 + k, can_wait=True) for k in range(num_probes)]
        groups = {}
        for position, request in enumerate(requests):
            state = draw(st.sampled_from(["open", "there", "given up" if request.can_wait else "there"]))
            if state != "open":
                sampled = tuple(draw(responses()) for _ in range(request.num_responses))
                groups[position] = RolloutGroup(request.prompt, sampled, 3) if state == "there" else None
        found.append(InFlight(9, requests, own, groups))
    return found


def rows(items):
    """Every request with what is known of it, whichever rank holds it."""
    return sorted(
        (item.slots[k] if k < len(item.slots) else -1, request.seed, request, shown(item.groups.get(k, "open")))
        for item in items
        for k, request in enumerate(item.requests)
    )


def shown(group):
    if not isinstance(group, RolloutGroup):
        return repr(group)
    return repr((group.prompt, group.policy_version, [*map(plain, group.responses)]))


@settings(max_examples=40)
@given(st.data(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]))
def test_nothing_is_lost_on_another_number_of_ranks(tmp_path_factory, data, before, after):
    folder = tmp_path_factory.mktemp("kept")
    written = data.draw(batches(before, list(range(12))))
    for rank, item in enumerate(written):
        write_in_flight(folder, rank, [item])
    read = []
    for rank in range(after):
        slots = batch_slots(12, 4, rank, after)
        (item,) = read_in_flight(folder, prompt, lambda sizes, own=slots: own.tolist(), rank, after)
        assert item.step == 9 and item.slots == sorted(slots.tolist())
        assert [request.can_wait for request in item.requests[: len(item.slots)]] == [False] * len(item.slots)
        read.append(item)
    assert [row[:2] for row in rows(read)] == [row[:2] for row in rows(written)]
    assert rows(read) == rows(written)  # prompts, seeds, and every token, log-probability and version


def test_files_of_earlier_versions_have_wider_types(tmp_path):
    group = RolloutGroup(prompt(4), (response([5, 6], [-0.1, -0.2]), response([], [])), 3)
    request = RolloutRequest(prompt(4), 2, 7)
    write_in_flight(tmp_path, 0, [InFlight(9, [request], [0], {0: group})])
    path = tmp_path / "rank_0.safetensors"
    arrays = load_file(path)
    arrays |= {"9.token_ids": np.array([5, 6]), "9.logprobs": np.array([-0.1, -0.2])}
    save_file(arrays, path)
    (read,) = read_in_flight(tmp_path, prompt, lambda sizes: sizes, 0, 1)
    assert shown(read.groups[0]) == shown(group)


def collected(item):
    return item.submitted is None and len(item.groups) == len(item.requests)


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_run_ahead_draws_as_one_in_turn_and_goes_on_from_a_checkpoint(tmp_path, staleness):
    """With one step ahead, a batch is drawn after the one before was observed: by the very same weights."""

    def run(folder=None, stop=None, steps=range(1, STEPS + 1)):
        maker, coordinator = make(SingleProcess(), FakeCollector(), online_filtering=False)
        maker._rollout.max_staleness_steps = staleness
        if stop is None and folder is not None:
            coordinator.load(folder)
            maker.load(folder, SETTINGS)
        found = []
        for step in steps:
            found.append(content(maker.make(step, SETTINGS, StageClock())))
            maker.begin_ahead(step, SETTINGS)
            assert set(maker._in_flight) == set(range(step + 1, min(step + staleness, 8) + 1))
        if stop is not None:
            maker.finish_ahead()
            assert all(collected(item) for item in maker._in_flight.values())
            coordinator.save(folder)
            maker.save(folder)
        return found

    whole = run()
    first = run(tmp_path, stop=3, steps=range(1, 4))
    assert first + run(tmp_path, steps=range(4, STEPS + 1)) == whole
    in_turn, _ = make(SingleProcess(), FakeCollector(), online_filtering=False)
    assert [content(in_turn.make(step, SETTINGS, StageClock())) for step in range(1, STEPS + 1)] == whole


def test_a_step_behind_a_refresh_is_not_begun_before_it():
    maker, coordinator = make(SingleProcess(), FakeCollector(), online_filtering=False,
                              sampling_strategy="curriculum", curriculum_update_freq=2)  # fmt: skip
    maker._rollout.max_staleness_steps = 3
    assert list(coordinator.refresh_chunks())
    coordinator._refresh.done[:] = True
    coordinator.finish_refresh(1)
    maker.make(1, SETTINGS, StageClock())
    maker.begin_ahead(1, SETTINGS)
    assert set(maker._in_flight) == {2}  # step 3 is drawn by what the refresh before it finds
