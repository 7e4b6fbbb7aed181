"""Who is lost, has stalled or went astray, judged from what one rank knows: no clock, no thread and no store here.

Every verdict is text; the empty text means that nobody is at fault.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

RUNNING, DONE = "running", "done"
ENDED_BY_USER = "has ended with UserError"


@dataclass(frozen=True)
class Place:
    """What a rank reports of itself."""

    rank: int
    host: str
    beat: int = 0  # another number each time
    state: str = RUNNING  # or DONE, or the name of the error it ended with
    step: int = 0
    stage: str = "start"
    stage_seconds: float = 0.0
    number: int = 0  # of control collectives begun
    collective: str = ""  # the one it waits in
    verdict: str = ""  # whom it believes lost, and why

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host})"

    @classmethod
    def read(cls, text: bytes) -> Place:
        """Parse what a rank wrote to the store. Raises: ValueError, TypeError for what no rank wrote."""
        values = json.loads(text)
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Heard:
    """Another rank's place, and the age of its last sign of life."""

    place: Place
    seconds_ago: float

    @property
    def stage_seconds(self) -> float:
        """How long the rank has been in its stage, if it is still there."""
        return self.place.stage_seconds + self.seconds_ago


@dataclass(frozen=True)
class Known:
    """What a rank knows at one moment, by its own clock."""

    own: Place
    others: tuple[Heard, ...]  # by rank, without the ranks never heard
    waited_seconds: float  # in own.collective
    answered_seconds_ago: float  # since the store answered
    store_is_lost: bool  # it refuses connections
    lost_seconds: float  # after which a silent rank is lost, whether it is waited for or not
    silence_seconds: float  # after which a rank counts as silent where a collective failed
    timeout_seconds: float  # the longest wait for another rank

    def silent_seconds(self, heard: Heard) -> float:
        """How long a rank said nothing while it could be heard. The store ends with rank 0: others are silent then."""
        return heard.seconds_ago if heard.place.rank == 0 else heard.seconds_ago - self.answered_seconds_ago


def overdue(known: Known) -> str:
    """Who has overrun the time limit, or was found lost by another rank."""
    own = known.own
    for heard in known.others:
        if heard.place.verdict:
            return heard.place.verdict
        is_silent = known.silent_seconds(heard) > known.lost_seconds
        if is_silent and heard.place.state != DONE and own.state == RUNNING:
            return f"{lost(known, known.lost_seconds)}; reported by {own}, {_where(known)}"
    if not own.collective or known.waited_seconds <= known.timeout_seconds:
        return ""
    culprit = lost(known) or _behind(known) or "every rank is there, the connections between them must be broken"
    return f"{culprit}; reported by {own}, {_where(known)}"


def lost(known: Known, silence_seconds: float | None = None) -> str:
    """Which ranks have ended or show no sign of life."""
    silence = known.silence_seconds if silence_seconds is None else silence_seconds
    is_cut_off = known.store_is_lost or known.answered_seconds_ago > silence
    for heard in known.others[:1]:
        if heard.place.rank == 0 and is_cut_off and heard.place.state == RUNNING:
            symptom = "its connection is lost" if known.store_is_lost else "no sign of life"
            return (
                f"{heard.place} is lost: {symptom}, last heard {heard.seconds_ago:.1f} s ago in {_doing(heard.place)}; "
                "the other ranks are heard through it"
            )
    found = []
    for heard in known.others:
        place = heard.place
        if place.state == DONE:
            found.append(f"{place} has ended, after step {place.step}")
        elif place.state != RUNNING:
            found.append(f"{place} has ended with {place.state} in {_doing(place)}")
        elif known.silent_seconds(heard) > silence:
            found.append(
                f"{place} is lost: no sign of life for {heard.seconds_ago:.1f} s (dead, stopped or cut off), "
                f"last in {_doing(place)}"
            )
    return ", and ".join(found)


