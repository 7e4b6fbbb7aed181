"""The experiment: its pools, its records and its figures are what they say; recording changes no training."""

import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.coordinators import B, N, P, answer
from fixtures.launching import ROOT, environment
from fixtures.rank_threads import SingleProcess

from mmr1_ds.commands.demo.digits import LEARNABLE
from mmr1_ds.config import AlgorithmConfig, DataConfig, RolloutConfig
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import GroupRewards, Prompt, Response, RolloutGroup, SamplingSettings, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts

BENCHMARKS = ROOT / "benchmarks" / "vas_experiment"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The benchmarks are programs beside one another, not a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def a_trial(**changes):
    from vas_experiment_trials import Trial

    return Trial(**{"share": 15, "size": 101, "arm": "shuffle", "seed": 3, "steps": 40, **changes})


# --- trials and pools ---------------------------------------------------------------------------------------------


def test_trials_are_every_combination_once_and_whole_seeds_come_first():
    from vas_experiment_trials import ARMS, all_trials

    trials = all_trials([2, 50], [512], ARMS, [7, 8], 60, ratios=[0.5, 0.8], categories=[True, False])
    # A seed and pool: shuffle, filtering and seven rivals once, full for each lambda, online for each lambda and
    # the five that follow from beliefs with categories and without.
    assert len(trials) == 2 * 2 * (9 + 2 + 4 + 5 * 2)
    assert len({trial.name for trial in trials}) == len({(t.pool, t.label, t.seed) for t in trials}) == len(trials)
    assert [trial.seed for trial in trials] == [7] * 50 + [8] * 50


def test_a_trial_spends_what_its_steps_would_unless_told_otherwise():
    assert a_trial().budget == 40 * 64 and a_trial(rollouts=777).budget == 777
    assert a_trial(rollouts=777).name == a_trial().name.replace("_seed3", "_rollouts777_seed3")
    assert a_trial(rollouts=777).label == a_trial().label


@pytest.mark.parametrize(("share", "size"), [(2, 512), (5, 2048), (15, 101), (50, 7)])
def test_a_mixed_pool_has_its_learnable_share_and_the_rest_easy_to_hard_as_45_to_40(share, size):
    from vas_experiment_trials import SORTS, draw_pool

    pool = draw_pool(a_trial(share=share, size=size, dead=False))
    counts = Counter(SORTS[question.kind] for question in pool)
    assert counts.total() == size
    assert abs(counts["learnable"] - share * size / 100) < 1
    assert abs(counts["easy"] - (100 - share) * size / 100 * 45 / 85) < 1


def test_the_rest_of_a_dead_pool_are_large_products_in_random_order():
    from vas_experiment_trials import draw_pool

    pool = draw_pool(a_trial())
    rest = [question for question in pool if question.kind not in LEARNABLE]
    assert len(rest) == 86 and {question.kind for question in rest} == {"mul4"}
    assert min(np.prod(question.digits) for question in rest) >= 1000
    assert pool == draw_pool(a_trial(arm="online")) != draw_pool(a_trial(seed=4))
    is_learnable = [question.kind in LEARNABLE for question in pool]
    assert is_learnable not in (sorted(is_learnable), sorted(is_learnable, reverse=True))


# --- records ------------------------------------------------------------------------------------------------------


def test_calls_of_one_step_make_one_line_and_the_file_appears_when_it_is_whole(tmp_path):
    from vas_experiment_steps import StepFile

    file = StepFile(tmp_path / "run.jsonl", {"seed": 3})
    file.log(0, {"val/accuracy_reward": 0.25, "val/overall_reward": 9.0})
    file.note(1, {"rollouts": 64})
    file.log(1, {"actor/grad_norm": 0.5})
    file.log(1, {"timing_s/refresh": 7.0})
    assert list(tmp_path.glob("*.jsonl")) == []
    file.finish()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert lines[:3] == [
        {"trial": {"seed": 3}},
        {"step": 0, "validation_accuracy": 0.25},
        {"step": 1, "rollouts": 64, "gradient_norm": 0.5, "refresh_seconds": 7.0},
    ]
    assert lines[3]["finished"] is True and len(lines) == 4


def test_transitions_count_prompts_by_how_many_were_right_before_and_after():
    from vas_experiment_steps import transition_counts

    before, after = np.array([0, 3, 3, 3, 7]) / 7, np.array([7, 3, 4, 3, 0]) / 7
    counts = transition_counts(before.astype(np.float32), after, 7)
    assert counts.shape == (8, 8) and counts.sum() == 5
    assert (counts[0, 7], counts[3, 3], counts[3, 4], counts[7, 0]) == (1, 2, 1, 1)


