"""Policy losses and how they are averaged, against verl's and TRL's numbers; the learning-rate schedule."""

import json
import math

import numpy as np
import pytest
import torch
from fixtures.golden_numbers import (
    CASES,
    CLIP_DUAL,
    CLIP_HIGH,
    CLIP_LOW,
    GOLDEN,
    TRL,
    VERL,
    mask_of,
    pack,
    packed,
    segments_of,
    unpack,
)

from mmr1_ds.algorithm.aggregation import GlobalBatch, Segments, token_weights
from mmr1_ds.algorithm.losses import LOSSES, PolicyLoss, value_loss
from mmr1_ds.algorithm.schedule import learning_rate
from mmr1_ds.config import OptimConfig

MODES = {"token-mean": "token", "seq-mean-token-mean": "seq", "seq-mean-token-sum": "seq_sum"}
KINDS = {"vanilla": "default", "gspo": "gspo_token", "cispo": "cispo", "sapo": "sapo"}  # verl's gspo is gspo_token


def weights_of(case, mode, num_responses=None, scale_factor=1.0):
    """Of the whole case as one global batch; empty rows are no responses."""
    segments = segments_of(case)
    num_responses = float((segments.lengths > 0).sum()) if num_responses is None else num_responses
    return token_weights(mode, segments, GlobalBatch(float(segments.lengths.sum()), num_responses), scale_factor)


def loss_and_gradient(case, loss, advantages_T, weights_T):
    logprobs_T = packed(case, "log_prob").requires_grad_()
    loss_T, figures = loss(logprobs_T, packed(case, "old_log_prob"), advantages_T, segments_of(case))
    total = (loss_T * weights_T).sum()
    total.backward()
    return total.item(), unpack(case, logprobs_T.grad), {name: float(x.mean()) for name, x in figures.items()}


