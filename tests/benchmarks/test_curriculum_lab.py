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
    names = "uniform full_n32_t35 full_n16_t56 full_n8_t4 mopps_geo3k mopps_math dps vade greso difficulty_pools"
    assert {row["policy"] for row in rows} >= {*names.split(), "dps_math", "pilot_commit", "dapo", "online"}
    believing = "full_n32_t35 full_n16_t56 full_n8_t4 mopps_geo3k mopps_math dps dps_math vade".split()
    for row in rows:
        assert row["setting"] == "u_shaped_fast" and row["seed"] == 0
        for key in (
            "effective_group_fraction", "mean_variance_share", "visited_fraction", "extra_rollout_fraction",
            "effective_per_rollout",
        ):  # fmt: skip
            assert isinstance(row[key], float) and np.isfinite(row[key])
        assert (row["spearman"] is not None) == (row["policy"] in believing or row["policy"].startswith("online"))
    printed = capsys.readouterr().out
    assert "online against mopps_geo3k" in printed and "mean" in printed
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3


def test_rollouts_are_counted_as_the_paper_spends_them(lab, policies, worlds):
    # 3,750 prompts in batches of 128 as 15,000 in batches of 512: 4 refreshes of 16 in 224 steps are 105 %.
    spent = {
        name: run_one(lab, policies, worlds, name, num_prompts=375, steps=224, batch=13)["extra_rollout_fraction"]
        for name in ("full_n16_t56", "full_n32_t35", "uniform", "mopps_geo3k", "dps", "vade")
    }
    training = 224 * 13 * 8
    assert spent.pop("full_n16_t56") == pytest.approx(4 * 16 * 375 / training)
    assert spent.pop("full_n32_t35") == pytest.approx(7 * 32 * 375 / training)
    assert set(spent.values()) == {0.0}


def test_dynamic_sampling_trains_on_effective_groups_and_pays_for_the_rest(lab, policies, worlds):
    row = run_one(lab, policies, worlds, "dapo")
    uniform = run_one(lab, policies, worlds, "uniform")
    assert row["effective_group_fraction"] == 1.0
    # A round is a batch, so the expected cost is a little over 1 / (share of effective groups).
    expected = 1.0 / uniform["effective_per_rollout"] - 1.0
    assert expected < row["extra_rollout_fraction"] < expected + 1.2
    assert row["effective_per_rollout"] == pytest.approx(1.0 / (1.0 + row["extra_rollout_fraction"]))


def test_a_full_refresh_with_many_responses_is_nearly_the_oracle(lab, policies, worlds):
    world = worlds.SimulatedPolicy(worlds.SETTINGS["u_shaped_none"], 401, 24, seed=0)
    run = policies.Run(401, world.categories, world.clusters, 24, 24, 0)
    row = lab.run_policy(world, "x", policies.FullRefresh(run, 4000, 8), run)
    assert row["spearman"] > 0.98 and row["variance_spearman"] > 0.98
    uniform = run_one(lab, policies, worlds, "uniform", setting="u_shaped_none")["mean_variance_share"]
    # Half of a batch is drawn as the oracle draws.
    assert row["mean_variance_share"] == pytest.approx((1.0 + uniform) / 2.0, abs=0.06)


def test_ours_ranks_better_and_teaches_more_a_rollout_than_what_knows_less(lab, policies, worlds):
    rows = {
        name: run_one(lab, policies, worlds, name, num_prompts=1500, steps=112, batch=51)
        for name in ("uniform", "full_n16_t56", "mopps_geo3k", "online_half", "online", "online_posterior")
    }
    assert rows["online_half"]["variance_spearman"] > rows["full_n16_t56"]["variance_spearman"]
    teaching = {name: row["effective_per_rollout"] for name, row in rows.items()}
    in_order = ["full_n16_t56", "uniform", "online_half", "online", "mopps_geo3k", "online_posterior"]
    assert sorted(teaching, key=teaching.get) == in_order
    assert rows["online"]["visited_fraction"] > 0.95


def test_beliefs_are_compared_on_the_same_observations(lab, tmp_path):
    rows = rows_of(lab, tmp_path, *SMALL, "--settings", "u_shaped_slow", "--estimators", "--seeds", "0", "1")
    found = {(row["estimator"], row["seed"]): row for row in rows}
    assert len(found) == 2 * len(lab.ESTIMATORS)
    for seed in (0, 1):
        assert (
            found["online", seed]["log_loss"] < found["mopps_geo3k", seed]["log_loss"] < found["dps", seed]["log_loss"]
        )
        assert 0.0 < found["online", seed]["log_loss"] and found["online", seed]["spearman"] > 0.5


