"""What a rank concludes from what it knows: who is lost, who has stalled, who went astray."""

import dataclasses
import re

import pytest

from mmr1_ds.cluster.judgement import (
    DONE,
    Heard,
    Known,
    Place,
    absent,
    desynchronised,
    elsewhere,
    everyone_knows,
    lost,
    overdue,
)


def at(rank: int, stage: str, seconds: float, number: int, collective: str = "", step: int = 5) -> Place:
    return Place(rank, f"h{rank}", 9, "running", step, stage, seconds, number, collective)


def known(
    places: list[Place],
    own: int,
    heard_ago: dict[int, float] | None = None,
    answered_ago: float = 0.0,
    store_is_lost: bool = False,
) -> Known:
    """What rank `own` knows, which has waited 10.5 of 10 seconds; the others were heard just now unless given."""
    ages = heard_ago or {}
    others = tuple(Heard(place, ages.get(place.rank, 0.0)) for place in places if place.rank != own)
    (place,) = (place for place in places if place.rank == own)
    limits = {"lost_seconds": 6.0, "silence_seconds": 1.5, "timeout_seconds": 10.0}
    return Known(place, others, 10.5, answered_ago, store_is_lost, **limits)


def named(words: str) -> list[int]:
    return [int(rank) for rank in re.findall(r"rank (\d+) \(host", words.split("; reported by")[0])]


@pytest.mark.parametrize("own", [0, 2, 3])
def test_ranks_that_wait_in_a_group_or_in_a_later_collective_are_not_named(own):
    """Groups of two: 0 waits for 1, which stalls, in their group; 2 and 3 are done with theirs."""
    places = [
        at(0, "old", 10.5, 7, "gather sequences of a group"),
        at(1, "old", 11.0, 7),
        at(2, "update_actor", 10.2, 8, "count response tokens"),
        at(3, "update_actor", 10.2, 8, "count response tokens"),
    ]
    collective = places[own].collective
    assert overdue(known(places, own)) == (
        "rank 1 (host h1) has stalled: 11.0 s in stage 'old' at step 5; "
        f"reported by rank {own} (host h{own}), which waited 10.5 s in {collective!r} at step 5"
    )


def test_a_rank_in_another_collective_is_desynchronised():
    places = [at(0, "gen", 10.5, 7, "count"), at(1, "gen", 10.5, 7, "gather")]
    words = overdue(known(places, 0))
    assert words.startswith("rank 1 (host h1) is desynchronised: it is in 'gather' at step 5; reported by")


def test_two_ranks_that_stall_are_named_both():
    places = [at(0, "old", 10.5, 8, "count"), at(1, "gen", 11.0, 7), at(2, "gen", 12.0, 7)]
    assert named(overdue(known(places, 0))) == [1, 2]


def test_where_all_wait_in_the_same_collective_no_rank_is_named():
    places = [at(rank, "gen", 10.5, 7, "count") for rank in range(3)]
    words = overdue(known(places, 1))
    assert words.startswith("every rank is there, the connections between them must be broken; reported by rank 1")


def test_nothing_is_overdue_before_the_limit():
    places = [at(0, "old", 10.5, 8, "count"), at(1, "gen", 11.0, 7)]
    assert overdue(dataclasses.replace(known(places, 0), waited_seconds=9.5)) == ""
    assert overdue(known([at(0, "old", 10.5, 8), places[1]], 0)) == ""  # it computes, and waits for nobody


def test_the_verdict_of_another_rank_is_taken_over():
    places = [at(0, "gen", 1.0, 7), dataclasses.replace(at(1, "gen", 1.0, 7), verdict="rank 2 (host h2) is lost")]
    assert overdue(known(places, 0)) == "rank 2 (host h2) is lost"


@pytest.mark.parametrize(
    ("heard_ago", "answered_ago", "culprits"),
    [({0: 14, 1: 14, 3: 15}, 14, [0]), ({0: 1, 1: 0, 3: 14}, 0, [3]), ({0: 20, 1: 14, 3: 30}, 14, [0])],
)
def test_silence_after_the_stores_end_is_not_the_others(heard_ago, answered_ago, culprits):
    facts = known([at(rank, "gen", 1.0, 7) for rank in range(4)], 2, heard_ago, answered_ago)
    assert named(lost(facts)) == culprits
    assert named(overdue(facts)) == culprits


