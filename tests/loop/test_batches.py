from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from fixtures.batch_makers import SETTINGS, STEPS, B, FakeCollector, N, content, make, scored
from fixtures.rank_threads import SingleProcess, on_ranks

from mmr1_ds.cluster.preemption import SamplingAbandoned
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.group_sizes import SizeRange
from mmr1_ds.errors import UserError
from mmr1_ds.loop.drawn import teaches
from mmr1_ds.monitoring.clock import StageClock


@pytest.mark.parametrize(
    ("group", "algorithm", "expected"),
    [
        (scored([0, 1, 1]), {}, True),
        (scored([1, 1, 1]), {}, False),
        (scored([0.1, 0.1, 0.1]), {}, False),  # all wrong in good format: a mean above 0.01, and nothing to learn
        (scored([0.1, 0.1, 0.1 + 1e-7]), {}, True),  # a difference is a difference, however small
        (scored([-1, -1, 1]), {}, True),  # a negative mean says nothing either
        (scored([0, 1, 1]), {"filter_high": 0.5}, False),
        (scored([0, 1, 1]), {"filter_low": 0.5, "filter_high": 0.7}, True),
        (scored([0, 0, 1]), {"filter_low": 0.5}, False),
        (scored([0.9, 1.0], [1, 1]), {"filter_key": "accuracy"}, False),
        (scored([0.9, 1.0], [1, 1]), {}, True),
        (scored([0.5, 0.5], [0, 1]), {"filter_key": "accuracy"}, False),  # no gradient, whatever the accuracy
        (scored([0.1, 1.0], [np.nan, 1]), {"filter_key": "accuracy"}, False),
        (scored([0.1, 1.0, 0.1], [np.nan, 1, 0]), {"filter_key": "accuracy"}, True),
        (scored([0.1, 1.0], [np.nan, np.nan]), {"filter_key": "accuracy"}, False),
        (scored([0.1, 1.0], format=[0.0, 1.0]), {"filter_key": "format"}, True),
    ],
)
def test_which_groups_teach(group, algorithm, expected):
    assert teaches(group, AlgorithmConfig(**algorithm)) is expected


def test_a_group_whose_rewards_all_failed_does_not_teach():
    assert not teaches(scored([0, 0]), AlgorithmConfig(filter_key="format"))  # such a group has no parts


@pytest.mark.parametrize("size", [1, 3])
def test_an_unknown_filter_key_is_told_on_every_rank(size):
    def first_step(control):
        maker, _ = make(control, FakeCollector(), filter_key="acc")
        with pytest.raises(UserError, match=r"filter_key=acc is not among the reward's keys: accuracy, overall"):
            maker.make(1, SETTINGS, StageClock())

    on_ranks(size, first_step)


def test_filtering_draws_until_the_batch_teaches():
    maker, coordinator = make(SingleProcess(), FakeCollector())
    batch = maker.make(1, SETTINGS, StageClock())
    assert len(batch.groups) == B
    assert all(group.group.prompt.index % 3 == 0 for group in batch.groups)
    assert all(teaches(group, AlgorithmConfig()) for group in batch.groups)
    tries = batch.metrics["online_filtering/num_tries"]
    assert 2 <= tries <= 5  # a third of 60 prompts teach: 5 tries of 12 see them all
    assert len(set(maker._collector.seeds)) == tries * B  # no try repeats the seeds of another
    assert batch.metrics["online_filtering/teaching_fraction"] == pytest.approx(1 / 3, abs=0.1)
    metrics = coordinator.metrics()
    assert metrics["curriculum/consumed_batches"] == tries
    assert metrics["curriculum/extra_rollout_fraction"] == pytest.approx(tries - 1)
    assert batch.metrics["reward/num_responses"] == tries * B * N


