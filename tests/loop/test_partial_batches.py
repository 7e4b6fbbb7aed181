"""Partial rollouts against an engine whose responses are known in full beforehand."""

import dataclasses

import numpy as np
import pytest
from fixtures.batch_makers import B, Data, FakeCollector, N, P, make, rewards, score, sections
from fixtures.rank_threads import Ranks, SingleProcess, on_ranks
from fixtures.responses import plain, response

from mmr1_ds.cluster.preemption import SamplingAbandoned
from mmr1_ds.config import RunConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.loop.in_flight import InFlight
from mmr1_ds.loop.partial_batches import FinishRates, PartialBatchMaker, _Round
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import RolloutGroup, SamplingSettings, ScoredGroup
from mmr1_ds.rewards.scoring import RESPONSES, RewardCounts

LONGEST, BUDGET = 40, 10
SETTINGS = SamplingSettings(1.0, 1.0, -1, LONGEST)


def whole_response(index, number):
    """The response that a prompt's `number`th would be without a budget; a third are longer than the budget."""
    lengths, shares = [3, 8, 9, 14, 27, 40, 55], [0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05]
    length = int(np.random.default_rng((index, number)).choice(lengths, p=shares))
    return [1000 * index + 100 * number + k for k in range(length)]


def logprobs_of(token_ids):
    return [-0.001 * token for token in token_ids]


