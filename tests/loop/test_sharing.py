"""How a batch is shared out: slots, and groups that travel between ranks as arrays."""

import numpy as np
import pytest
from fixtures.batch_makers import Data
from fixtures.rank_threads import Ranks, on_ranks
from fixtures.responses import plain, response
from safetensors.numpy import load, save

from mmr1_ds.config import AlgorithmConfig, RolloutConfig
from mmr1_ds.loop.drawn import Drawn
from mmr1_ds.loop.group_arrays import groups_from_arrays, groups_to_arrays
from mmr1_ds.loop.sharing import (
    balanced,
    batch_slots,
    dealt,
    sampled_slots,
    share_out,
    waits_for_room,
    work_of,
)
from mmr1_ds.records import GroupRewards, Prompt, RolloutGroup, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_every_mini_batch_holds_the_same_prompts_on_any_number_of_ranks(size):
    batch, mini_batch = 24, 6
    slots = [batch_slots(batch, mini_batch, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(slots)) == list(range(batch))
    share = mini_batch // size
    for step in range(batch // mini_batch):
        own = np.concatenate([part[step * share : (step + 1) * share] for part in slots])
        assert sorted(own) == list(range(step * mini_batch, (step + 1) * mini_batch))


def scored(index, lengths, parts=(), version=3):
    """A group whose responses have these lengths; every number in it follows from the index."""
    random = np.random.default_rng(index)
    responses = tuple(
        response(random.integers(0, 150_000, n), -random.random(n), bool(k % 2), ((version, n),) * (k % 3))
        for k, n in enumerate(lengths)
    )
    overall, accuracy = random.random((2, len(lengths)), dtype=np.float32)
    accuracy[:1] = np.nan
    of_parts = {name: random.random(len(lengths), dtype=np.float32) for name in parts}
    rewards = GroupRewards(overall, accuracy, random.random(len(lengths)) < 0.5, of_parts)
    return ScoredGroup(RolloutGroup(Data()[index], responses, version), rewards)


def content(item):
    """All of a group that travels, as what compares."""
    rewards, group = item.rewards, item.group
    arrays = {"overall": rewards.overall, "accuracy": rewards.accuracy, "failed": rewards.failed, **rewards.parts}
    kept = {name: (array.dtype.name, repr(array.tolist())) for name, array in arrays.items()}
    return group.prompt.index, group.policy_version, [*map(plain, group.responses)], kept


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {5: scored(7, [0])},
        {2: scored(1, [0, 0, 0]), 0: scored(4, [1], ["format"])},
        {2**40: scored(1, [3, 0, 401], ["format", "b.c", ""]), 3: scored(8, [7, 1, 0]), 4: scored(2, [1, 1], ["b.c"])},
    ],
)
def test_groups_are_the_same_behind_the_arrays(groups):
    found = groups_from_arrays(load(save(groups_to_arrays(groups))))
    assert [*found] == [*groups]
    assert [*map(content, found.values())] == [*map(content, groups.values())]
    assert all(item.group.prompt == Prompt(item.group.prompt.index, "", (), (), "") for item in found.values())


