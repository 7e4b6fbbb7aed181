import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "curriculum"


@pytest.fixture(scope="module", autouse=True)
def lab():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("curriculum_lab")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def policies(lab):
    return importlib.import_module("curriculum_lab_policies")


@pytest.fixture
def worlds(lab):
    return importlib.import_module("curriculum_lab_worlds")


SMALL = ["--prompts", "401", "--steps", "24", "--batch", "24"]


def rows_of(lab, tmp_path, *arguments):
    lab.main([*arguments, "--json", str(tmp_path / "rows.json")])
    return json.loads((tmp_path / "rows.json").read_text())


def run_one(lab, policies, worlds, name, setting="u_shaped_slow", num_prompts=401, steps=24, batch=24, seed=0):
    return lab.run_setting(worlds.SETTINGS[setting], [name], num_prompts, steps, batch, seed)[0]


def test_rank_correlation_equals_scipy(lab):
    random = np.random.default_rng(0)
    for a, b in ((random.random(401), random.random(401)), (random.integers(5, size=77), random.integers(9, size=77))):
        assert np.array_equal(lab.average_ranks(a) + 1, rankdata(a))
        assert lab.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert lab.spearman(np.ones(7), np.arange(7)) == 0.0


def test_every_policy_gives_a_row_with_the_promised_keys(lab, tmp_path, capsys):
    rows = rows_of(lab, tmp_path, *SMALL, "--settings", "u_shaped_fast", "--plots", str(tmp_path / "plots"))
    names = "uniform full_n32_t35 full_n16_t56 full_n8_t4 mopps vade dapo online_free online".split()
    assert sorted(row["policy"] for row in rows) == sorted(names)
    for row in rows:
        assert row["setting"] == "u_shaped_fast"
        for key in ("spearman", "effective_group_fraction", "extra_rollout_fraction", "ovs_share"):
            assert isinstance(row[key], float) and np.isfinite(row[key])
        assert np.isfinite(row["spearman_by_quarter"]).all()
    printed = capsys.readouterr().out
    assert "online_free - full_n16_t56" in printed and "mean" in printed
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3


def test_rollouts_are_counted_as_the_paper_spends_them(lab, policies, worlds):
    # 3,750 prompts in batches of 128 as 15,000 in batches of 512: 4 refreshes of 16 in 224 steps are 105 %.
    spent = {
        name: run_one(lab, policies, worlds, name, num_prompts=375, steps=224, batch=13)["extra_rollout_fraction"]
        for name in ("full_n16_t56", "full_n32_t35", "uniform", "online_free", "online")
    }
    training = 224 * 13 * 8
    assert spent["full_n16_t56"] == pytest.approx(4 * 16 * 375 / training)
    assert spent["full_n32_t35"] == pytest.approx(7 * 32 * 375 / training)
    assert spent["uniform"] == spent["online_free"] == 0.0
    assert 0.09 < spent["online"] <= 0.1


def test_dynamic_sampling_trains_on_effective_groups_and_pays_for_the_rest(lab, policies, worlds):
    row = run_one(lab, policies, worlds, "dapo")
    uniform = run_one(lab, policies, worlds, "uniform")
    assert row["effective_group_fraction"] == 1.0
    # A round is a batch, so the expected cost is a little over 1 / (share of effective groups).
    expected = 1.0 / uniform["effective_group_fraction"] - 1.0
    assert expected < row["extra_rollout_fraction"] < expected + 1.2


def test_a_full_refresh_with_many_responses_is_nearly_the_oracle(lab, policies, worlds):
    world = worlds.SimulatedPolicy(worlds.SETTINGS["u_shaped_none"], 401, 24, seed=0)
    run = policies.Run(401, world.categories, world.clusters, 24, 24, 0)
    row = lab.run_policy(world, "x", policies.FullRefresh(run, 4000, 8), run)
    assert row["spearman"] > 0.98
    assert row["ovs_share"] == pytest.approx(1.0, abs=0.02)
    assert row["effective_sample_size"] == pytest.approx(row["oracle_sample_size"], abs=0.03)


def test_equal_weights_collect_the_mean(lab):
    rates = np.array([0.0, 0.5, 0.2, 1.0])
    measured = lab.measure(np.ones(4), rates, None)
    value = np.array([0.0, 0.25, 0.16, 0.0])
    assert measured["ovs_share"] == pytest.approx(value.mean() / ((value**2).sum() / value.sum()))
    assert measured["effective_sample_size"] == 1.0
    assert lab.measure(value, rates, None)["ovs_share"] == pytest.approx(1.0)
    trained = lab.measure(np.ones(4), rates, np.array([1, 1]))
    assert trained["ovs_share"] == pytest.approx(0.25 / (value @ value / 0.41))


