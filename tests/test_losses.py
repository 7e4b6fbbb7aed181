"""Losses, advantages and the schedule against verl's and TRL's numbers."""

import json
import math
from pathlib import Path

import mmr1_kernels
import numpy as np
import pytest
import torch

from mmr1_ds.config import OptimConfig
from mmr1_ds.engine.losses import clipped_policy_loss, low_var_kl
from mmr1_ds.engine.schedule import learning_rate

GOLDEN = Path(__file__).parent / "golden"
VERL = json.loads((GOLDEN / "verl_core_algos.json").read_text())["cases"]
TRL = json.loads((GOLDEN / "trl_grpo_loss.json").read_text())["cases"]
CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 0.2, 0.28, 3.0  # actor_config of the golden file


def packed(case: dict, name: str) -> torch.Tensor:
    """A (rows, tokens) field of the golden inputs, response tokens only, end to end."""
    mask = torch.tensor(case["inputs"]["response_mask"]).bool()
    return torch.tensor(case["inputs"][name], dtype=torch.float64)[mask]


@pytest.mark.parametrize("name", ["base", "edge"])
@pytest.mark.parametrize("advantages", ["seq", "token"])
def test_policy_loss_and_gradient_equal_verl(name, advantages):
    case = VERL[name]
    expected = case["outputs"]["policy_loss"][f"vanilla|token-mean|adv_{advantages}"]
    mask = torch.tensor(case["inputs"]["response_mask"]).bool()
    advantages_T = torch.tensor(case["outputs"]["policy_loss_advantages"][advantages], dtype=torch.float64)[mask]
    logprobs_T = packed(case, "log_prob").requires_grad_()

    loss_T, figures = clipped_policy_loss(
        logprobs_T, packed(case, "old_log_prob"), advantages_T, CLIP_LOW, CLIP_HIGH, CLIP_DUAL
    )
    loss_T.mean().backward()

    assert loss_T.mean().item() == pytest.approx(expected["loss"], abs=1e-12)
    gradient = torch.zeros(mask.shape, dtype=torch.float64)
    gradient[mask] = logprobs_T.grad
    np.testing.assert_allclose(gradient, expected["grad_log_prob"], atol=1e-12)
    assert figures["pg_clipfrac_higher"].mean().item() == pytest.approx(expected["pg_clipfrac"], abs=1e-6)
    assert figures["pg_clipfrac_lower"].mean().item() == pytest.approx(expected["pg_clipfrac_lower"], abs=1e-6)
    assert figures["ppo_kl"].mean().item() == pytest.approx(expected["ppo_kl"], abs=1e-6)


@pytest.mark.parametrize("name", ["base", "edge"])
def test_kl_equals_verl(name):
    case = VERL[name]
    mask = torch.tensor(case["inputs"]["response_mask"]).bool()
    expected = torch.tensor(case["outputs"]["kl_penalty"]["low_var_kl"]["per_token"], dtype=torch.float64)[mask]
    actual = low_var_kl(packed(case, "log_prob"), packed(case, "ref_log_prob"))
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def group_advantages(rewards):
    """Of one group, by the kernel the trainer calls."""
    nothing = np.zeros(len(rewards), dtype=np.float32)
    packed = np.zeros(0, dtype=np.int32), np.zeros(len(rewards) + 1, dtype=np.int64)
    return mmr1_kernels.group_statistics(*packed, rewards.astype(np.float32), nothing, len(rewards)).advantages


@pytest.mark.parametrize("name", ["base", "edge"])
def test_advantages_equal_verl(name):
    case = VERL[name]
    index = np.array(case["inputs"]["index"])
    rewards = np.array(case["inputs"]["token_level_rewards"]).sum(axis=1)  # verl scores by these
    expected = np.array([max(row, key=abs) for row in case["outputs"]["advantages"]["grpo_std"]["advantages"]])
    has_tokens = np.array(case["inputs"]["response_mask"]).any(axis=1)
    for group in np.unique(index):
        actual = group_advantages(rewards[index == group])
        own = has_tokens[index == group]
        np.testing.assert_allclose(actual[own], expected[index == group][own], atol=1e-6)


@pytest.mark.parametrize("name", ["base", "edge"])
def test_advantages_equal_trl(name):
    case = TRL[name]
    index = np.array(case["inputs"]["index"])
    scores = np.array(case["inputs"]["scores"])
    expected = np.array(case["outputs"]["advantages"]["scale_rewards=group"])
    for group in np.unique(index):
        std = scores[index == group].std(ddof=1)
        actual = group_advantages(scores[index == group]) * (std + 1e-6) / (std + 1e-4)  # TRL's epsilon
        np.testing.assert_allclose(actual, expected[index == group], atol=2e-6)


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