@pytest.mark.parametrize(("size", "mini_batch"), [(1, 6), (2, 6), (3, 3), (3, 6)])
@pytest.mark.parametrize("uneven", [False, True])
def test_every_rank_gets_its_share_whoever_has_sampled_it(size, mini_batch, uneven):
    """uneven: rank 0 has all that was sampled, the others nothing."""
    groups = [scored(index, [index * 50 % 401, 0, 7], ["format"] * (index % 2)) for index in range(8)]

    def share(control):
        drawn = Drawn()
        own = [slot for slot in range(8) if (0 if uneven else slot % size) == control.rank]
        drawn.add(own, [groups[slot] for slot in own], RewardCounts(), 6, AlgorithmConfig())
        return share_out(drawn, 6, mini_batch, Data(), Ranks(control))

    ranks = on_ranks(size, share)
    share = mini_batch // size
    for start in range(0, 6, mini_batch):
        part = slice(start // size, start // size + share)
        found = sorted((content(item) for items, _, _ in ranks for item in items[part]), key=lambda item: item[0])
        assert found == [content(item) for item in groups[start : start + mini_batch]]
    for items, indices, _ in ranks:
        assert indices.tolist() == [*range(6)] and len(items) == 6 // size
        assert all(item.group.prompt == Data()[item.group.prompt.index] for item in items)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_responses_are_sampled_evenly(size):
    sizes = np.random.default_rng(2).integers(2, 20, 24)
    slots = [sampled_slots(sizes, 12, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(slots)) == list(range(24))
    for part in slots:
        assert part.dtype == np.int64 and (np.diff(part) > 0).all()
        assert (part < 12).sum() == 12 // size  # every mini-batch is shared out on its own
    responses = [sizes[part].sum() for part in slots]
    assert max(responses) - min(responses) <= 4
    equal = [sampled_slots(np.full(24, 5), 12, rank, size) for rank in range(size)]
    for rank, part in enumerate(equal):
        np.testing.assert_array_equal(part, batch_slots(24, 12, rank, size))


@pytest.mark.parametrize(
    ("num_responses", "settings", "size", "waits"),
    [
        (24, {"max_num_seqs": 8}, 3, False),
        (25, {"max_num_seqs": 8}, 3, True),
        (17, {"max_num_seqs": 8, "tensor_parallel_size": 2}, 4, True),  # two engines
        (401, {"max_num_seqs": 8, "engine": "server"}, 1, False),  # they wait in the rank, whichever that is
    ],
)
def test_when_responses_wait_for_others(num_responses, settings, size, waits):
    assert waits_for_room(num_responses, RolloutConfig(**settings), size) is waits


def test_tokens_are_sampled_evenly_where_responses_wait():
    random = np.random.default_rng(5)
    sizes, tokens = np.full(24, 7), np.rint(random.lognormal(4.0, 0.5, 24)).astype(np.int64)

    def totals(waits):
        own = [sampled_slots(work_of(sizes, tokens, waits), 12, rank, 3) for rank in range(3)]
        assert sorted(np.concatenate(own)) == list(range(24)) and {*map(len, own)} == {8}
        return [tokens[part].sum() for part in own]

    assert np.ptp(totals(True)) < 0.05 * tokens.sum() / 3 < np.ptp(totals(False))
    for tokens_of_none in (np.zeros(24, dtype=np.int64), np.full(24, 401)):  # nothing is known, or all is the same
        for rank in range(3):
            own = sampled_slots(work_of(sizes, tokens_of_none, True), 12, rank, 3)
            np.testing.assert_array_equal(own, batch_slots(24, 12, rank, 3))


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 3), (17, 1), (17, 3), (18, 3)])
def test_prompts_are_dealt_by_their_length_where_responses_wait(count, size):
    tokens = np.random.default_rng(count).integers(0, 401, count)
    plain = [dealt(tokens, False, rank, size).tolist() for rank in range(size)]
    assert plain == [[*range(rank, count, size)] for rank in range(size)]
    own = [dealt(tokens, True, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(own)) == list(range(count))
    assert all((np.diff(part) > 0).all() for part in own)
    if count % size == 0 < count:
        totals = [tokens[part].sum() for part in own]
        assert max(totals) - min(totals) <= tokens.max() - tokens.min()


def test_groups_stay_with_the_ranks_that_sampled_them():
    """But for those that even the tokens out, and where a rank sampled more than its share of an optimiser step."""
    tokens = np.array([401, 7, 7, 401, 7, 401, 401, 7])
    samplers = np.array([1, 1, 0, 0, 0, 0, 1, 1])  # each has a long and a short one of either step
    takers, metrics = balanced(tokens, samplers, 4, 2)
    assert takers.tolist() == samplers.tolist()
    assert metrics["global_seqlen/balanced_min"] == metrics["global_seqlen/balanced_max"] == 816
    even = np.full(8, 7)
    takers, _ = balanced(even, np.array([1, 0, 0, 0, 1, 1, 1, 1]), 4, 2)
    assert takers.tolist() == [1, 0, 0, 1, 1, 1, 0, 0]  # what is over goes where there is room
