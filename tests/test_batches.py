from itertools import chain

import numpy as np
import pytest
from test_coordinator import SingleProcess, ThreadRank, on_ranks

from mmr1_ds.batches import BatchMaker, teaches
from mmr1_ds.config import AlgorithmConfig, DataConfig, RunConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.errors import UserError
from mmr1_ds.preemption import SamplingAbandoned
from mmr1_ds.records import GroupRewards, Prompt, Response, RolloutGroup, SamplingSettings, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts
from mmr1_ds.stages import StageClock

P, B, N, STEPS = 60, 12, 4, 7
SETTINGS = SamplingSettings(1.0, 1.0, -1, 16)


def rewards(overall, accuracy=None, **parts):
    overall = np.array(overall, dtype=np.float32)
    accuracy = overall if accuracy is None else np.array(accuracy, dtype=np.float32)
    parts = {name: np.array(values) for name, values in parts.items()}
    return GroupRewards(overall, accuracy, np.zeros(len(overall), dtype=bool), parts)


def scored(*arguments, **parts):
    values = rewards(*arguments, **parts)
    responses = tuple(Response((5, 6), (-0.1, -0.2), True) for _ in values.overall)
    return ScoredGroup(RolloutGroup(Prompt(0, "p0", (1,), (), "42"), responses, 0), values)


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


class Ranks:
    """The collectives that a batch needs, over threads or for one."""

    def __init__(self, control):
        self._control = control
        self.rank, self.size = control.rank, control.size

    def all_gather_objects(self, value, stage):
        return self._control._exchange(value, stage) if isinstance(self._control, ThreadRank) else [value]

    def exchange_objects(self, to_ranks, stage):
        return [part[self.rank] for part in self.all_gather_objects(list(to_ranks), stage)]

    def sum(self, values, stage):
        everyone = self.all_gather_objects(dict(values), stage)
        return {name: sum(part[name] for part in everyone) for name in values}


class Data:
    """Prompts whose index says what happens to them."""

    def __getitem__(self, index):
        return Prompt(index, f"p{index}", (1, 2, index), ("image",), str(index))


class FakeCollector:
    """Groups of one in three prompts vary; whatever else, a group follows from its request alone."""

    def __init__(self, teaching=3):
        self.teaching, self.seeds = teaching, []

    def begin(self, sampling, settings):
        sampling.submitted = settings

    def wait(self, sampling):
        if sampling.submitted is not None:
            groups = self.collect(sampling.requests, sampling.submitted, None)[0]
            sampling.groups.update(enumerate(group.group for group in groups))
            self.scored = dict(zip(map(id, sampling.groups.values()), groups, strict=True))
            sampling.submitted = None

    def score(self, groups, clock):
        found = [self.scored[id(group)] for group in groups]
        return found, RewardCounts(sum(len(g.group.responses) for g in found), 0, 0, 0, 0)

    def collect(self, requests, settings, clock):
        groups = []
        for request in requests:
            self.seeds.append(request.seed)
            right = np.arange(request.num_responses) % 2 if request.prompt.index % self.teaching == 0 else 0
            overall = np.zeros(request.num_responses, dtype=np.float32) + right
            length = 1 + request.prompt.index % 11
            tokens = [(request.seed % 1000, 7, *range(k, k + length)) for k in range(request.num_responses)]
            responses = tuple(Response(t, (-0.5,) * len(t), True) for t in tokens)
            groups.append(ScoredGroup(RolloutGroup(request.prompt, responses, 3), rewards(overall)))
        return groups, RewardCounts(sum(len(g.group.responses) for g in groups), 0, 0, 0, 0)


class Encoder:
    eos_token_ids = (99,)


def make(control, collector, online_filtering=True, max_tries=20, mini_batch=B, filter_key="overall", **data):
    config = RunConfig()
    config.data = DataConfig(rollout_batch_size=B, seed=3, **data)
    config.worker.rollout.n, config.worker.actor.global_batch_size = N, mini_batch
    config.algorithm.filter_key = filter_key
    config.algorithm.online_filtering, config.trainer.max_try_make_batch = online_filtering, max_tries
    ids = [f"p{i}" for i in range(P)]
    coordinator = Coordinator(config.data, ids, [""] * P, "abc", N, 8, control)
    return BatchMaker(config, Ranks(control), Encoder(), Data(), coordinator, collector), coordinator


