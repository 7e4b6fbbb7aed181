import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from mmr1_ds.curriculum import estimator
from mmr1_ds.curriculum.drift_law import DriftLaw, Prior
from mmr1_ds.curriculum.estimator import PROBE_RESPONSES, FilterSettings, LogitFilter, probe_budget
from mmr1_ds.curriculum.posterior import pooled, posterior
from mmr1_ds.curriculum.utilities import expected_utility, utility_function, utility_peak
from mmr1_ds.errors import UserError

# A world to learn from


class World:
    """Logits that follow the filter's own law, without its knowledge of the parameters."""

    def __init__(
        self, num_prompts=4000, seed=0, mean=0.5, deviation=1.5, drift=0.0, noise=0.0, gain=0.0, offsets=(0.0,)
    ):
        self.random = np.random.default_rng(seed)
        self.categories = self.random.integers(len(offsets), size=num_prompts)
        self.offsets = np.array(offsets)
        self.z = mean + deviation * self.random.standard_normal(num_prompts)
        self.drift, self.noise, self.gain = drift, noise, gain

    def step(self, belief, num_drawn=256, num_responses=8):
        drawn = self.random.choice(len(self.z), size=num_drawn, replace=False)
        belief.observe(drawn, self.random.binomial(num_responses, expit(self.z[drawn])), num_responses)
        belief.predict_step(drawn)
        p = expit(self.z[drawn])
        self.z[drawn] += self.gain * 4 * p * (1 - p)
        self.z += self.drift + self.offsets[self.categories]
        self.z += np.sqrt(self.noise) * self.random.standard_normal(len(self.z))

    def run(self, steps, **filter_settings):
        belief = LogitFilter(len(self.z), self.categories, 8, FilterSettings(**filter_settings))
        for _ in range(steps):
            self.step(belief)
        return belief


def test_the_prior_of_prompts_never_seen_is_recovered():
    world = World(num_prompts=60_000, mean=-1.0, deviation=1.5)
    belief = world.run(30)
    assert belief.metrics()["curriculum/estimator_prior_mean"] == pytest.approx(-1.0, abs=0.15)
    assert belief.metrics()["curriculum/estimator_prior_variance"] == pytest.approx(1.5**2, rel=0.2)
    unseen = np.flatnonzero(belief.last_seen_step < 0)
    assert belief.predicted_pass_rates(unseen).mean() == pytest.approx(expit(world.z[unseen]).mean(), abs=0.02)


@pytest.mark.parametrize("deviation", [0.0, 1.2])
def test_the_distance_of_categories_is_learned_and_used_from_the_first_step(deviation):
    world = World(num_prompts=30_000, deviation=1.0, offsets=(0.0,) * 64)
    offsets = deviation * world.random.standard_normal(64)
    world.z += offsets[world.categories]
    belief = LogitFilter(30_000, world.categories, 8)
    world.step(belief, num_drawn=512)
    if deviation > 0.0:
        unseen = belief.predicted_pass_rates(np.flatnonzero(belief.last_seen_step < 0))
        category = world.categories[belief.last_seen_step < 0]
        by_category = np.array([unseen[category == k].mean() for k in range(64)])
        assert np.corrcoef(by_category, offsets)[0, 1] > 0.85
    for _ in range(10):
        world.step(belief, num_drawn=512)
    assert belief.state_dict()["numbers"]["prior.offset_variance"] ** 0.5 == pytest.approx(deviation, abs=0.3)