def test_a_run_is_repeatable_and_its_seed_counts(lab, policies, worlds):
    for name in ("online", "mopps_geo3k", "greso", "pilot_commit"):
        first, second = (run_one(lab, policies, worlds, name) for _ in range(2))
        assert first == second
    assert (
        run_one(lab, policies, worlds, "online", seed=1)["spearman"]
        != run_one(lab, policies, worlds, "online")["spearman"]
    )


# Rivals, by hand


@pytest.fixture
def rivals(lab):
    return importlib.import_module("curriculum_lab_rivals")


def small_run(policies, num_prompts=7, batch=2):
    return policies.Run(num_prompts, np.zeros(num_prompts, int), np.zeros(num_prompts, int), batch, 10, 0)


def test_mopps_pulls_back_what_it_visits_and_takes_the_nearest_to_a_half(policies, rivals):
    mopps = rivals.Mopps(small_run(policies), ratio=3, decay=0.5)
    for _ in range(2):
        mopps.learn(np.array([1, 4]), np.array([6.0, 0.0]), None)
    # 1 -> .5 + .5 + 6 = 7 -> 3.5 + .5 + 6 = 10; 1 -> 3 -> 1.5 + .5 + 2 = 4
    assert (mopps.alpha[1], mopps.beta[1]) == (10.0, 4.0) and mopps.pass_rates()[1] == pytest.approx(10 / 14)
    assert (mopps.alpha[0], mopps.beta[0]) == (1.0, 1.0)
    mopps.alpha[:] = mopps.beta[:] = 1e7  # draws are the means now
    mopps.alpha[[0, 1, 3, 5, 6]] *= 9.0
    batches = [set(mopps.draw(step).tolist()) for step in range(1, 8)]  # six of seven come in turn
    assert sum(batch == {2, 4} for batch in batches) >= 4


def test_dps_is_the_hidden_markov_model(policies, rivals):
    dps = rivals.Dps(small_run(policies))
    dps.learn(np.array([3]), np.array([4.0]), None)
    # All is equal before: the transitions into the middle state get a third each on top of 1.
    assert dps.transitions[3] == pytest.approx(np.array([[1, 1, 1], [4 / 3, 4 / 3, 4 / 3], [1, 1, 1]]))
    assert dps.states[3] == pytest.approx([0.3, 0.4, 0.3]) and dps.pass_rates()[3] == pytest.approx(0.5)
    assert dps.states[0] == pytest.approx([1 / 3] * 3)
    dps.learn(np.array([3]), np.array([8.0]), None)
    # From the middle to the last: decayed counts 1, 7/6, 1 and one more at (last, middle), of which it was certain.
    assert dps.transitions[3] == pytest.approx(np.array([[1, 1, 1], [7 / 6, 7 / 6, 7 / 6], [1, 2, 1]]))
    assert dps.states[3] == pytest.approx(np.array([6, 7, 6]) / 19)
    dps.learn(np.array([0]), np.array([0.0]), None)
    assert dps.transitions[3] == pytest.approx(np.array([[1, 1, 1], [13 / 12, 13 / 12, 13 / 12], [1, 1.5, 1]]))


def test_vade_forgets_at_two_scales_and_likes_a_third(policies, rivals):
    vade = rivals.Vade(small_run(policies), visit_decay=0.5, step_decay=0.75)
    vade.learn(np.array([2]), np.array([8.0]), None)
    vade.learn(np.array([5]), np.array([0.0]), None)
    assert vade.alpha[2] == 0.75 * 9.0 + 0.25 and vade.beta[5] == 9.0 and vade.alpha[0] == 1.0
    vade.alpha[:], vade.beta[:] = 1e7, 9e7
    vade.alpha[[1, 6]], vade.beta[[1, 6]] = 1e7, 2e7
    assert set(vade.draw(1).tolist()) == {1, 6}