@pytest.mark.parametrize("size", [1, 3])
def test_draws_sampled_together_are_those_of_one_after_the_other(size):
    """The same prompts and seeds, and so the same batch, in fewer rounds; the curriculum learns from all of them."""
    strategy = {"sampling_strategy": "curriculum", "curriculum_refresh": "online", "curriculum_probe_fraction": 0.5}

    def first_step(oversample):
        def on_rank(control):
            maker, coordinator = make(control, FakeCollector(), oversample=oversample, **strategy)
            batch = maker.make(1, SETTINGS, StageClock())
            return content(batch), batch.prompts.tolist(), batch.metrics, coordinator.metrics()

        return on_ranks(size, on_rank)

    observed = []
    original = Coordinator.observe

    def observe(self, step, statistics):
        observed.extend(statistics)
        original(self, step, statistics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "observe", observe)
        single = first_step(1)
        of_single = len(observed)
        observed.clear()
        together = first_step(4)
    tries = single[0][2]["online_filtering/num_tries"]
    assert 2 < tries <= 4 and together[0][2]["online_filtering/num_tries"] == 1
    for one, other in zip(single, together, strict=True):
        assert one[0] == other[0] and one[1] == other[1]
    assert together[0][3]["curriculum/consumed_batches"] == 4
    assert together[0][3]["curriculum/extra_rollout_fraction"] >= 3
    assert len(observed) - of_single == (4 - tries) * B  # everything that was scored
    assert together[0][2]["reward/num_responses"] >= 4 * B * N


class InTurn(FakeCollector):
    """Its groups end one after the other, the last asked for first, until there are enough."""

    def wait(self, in_flight, enough=None):
        super().wait(in_flight)
        there = {}
        for position in reversed(range(len(in_flight.requests))):
            there[position] = in_flight.groups[position]
            if enough is not None and enough(there):
                assert enough(there)  # as an engine asks that waits for other ranks
                break
        in_flight.groups.update(dict.fromkeys(in_flight.groups.keys() - there.keys()))

    def score_early(self, groups):
        self.calls = [*getattr(self, "calls", []), len(groups)]
        return self.score(groups, None)[0]


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_still_sampled_is_stopped_when_the_batch_is_full(size):
    """A third of the prompts teach, so that some 3 of 5 draws are needed; the curriculum sees what came back alone."""
    observed = []
    original = Coordinator.observe

    def observe(self, step, statistics):
        observed.extend(statistics)
        original(self, step, statistics)

    def on_rank(control):
        collector = InTurn()
        maker, _ = make(control, collector, oversample=5, stop=True)
        batch = maker.make(1, SETTINGS, StageClock())
        return [teaches(group, AlgorithmConfig()) for group in batch.groups], batch.metrics, collector.calls

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "observe", observe)
        found = on_ranks(size, on_rank)
    assert sum(len(taught) for taught, _, _ in found) == B and all(all(taught) for taught, _, _ in found)
    metrics = found[0][1]
    assert metrics["online_filtering/num_tries"] == 1 and 5 <= metrics["online_filtering/num_stopped"] < 4 * B
    assert metrics["reward/num_responses"] == (5 * B - metrics["online_filtering/num_stopped"]) * N
    assert len(observed) * N == metrics["reward/num_responses"]
    assert all(len(calls) < 5 * B / size for _, _, calls in found)  # not one for each group


def test_a_reward_that_compares_all_responses_waits_for_all():
    collector = InTurn()
    collector.scores_groups_alone = False
    batch = make(SingleProcess(), collector, oversample=5, stop=True)[0].make(1, SETTINGS, StageClock())
    assert batch.metrics["online_filtering/num_stopped"] == 0
    assert batch.metrics["reward/num_responses"] == 5 * B * N


def test_draws_begun_together_are_shared_out_over_other_ranks(tmp_path):
    def maker_of(control):
        return make(control, FakeCollector(), oversample=2)[0]

    maker = maker_of(SingleProcess())
    maker._in_flight[1] = maker._begin(1, 0, SETTINGS)
    maker.finish_ahead()
    maker.save(tmp_path)

    def resumed(control):
        maker = maker_of(control)
        maker.load(tmp_path, SETTINGS)
        return maker._in_flight[1].slots

    assert sorted(chain.from_iterable(on_ranks(3, resumed))) == list(range(2 * B))


def test_too_few_that_teach_do_not_end_the_run(caplog):
    maker, _ = make(SingleProcess(), FakeCollector(teaching=1000), max_tries=5)
    batch = maker.make(1, SETTINGS, StageClock())
    assert len(batch.groups) == B
    assert "step 1: 1 of 12 groups teach after 5 tries (trainer.max_try_make_batch)" in caplog.text
    taught = [teaches(group, AlgorithmConfig()) for group in batch.groups]
    assert taught == [True] + [False] * (B - 1)  # what teaches comes first


def test_without_filtering_one_draw_is_the_batch():
    collector = FakeCollector(teaching=1000)
    maker, coordinator = make(SingleProcess(), collector, online_filtering=False)
    batch = maker.make(1, SETTINGS, StageClock())
    assert len(batch.groups) == B and len(collector.seeds) == B
    assert coordinator.metrics()["curriculum/extra_rollout_fraction"] == 0.0