def test_rank_0_that_ended_with_an_error_is_named_alone():
    """Its store ended with it, 14 seconds ago: nothing was heard of anyone since."""
    places = [at(rank, "gen", 1.0, 7) for rank in range(4)]
    places[0] = dataclasses.replace(places[0], state="MemoryError")
    facts = known(places, 2, dict.fromkeys(range(4), 14), answered_ago=13.5, store_is_lost=True)
    assert lost(facts) == "rank 0 (host h0) has ended with MemoryError in stage 'gen' at step 5"
    assert named(overdue(facts)) == [0]


def test_a_rank_that_is_done_is_lost_to_a_collective_but_not_by_its_silence():
    places = [at(0, "gen", 1.0, 7), dataclasses.replace(at(1, "gen", 1.0, 7), state=DONE)]
    facts = known(places, 0, {1: 30})
    assert lost(facts) == "rank 1 (host h1) has ended, after step 5"
    assert overdue(facts) == ""


def test_where_a_collective_of_deepspeed_fails_the_ranks_elsewhere_are_named():
    """A rank in such a collective reports none."""
    places = [at(rank, "update_actor", 3.0, 7) for rank in range(4)]
    places[3] = at(3, "old", 11.0, 7)
    words = elsewhere(known(places, 0))
    assert words == "elsewhere than rank 0 (host h0): rank 3 (host h3) for 11.0 s in stage 'old' at step 5"
    places[3] = at(3, "update_actor", 11.0, 7, step=4)
    assert "rank 3 (host h3) for 11.0 s in stage 'update_actor' at step 4" in elsewhere(known(places, 1))


def test_where_a_collective_of_deepspeed_fails_in_one_stage_every_place_is_reported():
    words = elsewhere(known([at(rank, "update_actor", 3.0 + rank, 7) for rank in range(3)], 1, {2: 0.5}))
    assert named(words) == [0, 1, 2]
    assert "rank 2 (host h2) for 5.5 s in stage 'update_actor' at step 5" in words


def test_where_an_announced_collective_fails_the_rank_behind_is_named():
    places = [at(0, "old", 10.5, 8, "count"), at(1, "old", 11.0, 7), at(2, "old", 10.0, 8, "count")]
    assert named(elsewhere(known(places, 0))) == [1]


def test_ranks_that_were_never_heard_are_absent():
    facts = known([at(rank, "start", 0.0, 0) for rank in (0, 2)], 0)
    assert absent(facts, 3) == "rank 1 of 3 has not come within 10 s (trainer.collective_timeout_seconds)"
    assert absent(facts, 5).startswith("ranks 1, 3, 4 of 5 have not come")
    assert absent(known([at(0, "start", 0.0, 0)], 0), 1) == ""


def test_collectives_of_different_names_are_ordered_by_how_many_call_them():
    facts = known([at(rank, "gen", 1.0, 7) for rank in range(3)], 2)
    assert desynchronised(facts, ["a", "b", "a"]) == (
        "the ranks are desynchronised at step 5: rank 1 (host h1) calls 'b', "
        "but ranks 0 (host h0), 2 (host h2) call 'a'"
    )


def test_whoever_has_a_verdict_has_ended_or_is_silent_need_not_be_waited_for():
    places = [at(rank, "gen", 1.0, 7) for rank in range(4)]
    places[1] = dataclasses.replace(places[1], verdict="rank 9 is lost")
    places[2] = dataclasses.replace(places[2], state="MemoryError")
    assert everyone_knows(known(places, 0, {3: 2.0}))
    assert not everyone_knows(known(places, 0, {3: 1.0}))


def test_a_rank_that_is_silent_is_lost_long_before_the_time_limit():
    places = [at(0, "gen", 3.0, 7), at(1, "gen", 3.0, 7), at(2, "gen", 3.0, 7)]
    assert overdue(dataclasses.replace(known(places, 0, {1: 5.9}), waited_seconds=0.0)) == ""
    words = overdue(dataclasses.replace(known(places, 0, {1: 6.1}), waited_seconds=0.0))
    assert named(words) == [1] and "no sign of life for 6.1 s" in words
    # The store is what does not answer: nobody but its host can be said to be silent.
    assert overdue(dataclasses.replace(known(places, 1, {0: 5.0, 2: 8.0}, answered_ago=5.0), waited_seconds=0.0)) == ""