class WholeKnown(FakeCollector):
    """Samples the known responses; every call is by a policy of its own version."""

    version = 0
    calls, cut_off = 0, ()  # batches of requests, and those of them that are abandoned

    def begin(self, in_flight, settings):
        in_flight.submitted = settings

    def __init__(self):
        super().__init__()
        self.handed_over = []  # keys and groups that were scored while others were sampled

    def score_beside(self, groups):
        known = {key for key, _ in self.handed_over}
        self.handed_over += [(key, group) for key, group in groups.items() if key not in known]
        return False

    def wait(self, in_flight, enough):
        self.calls += 1
        if self.calls in self.cut_off:
            raise SamplingAbandoned
        self.version += 1
        assert in_flight.submitted.max_tokens == BUDGET
        for position, request in enumerate(in_flight.requests):
            asked = request.max_tokens or BUDGET
            assert 0 < asked <= BUDGET
            begun = request.prompt.token_ids[3:]  # prompts have three tokens
            numbers = range(request.num_responses)
            if begun:
                assert request.num_responses == 1
                numbers = [begun[0] // 100 % 10]
            responses = []
            for number in numbers:
                whole = whole_response(request.prompt.index, number)
                assert tuple(whole[: len(begun)]) == begun and len(begun) + asked <= LONGEST
                new = tuple(whole[len(begun) : len(begun) + asked])
                end = len(begun) + len(new)
                responses.append(response(new, logprobs_of(new), finished=end == len(whole)))
            in_flight.groups[position] = RolloutGroup(request.prompt, tuple(responses), self.version)
            assert not enough(in_flight.groups)
        in_flight.submitted = None

    def score(self, groups, clock):
        scored = [ScoredGroup(group, rewards(np.arange(len(group.responses)) % 2)) for group in groups]
        return scored, RewardCounts({RESPONSES: sum(len(g.responses) for g in groups)})


def maker(control):
    config = RunConfig()
    config.worker.rollout.partial, config.data.max_response_length = BUDGET, LONGEST
    config.data.rollout_batch_size = config.worker.actor.global_batch_size = B
    config.data.seed, config.worker.rollout.n = 3, N
    coordinator = Coordinator(config.data, [f"p{i}" for i in range(P)], [""] * P, "abc", N, 8, control)
    collector = WholeKnown()
    return PartialBatchMaker(*sections(config), Ranks(control), score, Data(), coordinator, collector), coordinator


def check(scored):
    rollout = scored.group
    assert rollout.prompt == Data()[rollout.prompt.index]
    for number, found in enumerate(rollout.responses):
        whole = whole_response(rollout.prompt.index, number)
        token_ids, logprobs, finished, policy_versions = plain(found)
        assert token_ids == whole[:LONGEST]
        assert logprobs == np.float32(logprobs_of(token_ids)).tolist()
        assert finished == (len(whole) <= LONGEST)
        if policy_versions:
            counts = [count for _, count in policy_versions]
            assert sum(counts) == len(token_ids) and max(counts) <= BUDGET
            versions = [version for version, _ in policy_versions]
            assert versions == sorted(set(versions))
    oldest = [version for response in rollout.responses for version, _ in response.policy_versions]
    assert rollout.policy_version == min([*oldest, rollout.policy_version])


def seen(batch):
    return [(g.group.prompt.index, [*map(plain, g.group.responses)]) for g in batch.groups]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("cut_off", [(), (2, 3, 5, 17)])
def test_every_group_is_trained_on_once_and_whole(size, cut_off):
    """cut_off: steps that were abandoned in their first or second round and began again."""

    def run(control):
        batches, coordinator = maker(control)
        batches._collector.cut_off = cut_off
        found, rounds, waits, num_cut_off = [], [], 0, 0
        for step in range(1, 31):
            batch = None
            while batch is None:
                try:
                    batch = batches.make(step, SETTINGS, StageClock())
                except SamplingAbandoned:
                    num_cut_off += 1
            for group in batch.groups:
                check(group)
            found += [(g.group.prompt.index, id(g)) for g in batch.groups]
            assert len(batch.groups) == B // size
            rounds.append(batch.metrics["partial/num_rounds"])
            waits += batch.metrics["partial/num_unfinished"] > 0
        assert num_cut_off == len(cut_off)
        return [index for index, _ in found], rounds, waits, coordinator._num_draws, batches._queue, batches._begun

    ranks = on_ranks(size, run)
    trained = sorted(index for part in ranks for index in part[0])
    begun = sorted(request.prompt.index for part in ranks for request, _ in part[5].values())
    queue, num_draws = ranks[0][4], ranks[0][3]
    assert all(part[4] == queue for part in ranks)
    # The walk visits every prompt once an epoch: what was drawn is trained on, underway or in the queue.
    drawn = sorted(trained + begun + queue)
    counts = np.bincount(drawn, minlength=P)
    assert len(drawn) == num_draws * B and counts.max() - counts.min() <= 1
    # 11 rounds of 10 tokens would be needed for 40 tokens each; most steps take one.
    rounds = ranks[0][1]
    assert np.mean(rounds[3:]) < 1.6 and ranks[0][2] > 20


def test_a_checkpoint_keeps_what_was_begun(tmp_path):
    whole, _ = maker(SingleProcess())
    expected = [seen(whole.make(step, SETTINGS, StageClock())) for step in range(1, 9)]
    first, coordinator = maker(SingleProcess())
    for step in range(1, 5):
        first.make(step, SETTINGS, StageClock())
    first.save(tmp_path)
    (tmp_path / "c").mkdir()
    coordinator.save(tmp_path / "c")
    second, coordinator = maker(SingleProcess())
    coordinator.load(tmp_path / "c")
    second.load(tmp_path, SETTINGS)
    second._collector.version = first._collector.version
    assert [seen(second.make(step, SETTINGS, StageClock())) for step in range(5, 9)] == expected[4:]


def test_a_run_without_a_budget_leaves_what_was_cut(tmp_path, caplog):
    cut, _ = maker(SingleProcess())
    cut.make(1, SETTINGS, StageClock())
    cut.save(tmp_path)
    whole, _ = make(SingleProcess(), FakeCollector(), online_filtering=False)
    whole.load(tmp_path, SETTINGS)
    assert whole._in_flight == {} and "worker.rollout.partial" in caplog.text


def test_rates_draw_what_a_round_needs():
    rates = FinishRates()
    assert rates.num_fresh(12, 0, 100) == 12  # nothing known: all are expected to finish, none to spare
    for _ in range(200):
        rates.observe("fresh", 100, 50)
        rates.observe("carried", 20, 20)
    needed = 100
    count = rates.num_fresh(needed, 20, 1000)
    draws = np.random.default_rng(0).binomial(count, 0.5, size=20_000) + 20
    assert 0.9 < (draws >= needed).mean() < 0.995  # two deviations: a second round is rare
    assert rates.num_fresh(needed, 20, 30) == 30
    assert rates.num_fresh(10, 40, 1000) == 0


def test_long_prompts_of_every_kind_end():
    """All responses of the longest kind: a batch is there after as many rounds as they need."""
    batches, _ = maker(SingleProcess())
    batches._collector.wait = lambda in_flight, enough: _endless(in_flight)
    batch = batches.make(1, SETTINGS, StageClock())
    assert batch.metrics["partial/num_rounds"] == LONGEST // BUDGET
    assert {len(r.token_ids) for g in batch.groups for r in g.group.responses} == {LONGEST}
    assert len(batch.groups) == B and len(batches._begun) <= (LONGEST // BUDGET) * B


def _endless(in_flight):
    for position, request in enumerate(in_flight.requests):
        tokens = tuple(range(request.max_tokens or BUDGET))
        responses = (response(tokens, finished=False),) * request.num_responses
        in_flight.groups[position] = RolloutGroup(request.prompt, responses, 0)
    in_flight.submitted = None


def test_probes_that_are_cut_say_nothing():
    batches, _ = maker(SingleProcess())
    prompt = Data()[3]
    cut = RolloutGroup(prompt, (response((1,) * BUDGET, finished=False),), 0)
    whole = dataclasses.replace(cut, responses=(response((1, 2)),))
    in_flight = InFlight(1, [None] * 3, [], {0: cut, 1: whole, 2: None})
    sampled = _Round(in_flight, {})
    assert batches._merge(sampled) == [whole]
    batches._score_beside(sampled, {0: cut, 1: whole})
    assert [group for _, group in batches._collector.handed_over] == [whole]
    assert N > 1


def test_whole_groups_are_scored_before_their_round_ends():
    """The last of a round alone is known to nobody before; what is trained on later was scored when it was whole."""
    batches, _ = maker(SingleProcess())
    collector, asked = batches._collector, []
    collector.score = lambda groups, clock: (asked.append(groups), WholeKnown.score(collector, groups, clock))[1]
    num_waiting = 0
    for step in range(1, 9):
        batch = batches.make(step, SETTINGS, StageClock())
        num_waiting += batch.metrics["partial/num_waiting"]
        assert len(collector.handed_over) == len({key for key, _ in collector.handed_over})
        handed_over = [group for _, group in collector.handed_over]
        assert all(any(group is one for one in handed_over) for group in asked[-1])
        responses = [response for group in handed_over for response in group.responses]
        assert all(response.finished or len(response.token_ids) == LONGEST for response in responses)
    assert num_waiting > 0 and any(response.policy_versions for group in asked[-1] for response in group.responses)
