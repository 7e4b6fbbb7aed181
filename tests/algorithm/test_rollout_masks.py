"""Masks of tokens on which trainer and rollout engine differ, against the published formulas (tests/golden)."""

import json

import numpy as np
import pytest
import torch
from fixtures.golden_numbers import GOLDEN

from mmr1_ds.algorithm.aggregation import Segments
from mmr1_ds.algorithm.importance import ImportanceSampling

FOUND = json.loads((GOLDEN / "rollout_masks.json").read_text())


@pytest.mark.parametrize("case", FOUND["cases"], ids=lambda case: f"{case['low']}-{case['high']}")
@pytest.mark.parametrize("mask", ["token", "sequence", "geometric", "k3"])
@pytest.mark.parametrize("level", ["none", "token"])
def test_masks_are_the_published_ones_and_compose_with_weights(case, mask, level):
    log_ratio_T = torch.tensor(FOUND["log_ratios"], dtype=torch.float64)
    rollout_T = torch.full_like(log_ratio_T, -1.0)
    segments = Segments.of(FOUND["lengths"])
    high = case["k3_high"] if mask == "k3" else case["high"]
    importance = ImportanceSampling(level, 1.3, mask, case["low"], high)
    weights_T, figures = importance(rollout_T + log_ratio_T, rollout_T, segments)
    kept_T = np.array(case["kept"][mask])
    plain_T = np.minimum(np.exp(FOUND["log_ratios"]), 1.3) if level == "token" else 1.0
    np.testing.assert_allclose(weights_T, kept_T * plain_T, atol=1e-12)
    np.testing.assert_array_equal(figures["is_masked_fraction"], 1 - kept_T)


@pytest.mark.parametrize("mask", ["token", "sequence", "geometric", "k3"])
def test_every_golden_mask_keeps_some_tokens_and_not_all(mask):
    shares = [float(np.mean(case["kept"][mask])) for case in FOUND["cases"]]
    assert any(0 < share < 1 for share in shares)