def test_ours_ranks_better_than_what_knows_less(lab, policies, worlds):
    ranking = {
        name: run_one(lab, policies, worlds, name, num_prompts=1500, steps=112, batch=51)["spearman"]
        for name in ("uniform", "mopps", "vade", "full_n16_t56", "online_free", "online")
    }
    assert ranking["uniform"] == 0.0
    assert ranking["vade"] < ranking["mopps"] < ranking["online_free"] < ranking["online"]
    assert ranking["full_n16_t56"] < ranking["online"]


def test_a_run_is_repeatable_and_its_seed_counts(lab, policies, worlds):
    first, second = (run_one(lab, policies, worlds, "online") for _ in range(2))
    assert first == second
    assert run_one(lab, policies, worlds, "online", seed=1)["spearman"] != first["spearman"]


@pytest.mark.parametrize("name", ["uniform_none", "uniform_slow", "uniform_fast", "u_shaped_sudden", "hard_fast"])
def test_worlds_drift_as_their_setting_says(worlds, name):
    setting = worlds.SETTINGS[name]
    world = worlds.SimulatedPolicy(setting, 20_000, 60, seed=0)
    before = world.logits.copy()
    for _ in range(60):
        world.train(np.empty(0, dtype=int))
    moved = world.logits - before
    steps = np.arange(1, 61)
    jumps = 2 * (0.3 * 1.5 - 0.1) if setting.jumps else 0.0
    expected = setting.drift * (1.5 * np.exp(-steps / 54)).sum() + jumps
    assert moved.mean() == pytest.approx(expected, abs=0.01 + 60 * setting.category_drift)
    assert (moved.std() == 0.0) == (name == "uniform_none")


def test_training_on_a_prompt_moves_it(worlds):
    world = worlds.SimulatedPolicy(worlds.Setting("x", 0.0, 0.1, gain=0.2), 1000, 10, seed=0)
    before = world.logits.copy()
    world.train(np.repeat(np.arange(500), 2))
    assert (world.logits - before)[:500].mean() == pytest.approx(0.4, abs=0.03)
    assert np.array_equal(world.logits[500:], before[500:])


def test_dead_prompts_are_exactly_dead(worlds):
    world = worlds.SimulatedPolicy(worlds.UNLIKE, 10_000, 60, seed=0)
    assert np.isin(world.pass_rates, (0.0, 1.0)).mean() == pytest.approx(0.4, abs=0.03)


# Traces


def write_trace(path, **changes):
    random = np.random.default_rng(0)
    steps = np.arange(0, 41, 10)
    rates = random.binomial(64, np.linspace(0.02, 0.98, 300) * np.ones((5, 1))) / 64
    arrays = {"steps": steps, "pass_rates": rates, "num_responses": np.array(64)} | changes
    np.savez(path, **arrays)
    return arrays


def test_a_trace_is_replayed_between_its_measurements(worlds, tmp_path):
    rates = np.array([[0.5, 0.0], [0.75, 0.25], [1.0, 0.5]])
    write_trace(tmp_path / "t.npz", steps=np.array([0, 4, 8]), pass_rates=rates, num_responses=np.array(4))
    world = worlds.RecordedTrace(tmp_path / "t.npz")
    assert (world.num_prompts, world.num_steps) == (2, 8)
    # The middle is averaged with its neighbours, which leaves a straight line as it is.
    assert world.pass_rates == pytest.approx([2.5 / 5, 0.5 / 5])
    for _ in range(4):
        world.train(np.array([0, 0]))
    assert world.pass_rates == pytest.approx([3.5 / 5, 1.5 / 5])
    for _ in range(2):
        world.train(np.array([0]))
    logits = np.log([3.5 / 1.5, 1.5 / 3.5]) / 2 + np.log([4.5 / 0.5, 2.5 / 2.5]) / 2
    assert world.pass_rates == pytest.approx(1 / (1 + np.exp(-logits)))


def test_the_laboratory_runs_on_traces(lab, tmp_path):
    write_trace(tmp_path / "demo.npz", categories=np.arange(300) // 150)
    rows = rows_of(lab, tmp_path, "--traces", str(tmp_path / "demo.npz"), "--policies", "online", "full_n16_t56")
    assert [(row["setting"], row["num_prompts"]) for row in rows] == [("demo", 300)] * 2
    # Batches of 300 // 16 prompts for 40 steps, refreshed once.
    assert rows[1]["extra_rollout_fraction"] == pytest.approx(16 * 300 / (40 * 18 * 8))
    assert rows[0]["spearman"] > 0.3


def test_a_trace_out_of_order_is_refused(worlds, tmp_path):
    write_trace(tmp_path / "t.npz", steps=np.array([0, 10, 10, 20, 30]))
    with pytest.raises(ValueError, match="steps must increase"):
        worlds.RecordedTrace(tmp_path / "t.npz")


def test_quick_leaves_no_policy_out(lab):
    options = lab.parse(["--quick"])
    assert options.quick and set(options.policies) >= {"uniform", "dapo", "mopps", "vade", "online_free", "online"}
    assert len(lab.SETTINGS) == 10