VERL_LOSSES = [
    key for key in VERL["base"]["outputs"]["policy_loss"] if key.split("|")[0] in KINDS and "sum-norm" not in key
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("key", VERL_LOSSES)
def test_policy_loss_and_gradient_equal_verl(name, key):
    case, (kind, mode, advantages, *weighted) = VERL[name], key.split("|")
    expected = case["outputs"]["policy_loss"][key]
    advantages_T = pack(case, case["outputs"]["policy_loss_advantages"][advantages.removeprefix("adv_")])
    weights_T = weights_of(case, MODES[mode])
    if weighted:
        weights_T = weights_T * packed(case, "rollout_is_weights")

    loss = PolicyLoss(KINDS[kind], CLIP_LOW, CLIP_HIGH, CLIP_DUAL)
    total, gradient, figures = loss_and_gradient(case, loss, advantages_T, weights_T)

    assert total == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(gradient, expected["grad_log_prob"], atol=1e-6)
    assert figures["ppo_kl"] == pytest.approx(expected["ppo_kl"], abs=1e-6)
    assert figures["pg_clipfrac_lower"] == pytest.approx(expected["pg_clipfrac_lower"], abs=1e-6) or kind == "cispo"
    clipped = figures["pg_clipfrac_higher"] + (figures["pg_clipfrac_lower"] if kind == "cispo" else 0)  # verl adds up
    assert clipped == pytest.approx(expected["pg_clipfrac"], abs=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["vanilla", "cispo"])
def test_verl_s_sum_norm_grows_with_the_batch(name, kind):
    """It is a sum over responses, ours and TRL's a mean: theirs doubles when the batch does, at one learning rate."""
    case = VERL[name]
    expected = case["outputs"]["policy_loss"][f"{kind}|seq-mean-token-sum-norm|adv_seq"]
    advantages_T = pack(case, case["outputs"]["policy_loss_advantages"]["seq"])
    weights_T = weights_of(case, "seq_sum", scale_factor=6.0)
    loss = PolicyLoss(KINDS[kind], CLIP_LOW, CLIP_HIGH, CLIP_DUAL)
    total, gradient, _ = loss_and_gradient(case, loss, advantages_T, weights_T)
    num_responses = mask_of(case).any(axis=1).sum()
    assert total * num_responses == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(gradient * num_responses, expected["grad_log_prob"], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("advantages", ["seq", "token"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gmpo_equals_verl(name, advantages, weighted):
    """verl weighs a response by the geometric mean of its tokens' weights, and counts empty rows as responses."""
    case = VERL[name]
    expected = case["outputs"]["policy_loss"][f"geo_mean||adv_{advantages}" + weighted * "|is_weights"]
    weights_T = weights_of(case, "seq", num_responses=8.0)
    if weighted:
        segments = segments_of(case)
        weights_T = weights_T * segments.spread(segments.mean(packed(case, "rollout_is_weights").log()).exp())
    advantages_T = pack(case, case["outputs"]["policy_loss_advantages"][advantages])
    loss = PolicyLoss("gmpo", CLIP_LOW, CLIP_HIGH)
    total, gradient, figures = loss_and_gradient(case, loss, advantages_T, weights_T)
    assert total == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(gradient, expected["grad_log_prob"], atol=1e-6)
    assert figures["ppo_kl"] == pytest.approx(expected["ppo_kl"], abs=1e-6)
    # verl counts a ratio beyond either bound; held back is only what an advantage would take further.
    assert 0 < figures["pg_clipfrac_higher"] <= expected["pg_clipfrac"] + expected["pg_clipfrac_lower"] + 1e-6


DPPO = json.loads((GOLDEN / "dppo.json").read_text())


@pytest.mark.parametrize("case", DPPO["cases"], ids=lambda case: f"{case['kind']}-{case['high']}")
def test_dppo_equals_its_formulas(case):
    logprobs_T, old_T, advantages_T = (
        torch.tensor(DPPO[name], dtype=torch.float64) for name in ("logprobs", "old_logprobs", "advantages")
    )
    logprobs_T.requires_grad_()
    loss = PolicyLoss(case["kind"], case["low"], case["high"])
    loss_T, figures = loss(logprobs_T, old_T, advantages_T, Segments.of([len(old_T)]))
    loss_T.sum().backward()
    np.testing.assert_allclose(loss_T.detach(), case["loss"], atol=1e-9)
    np.testing.assert_allclose(logprobs_T.grad, case["gradient"], atol=1e-9)
    assert (figures["pg_clipfrac_higher"].sum(), figures["pg_clipfrac_lower"].sum()) == (case["higher"], case["lower"])


def test_kl_cov_holds_the_chosen_tokens_alone():
    """By hand: -A r, and r - 1 - log r at the second and third, whose gradient in log p is r - 1."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -0.1], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.5, -1.0, -0.5, -3.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    chosen = torch.tensor([False, True, True, False])
    loss_T, figures = PolicyLoss("kl_cov", 0.2, 0.3, kl_cov_coef=0.7)(
        logprobs, old, advantages, Segments.of([3, 1]), chosen
    )
    loss_T.sum().backward()
    ratios = np.exp([0.5, -1.0, 0.0, 2.9])
    held = 0.7 * np.array([0, ratios[1] - 1 + 1, 0, 0])
    np.testing.assert_allclose(loss_T.detach(), -advantages.numpy() * ratios + held)
    gradient = -advantages.numpy() * ratios + 0.7 * np.array([0, ratios[1] - 1, 0, 0])
    np.testing.assert_allclose(logprobs.grad, gradient, atol=1e-15)
    assert figures["kl_cov_fraction"].tolist() == [0, 1, 1, 0]


# TRL's name -> our loss and average. Without delta it has no dual clip; cispo's epsilon is the largest weight itself.
UNBOUNDED = PolicyLoss("default", CLIP_LOW, CLIP_HIGH)
TRL_LOSSES = {
    "grpo": (UNBOUNDED, "seq", 1.0),
    "bnpo": (UNBOUNDED, "token", 1.0),
    "dapo": (UNBOUNDED, "token", 1.0),
    "dr_grpo": (UNBOUNDED, "seq_sum", 8.0),
    "grpo|sequence_level(gspo)": (PolicyLoss("gspo", CLIP_LOW, CLIP_HIGH, CLIP_DUAL), "seq", 1.0),
    "grpo|delta2.0": (PolicyLoss("default", CLIP_LOW, CLIP_HIGH, 2.0), "seq", 1.0),
    "dapo|delta2.0": (PolicyLoss("default", CLIP_LOW, CLIP_HIGH, 2.0), "token", 1.0),
    "cispo|epsilon_high5.0": (PolicyLoss("cispo", 1.0, 4.0), "token", 1.0),
    "cispo|epsilon_high1.28": (PolicyLoss("cispo", 1.0, 0.28), "token", 1.0),
    "sapo": (PolicyLoss("sapo", 0.0, 0.0), "seq", 1.0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("key", TRL_LOSSES)
@pytest.mark.parametrize("advantages", ["group", "none", "token"])
def test_policy_loss_and_gradient_equal_trl(name, key, advantages):
    case = TRL[name]
    expected = case["outputs"]["loss"][f"{key}|beta0.0|adv_{advantages}"]
    if advantages == "token":
        advantages_T = packed(case, "adv_token")
    else:
        rows = case["outputs"]["advantages"][f"scale_rewards={advantages}"]
        advantages_T = segments_of(case).spread(torch.tensor(rows, dtype=torch.float64))
    loss, mode, scale_factor = TRL_LOSSES[key]
    # A response without a token is none to us and to verl; TRL counts it as one whose loss is 0.
    weights_T = weights_of(case, mode, num_responses=8.0, scale_factor=scale_factor)
    total, gradient, _ = loss_and_gradient(case, loss, advantages_T, weights_T)
    assert total == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(gradient, expected["grad_log_prob"], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_averages_equal_verl_s_for_a_larger_global_batch(name):
    """40 tokens and 16 responses over 2 ranks, of which the case is one's; a rank's part is scaled by their number."""
    case = VERL[name]
    values_T, segments, averages = packed(case, "adv_token"), segments_of(case), case["outputs"]["agg_loss"]
    batch = GlobalBatch(40.0, 16.0)

    def average(mode, scale_factor=1.0):
        return 2 * float((token_weights(mode, segments, batch, scale_factor) * values_T).sum())

    assert average("token") == pytest.approx(averages["token-mean|batch_num_tokens=40|dp_size=2"], abs=1e-6)
    assert average("seq") == pytest.approx(averages["seq-mean-token-mean|global_batch_size=16|dp_size=2"], abs=1e-6)
    own = (weights_of(case, "seq_sum", 1.0, 10.0) * values_T).sum()
    assert float(own) == pytest.approx(averages["seq-mean-token-sum-norm|loss_scale_factor=10"], abs=1e-6)


@pytest.mark.parametrize("mode", ["token", "seq", "seq_sum"])
@pytest.mark.parametrize("kind", LOSSES)
def test_cutting_a_batch_changes_no_gradient(mode, kind):
    random = np.random.default_rng(3)
    lengths = [1, 7, 3, 12, 5, 1]
    loss = PolicyLoss(kind, 0.2, 0.3, 3.0)
    old, advantages = (torch.tensor(random.normal(-1, 0.3, sum(lengths))) for _ in range(2))
    batch = GlobalBatch(float(sum(lengths)), float(len(lengths)))

    def gradient(cuts):
        logprobs = (old + torch.tensor(np.random.default_rng(4).normal(0, 0.4, len(old)))).requires_grad_()
        for first, last in cuts:
            segments = Segments.of(lengths[first:last])
            part = slice(sum(lengths[:first]), sum(lengths[:last]))
            loss_T, _ = loss(logprobs[part], old[part], advantages[part], segments)
            (loss_T * token_weights(mode, segments, batch, 9.0)).sum().backward()
        return logprobs.grad

    whole = gradient([(0, 6)])
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(gradient([(0, 1), (1, 4), (4, 6)]), whole, atol=1e-14, rtol=0)


def test_weights_of_a_mean_add_up_to_one():
    segments = Segments.of([2, 0, 5])
    for mode in ("token", "seq"):
        assert float(token_weights(mode, segments, GlobalBatch(7.0, 2.0), 1.0).sum()) == pytest.approx(1.0)
    assert float(token_weights("seq_sum", segments, GlobalBatch(7.0, 2.0), 3.5).sum()) == pytest.approx(1.0)


def test_extreme_ratios_stay_finite():
    old, new = torch.tensor([-900.0, -1.0]), torch.tensor([-1.0, -900.0]).requires_grad_()
    for kind in LOSSES:
        loss_T, _ = PolicyLoss(kind, 0.2, 0.3, 3.0)(new, old, torch.tensor([-1.0, 0.0]), Segments.of([1, 1]))
        loss_T.sum().backward()
        assert loss_T.isfinite().all() and new.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_value_loss_and_gradient_equal_verl(name, mode):
    case = VERL[name]
    expected = case["outputs"]["value_loss"][mode]
    values_T = packed(case, "vpreds").requires_grad_()
    returns_T = pack(case, case["outputs"]["advantages"]["gae_outcome_gamma1.0_lam0.95"]["returns"])
    loss_T, clipped_T = value_loss(values_T, packed(case, "values"), returns_T, clip=0.2)
    total = (loss_T * weights_of(case, MODES[mode])).sum()
    total.backward()
    assert total.item() == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(unpack(case, values_T.grad), expected["grad_vpreds"], atol=1e-6)
    assert float(clipped_T.double().mean()) == pytest.approx(expected["clipfrac"], abs=1e-6)


def test_learning_rate_warms_up_and_decays():
    cosine = OptimConfig(lr=2.0, lr_warmup_steps=4, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(cosine, step, 11) for step in range(11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # halfway from 4 to 10: cos(pi / 2) = 0
    assert rates[10] == pytest.approx(0.2)
    linear = OptimConfig(lr=1.0, lr_warmup_ratio=0.2, lr_scheduler_type="linear")
    assert [learning_rate(linear, step, 10) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 0.0]
    constant = OptimConfig(lr=3.0)
    assert {learning_rate(constant, step, 5) for step in range(5)} == {3.0}
    assert math.isfinite(learning_rate(OptimConfig(lr_warmup_steps=1), 0, 1))