def test_a_known_drift_and_gain_are_recovered_and_reach_prompts_never_visited():
    world = World(drift=0.03, gain=0.15, mean=-1.5)
    kept_out = np.arange(4000) >= 3000
    belief = LogitFilter(4000, None, 8)
    belief.observe(np.arange(4000), world.random.binomial(32, expit(world.z)), 32)
    belief.predict_step(np.empty(0, dtype=int))
    world.z += world.drift
    for _ in range(80):
        drawn = world.random.choice(3000, size=256, replace=False)
        belief.observe(drawn, world.random.binomial(8, expit(world.z[drawn])), 8)
        belief.predict_step(drawn)
        p = expit(world.z[drawn])
        world.z[drawn] += world.gain * 4 * p * (1 - p)
        world.z += world.drift
    metrics = belief.metrics()
    assert metrics["curriculum/estimator_drift"] == pytest.approx(0.03, abs=0.006)
    assert metrics["curriculum/estimator_training_gain"] == pytest.approx(0.15, abs=0.08)
    predicted = belief.predicted_pass_rates(np.flatnonzero(kept_out))
    assert predicted.mean() == pytest.approx(expit(world.z[kept_out]).mean(), abs=0.02)


def test_categories_drift_apart():
    world = World(offsets=(-0.02, 0.02), num_prompts=3000)
    belief = world.run(80)
    moved = belief.state_dict()["arrays"]["law.category_drift"] + belief.metrics()["curriculum/estimator_drift"]
    assert moved == pytest.approx([-0.02, 0.02], abs=0.008)


@pytest.mark.parametrize("noise", [0.0034, 0.015])
def test_the_process_noise_is_recovered(noise):
    estimates = []
    belief = LogitFilter(4000, None, 8)
    world = World(noise=noise)
    for step in range(250):
        world.step(belief)
        if step >= 150:
            estimates.append(belief.metrics()["curriculum/estimator_process_noise"])
    assert noise / 1.6 < np.mean(estimates) < noise * 1.6


def test_predictions_are_calibrated():
    world = World(drift=0.02, noise=0.003)
    belief = world.run(60)
    predicted, true = belief.predicted_pass_rates(np.arange(4000)), expit(world.z)
    for low, high in ((0.0, 0.4), (0.4, 0.7), (0.7, 1.0)):
        within = (predicted >= low) & (predicted < high)
        assert predicted[within].mean() == pytest.approx(true[within].mean(), abs=0.025)


def test_what_the_shared_drift_explains_is_not_counted_again_for_categories():
    law = DriftLaw(2, FilterSettings())
    information, steps = np.full(10, 1e6), np.arange(1.0, 11.0)
    gradient = information * steps * 0.05  # as if every prompt had drifted 0.05 a step more than believed
    change, gain = law.learn_drift(gradient, information, np.arange(10) % 2, steps, np.zeros(10))
    assert change == pytest.approx([0.05, 0.05], abs=1e-6) and gain == pytest.approx(0.0)
    assert np.abs(law.category_drift).max() < 1e-6


def test_a_category_drift_that_nothing_confirms_fades():
    law, nothing = DriftLaw(2, FilterSettings()), np.empty(0)
    law.category_drift = np.array([0.01, -0.02])
    for _ in range(300):
        law.learn_drift(nothing, nothing, np.empty(0, dtype=int), nothing, nothing)
    assert np.abs(law.category_drift).max() < 1e-4


def test_draws_that_collect_less_than_expected_are_sharpened():
    belief = World().run(20, max_sharpening=8.0)
    state = belief.state_dict()
    exponents = []
    for found in (0.9, 1.0, 1.1):
        state["numbers"]["found_variance"] = found * state["numbers"]["expected_variance"]
        belief.load_state_dict(state)
        belief.weights()
        exponents.append(belief.metrics()["curriculum/estimator_sharpening"])
    assert exponents[0] > exponents[1] > exponents[2] >= 1.0


def test_what_draws_collect_is_compared_without_bias():
    world = World(noise=0.001)
    numbers = world.run(80).state_dict()["numbers"]
    assert numbers["found_variance"] / numbers["expected_variance"] == pytest.approx(1.0, abs=0.04)