def unusual(known: Known) -> bool:
    """Return whether any other rank has ended, names another lost, or is silent."""
    return any(
        heard.place.verdict or heard.place.state != RUNNING or known.silent_seconds(heard) > known.silence_seconds
        for heard in known.others
    )


def elsewhere(known: Known) -> str:
    """Where a collective failed and every rank is alive: the ranks that are elsewhere, or else where each one is."""
    own = known.own
    # A rank in a collective of DeepSpeed, which is not announced, looks like one that computes in the same stage.
    if own.collective and (behind := _behind(known)):
        return behind
    apart = [heard for heard in known.others if (heard.place.stage, heard.place.step) != (own.stage, own.step)]
    everyone = sorted([Heard(own, 0.0), *known.others], key=lambda heard: heard.place.rank)
    places = ", ".join(
        f"{heard.place} for {heard.stage_seconds:.1f} s in {_doing(heard.place)}" for heard in apart or everyone
    )
    if apart:
        return f"elsewhere than {own}: {places}"
    return f"every rank shows signs of life, and the stacks show which one did not come: {places}"


def everyone_knows(known: Known) -> bool:
    """Whether every other rank has a verdict, has ended, or cannot be informed."""
    return all(
        heard.place.verdict or heard.place.state != RUNNING or heard.seconds_ago > known.silence_seconds
        for heard in known.others
    )


def absent(known: Known, num_ranks: int) -> str:
    """Which ranks were never heard within the time limit."""
    heard = {known.own.rank, *(other.place.rank for other in known.others)}
    missing = [rank for rank in range(num_ranks) if rank not in heard]
    if not missing:
        return ""
    return (
        f"{_ranks(missing)} of {num_ranks} {'has' if len(missing) == 1 else 'have'} not come within "
        f"{known.timeout_seconds:g} s (trainer.collective_timeout_seconds)"
    )


def desynchronised(known: Known, names: Sequence[str]) -> str:
    """Which ranks call which collective, given its name by rank; the largest party comes last."""
    hosts = {place.rank: place.host for place in [known.own, *(heard.place for heard in known.others)]}
    callers = {name: [rank for rank, other in enumerate(names) if other == name] for name in names}
    most = max(callers.values(), key=len)
    calls = [
        f"{_ranks(ranks, hosts)} call{'s' * (len(ranks) == 1)} {name!r}"
        for name, ranks in sorted(callers.items(), key=lambda item: item[1] is most)
    ]
    return f"the ranks are desynchronised at step {known.own.step}: {', but '.join(calls)}"


def _behind(known: Known) -> str:
    """The ranks that are alive and elsewhere than this one, which waits."""
    own, others = known.own, known.others
    lowest = min([own.number, *(heard.place.number for heard in others)])
    idle = [heard for heard in others if heard.place.number == lowest and not heard.place.collective]
    found = []
    for heard in idle or others:  # all others wait for the idle ones, some in collectives of a few
        place = heard.place
        if place.number > own.number or (place.collective and place.collective != own.collective):
            found.append(
                f"{place} is desynchronised: it is in {place.collective or place.stage!r} at step {place.step}"
            )
        elif place.number < own.number or not place.collective:
            found.append(
                f"{place} has stalled: {heard.stage_seconds:.1f} s in stage {place.stage!r} at step {place.step}"
            )
    return ", and ".join(found)


def _where(known: Known) -> str:
    own = known.own
    if own.collective:
        return f"which waited {known.waited_seconds:.1f} s in {own.collective!r} at step {own.step}"
    return f"in stage {own.stage!r} at step {own.step}"


def _doing(place: Place) -> str:
    within = f", collective {place.collective!r}" if place.collective else ""
    return f"stage {place.stage!r}{within} at step {place.step}"


def _ranks(ranks: Sequence[int], hosts: Mapping[int, str] | None = None) -> str:
    listed = ", ".join(f"{rank} (host {hosts[rank]})" if hosts and rank in hosts else str(rank) for rank in ranks)
    return f"rank{'s' * (len(ranks) > 1)} {listed}"