# --- figures ------------------------------------------------------------------------------------------------------


def write_run(folder, trial, rollouts_per_step, accuracy, extra=0.0, answers=None):
    """A finished run whose accuracy is a function of the step, validated every 5 steps; answers: of its end."""
    from vas_experiment_steps import StepFile
    from vas_experiment_trials import trial_record

    (folder / "runs").mkdir(exist_ok=True)
    file = StepFile(folder / "runs" / f"{trial.name}.jsonl", trial_record(trial))
    for step in range(trial.steps + 1):
        line = {"rollouts": step * rollouts_per_step, "extra_rollout_fraction": extra}
        if step:
            line |= {"effective_fraction": 0.5, "learnable_fraction": 0.25, "learnable_effective_fraction": 0.2}
            line |= {"gradient_norm": 1.0, "clip_fraction": 0.0, "drawn_effective_fraction": 0.5}
        if step % 5 == 0:
            line["validation_accuracy"] = accuracy(step)
        if trial.arm in ("full", "online", "posterior") and step % 20 == 0 and step:
            shares = {"easy": 0.5, "learnable": 0.25, "hard": 0.25}
            line |= {"weight_histogram": [3, *[1] * 19], "weight_shares": shares}
        if trial.arm == "full" and step == 20:
            line["transitions"] = np.eye(9, dtype=int).tolist()
        file.note(step, line)
    file.finish({"answers": answers} if answers else None)


def test_an_arm_that_learns_three_times_faster_for_a_fifth_more_rollouts_needs_2_5_times_fewer(tmp_path):
    from vas_experiment_report import comparisons
    from vas_experiment_runs import by_pool, load_runs

    # Straight lines: smoothing changes only their ends, by half a validation (2.5 steps) there.
    for seed in (3, 4):
        write_run(tmp_path, a_trial(seed=seed), 64, lambda step, seed=seed: 0.1 * (seed - 3) + step / 100)
        online = a_trial(seed=seed, arm="online")
        write_run(tmp_path, online, 76.8, lambda step, seed=seed: 0.1 * (seed - 3) + 3 * step / 100, extra=0.2)
    write_run(tmp_path, a_trial(seed=4, arm="full"), 128, lambda step: 0.05)
    rows = {row["arm"]: row for row in comparisons(by_pool(load_runs(tmp_path)))}
    target = 0.05 + 37.5 / 100
    row = rows["online, lambda 0.5"]
    assert row["target"] == pytest.approx(target) and row["seeds"] == [3, 4]
    assert row["needed_rollouts"] == pytest.approx((37.5 / 3) * 76.8)
    assert row["ratio"] == pytest.approx(40 * 64 / (12.5 * 76.8))
    assert row["paired_ratios"] == pytest.approx([row["ratio"]] * 2)
    assert row["extra_rollout_fraction"] == 0.2
    # At 40 * 64 rollouts the arm has done 100/3 steps; shuffle's own final point is smoothed.
    assert row["accuracy_gains"] == pytest.approx([1.0 - 0.375] * 2)
    assert row["shuffle_rollouts"] == 40 * 64 == row["shuffle_first_rollouts"]
    assert row["first_ratio"] == pytest.approx(row["ratio"])
    never = rows["full, lambda 0.5"]
    assert never["ratio"] == 0.0 and never["needed_rollouts"] is None and never["paired_ratios"] == [0.0]


def test_each_run_is_compared_where_shuffle_ends_also_when_runs_of_an_arm_end_apart(tmp_path):
    from vas_experiment_report import comparisons
    from vas_experiment_runs import by_pool, curves, load_runs

    for seed, per_step, steps in ((3, 70, 40), (4, 151, 60)):
        write_run(tmp_path, a_trial(seed=seed), 64, lambda step: 0.0)
        write_run(tmp_path, a_trial(seed=seed, arm="pilot", steps=steps), per_step, lambda step: step / 100)
    pools = by_pool(load_runs(tmp_path))
    (row,) = comparisons(pools)
    # Shuffle ends at 2,560 rollouts: after 36.6 steps, between the points of 35 and (smoothed) 37.5, and after 17.
    last = 0.35 + (2560 - 35 * 70) / (5 * 70) * 0.025
    assert row["accuracy_gains"] == pytest.approx([last, 2560 / 151 / 100])
    (arms,) = pools.values()
    grid, _ = curves(list(arms["pilot"].values()))
    assert grid[-1] == 40 * 70  # as far as both go


