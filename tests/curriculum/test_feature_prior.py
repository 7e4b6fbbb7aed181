import json

import numpy as np
import pytest
from fixtures.coordinators import N, P, make, train
from fixtures.rank_threads import SingleProcess, on_ranks

from mmr1_ds.config import DataConfig, RunConfig
from mmr1_ds.config.ranges import check_choices
from mmr1_ds.curriculum import feature_prior
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.estimator import LogitFilter
from mmr1_ds.curriculum.feature_prior import FEATURE_UNIT, FeaturePrior, inverse
from mmr1_ds.curriculum.metric_names import FEATURE_EXPLAINED_FRACTION, FEATURE_WEIGHT
from mmr1_ds.data.features import NUM_FEATURES, UNIT
from mmr1_ds.errors import UserError

ONLINE = {"curriculum_refresh": "online", "curriculum_features": "text"}


def make_features(num_prompts=P, size=7, seed=3):
    random = np.random.default_rng(seed)
    return np.rint(random.standard_normal((num_prompts, size)).clip(-3.9, 3.9) * FEATURE_UNIT).astype(np.int8)


def coordinator_with(features, control=None, **changes):
    settings = {"rollout_batch_size": 6, "seed": 5, "sampling_strategy": "curriculum", **ONLINE, **changes}
    ids = [f"p{i}" for i in range(P)]
    return Coordinator(
        DataConfig(**settings), ids, [""] * P, "abc", N, 40, control or SingleProcess(), features=features
    )


def test_the_unit_is_that_of_the_text_features():
    assert FEATURE_UNIT == UNIT
    FeaturePrior(np.zeros((3, NUM_FEATURES), dtype=np.int8))  # few enough for sums without rounding


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_inverse_is_the_librarys(size):
    random = np.random.default_rng(size)
    root = random.standard_normal((size, size + 3))
    matrix = root @ root.T + np.diag(random.uniform(0.1, 100.0, size))
    np.testing.assert_allclose(inverse(matrix), np.linalg.inv(matrix), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_one_step_is_bayesian_linear_regression(monkeypatch, size):
    """With Gaussian observations y = x . w + noise the quadratic approximation is exact: the closed form must come."""
    monkeypatch.setattr(feature_prior, "_EM_PASSES", 1)
    features = make_features(401, size)
    prior = FeaturePrior(features)
    tau_squared = prior.deviation_squared
    random = np.random.default_rng(1)
    indices = random.permutation(401)[:313]
    truth, noise = random.standard_normal(size) / np.sqrt(size), random.uniform(0.5, 2.0, 313)
    share = random.uniform(0.1, 1.0, 313)
    x = features[indices] / FEATURE_UNIT
    y = share * (x @ truth) + np.sqrt(noise) * random.standard_normal(313)
    prior.learn(indices, y / noise, 1.0 / noise, share)
    design = share[:, None] * x / np.sqrt(noise)[:, None]
    expected = np.linalg.solve(design.T @ design + np.eye(size) / tau_squared, design.T @ (y / np.sqrt(noise)))
    effect = features / FEATURE_UNIT @ expected * prior.trust
    np.testing.assert_allclose(prior.effect(slice(None)), effect, atol=2e-3 * np.abs(effect).max())


def test_many_steps_are_regression_on_all_observations_with_decayed_weights(monkeypatch):
    """Each step's gradients are taken at the weights of the step before, and the result does not depend on them."""
    monkeypatch.setattr(feature_prior, "_EM_PASSES", 1)
    size, memory = 5, feature_prior._MEMORY
    features = make_features(97, size)
    prior = FeaturePrior(features)
    random = np.random.default_rng(2)
    truth = random.standard_normal(size)
    information, evidence = np.zeros((size, size)), np.zeros(size)
    for _ in range(30):
        tau_squared = prior.deviation_squared
        indices = random.permutation(97)[:41]
        x = features[indices] / FEATURE_UNIT
        y = x @ truth + random.standard_normal(41)
        prior.learn(indices, y - prior.effect(indices), np.ones(41), np.ones(41))
        information, evidence = memory * information + x.T @ x, memory * evidence + x.T @ y
        expected = np.linalg.solve(information + np.eye(size) / tau_squared, evidence)
    np.testing.assert_allclose(prior.effect(slice(None)) / prior.trust, features / FEATURE_UNIT @ expected, atol=5e-3)
    assert prior.trust == pytest.approx(1.0, abs=0.05)
    assert prior.deviation_squared == pytest.approx(truth @ truth / size, rel=0.5)


def test_trust_lasts_when_nothing_is_left_to_predict():
    features = make_features(97, 5)
    prior = FeaturePrior(features)
    random = np.random.default_rng(3)
    truth = random.standard_normal(5)
    for _ in range(30):
        indices = random.permutation(97)[:41]
        y = features[indices] / FEATURE_UNIT @ truth + random.standard_normal(41)
        prior.learn(indices, y - prior.effect(indices), np.ones(41), np.ones(41))
    assert prior.trust > 0.9
    nothing = np.empty(0)
    for _ in range(400):
        prior.learn(np.empty(0, dtype=np.int64), nothing, nothing, nothing)
    assert 0.6 < prior.trust < 0.9


def test_no_result_depends_on_the_order_of_sums():
    prior = FeaturePrior(make_features(1001, 40))
    random = np.random.default_rng(0)
    prior.learn(np.arange(1001), random.standard_normal(1001), np.ones(1001), np.ones(1001))
    whole = prior.effect(slice(None))
    one_by_one = np.concatenate([prior.effect(np.array([i])) for i in range(1001)])
    np.testing.assert_array_equal(whole, one_by_one)
    exact = prior.features.astype(np.int64) @ prior.levels.astype(np.int64)
    expected = exact.astype(np.float32) * np.float32(prior.level_size) * np.float32(prior.trust)
    np.testing.assert_array_equal(whole, expected)


def run_filter(features, seed, num_prompts=1501, steps=30, informative=True):
    """Return the filter, which prompts it saw, and the true logits."""
    random = np.random.default_rng([seed, 1])
    x = make_features(num_prompts, 40, seed)
    weights = random.standard_normal(40) / np.sqrt(40) * 2.0
    logits = x / FEATURE_UNIT @ weights + 1.5 * random.standard_normal(num_prompts) - 1.0
    given = {"none": None, "text": x, "shuffled": random.permutation(x)}[features]
    belief = LogitFilter(num_prompts, None, N, features=given)
    draws = np.random.default_rng([seed, 2])
    for _ in range(steps):
        batch = draws.choice(num_prompts, 24)
        belief.observe(batch, draws.binomial(N, 1 / (1 + np.exp(-logits[batch]))).astype(float), np.full(24, N))
        belief.predict_step(batch)
    return belief, belief.last_seen_step >= 0, logits


def rank_correlation(a, b):
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]