def content(batch):
    return [
        (group.scored.group.prompt, group.scored.group.responses, group.scored.rewards.overall.tolist())
        for group in batch.groups
    ]


def test_filtering_draws_until_the_batch_teaches():
    maker, coordinator = make(SingleProcess(), FakeCollector())
    batch = maker.make(1, SETTINGS, StageClock())
    assert len(batch.groups) == B
    assert all(group.scored.group.prompt.index % 3 == 0 for group in batch.groups)
    assert all(np.abs(group.advantages).min() > 0.5 for group in batch.groups)
    tries = batch.metrics["online_filtering/num_tries"]
    assert 2 <= tries <= 5  # a third of 60 prompts teach: 5 tries of 12 see them all
    assert len(set(maker._collector.seeds)) == tries * B  # no try repeats the seeds of another
    assert batch.metrics["online_filtering/teaching_fraction"] == pytest.approx(1 / 3, abs=0.1)
    metrics = coordinator.metrics()
    assert metrics["curriculum/consumed_batches"] == tries
    assert metrics["curriculum/extra_rollout_fraction"] == pytest.approx(tries - 1)
    assert batch.metrics["reward/num_responses"] == tries * B * N


def test_too_few_that_teach_do_not_end_the_run(caplog):
    maker, _ = make(SingleProcess(), FakeCollector(teaching=1000), max_tries=5)
    batch = maker.make(1, SETTINGS, StageClock())
    assert len(batch.groups) == B
    assert "step 1: 1 of 12 groups teach after 5 tries (trainer.max_try_make_batch)" in caplog.text
    assert (batch.groups[0].advantages != 0).any()  # what teaches comes first
    assert all((group.advantages == 0).all() for group in batch.groups[1:])


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
    return sum(len(prompt.token_ids) + len(response.token_ids) for response in responses)


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
    assert len(batch.groups) == B and all(len(g.scored.group.responses) == N for g in batch.groups)
    num_probes = len(collector.seeds) - B
    assert num_probes > 0 and len(set(collector.seeds)) == B + num_probes
    metrics = coordinator.metrics()
    extra = num_probes * coordinator.num_probe_responses
    assert metrics["curriculum/extra_rollout_fraction"] == pytest.approx(extra / (B * N))
    assert batch.metrics["reward/num_responses"] == B * N + extra
    effective = np.mean([g.scored.group.prompt.index % 3 == 0 for g in batch.groups])
    assert metrics["curriculum/effective_group_fraction"] == pytest.approx(effective)  # of the batch alone


class CutOff(FakeCollector):
    """Sampling is abandoned at the n-th batch of requests, counted from 1; 0 = never."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def wait(self, sampling):
        self.left -= 1
        if self.left == 0:
            raise SamplingAbandoned
        super().wait(sampling)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("at", [5, 6])
def test_a_step_that_is_cut_off_leaves_nothing_observed(size, at):
    """The first step takes four draws: the second is cut off in its first, and in its second with one observed."""

    def cut_off(control):
        collector = CutOff(at)
        maker, coordinator = make(control, collector, curriculum_refresh="online", sampling_strategy="curriculum")
        step, before = 0, None
        try:
            while True:
                step += 1
                before = state(coordinator, control)
                maker.make(step, SETTINGS, StageClock())
        except SamplingAbandoned:
            pass
        assert step == 2  # the first step has gone well
        assert state(coordinator, control) == before
        settings = {"curriculum_refresh": "online", "sampling_strategy": "curriculum"}
        resumed, fresh = make(control, FakeCollector(), **settings)
        fresh.load_state_dict(coordinator.state_dict() if control.rank == 0 else None)
        coordinator = fresh
        again = resumed.make(step, SETTINGS, StageClock())
        return again.prompts.tolist(), state(coordinator, control)

    def left_alone(control):
        maker, coordinator = make(control, FakeCollector(), curriculum_refresh="online", sampling_strategy="curriculum")
        batches = [maker.make(step, SETTINGS, StageClock()) for step in (1, 2)]
        return batches[1].prompts.tolist(), state(coordinator, control)

    assert on_ranks(size, cut_off) == on_ranks(size, left_alone)


def state(coordinator, control):
    """What a checkpoint would hold, as text that compares; rank 0 has it."""
    if control.rank > 0:
        return None
    return repr(sorted(flat(coordinator.state_dict()).items()))


def flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value.tolist() if isinstance(value, np.ndarray) else value
    return found