def test_the_answers_of_the_end_are_compared_seed_by_seed_and_earlier_runs_have_none(tmp_path):
    from vas_experiment_report import answer_rows, write_report
    from vas_experiment_runs import by_pool, load_runs

    write_run(tmp_path, a_trial(arm="full"), 64, lambda step: 0.1)
    assert "pass@" not in write_report(tmp_path, None, None)
    for seed, passed in ((3, 0.5), (4, 0.9)):
        write_run(tmp_path, a_trial(seed=seed), 64, lambda step: 0.1, answers={"accuracy": 0.3, "pass_at_8": passed})
    write_run(tmp_path, a_trial(arm="dps", seed=4), 64, lambda step: 0.1, answers={"accuracy": 0.4, "pass_at_8": 0.7})
    rows = {row["arm"]: row for row in answer_rows(by_pool(load_runs(tmp_path)))}
    assert rows.keys() == {"shuffle", "dps"} and rows["shuffle"]["seeds"] == [3, 4]
    assert rows["shuffle"]["pass_at_8"] == pytest.approx((0.7, 0.2))
    assert rows["dps"]["pass_at_8_beyond_shuffle"] == (pytest.approx(-0.2), None)
    assert "| dps | 1 | 0.700 |" in write_report(tmp_path, None, None)


def test_runs_of_two_budgets_are_not_taken_for_one_another(tmp_path):
    from vas_experiment_runs import by_pool, load_runs

    write_run(tmp_path, a_trial(), 64, lambda step: 0.1)
    write_run(tmp_path, a_trial(rollouts=999), 64, lambda step: 0.1)
    with pytest.raises(ValueError, match="shuffle of seed 3"):
        by_pool(load_runs(tmp_path))


def test_nothing_is_learned_while_a_refresh_spends():
    from vas_experiment_runs import Run, curves, first_crossing

    # 64 a step, 1,000 by the refresh after step 0 and 500 by the one after step 10; .25 more every ten steps.
    steps = [
        {"step": 0, "rollouts": 0, "validation_accuracy": 0.25, "refresh_seconds": 1.0},
        *({"step": step, "rollouts": 1000 + 64 * step} for step in range(1, 10)),
        {"step": 10, "rollouts": 1640, "validation_accuracy": 0.5, "refresh_seconds": 1.0},
        *({"step": step, "rollouts": 1500 + 64 * step} for step in range(11, 20)),
        {"step": 20, "rollouts": 2780, "validation_accuracy": 0.75},
    ]
    rollouts, (accuracy,) = curves([Run({"responses_per_step": 64}, steps, 1.0)])
    assert rollouts.tolist() == [0, 1000, 1640, 2140, 2780]
    assert accuracy.tolist() == [0.25, 0.25, 0.5, 0.5, 0.625]  # the last smoothed with the one before it
    assert first_crossing(rollouts, accuracy, 0.375) == 1320
    assert first_crossing(rollouts, accuracy, 0.2) == 0.0 and np.isnan(first_crossing(rollouts, accuracy, 0.7))


def test_a_shuffled_run_longer_than_it_needs_is_seen_through(tmp_path):
    from vas_experiment_report import comparisons
    from vas_experiment_runs import by_pool, load_runs

    write_run(tmp_path, a_trial(), 64, lambda step: min(step, 20) / 100)
    write_run(tmp_path, a_trial(arm="online"), 64, lambda step: min(step, 20) / 100)
    (row,) = comparisons(by_pool(load_runs(tmp_path)))
    # Smoothed, both reach .2 at step 25: as fast, though in 25 of shuffle's 40 steps.
    assert row["needed_rollouts"] == row["shuffle_first_rollouts"] == pytest.approx(25 * 64)
    assert row["ratio"] == pytest.approx(40 / 25) and row["first_ratio"] == pytest.approx(1.0)


@pytest.mark.slow
def test_the_report_has_tables_json_and_plots(tmp_path):
    sys_path = [sys.executable, str(BENCHMARKS / "vas_experiment.py"), "report", str(tmp_path)]
    for arm in ("shuffle", "full", "online", "posterior", "filtering"):
        write_run(tmp_path, a_trial(arm=arm), 64, lambda step: step / 100)
    write_run(tmp_path, a_trial(arm="online", ratio=1.0), 64, lambda step: step / 50)
    command = [*sys_path, "--json", str(tmp_path / "figures.json"), "--plots", str(tmp_path / "plots")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["arm"] for row in figures["runs"]} == {row["arm"] for row in figures["comparisons"]} | {"shuffle"}
    assert all(row["arm"] in done.stdout for row in figures["runs"])
    plots = {path.stem: path.read_bytes()[:4] for path in (tmp_path / "plots").iterdir()}
    expected = {"accuracy_by_steps", "accuracy_by_rollouts", "dynamics", "weights", "transitions"}
    assert plots == dict.fromkeys(expected | {"variants_by_rollouts"}, b"\x89PNG")