def test_a_prompt_that_revives_is_believed_sooner_than_without_jumps():
    def after_revival(jump_rate):
        belief = LogitFilter(500, None, 8, FilterSettings(jump_rate=jump_rate))
        random = np.random.default_rng(0)
        for step in range(40):
            right = random.binomial(8, np.linspace(0.05, 0.95, 500)).astype(float)
            right[0] = 0 if step < 39 else 4
            belief.observe(np.arange(500), right, 8)
            belief.predict_step(np.arange(500))
        return belief.predicted_pass_rates(np.array([0]))[0]

    assert after_revival(1e-3) > 0.4 > 0.2 > after_revival(1e-12)


# The bookkeeping


class EagerFilter:
    """The same law with every prompt's m, V and shares moved at every step, as plainly as it can be written."""

    def __init__(self, num_prompts, categories, constants):
        self.k, self.constants, self.step = categories, constants, 0
        self.law, self.prior = DriftLaw(categories.max() + 1, constants), Prior(categories.max() + 1, constants)
        self.m, self.V, self.S0, self.S1, self.R = np.zeros((5, num_prompts))
        self.last = np.full(num_prompts, -1)

    def belief(self, i):
        new = self.last[i] < 0
        m = np.where(new, self.prior.mean + self.prior.offset[self.k[i]], self.m[i])
        return m, np.where(new, self.prior.variance, self.V[i]).clip(self.constants.min_variance, 16.0)

    def observe(self, indices, num_right, num_responses):
        i, c, n = pooled(indices, num_right, num_responses)
        seen, k = self.last[i] >= 0, self.k[i]
        self.prior.learn(k[~seen], c[~seen], n[~seen])
        m, V = self.belief(i)
        m0, V0, evidence = posterior(m, V, c, n)
        m1, V1, evidence_of_jump = posterior(
            self.prior.mean + self.prior.offset[k], np.full(len(i), self.prior.variance), c, n
        )
        elapsed = np.where(seen, self.step - self.last[i], 0)
        h = 1 - (1 - self.law.jump_rate) ** elapsed
        r = h * np.exp(evidence_of_jump) / (h * np.exp(evidence_of_jump) + (1 - h) * np.exp(evidence))
        g, j = (m0 - m) / V, (V - V0) / V**2
        S0, S1, R = (np.where(seen, share[i], 0.0) for share in (self.S0, self.S1, self.R))
        self.law.learn_jumps(r[seen], elapsed[seen])
        self.law.learn_noise(g, j, R, 1 - r)
        change, gain_change = self.law.learn_drift((1 - r) * g, (1 - r) * np.maximum(j, 0), k, S0, S1)
        everyone = self.last >= 0
        moved = self.S0 * change[self.k] + self.S1 * gain_change
        self.m[everyone] += moved[everyone]
        kept = (1 - r) * V0 / V
        self.S0[i], self.S1[i], self.R[i] = kept * S0, kept * S1, kept**2 * R
        self.m[i] = (1 - r) * m0 + r * m1
        self.V[i] = (1 - r) * (V0 + (m0 - self.m[i]) ** 2) + r * (V1 + (m1 - self.m[i]) ** 2)
        self.V[i] = np.maximum(self.V[i], self.constants.min_variance)
        self.m[i] += self.S0[i] * change[k] + self.S1[i] * gain_change
        self.last[i] = self.step

    def predict_step(self, trained):
        u = np.bincount(trained[self.last[trained] >= 0], minlength=len(self.m)).astype(float)
        p = expit(self.m)
        u *= 4 * p * (1 - p) / np.sqrt(1 + 0.3 * self.V)
        self.m += self.law.gain * u
        self.S1 += u
        self.m += self.law.drift[0] + self.law.category_drift[self.k]
        self.V += self.law.noise
        self.S0 += 1
        self.R += 1
        self.prior.mean += self.law.drift[0]
        self.prior.offset = self.prior.offset + self.law.category_drift
        self.step += 1


