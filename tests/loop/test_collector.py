"""Rewards beside the sampling: scored as groups end, with the same results as behind it."""

from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.launching import wait_until
from fixtures.rank_threads import SingleProcess
from fixtures.responses import response

from mmr1_ds.config import RewardConfig
from mmr1_ds.loop.collector import Collector
from mmr1_ds.loop.in_flight import InFlight
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import Prompt, RolloutGroup, RolloutRequest
from mmr1_ds.rewards.pool import RewardPool

REWARD = """
from pathlib import Path

def one(item):
    if item["response"] == "raise":
        raise RuntimeError("no")
    Path(__file__).with_name(f"seen_{item['response']}").touch()
    return {"overall": len(item["response"]), "accuracy": 1.0}

def all(items):
    return [one(item) for item in items]
"""
TEXTS = [["a", "bb"], ["ccc", "raise"], ["dddd", "e"]]


class Ranks(SingleProcess):
    def sum(self, own, stage):
        return own


class Engine:
    """Samples one group after the other, and goes on only when the one before was scored."""

    def __init__(self, seen, groups):
        self._seen, self._groups = seen, groups

    def submit(self, requests, settings):
        return len(requests)

    def collect(self, submitted, enough, advance=None):
        there = {}
        for position, group in enumerate(self._groups):
            there[position] = group
            assert not enough(there)
            if position < submitted - 1:
                wait_until(lambda at=position: self._seen(TEXTS[at][0]), 60, f"group {position} is scored")
        return list(there.values())


@pytest.mark.parametrize(("kind", "function"), [("sequential", "one"), ("batch", "all")])
def test_groups_are_scored_while_others_are_sampled(tmp_path, kind, function):
    (tmp_path / "mine.py").write_text(REWARD)
    prompts = [Prompt(index, f"p{index}", (1,), (), "") for index in range(3)]
    groups = [
        RolloutGroup(prompt, tuple(response([ord(letter) for letter in text]) for text in texts), 0)
        for prompt, texts in zip(prompts, TEXTS, strict=True)
    ]

    def seen(text):
        return kind == "batch" or (tmp_path / f"seen_{text}").exists()

    encoder = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)), expand_ahead=lambda prompts: None)
    config = RewardConfig(f"{tmp_path / 'mine.py'}:{function}", reward_type=kind, num_workers=2)
    with RewardPool(config) as pool:
        collector = Collector(Engine(seen, groups), pool, "mine.py:score", encoder, Ranks())
        requests = [RolloutRequest(prompt, 2, 0) for prompt in prompts]
        in_flight = InFlight(1, requests, [0, 1, 2])
        collector.begin(in_flight, None)
        collector.wait(in_flight, collector.score_beside)
        assert not (kind == "batch" and (tmp_path / "seen_a").exists())  # a batch is one call, behind the sampling
        found, counts = collector.score([in_flight.groups[at] for at in range(3)], StageClock())
        behind, behind_counts = collector.score(groups, StageClock())
        for path in tmp_path.glob("seen_*"):
            path.unlink()
        validated, _ = collector.collect(requests, None, StageClock())  # the engine waits for each reward here, too
    assert [item.group for item in found] == groups and counts == behind_counts
    assert counts["reward/num_responses"] == 6 and counts["reward/num_errors"] == 1
    for one, *others in zip(found, behind, validated, strict=True):
        for other in others:
            np.testing.assert_array_equal(one.rewards.overall, other.rewards.overall)
            np.testing.assert_array_equal(one.rewards.failed, other.rewards.failed)
    assert [item.rewards.overall.tolist() for item in found] == [[1, 2], [3, 3], [4, 1]]


def test_groups_of_several_waits_are_scored_once_and_wait_for_the_step_that_asks(tmp_path):
    """As with rounds of cut responses: two calls sample, then a step takes some groups and the next the others."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "def one(item):\n"
        "    with open(Path(__file__).with_name('asked'), 'a') as file:\n"
        "        file.write(item['response'])\n"
        "    return {'overall': ord(item['response'])}\n"
    )
    groups = [RolloutGroup(Prompt(k, f"p{k}", (1,), (), ""), (response([97 + k]),), 0) for k in range(5)]
    encoder = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)), expand_ahead=lambda prompts: None)

    class Rounds:
        def submit(self, requests, settings):
            return [groups[request.prompt.index] for request in requests]

        def collect(self, submitted, enough, advance=None):
            enough(dict(enumerate(submitted)))
            return submitted

    with RewardPool(RewardConfig(f"{tmp_path / 'mine.py'}:one", reward_type="sequential", num_workers=1)) as pool:
        collector = Collector(Rounds(), pool, "mine.py:one", encoder, Ranks())
        for part in ([0, 1], [2, 3]):
            in_flight = InFlight(1, [RolloutRequest(groups[k].prompt, 1, 0) for k in part], part)
            collector.begin(in_flight, None)
            by_number = dict(enumerate(part))
            collector.wait(
                in_flight, lambda there, names=by_number: collector.score_beside({names[at]: there[at] for at in there})
            )
        first, counts = collector.score([groups[k] for k in (3, 0, 2)], StageClock())
        second, later_counts = collector.score([groups[k] for k in (1, 4)], StageClock())
    assert [item.rewards.overall.tolist() for item in first + second] == [[100], [97], [99], [98], [101]]
    assert (counts["reward/num_responses"], later_counts["reward/num_responses"]) == (4, 1)
    assert sorted((tmp_path / "asked").read_text()) == ["a", "b", "c", "d", "e"]