# --- rivals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mopps_math", "mopps_geo3k", "dps", "dps_math", "vade", "difficulty_pools"])
def test_a_rival_draws_in_a_run_as_in_the_laboratory_and_learns_from_each_step_once(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "curriculum"))
    from curriculum_lab_policies import Run
    from curriculum_lab_rivals import RIVALS
    from curriculum_rival_draws import RivalDraws

    data = DataConfig(rollout_batch_size=B, seed=5, sampling_strategy="shuffle")
    coordinator = RivalDraws(data, [f"p{i}" for i in range(P)], [""] * P, "abc", N, 40, SingleProcess())
    coordinator.rival = name
    none = np.zeros(P, dtype=np.int64)
    alone = RIVALS[name](Run(P, none, none, B, 40, 5))
    for step in range(1, 8):
        batch = coordinator.next_batch(step)
        assert batch.tolist() == alone.draw(step).tolist()
        groups = [answer(index, step) for index in batch]
        coordinator.observe(step, groups[:2])
        coordinator.observe(step, groups[2:])
        coordinator.finish_step(step, batch)
        num_right = np.array([round(8 * group.pass_rate) for group in groups])
        alone.learn(batch, num_right, None)


class Collected:
    """Answers by each prompt's pass rate, every response with a number of its own."""

    def __init__(self, rates):
        self.rates, self.random, self.num_responses = rates, np.random.default_rng(7), 0

    def collect(self, requests, settings, clock):
        return [self._answer(request) for request in requests], RewardCounts()

    def _answer(self, request):
        numbers = np.arange(request.num_responses) + self.num_responses
        self.num_responses += request.num_responses
        right = (self.random.random(len(numbers)) < self.rates[request.prompt.index]).astype(np.float32)
        pairs = np.stack([numbers, right], axis=1).astype(np.int32)
        responses = tuple(Response(pair, np.zeros(2), True) for pair in pairs)
        rewards = GroupRewards(right, right, right > 2, {"seen": right + 0.0})
        return ScoredGroup(RolloutGroup(request.prompt, responses, 3), rewards)


class Listed(list):
    """The prompts of a data set."""

    def prompts(self, indices):
        return [self[int(index)] for index in indices]


def looped(name, rates, observed):
    """The batches of a rival with a loop of its own."""
    from vas_experiment_rivals import LoopedBatches

    data = DataConfig(rollout_batch_size=B, seed=5, sampling_strategy="shuffle")
    coordinator = SimpleNamespace(num_steps=40, observe=lambda step, found: observed.extend(found))
    prompts = Listed(Prompt(i, f"p{i}", (1, 2), (), "") for i in range(P))
    batches = LoopedBatches(
        data, AlgorithmConfig(), RolloutConfig(), B, 1, SingleProcess(), list, prompts, coordinator, Collected(rates)
    )
    batches.rival = name
    return batches


def test_a_batch_that_a_rival_leaves_short_is_filled_with_whatever_there_is(monkeypatch):
    batches = looped("pilot_commit", np.full(P, 0.9), [])
    import curriculum_lab_rivals

    monkeypatch.setattr(curriculum_lab_rivals, "_MANY_ROUNDS", 1)  # nothing waits in the first round of a run
    drawn, _ = batches._fill(1, SamplingSettings(1.0, 1.0, -1, 2), StageClock())
    assert not drawn.teaching and len(drawn.others) == B and len({*drawn.others}) == B
    assert any(np.ptp(group.rewards.accuracy) for group in drawn.others.values())
    assert all(len(group.group.responses) == 8 for group in drawn.others.values())


