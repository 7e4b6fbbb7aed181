"""The KL to the reference, the controllers of its coefficient, and the weights between rollout and trainer."""

import numpy as np
import pytest
import torch
from fixtures.golden_numbers import CASES, TRL, VERL, pack, packed, segments_of, unpack

from mmr1_ds.algorithm.aggregation import GlobalBatch, Segments, token_weights
from mmr1_ds.algorithm.importance import ImportanceSampling
from mmr1_ds.algorithm.kl import KLController, kl_penalty
from mmr1_ds.algorithm.losses import PolicyLoss
from mmr1_ds.config import AlgorithmConfig


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "low_var_kl"])
def test_kl_and_its_gradient_equal_verl(name, kind):
    case = VERL[name]
    expected = case["outputs"]["kl_penalty"][kind]
    logprobs_T = packed(case, "log_prob").requires_grad_()
    kl_T = kl_penalty(kind, logprobs_T, packed(case, "ref_log_prob"))
    kl_T.mean().backward()
    torch.testing.assert_close(kl_T.detach(), pack(case, expected["per_token"]), atol=1e-6, rtol=0)
    np.testing.assert_allclose(unpack(case, logprobs_T.grad), expected["grad_log_prob_of_token_mean"], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("key", "mode", "scale"), [("grpo", "seq", 1), ("bnpo", "token", 1), ("dr_grpo", "seq_sum", 8)]
)
def test_loss_with_kl_equals_trl(name, key, mode, scale):
    """Without TRL's `use_bias_correction_kl`, its own multiplication of the KL by the ratio."""
    case = TRL[name]
    expected = case["outputs"]["loss"][f"{key}|beta0.04|bias_correction_kl=False|adv_group"]
    segments = segments_of(case)
    rows = torch.tensor(case["outputs"]["advantages"]["scale_rewards=group"], dtype=torch.float64)
    logprobs_T = packed(case, "log_prob").requires_grad_()
    loss_T, _ = PolicyLoss("default", 0.2, 0.28)(
        logprobs_T, packed(case, "old_log_prob"), segments.spread(rows), segments
    )
    loss_T = loss_T + 0.04 * kl_penalty("low_var_kl", logprobs_T, packed(case, "ref_log_prob"))
    weights_T = token_weights(mode, segments, GlobalBatch(float(segments.lengths.sum()), 8.0), scale)  # TRL: all rows
    total = (loss_T * weights_T).sum()
    total.backward()
    assert total.item() == pytest.approx(expected["loss"], abs=1e-6)
    np.testing.assert_allclose(unpack(case, logprobs_T.grad), expected["grad_log_prob"], atol=1e-6)


def test_which_estimates_pull_towards_the_reference():
    """By the whole distribution over 5 tokens: the gradient of mse in the loss is the KL's, that of kl is none."""
    random = np.random.default_rng(1)
    logits = torch.tensor(random.normal(size=5)).requires_grad_()
    reference = torch.tensor(random.normal(size=5)).log_softmax(-1)
    probabilities = logits.softmax(-1).detach()

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    def expected_gradient(kind):
        return gradient((probabilities * kl_penalty(kind, logits.log_softmax(-1), reference)).sum())

    exact = gradient((logits.softmax(-1) * (logits.log_softmax(-1) - reference)).sum())
    torch.testing.assert_close(expected_gradient("mse"), exact, atol=1e-12, rtol=0)
    assert expected_gradient("kl").abs().max() < 1e-12
    assert float(expected_gradient("low_var_kl") @ exact) > 0
    unbiased = (probabilities * kl_penalty("low_var_kl", logits.log_softmax(-1), reference)).sum()
    torch.testing.assert_close(unbiased, (probabilities * (probabilities.log() - reference)).sum())


def test_a_distant_reference_stays_finite():
    far = torch.tensor([-0.1, -200.0]).requires_grad_()
    kl_T = kl_penalty("low_var_kl", far, torch.tensor([-200.0, -0.1]))
    kl_T.sum().backward()
    assert kl_T.tolist() == [10.0, 10.0] and far.grad.tolist() == [0.0, 0.0]  # as verl: clamped at both ends


def test_controllers():
    fixed = KLController(AlgorithmConfig(kl_coef=0.02))
    fixed.update(100.0, 64)
    fixed.load_state_dict({"coefficient": 7.0})
    assert fixed.coefficient == 0.02

    settings = AlgorithmConfig(kl_coef=0.02, kl_type="adaptive", kl_target=0.1, kl_horizon=1000.0)
    adaptive = KLController(settings)
    adaptive.update(0.11, 50)  # 10 % over the target, for a twentieth of the horizon
    assert adaptive.coefficient == pytest.approx(0.02 * (1 + 0.1 * 0.05))
    adaptive.update(1.0, 50)  # an error counts as a fifth at most
    assert adaptive.coefficient == pytest.approx(0.02 * 1.005 * 1.01)
    adaptive.update(0.0, 50)
    assert adaptive.coefficient == pytest.approx(0.02 * 1.005 * 1.01 * 0.99)
    resumed = KLController(settings)
    resumed.load_state_dict(adaptive.state_dict())
    assert resumed.coefficient == adaptive.coefficient


def test_importance_weights():
    segments = Segments.of([2, 0, 3])
    trainer = torch.log(torch.tensor([0.5, 0.4, 0.3, 0.9, 0.2], dtype=torch.float64)).requires_grad_()
    rollout = torch.log(torch.tensor([0.4, 0.5, 0.1, 0.3, 0.2], dtype=torch.float64))
    token, figures = ImportanceSampling("token", 2.0)(trainer, rollout, segments)
    assert token.tolist() == pytest.approx([1.25, 0.8, 2.0, 2.0, 1.0])
    assert figures["is_truncated_fraction"].tolist() == [0, 0, 1, 1, 0]
    assert figures["is_weight_mean"].tolist() == token.tolist()
    sequence, figures = ImportanceSampling("sequence", 4.0)(trainer, rollout, segments)
    assert sequence.tolist() == pytest.approx([1.0, 1.0, 4.0, 4.0, 4.0])  # products: 1, and 9 over the cap
    assert figures["is_truncated_fraction"].tolist() == [0, 0, 1, 1, 1]
    assert not token.requires_grad and not sequence.requires_grad
    weights, figures = ImportanceSampling("none", 2.0)(trainer, rollout, segments)
    assert weights.tolist() == [1.0] * 5 and set(figures) == {"logprob_diff_mean", "kl"}
    far, _ = ImportanceSampling("token", 2.0)(torch.tensor([0.0]), torch.tensor([-300.0]), Segments.of([1]))
    assert far.tolist() == [2.0]


def test_figures_of_the_drift():
    trainer, rollout = torch.log(torch.tensor([[0.5, 0.3], [0.25, 0.3]], dtype=torch.float64))
    _, figures = ImportanceSampling("token", 2.0)(trainer, rollout, Segments.of([2]))
    assert figures["logprob_diff_mean"].tolist() == pytest.approx([np.log(2), 0.0])
    assert figures["kl"].tolist() == pytest.approx([2 - 1 - np.log(2), 0.0])