def test_greso_passes_over_streaks_and_steers_how_many_after_the_first_epoch(policies, rivals):
    greso = rivals.Greso(small_run(policies))
    greso.judge(np.array([0, 1, 2, 3]), np.array([8.0, 0.0, 3.0, 0.0]))
    greso.judge(np.array([0, 1, 2, 3]), np.array([8.0, 0.0, 3.0, 8.0]))  # a streak is of one kind
    assert greso.kept_chance(np.arange(5)) == pytest.approx([0.25, 0.25, 1.0, 0.5, 1.0])
    greso.learn(None, None, None)
    assert greso.explored.tolist() == [0.5, 0.5]  # the first epoch
    greso._next(7)
    greso.judge(np.array([4, 5, 6]), np.array([8.0, 0.0, 3.0]))
    greso.learn(None, None, None)  # a third easy and a third hard, both above their targets
    assert greso.explored == pytest.approx([0.49, 0.49])
    greso.judge(np.array([1, 3, 4, 5]), np.array([8.0, 1.0, 1.0, 1.0]))
    greso.learn(None, None, None)  # a quarter easy, none hard
    assert greso.explored == pytest.approx([0.48, 0.5]) and greso.kept_chance(np.array([1])) == pytest.approx(0.48)
    greso.streaks[6, 1] = 9
    assert greso.kept_chance(np.array([6])) == pytest.approx(0.01)


def test_a_later_round_of_greso_is_as_large_as_the_last_one_says(policies, rivals):
    greso, sizes = rivals.Greso(small_run(policies, batch=8, num_prompts=1000)), []

    def roll(indices, num_responses):
        sizes.append(len(indices))
        teach = {1: 2, 2: 1, 3: 5}.get(len(sizes), 0)
        return np.array([4.0] * teach + [0.0] * (len(indices) - teach))

    batch, num_right, spent = greso.batch(1, roll)
    # 6 missing at 2 of 12: 45, more than 12 at a time; 5 at 1 of 12: 75; none missing.
    assert sizes == [12, 12, 12] and len(batch) == 8 and spent == 8 * 36 and (num_right == 4.0).all()
    sizes.clear()

    def richer(indices, num_responses):
        sizes.append(len(indices))
        teach = 7 if len(sizes) == 1 else 0
        return np.array([4.0] * teach + [0.0] * (len(indices) - teach))

    batch, _, _ = greso.batch(2, richer)  # 1 missing at 7 of 12: 2, the least is B / 4, and no further round
    assert sizes == [12, 2] and len(batch) == 7


def test_pools_draw_by_the_last_group(policies, rivals):
    pools = rivals.DifficultyPools(small_run(policies, batch=4000))
    pools.learn(np.array([0, 1, 2]), np.array([8.0, 0.0, 5.0]), None)
    counts = np.bincount(pools.draw(1), minlength=7) / 4000
    assert counts == pytest.approx(np.array([0.2, 0.2, 1, 1, 1, 1, 1]) / 5.4, abs=0.03)
    pools.learn(np.array([1]), np.array([1.0]), None)
    assert pools.weights.tolist() == [0.2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("evicts", [True, False])
def test_pilots_are_counted_and_wait_for_a_later_round(policies, rivals, evicts):
    pilot = rivals.PilotCommit(small_run(policies), pilots=4, evicts=evicts)  # 2 of 7 a step, 6 pilots a round
    right = np.array([4.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0])
    rolled = []

    def roll(indices, num_responses):
        rolled.append((num_responses, indices.tolist()))
        return right[indices]

    batch, num_right, spent = pilot.batch(1, roll)
    assert len(batch) == 2 and set(batch) <= {2, 3, 4} and (num_right == 2 * right[batch]).all()
    assert rolled[1] == (4, [])  # nothing waited in the first round
    assert rolled[3] == (4, batch.tolist()) and len(rolled) == 4 and spent == 4 * (6 + 6 + 2)
    waiting = set(pilot._waiting)
    assert waiting and waiting <= {2, 3, 4}
    assert pilot.evicted.tolist() == [True] + [False] * 6
    rolled.clear()
    for step in (2, 3):
        pilot.batch(step, roll)
    piloted = [prompt for at in range(0, len(rolled), 2) for prompt in rolled[at][1]]
    assert len(piloted) % 6 == 0 and (0 in piloted) != evicts


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
    assert world.pass_rates == pytest.approx([2.1 / 4.2, 0.1 / 4.2])
    for _ in range(4):
        world.train(np.array([0, 0]))
    assert world.pass_rates == pytest.approx([3.1 / 4.2, 1.1 / 4.2])
    for _ in range(2):
        world.train(np.array([0]))
    logits = np.log([3.1 / 1.1, 1.1 / 3.1]) / 2 + np.log([4.1 / 0.1, 2.1 / 2.1]) / 2
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
    assert options.quick and set(options.policies) >= {"uniform", "online", *lab.RIVALS}
    assert len(lab.SETTINGS) == 10