def test_prompts_never_seen_are_told_apart():
    belief, seen, logits = run_filter("text", 0)
    rates = belief.predicted_pass_rates(np.arange(1501))
    assert rank_correlation(rates[~seen], logits[~seen]) > 0.6
    metrics = belief.metrics()
    assert metrics[FEATURE_WEIGHT] > 0.9
    assert metrics[FEATURE_EXPLAINED_FRACTION] == pytest.approx(4.0 / (4.0 + 1.5**2), abs=0.15)
    without, _, _ = run_filter("none", 0)
    assert FEATURE_WEIGHT not in without.metrics()


def test_features_are_trusted_from_rates_that_are_known_beforehand():
    features, num = make_features(801), 801
    settings = DataConfig(rollout_batch_size=6, seed=5, sampling_strategy="curriculum", **ONLINE)
    ids = [f"p{i}" for i in range(num)]
    table = Coordinator(settings, ids, [""] * num, "abc", N, 40, SingleProcess(), features=features).table
    rates = 1 / (1 + np.exp(-2.0 * features[:, 0] / FEATURE_UNIT))
    known, unknown = np.arange(0, num, 2), np.arange(1, num, 2)
    table.begin_from(known, np.rint(16 * rates[known]), np.full(len(known), 16))
    assert table.metrics()[FEATURE_WEIGHT] > 0.5
    assert rank_correlation(table.predicted_pass_rates(unknown), rates[unknown]) > 0.8


def test_a_prompt_seen_before_moves_by_its_share_of_what_the_features_say_now():
    belief, seen, _ = run_filter("text", 1, steps=5)
    before, _ = belief.belief(slice(None))
    effect = belief._features.effect(slice(None))
    belief._features.levels = (belief._features.levels * 2).clip(-2047, 2047)
    after, _ = belief.belief(slice(None))
    change = belief._features.effect(slice(None)) - effect
    np.testing.assert_allclose(after - before, belief._feature_share.astype(np.float32) * change, atol=1e-4)
    assert (belief._feature_share[~seen] == 1.0).all() and belief._feature_share[seen].max() < 0.9


def test_features_that_say_nothing_cost_nothing():
    """Of rank correlation with p(1-p), at most .003 in the mean of seeds: the weights that draw must not suffer."""
    lost, trusted = [], []
    for seed in range(16):  # of one seed it is up to .015 either way
        found = {}
        for kind in ("none", "shuffled"):
            belief, _, logits = run_filter(kind, seed, num_prompts=4001, steps=120)
            rates = 1 / (1 + np.exp(-logits))
            found[kind] = rank_correlation(belief.weights(), rates * (1 - rates))
            if kind == "shuffled":
                assert belief.metrics()[FEATURE_EXPLAINED_FRACTION] < 0.03
                trusted.append(belief.metrics()[FEATURE_WEIGHT])
        lost.append(found["none"] - found["shuffled"])
    assert np.mean(lost) < 0.003, lost
    assert np.mean(trusted) < 0.2, trusted