def split_off(metrics):
    """The metrics, and those of the tokens a rank, which do depend on the ranks."""
    prefix = "global_seqlen/"
    tokens = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: value for name, value in metrics.items() if not name.startswith(prefix)}, tokens


def num_tokens(group):
    prompt, responses, _ = group
    return sum(len(prompt.token_ids) + len(token_ids) for token_ids, *_ in responses)


@pytest.mark.parametrize("online_filtering", [True, False])
@pytest.mark.parametrize(("size", "mini_batch"), [(2, 12), (3, 6), (3, 12)])
def test_the_batch_is_the_same_on_any_number_of_ranks(size, mini_batch, online_filtering):
    def two_steps(control):
        strategy = {"sampling_strategy": "curriculum", "curriculum_refresh": "online", "curriculum_probe_fraction": 0.5}
        strategy |= {"curriculum_metrics": ["learnability", "self-bleu"], "curriculum_metric_weights": [0.8, 0.2]}
        maker, coordinator = make(control, FakeCollector(), online_filtering, mini_batch=mini_batch, **strategy)
        batches = [maker.make(step, SETTINGS, StageClock()) for step in range(1, STEPS + 1)]
        return [content(batch) for batch in batches], [batch.metrics for batch in batches], coordinator.metrics()

    alone = on_ranks(1, two_steps)[0]
    ranks = on_ranks(size, two_steps)
    for step in range(STEPS):
        together = [*chain.from_iterable(contents[step] for contents, _, _ in ranks)]
        assert sorted(map(repr, together)) == sorted(map(repr, alone[0][step]))
        share = mini_batch // size
        for start in range(0, B, mini_batch):  # each mini-batch holds the same groups, split over the ranks
            places = slice(start // mini_batch * share, (start // mini_batch + 1) * share)
            parts = [*chain.from_iterable(contents[step][places] for contents, _, _ in ranks)]
            assert sorted(map(repr, parts)) == sorted(map(repr, alone[0][step][start : start + mini_batch]))
        metrics, seqlen = split_off(ranks[0][1][step])
        assert metrics == pytest.approx(split_off(alone[1][step])[0])
        totals = [sum(map(num_tokens, contents[step])) for contents, _, _ in ranks]
        assert (min(totals), max(totals)) == (seqlen["balanced_min"], seqlen["balanced_max"])
        assert sum(totals) == pytest.approx(size * seqlen["mean"])
        assert seqlen["min"] <= seqlen["mean"] <= seqlen["max"]
        assert seqlen["minmax_diff"] == seqlen["max"] - seqlen["min"]
        if mini_batch == B:
            assert seqlen["balanced_max"] - seqlen["balanced_min"] <= 0.5 * seqlen["minmax_diff"]
    assert ranks[0][2] == pytest.approx(alone[2])


def test_probes_ride_along_but_do_not_train():
    collector = FakeCollector()
    strategy = {"sampling_strategy": "curriculum", "curriculum_refresh": "online", "curriculum_probe_fraction": 0.25}
    maker, coordinator = make(SingleProcess(), collector, online_filtering=False, **strategy)
    batch = maker.make(1, SETTINGS, StageClock())
    assert len(batch.groups) == B and all(len(g.group.responses) == N for g in batch.groups)
    num_probes = len(collector.seeds) - B
    assert num_probes > 0 and len(set(collector.seeds)) == B + num_probes
    metrics = coordinator.metrics()
    extra = num_probes * coordinator.num_probe_responses
    assert metrics["curriculum/extra_rollout_fraction"] == pytest.approx(extra / (B * N))
    assert batch.metrics["reward/num_responses"] == B * N + extra
    effective = np.mean([g.group.prompt.index % 3 == 0 for g in batch.groups])
    assert metrics["curriculum/effective_group_fraction"] == pytest.approx(effective)  # of the batch alone


class CutOff(FakeCollector):
    """Sampling is abandoned at the n-th batch of requests, counted from 1; 0 = never."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def wait(self, in_flight, enough=None):
        self.left -= 1
        if self.left == 0:
            raise SamplingAbandoned
        super().wait(in_flight)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("at", [5, 6])
def test_a_step_that_is_cut_off_leaves_nothing_observed(tmp_path, size, at):
    """The first step takes four draws: the second is cut off in its first, and in its second with one observed."""

    def cut_off(control):
        collector = CutOff(at)
        maker, coordinator = make(control, collector, curriculum_refresh="online", sampling_strategy="curriculum")
        step, before = 0, None
        try:
            while True:
                step += 1
                before = state(coordinator)
                maker.make(step, SETTINGS, StageClock())
        except SamplingAbandoned:
            pass
        assert step == 2  # the first step has gone well
        assert state(coordinator) == before
        settings = {"curriculum_refresh": "online", "sampling_strategy": "curriculum"}
        resumed, fresh = make(control, FakeCollector(), **settings)
        coordinator.save(tmp_path)
        fresh.load(tmp_path)
        coordinator = fresh
        again = resumed.make(step, SETTINGS, StageClock())
        return again.prompts.tolist(), state(coordinator)

    def left_alone(control):
        maker, coordinator = make(control, FakeCollector(), curriculum_refresh="online", sampling_strategy="curriculum")
        batches = [maker.make(step, SETTINGS, StageClock()) for step in (1, 2)]
        return batches[1].prompts.tolist(), state(coordinator)

    assert on_ranks(size, cut_off) == on_ranks(size, left_alone)


@pytest.mark.parametrize("size", [1, 3])
def test_a_step_cut_off_in_its_baselines_leaves_nothing_observed(size):
    class CutOffGreedy(FakeCollector):
        def collect(self, requests, settings, clock, shared=None):
            if settings.temperature == 0.0 and self.cut:
                raise SamplingAbandoned
            return super().collect(requests, settings, clock)

    def first_and_second(control, cut):
        collector = CutOffGreedy()
        collector.cut = False
        maker, coordinator = make(
            control, collector, online_filtering=False, remax=True, curriculum_refresh="online",
            sampling_strategy="curriculum",
        )  # fmt: skip
        maker.make(1, SETTINGS, StageClock())
        before, collector.cut = state(coordinator), cut
        if cut:
            with pytest.raises(SamplingAbandoned):
                maker.make(2, SETTINGS, StageClock())
            assert state(coordinator) == before
            collector.cut = False
        batch = maker.make(2, SETTINGS, StageClock())
        return batch.prompts.tolist(), batch.baselines, state(coordinator)

    assert on_ranks(size, lambda c: first_and_second(c, True)) == on_ranks(size, lambda c: first_and_second(c, False))


def state(coordinator):
    """What a checkpoint would hold; rank 0 has it."""
    with TemporaryDirectory() as folder:
        coordinator.save(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_groups_of_different_sizes_are_the_same_on_any_number_of_ranks():
    strategy = {"sampling_strategy": "curriculum", "curriculum_refresh": "online", "curriculum_draw": "posterior"}

    def run(num_ranks):
        def on_rank(control):
            settings = {"online_filtering": False, "mini_batch": 6, "sizes": SizeRange(2, 9), **strategy}
            maker, _ = make(control, FakeCollector(), curriculum_mixture_ratio=0.2, **settings)
            return [maker.make(step, SETTINGS, StageClock()) for step in range(1, STEPS + 1)]

        return list(zip(*on_ranks(num_ranks, on_rank), strict=True))

    sizes_seen = set()
    for whole, parts in zip(run(1), run(3), strict=True):
        (whole,) = whole
        for part in parts:
            np.testing.assert_array_equal(part.prompts, whole.prompts)
            assert part.metrics["reward/overall"] == pytest.approx(whole.metrics["reward/overall"])
        for step in (slice(0, 6), slice(6, 12)):  # an optimiser step has the same groups, two on each rank
            of_ranks = [content(part)[step.start // 3 : step.stop // 3] for part in parts]
            assert sorted(map(repr, chain(*of_ranks))) == sorted(map(repr, content(whole)[step]))
        sizes = [len(group.group.responses) for group in whole.groups]
        assert sum(sizes) == B * N
        sizes_seen |= set(sizes)
    assert len(sizes_seen) > 2 and min(sizes_seen) < N < max(sizes_seen) <= 9


def test_groups_of_different_sizes_in_flight_are_sampled_by_the_ranks_that_had_them(tmp_path):
    strategy = {"sampling_strategy": "curriculum", "curriculum_refresh": "online", "curriculum_draw": "posterior"}
    settings = {"online_filtering": False, "mini_batch": 6, "curriculum_mixture_ratio": 0.2, **strategy}

    def stopped(control):
        maker, _ = make(control, FakeCollector(), sizes=SizeRange(2, 9), **settings)
        for step in range(1, 6):
            maker.make(step, SETTINGS, StageClock())
        maker._in_flight[6] = maker._begin(6, 0, SETTINGS)
        maker.save(tmp_path)
        return in_flight(maker)

    def resumed(control, **sizes):
        maker, _ = make(control, FakeCollector(), **sizes, **settings)
        maker.load(tmp_path, SETTINGS)
        return in_flight(maker)

    def in_flight(maker):
        batch = maker._in_flight[6]
        return [(slot, item.num_responses) for slot, item in zip(batch.slots, batch.requests, strict=False)]

    before = on_ranks(3, stopped)
    assert on_ranks(3, lambda control: resumed(control, sizes=SizeRange(2, 9))) == before
    assert len({size for _, size in chain(*before)}) > 2
    with pytest.raises(UserError, match="n_min and n_max until a later checkpoint"):
        resumed(SingleProcess())


def steps(control, collector, num_steps=STEPS, **settings):
    """Batches of an online curriculum with probes, and the requests behind them."""
    strategy = {"sampling_strategy": "curriculum", "curriculum_refresh": "online", "curriculum_probe_fraction": 0.5}
    maker, _ = make(control, collector, **settings, **strategy)
    asked = []
    begin = collector.begin
    collector.begin = lambda in_flight, given: asked.append(in_flight.requests) or begin(in_flight, given)
    batches = [maker.make(step, SETTINGS, StageClock()) for step in range(1, num_steps + 1)]
    return [(content(batch), batch.prompts.tolist()) for batch in batches], asked


@pytest.mark.parametrize("size", [1, 3])
def test_where_responses_wait_the_batch_is_the_same_from_other_ranks(size):
    """Prompts, seeds and order: what is expected of a prompt's responses decides who samples them, and nothing else."""

    def on_rank(control, max_num_seqs):
        return steps(control, FakeCollector(), online_filtering=False, max_num_seqs=max_num_seqs)

    plain = on_ranks(size, lambda control: on_rank(control, 256))
    waiting = on_ranks(size, lambda control: on_rank(control, 3))

    def batches(ranks):
        """Of all ranks, by prompt."""
        return [
            (sorted((row for found, _ in ranks for row in found[step][0]), key=repr), ranks[0][0][step][1])
            for step in range(STEPS)
        ]

    assert batches(waiting) == batches(plain)
    seen = set()
    for step in range(STEPS):
        requests = [request for _, asked in waiting for request in asked[step]]
        assert sorted(request.seed for request in requests) == sorted(
            request.seed for _, asked in plain for request in asked[step]
        )
        assert step > 0 or all(request.expected_tokens == 0 for request in requests)
        known = [request for request in requests if request.prompt.index in seen]
        # The collector's responses to a prompt have all the same length.
        assert all(request.expected_tokens == 3 + request.prompt.index % 11 for request in known)
        assert step < STEPS - 1 or len(known) > len(requests) / 4
        seen |= {request.prompt.index for request in requests}
        if step > 2 and size > 1:
            tokens = [sum(r.expected_tokens for r in asked[step] if not r.can_wait) for _, asked in waiting]
            assert max(tokens) < 1.1 * min(tokens)


def test_where_stragglers_are_stopped_nothing_is_expected():
    """The longest first would be those that the others do not wait for."""
    settings = {"oversample": 2, "stop": True, "max_num_seqs": 3}
    _, asked = steps(SingleProcess(), FakeCollector(), 3, **settings)
    assert {request.expected_tokens for requests in asked for request in requests} == {0}


def test_a_step_that_was_cut_off_goes_on_with_what_was_expected(tmp_path):
    strategy = {"sampling_strategy": "curriculum", "curriculum_refresh": "online"}

    def begun(control):
        maker, _ = make(
            control, FakeCollector(), online_filtering=False, max_num_seqs=3, mini_batch=B // 2, **strategy
        )
        for step in (1, 2, 3):
            maker.make(step, SETTINGS, StageClock())
        maker._in_flight[4] = maker._begin(4, 0, SETTINGS)
        maker.save(tmp_path)
        return maker._in_flight[4].requests

    def resumed(control):
        maker, _ = make(
            control, FakeCollector(), online_filtering=False, max_num_seqs=3, mini_batch=B // 2, **strategy
        )
        maker.load(tmp_path, SETTINGS)
        return maker._in_flight[4].requests

    before = on_ranks(3, begun)
    assert on_ranks(3, resumed) == before
    assert len({request.expected_tokens for requests in before for request in requests}) > 3