def test_lazy_beliefs_equal_those_moved_at_every_step():
    constants = FilterSettings()
    world = World(num_prompts=401, drift=0.05, noise=0.01, gain=0.1, offsets=(-0.03, 0.0, 0.03))
    lazy, eager = LogitFilter(401, world.categories, 8, constants), EagerFilter(401, world.categories, constants)
    for _ in range(120):
        drawn = world.random.integers(350, size=37)  # 51 prompts are never seen; some are drawn twice
        right = world.random.binomial(8, expit(world.z[drawn]))
        for belief in (lazy, eager):
            belief.observe(drawn, right, 8)
            belief.predict_step(drawn)
        world.z += 0.05
    mean, variance = lazy.belief(np.arange(401))
    expected_mean, expected_variance = eager.belief(np.arange(401))
    # Shares are kept in half precision.
    assert np.abs(mean - expected_mean).max() < 0.01
    assert variance == pytest.approx(expected_variance, rel=0.01)
    assert lazy.metrics()["curriculum/estimator_drift"] == pytest.approx(eager.law.drift[0], abs=1e-4)


def run_steps(belief, steps, seed=3):
    drawn = []
    for _ in range(steps):
        random = np.random.default_rng([seed, belief.step])
        weights = belief.weights()
        batch = random.choice(belief.num_prompts, size=20, p=weights / weights.sum(dtype=np.float64))
        probes = belief.probes(5, exclude=batch)
        drawn.append(np.concatenate([batch, probes]))
        belief.observe(drawn[-1], random.binomial(8, 0.1 + 0.8 * (drawn[-1] % 7) / 6), 8)
        belief.predict_step(batch)
    return np.concatenate(drawn)


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a["numbers"] == b["numbers"]
    return all(np.array_equal(a["arrays"][name], b["arrays"][name]) for name in a["arrays"])


def test_a_saved_state_goes_on_to_the_same_bits():
    categories = np.arange(101) % 3
    whole, first = LogitFilter(101, categories, 8), LogitFilter(101, categories, 8)
    expected = run_steps(whole, 31)
    run_steps(first, 14)
    state = first.state_dict()
    numbers = json.loads(json.dumps(state["numbers"]))  # as a checkpoint keeps them
    second = LogitFilter(101, categories, 8)
    second.load_state_dict({"arrays": state["arrays"], "numbers": numbers})
    run_steps(first, 2)  # shares no array with the second
    assert np.array_equal(run_steps(second, 17), expected[14 * 25 :])
    assert equal_states(whole, second)
    assert np.array_equal(whole.weights(), second.weights())


def test_a_reordered_data_set_keeps_its_beliefs():
    categories = np.arange(101) % 3
    first = LogitFilter(101, categories, 8)
    run_steps(first, 14)
    positions = np.random.default_rng(0).permutation(101)
    second = LogitFilter(101, categories[positions], 8)
    second.load_state_dict(first.state_dict(), positions)
    assert np.array_equal(second.weights(), first.weights()[positions])
    assert np.array_equal(second.last_seen_step, first.last_seen_step[positions])


def test_the_table_takes_20_bytes_a_prompt():
    belief = LogitFilter(1000, None, 8)
    arrays = [array for array in vars(belief).values() if isinstance(array, np.ndarray) and len(array) == 1000]
    assert sum(array.nbytes for array in arrays) == 20 * 1000


# Edge cases


def test_an_unknown_utility_names_the_known_ones():
    with pytest.raises(UserError, match="unknown utility 'ovs'; known are learnability"):
        LogitFilter(3, None, 8).weights("ovs")


def test_prompts_never_seen_are_all_alike_within_their_category():
    belief = LogitFilter(20, np.arange(20) % 2, 8)
    assert np.array_equal(belief.weights(), np.ones(20, dtype=np.float32))
    belief.observe(np.array([0, 2, 4, 1, 3]), np.array([8.0, 8, 7, 1, 0]), 8)
    belief.predict_step(np.array([0, 2, 4, 1, 3]))
    predicted = belief.predicted_pass_rates(np.arange(5, 20))
    assert len(set(predicted[::2])) == len(set(predicted[1::2])) == 1
    assert predicted[1] > predicted[0]  # even prompts were the easier ones


