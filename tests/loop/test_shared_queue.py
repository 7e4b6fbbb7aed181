"""Requests in one queue: whichever rank takes what, the batch is the one that the ranks would have sampled apart."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.batch_makers import SETTINGS, B, Data, FakeCollector, N, P, content, rewards, score, sections
from fixtures.rank_threads import Ranks, on_ranks
from fixtures.responses import plain

from mmr1_ds.cluster.preemption import SamplingAbandoned
from mmr1_ds.config import DataConfig, RunConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.group_sizes import SizeRange
from mmr1_ds.loop.batches import BatchMaker
from mmr1_ds.loop.collector import VALIDATION, Collector, RequestMaker
from mmr1_ds.loop.shared_queue import SharedQueue, unread
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import ScoredGroup
from mmr1_ds.rewards.scoring import FAILED, RESPONSES, RewardCounts
from mmr1_ds.rollout.base import ignore, never


class Counter:
    """The counter of ranks that are threads. Counts how often it was asked."""

    def __init__(self):
        self._lock, self.value, self.num_asked = threading.Lock(), 0, 0

    def reset(self):
        with self._lock:
            self.value = 0

    def next(self):
        with self._lock:
            self.value += 1
            self.num_asked += 1
            return self.value - 1


class Engine:
    """Takes requests one at a time; `turns` says which rank is next."""

    def __init__(self, rank, turns, is_abandoned=lambda: False):
        self.rank, self.turns, self.is_abandoned, self.taken = rank, turns, is_abandoned, []

    def submit(self, requests, settings):
        return requests

    def collect(self, submitted, enough, advance):
        groups = [item.group for item in FakeCollector().collect(submitted, SETTINGS, None)[0]]
        assert not enough(dict(enumerate(groups)))
        return groups

    def collect_shared(self, queue, settings, enough, advance):
        requests = {}
        while (number := self.turns.take(self.rank, queue)) is not None:
            requests[number] = queue.request(number)
            advance(requests[number].num_responses)
        self.turns.end()
        if self.is_abandoned():
            raise SamplingAbandoned
        self.taken.append([(number, request.prompt.index) for number, request in requests.items()])
        scored, _ = FakeCollector().collect([*requests.values()], settings, None)
        groups = {number: item.group for number, item in zip(requests, scored, strict=True)}
        assert not enough(groups)
        return groups


class Turns:
    """Lets the ranks take in the order that `order` gives, again and again."""

    def __init__(self, size, order):
        self._order, self._at = order, 0
        self._changed, self._barrier = threading.Condition(), threading.Barrier(size)
        self._is_over = False

    def take(self, rank, queue):
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._order[self._at % len(self._order)] == rank, 10)
            if self._is_over:
                return None
            number = queue.take()
            self._at, self._is_over = self._at + 1, number is None
            self._changed.notify_all()
            return number

    def end(self):
        if self._barrier.wait(10) == 0:
            self._is_over = False
        self._barrier.wait(10)


class SharingCollector(FakeCollector):
    def share(self, in_flight, queue, settings):
        found = queue.sample(in_flight, settings, never)
        scored, _ = self.collect(found.requests, settings, None)
        self.scored = {id(group): item for group, item in zip(found.groups.values(), scored, strict=True)}
        return found

    def collect(self, requests, settings, clock, shared=None):
        """The reward of a greedy response is the prompt's index."""
        if settings.temperature > 0.0:
            return super().collect(requests, settings, clock)
        if shared is None:
            groups = dict(enumerate(item.group for item in super().collect(requests, settings, clock)[0]))
        else:
            groups = shared.sample_shares(requests, settings, never, ignore)
        found = {slot: ScoredGroup(group, rewards([group.prompt.index])) for slot, group in groups.items()}
        return [*found.values()] if shared is None else shared.bring_home(found), RewardCounts()


def maker_of(control, queue, collector, filtering=False, sizes=None, remax=False, steps=8):
    config = RunConfig()
    config.data = DataConfig(
        rollout_batch_size=B, seed=3, sampling_strategy="curriculum", curriculum_refresh="online",
        curriculum_probe_fraction=0.5,
    )  # fmt: skip
    config.worker.rollout.n, config.worker.actor.global_batch_size = N, B // 2
    config.algorithm.online_filtering = filtering
    if remax:
        config.algorithm.adv_estimator = "remax"
    if sizes is not None:
        config.worker.rollout.n_min, config.worker.rollout.n_max = sizes.smallest, sizes.largest
    coordinator = Coordinator(config.data, [f"p{i}" for i in range(P)], [""] * P, "abc", N, steps, control, sizes=sizes)
    return BatchMaker(*sections(config), Ranks(control), score, Data(), coordinator, collector, queue)