@pytest.mark.parametrize("name", ["pilot_commit", "greso", "dapo"])
def test_a_rival_with_a_loop_of_its_own_trains_on_whole_groups_as_it_counts_them(name, monkeypatch):
    observed, said = [], []
    batches = looped(name, np.random.default_rng(3).choice([0.0, 0.05, 0.4, 0.7, 1.0], P), observed)
    own = batches._policy.batch
    monkeypatch.setattr(batches._policy, "batch", lambda step, roll: said.append(own(step, roll)) or said[-1])
    trained, num_joined, num_full = set(), 0, 0
    for step in range(1, 13):
        begun = batches._collector.num_responses
        drawn, _ = batches._fill(step, SamplingSettings(1.0, 1.0, -1, 2), StageClock())
        chosen, num_right, _ = said[-1]
        assert [*drawn.teaching] == [*range(len(chosen))] and len(drawn.teaching) + len(drawn.others) >= B
        assert all(np.ptp(group.rewards.accuracy) == 0 for group in drawn.others.values())
        num_full += len(chosen) == B
        for group, prompt, right in zip(drawn.teaching.values(), chosen, num_right, strict=True):
            numbers, correct = np.array([response.token_ids for response in group.group.responses]).T
            assert group.group.prompt.index == prompt and len(numbers) == 8 and 0 < right < 8
            assert group.rewards.accuracy.tolist() == group.rewards.overall.tolist() == correct.tolist()
            assert group.rewards.parts["seen"].tolist() == correct.tolist() and correct.sum() == right
            num_joined += np.ptp(numbers) > 7  # sampled in two parts, others between them
            assert name == "pilot_commit" or numbers.min() >= begun  # nothing of an earlier step
            assert not trained & {*numbers.tolist()}
            trained |= {*numbers.tolist()}
    assert sum(spent for *_, spent in said) == batches._collector.num_responses and num_full >= 8
    assert sum(len(group.group.responses) for group in observed) == batches._collector.num_responses
    assert (num_joined > 0) == (name == "pilot_commit")


# --- training -----------------------------------------------------------------------------------------------------

REAL = """
import os, sys
from pathlib import Path
os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, sys.argv[1])
import vas_experiment_training as training
import curriculum_lab_rivals
from mmr1_ds.commands.demo.assets import prepare_assets
from mmr1_ds.commands.demo.warmup import WarmupSettings
from vas_experiment_trials import Trial

if __name__ == "__main__":
    short = WarmupSettings(num_steps=2, batch_size=3, first_steps=1, warmup_steps=1)
    training.prepare_model = lambda folder, trial: prepare_assets(folder / "models" / f"seed_{trial.seed}", 5, short)
    curriculum_lab_rivals._MANY_ROUNDS = 3  # a model that gets nothing right never fills a batch
    out = Path(sys.argv[2])
    trial = Trial(15, 33, "online", 5, 3, dead=False)
    with training.Session(out, validate_every=3) as session:
        session.train(trial, out / "plain.jsonl")
        session.train(trial, out / "traced.jsonl", (out / "trace.npz", 7, 4, 1))
        for arm in ("mopps", "text", "filtering", "greso", "pilot"):
            trial = Trial(15, 33, arm, 5, 9, dead=False, rollouts=100)
            session.train(trial, out / f"{arm}.jsonl")
"""


@pytest.mark.nightly
def test_recording_a_trace_changes_no_training_and_rollouts_are_counted(tmp_path):
    script = tmp_path / "real.py"
    script.write_text(REAL)
    done = subprocess.run(
        [sys.executable, str(script), str(BENCHMARKS), str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain, traced = ([json.loads(x) for x in (tmp_path / f"{n}.jsonl").open()][1:-1] for n in ("plain", "traced"))
    timed = ("seconds", "validation_seconds")
    for one, other in zip(plain, traced, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert [line["step"] for line in plain] == [0, 1, 2, 3]
    # 8 x 8 training responses a step, and probes by the coordinator's own account.
    assert plain[0]["rollouts"] == 0
    for line in plain[1:]:
        assert line["rollouts"] == pytest.approx(64 * line["step"] * (1 + line["extra_rollout_fraction"]))
    assert plain[-1]["rollouts"] > 192
    trace = np.load(tmp_path / "trace.npz")
    assert trace["steps"].tolist() == [0, 1, 2, 3] and trace["pass_rates"].shape == (4, 7)
    assert set(np.unique(trace["pass_rates"] * 4 % 1)) == {0.0}
    assert len(trace["categories"]) == 7 == len(trace["prompt_ids"])
    for arm in ("mopps", "text", "filtering", "greso", "pilot"):
        lines = [json.loads(x) for x in (tmp_path / f"{arm}.jsonl").open()]
        spent = [line["rollouts"] for line in lines[1:-1]]
        assert spent[-1] >= 100 > spent[-2] and "validation_accuracy" in lines[-2], arm
        answers = lines[-1]["answers"]
        assert answers["accuracy"] == pytest.approx(answers["pass_at_1"], abs=1e-6)
        assert answers["pass_at_1"] <= answers["pass_at_2"] <= answers["pass_at_4"] <= answers["pass_at_8"] <= 1