@pytest.mark.parametrize("right", [0, 8])
def test_hundreds_of_steps_all_right_or_all_wrong_stay_finite(right):
    belief = LogitFilter(7, None, 8)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for _ in range(300):
            belief.weights()
            belief.observe(np.arange(5), np.full(5, right), 8)
            belief.predict_step(np.arange(5))
    mean, variance = belief.belief(np.arange(7))
    assert (np.abs(mean[:5]) <= 16).all()
    assert (variance >= 0.01).all() and (variance <= 16).all()
    weights = belief.weights()
    assert (weights > 0).all() and weights.max() == 1.0
    assert abs(belief.predicted_pass_rates(np.arange(5)) - right / 8).max() < 0.02


def test_one_prompt():
    belief = LogitFilter(1, np.array([3]), 2)
    for right in (1.0, 0.0, 2.0):
        assert belief.weights().tolist() == [1.0]
        assert len(belief.probes(4, exclude=np.array([0, 0]))) == 0
        belief.observe(np.array([0, 0]), np.array([right, 1.0]), 2)
        belief.predict_step(np.array([0, 0]))
    assert belief.probes(4, exclude=np.empty(0, dtype=int)).tolist() == [0]


def test_a_step_without_observations_only_drifts():
    belief = LogitFilter(9, None, 8)
    run_on = np.empty(0, dtype=np.int64)
    belief.observe(run_on, np.empty(0), 8)
    belief.predict_step(run_on)
    belief.observe(np.arange(4), np.array([1.0, 5, 8, 0]), 8)
    belief.predict_step(np.arange(4))
    before = belief.belief(np.arange(9))
    belief.observe(run_on, np.empty(0), 8)
    belief.predict_step(run_on)
    after = belief.belief(np.arange(9))
    assert np.allclose(after[0], before[0], atol=0.1)
    assert (after[1][:4] > before[1][:4]).all()


def test_unknown_accuracies_are_skipped():
    known, mixed = LogitFilter(9, None, 8), LogitFilter(9, None, 8)
    known.observe(np.array([2, 5]), np.array([3.0, 7.0]), 8)
    mixed.observe(np.array([2, 4, 5, 2]), np.array([3.0, np.nan, 7.0, np.nan]), 8)
    for belief in (known, mixed):
        belief.predict_step(np.array([2, 4, 5]))
    assert equal_states(known, mixed)
    assert known.last_seen_step.tolist() == [-1, -1, 0, -1, -1, 0, -1, -1, -1]


def test_groups_of_one_prompt_are_pooled():
    apart, together = LogitFilter(9, None, 8), LogitFilter(9, None, 8)
    apart.observe(np.array([2, 5, 2]), np.array([3.0, 7.0, 1.5]), np.array([8, 8, 4]))
    together.observe(np.array([2, 5]), np.array([4.5, 7.0]), np.array([12, 8]))
    assert equal_states(apart, together)


def test_shared_expectations_equal_those_of_each_prompt(monkeypatch):
    belief = World(num_prompts=3001, drift=0.01, offsets=(-0.02, 0.0, 0.03)).run(3)
    mean, variance = belief.belief(np.arange(3001))
    expected = expected_utility(mean, variance, utility_function("learnability"), 8)
    evaluated = mock.Mock(wraps=expected_utility)
    monkeypatch.setattr(estimator, "expected_utility", evaluated)
    assert belief.utility("learnability").tolist() == expected.tolist()
    num_seen = int((belief.last_seen_step >= 0).sum())
    assert 0 < num_seen < 1024
    assert sum(len(call.args[0]) for call in evaluated.call_args_list) == 3 + num_seen