def queue_of(control, counter, turns, is_abandoned=lambda: False):
    engine = Engine(control.rank, turns, is_abandoned)
    return SharedQueue(engine, Data(), lambda prompts: None, Ranks(control), counter), engine


def groups_of(ranks):
    """The groups of all ranks, in one order; a prompt may be in a batch twice."""
    return sorted((group for own in ranks for group in own), key=repr)


@pytest.mark.parametrize(("size", "order"), [(1, [0]), (2, [1]), (2, [0, 1, 1]), (3, [2, 2, 2, 0]), (6, [5, 4, 3])])
@pytest.mark.parametrize("more", [{}, {"filtering": True}, {"sizes": SizeRange(2, 9)}, {"remax": True}], ids=str)
def test_the_batch_is_that_of_ranks_with_requests_of_their_own(size, order, more):
    """Some ranks take nothing at all; probes, further draws and groups of different sizes come along."""

    def batches(queued):
        counter, turns = Counter(), Turns(size, order)

        def on_rank(control):
            queue, engine = queue_of(control, counter, turns) if queued else (None, None)
            maker = maker_of(control, queue, SharingCollector(), **more)
            found = [maker.make(step, SETTINGS, StageClock()) for step in (1, 2)]
            for batch in found:
                expected = [item.group.prompt.index for item in batch.groups]
                assert batch.baselines == (expected if "remax" in more else None)
            figures = [{k: v for k, v in batch.metrics.items() if not k.startswith("global_seqlen")} for batch in found]
            return [content(batch) for batch in found], [batch.prompts.tolist() for batch in found], figures, engine

        return on_ranks(size, on_rank)

    apart, queued = batches(False), batches(True)
    for step in (0, 1):
        groups = [groups_of([rank[0][step] for rank in ranks]) for ranks in (apart, queued)]
        assert len(groups[0]) == B and groups[0] == groups[1]
        assert all(len(rank[0][step]) == B // size for rank in queued)
        assert apart[0][1][step] == queued[0][1][step]
        for one, other in zip(apart, queued, strict=True):
            assert one[2][step] == pytest.approx(other[2][step])
    for calls in zip(*(rank[3].taken for rank in queued), strict=True):
        numbers = sorted(number for own in calls for number, _ in own)
        assert numbers == [*range(len(numbers))] and len(numbers) >= B  # each once
    idle = set(range(size)) - {*order}
    assert all(not call for rank in idle for call in queued[rank][3].taken)


@pytest.mark.parametrize("size", [1, 2])
def test_what_was_drawn_before_the_run_was_cut_off_is_sampled_by_the_next(tmp_path, size):
    def begin(control, counter, turns):
        queue, _ = queue_of(control, counter, turns, is_abandoned=lambda: True)
        maker = maker_of(control, queue, SharingCollector())
        with pytest.raises(SamplingAbandoned):
            maker.make(1, SETTINGS, StageClock())
        maker.save(tmp_path)

    counter, turns = Counter(), Turns(size, [*range(size)])
    on_ranks(size, lambda control: begin(control, counter, turns))
    other_size = 3
    counter, turns = Counter(), Turns(other_size, [2, 0])

    def resume(control):
        queue, engine = queue_of(control, counter, turns)
        maker = maker_of(control, queue, SharingCollector())
        maker.load(tmp_path, SETTINGS)
        # The draw is in the checkpoint's curriculum: here, where there is none, another draw would be the same again.
        maker._coordinator.next_groups = None
        return content(maker.make(1, SETTINGS, StageClock())), engine.taken

    resumed = on_ranks(other_size, resume)
    straight = on_ranks(
        1, lambda control: content(maker_of(control, None, FakeCollector()).make(1, SETTINGS, StageClock()))
    )
    assert groups_of([own for own, _ in resumed]) == groups_of(straight)
    assert resumed[1][1] == [[]]


def test_the_queue_is_in_the_order_of_the_draw_with_probes_last():
    counter, turns = Counter(), Turns(3, [0])

    def on_rank(control):
        queue, engine = queue_of(control, counter, turns)
        maker = maker_of(control, queue, SharingCollector())
        return maker.make(1, SETTINGS, StageClock()).prompts, engine.taken

    (prompts, (taken,)), *_ = on_ranks(3, on_rank)
    indices = [index for _, index in taken]
    np.testing.assert_array_equal(indices[:B], prompts)
    assert len(indices) > B and not set(indices[B:]) & set(prompts.tolist())
    assert counter.num_asked == len(taken) + 1  # nothing is counted after the end


def test_later_batches_begin_with_the_longest_responses():
    """A response to prompt i has 3 + i % 11 tokens: see FakeCollector."""
    counter, turns = Counter(), Turns(2, [1, 0])

    def on_rank(control):
        queue, engine = queue_of(control, counter, turns)
        maker = maker_of(control, queue, SharingCollector(), steps=1)
        for step in (1, 2, 3):
            maker.make(step, SETTINGS, StageClock())
        return engine.taken, maker._coordinator._lengths._tokens

    ranks = on_ranks(2, on_rank)
    first, second, third = (sorted(ranks[0][0][step] + ranks[1][0][step]) for step in (0, 1, 2))
    np.testing.assert_array_equal(ranks[0][1][[index for _, index in third]], [3 + i % 11 for _, i in third])
    seen = {index for _, index in first + second}
    of_known = [index % 11 for _, index in third if index in seen]  # for others the mean is expected
    assert len({*of_known}) > 2 and of_known == sorted(of_known, reverse=True)


def scored_by_ground_truth(pool, groups, decode):
    """Rewards that follow from the prompt's text, which only the rank that samples it has read."""
    found = []
    for group in groups:
        overall = float(group.prompt.ground_truth) + np.arange(len(group.responses))
        found.append(ScoredGroup(group, rewards(overall, part=overall / 2)))
    num_failed = sum(group.prompt.index > 30 for group in groups)
    return found, RewardCounts({RESPONSES: sum(len(group.responses) for group in groups), FAILED: num_failed})


@pytest.mark.parametrize(("size", "order"), [(1, [0]), (2, [1]), (2, [0, 1, 1]), (3, [2, 2, 2, 0]), (3, [0, 1, 2])])
@pytest.mark.parametrize("together", ["one", "batch"])
def test_shares_come_back_to_the_ranks_that_asked_for_them(monkeypatch, size, order, together):
    """As validation, a refresh and baselines ask for: each rank has the groups of its own requests, in their order."""
    monkeypatch.setattr("mmr1_ds.loop.collector.score_groups", scored_by_ground_truth)
    indices = np.array([31, 7, 8, 2, 59, 7, 11])

    def results(queued):
        counter, turns = Counter(), Turns(size, order)

        def on_rank(control):
            engine, expanded, advanced = Engine(control.rank, turns), [], []
            queue = SharedQueue(engine, None, expanded.extend, Ranks(control), counter).of(Data()) if queued else None
            pool, encoder = SimpleNamespace(together=together), SimpleNamespace(decode=str)
            collector = Collector(engine, pool, "mine", encoder, Ranks(control))
            found = []
            for step, asked in enumerate((indices, indices[:1])):  # of the second call most ranks ask for nothing
                own = asked[control.rank :: control.size]
                requests = RequestMaker(1)(unread(Data(), queue), own, 1 + step, VALIDATION, step, own, own % 3)
                groups, counts = collector.collect(requests, SETTINGS, StageClock(), advanced.append, queue)
                rows = [(item.group.prompt.index, [*map(plain, item.group.responses)]) for item in groups]
                figures = [(item.rewards.overall.tolist(), item.rewards.parts["part"].tolist()) for item in groups]
                found.append((rows, figures, counts))
            assert expanded == []  # none of it is trained on
            assert not queued or sum(advanced) == len(engine.taken[0]) + 2 * len(engine.taken[1])
            return found, engine.taken

        return on_ranks(size, on_rank)

    apart, taken = zip(*results(False), strict=True)
    assert not any(taken)
    shared, taken = zip(*results(True), strict=True)
    for rank in set(range(size)) - {*order}:
        assert taken[rank] == [[], []]
    for one, other in zip(apart, shared, strict=True):
        assert [call[:2] for call in one] == [call[:2] for call in other]
    assert sum(len(rank[0][0]) for rank in shared) == len(indices)
    for call in (0, 1):
        totals = [sum((rank[call][2] for rank in ranks), RewardCounts()) for ranks in (apart, shared)]
        assert totals[0] == totals[1]