def test_a_resume_is_exact_and_takes_the_features_that_were_saved(tmp_path):
    unbroken = train(coordinator_with(make_features()), range(1, 13))
    first, second = coordinator_with(make_features()), coordinator_with(make_features(seed=4))
    assert train(first, range(1, 6)) == unbroken[:5]
    first.save(tmp_path)
    second.load(tmp_path)
    assert train(second, range(6, 13)) == unbroken[5:]
    assert FEATURE_WEIGHT in unbroken[-1][1]
    np.testing.assert_array_equal(second.table.columns()["features.features"], make_features())


def test_ranks_do_not_matter():
    single = train(coordinator_with(make_features()), range(1, 9))
    for of_rank in on_ranks(3, lambda control: train(coordinator_with(make_features(), control), range(1, 9))):
        assert [batch for batch, _ in of_rank] == [batch for batch, _ in single]


def test_features_that_come_late_count_as_if_they_had_been_there(tmp_path):
    """Those of the model: all 0 until that is loaded, which is after a checkpoint's were read."""
    expected = train(coordinator_with(make_features()), range(1, 13))
    late = coordinator_with(np.zeros_like(make_features()))
    assert not late.knows_features
    late.take_features(make_features())
    assert late.knows_features and train(late, range(1, 7)) == expected[:6]
    late.save(tmp_path)
    resumed = coordinator_with(np.zeros_like(make_features()))
    resumed.load(tmp_path)
    assert resumed.knows_features and train(resumed, range(7, 13)) == expected[6:]


def test_a_checkpoint_without_features_takes_those_that_come_late(tmp_path):
    before = coordinator_with(None)
    train(before, range(1, 5))
    before.save(tmp_path)
    found = []
    for given in (make_features(), np.zeros_like(make_features())):
        after = coordinator_with(given)
        after.load(tmp_path)
        if not after.knows_features:
            after.take_features(make_features())
        found.append(train(after, range(5, 9)))
    assert found[0] == found[1]


def test_features_find_their_prompts_in_another_order():
    belief, _, _ = run_filter("text", 2, num_prompts=201, steps=5)
    order = np.random.default_rng(0).permutation(201)
    other = LogitFilter(201, None, N, features=np.zeros((201, 40), dtype=np.int8))
    other.load_state_dict(belief.state_dict(), order)
    np.testing.assert_array_equal(other.belief(slice(None))[0], belief.belief(order)[0])


def test_a_checkpoint_without_features_loads_and_learns_from_then_on(tmp_path):
    before = make(curriculum_refresh="online")
    train(before, range(1, 6))
    before.save(tmp_path)
    numbers = json.loads((tmp_path / "curriculum.json").read_text())
    del numbers["settings"]["data.curriculum_features"]  # as earlier versions
    (tmp_path / "curriculum.json").write_text(json.dumps(numbers))
    after = coordinator_with(make_features())
    after.load(tmp_path)
    np.testing.assert_array_equal(after.table.sampling_weights, before.table.sampling_weights)
    assert train(after, range(6, 13))[-1][1][FEATURE_WEIGHT] >= 0.0


def test_a_checkpoint_with_features_loads_without(tmp_path):
    before = coordinator_with(make_features())
    train(before, range(1, 6))
    before.save(tmp_path)
    after = make(curriculum_refresh="online")
    after.load(tmp_path)
    seen = ~np.isnan(before.table.known_pass_rates())
    np.testing.assert_allclose(after.table.known_pass_rates()[seen], before.table.known_pass_rates()[seen], rtol=1e-4)
    assert seen.any() and FEATURE_WEIGHT not in train(after, range(6, 9))[-1][1]


def test_at_most_64_bytes_a_prompt_with_the_category():
    belief = LogitFilter(1000, None, N, features=np.zeros((1000, NUM_FEATURES), dtype=np.int8))
    arrays = [array for array in belief.state_dict()["arrays"].values() if len(array) == 1000]
    assert sum(array.nbytes for array in arrays) / 1000 + belief._category.itemsize <= 64


def test_odd_cases():
    belief = LogitFilter(1, None, N, features=np.zeros((1, 40), dtype=np.int8))  # without any spread
    nothing = np.empty(0, dtype=np.int64)
    belief.observe(nothing, nothing, nothing)
    belief.observe(np.array([0]), np.array([np.nan]), np.array([N]))
    belief.observe(np.array([0]), np.array([3.0]), np.array([N]))
    belief.predict_step(np.array([0]))
    assert np.isfinite(belief.belief(slice(None))).all()
    assert all(np.isfinite(value) for value in belief.metrics().values())


def test_other_features_are_refused_in_one_line():
    config = RunConfig(data=DataConfig(curriculum_features="images"))
    with pytest.raises(UserError, match=r"^data.curriculum_features must be none or text or model, got images$"):
        check_choices(config)