def test_results_do_not_depend_on_the_blocks_that_prompts_are_evaluated_in(monkeypatch):
    """Of 401 prompts each block of 64 has some that were seen, none, or all."""
    belief = LogitFilter(401, np.arange(401) % 3, 8)
    seen = np.concatenate([np.arange(130), np.arange(200, 401, 7)])
    belief.observe(seen, np.arange(len(seen)) % 9.0, np.full(len(seen), 8.0))
    belief.predict_step(seen)
    noise = np.linspace(-2, 2, 401, dtype=np.float32)

    def results():
        found = [belief.utility("learnability"), belief.sampled_utility("learnability", noise)]
        return [*found, belief.predicted_pass_rates(np.arange(401))]

    whole = results()
    monkeypatch.setattr(estimator, "_BLOCK", 64)
    for one, other in zip(whole, results(), strict=True):
        assert len({*one.tolist()}) > 9
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("utility", "peak"),
    [("learnability", 1 / 4), ("learnability-squared", 4 / 27), ("gradient-probability", 1 - 2**-7)],
)
def test_the_floor_is_a_share_of_the_utilitys_peak(utility, peak):
    assert utility_peak(utility, 8) == pytest.approx(peak, rel=1e-12)
    uniform, some = (LogitFilter(3, None, 8, FilterSettings(score_floor=floor)) for floor in (1.0, 0.04))
    for belief in (uniform, some):
        belief.observe(np.arange(3), np.array([0.0, 3.0, 8.0]), 8)
        belief.predict_step(np.arange(3))
    assert set(uniform.weights(utility)) == {1.0}
    score = 0.04 + 0.96 * some.utility(utility) / peak
    weights = some.weights(utility)
    gamma = some.metrics()["curriculum/estimator_sharpening"]
    np.testing.assert_allclose(weights, (score / score.max()) ** gamma, rtol=1e-5)


# Probes


@given(st.integers(1, 300), st.integers(0, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_probes_are_distinct_and_no_other_is_staler(num_prompts, num_probes, seed):
    random = np.random.default_rng(seed)
    belief = LogitFilter(num_prompts, None, 8)
    for _ in range(3):
        seen = random.integers(num_prompts, size=random.integers(1, num_prompts + 1))
        belief.observe(seen, random.binomial(8, 0.5, len(seen)), 8)
        belief.predict_step(seen)
    exclude = random.integers(num_prompts, size=5)
    probes = belief.probes(num_probes, exclude)
    left = np.setdiff1d(np.arange(num_prompts), exclude)
    assert len(set(probes)) == len(probes) == min(num_probes, len(left))
    assert not np.isin(probes, exclude).any()
    expected = np.sort(belief.last_seen_step[left])[: len(probes)]
    assert np.array_equal(np.sort(belief.last_seen_step[probes]), expected)
    assert np.array_equal(probes, belief.probes(num_probes, exclude))
    assert len(belief.probes(-3, exclude)) == 0


def test_equally_stale_prompts_are_probed_all_over_the_data_set():
    probes = LogitFilter(100_000, None, 8).probes(1000, exclude=np.arange(50))
    counts = np.bincount(probes // 10_000, minlength=10)
    assert counts.min() > 60 and counts.max() < 140
    assert np.bincount(probes % 8, minlength=8).max() < 2 * 1000 / 8


@pytest.mark.parametrize("num_steps", [1, 7, 224, 5000])
def test_the_probe_budget_is_spent_by_the_end_and_never_more(num_steps):
    budget = [probe_budget(step, num_steps, 15_000, 512, 8, 0.1) for step in range(num_steps + 1)]
    assert budget[0] == 0.0
    assert budget[-1] == pytest.approx(0.1 * num_steps * 512 * 8)
    assert (np.diff(budget) >= 0).all()
    assert max(np.diff(budget)) <= 0.1751 * 512 * 8
    if num_steps == 224:
        assert budget[56] == pytest.approx(0.4375 * budget[-1])
    assert PROBE_RESPONSES == 4
