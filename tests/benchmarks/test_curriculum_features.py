"""The world whose prompts have texts, and the comparison of runs with and without features."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
from fixtures.launching import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def features(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "curriculum"))
    return importlib.import_module("curriculum_features")


def test_half_of_the_variance_is_in_the_texts(features):
    setting = features.SETTINGS["u_shaped_slow"]
    world = features.TextWorld(setting, 8000, 224, 3, share=0.5)
    plain = features.TextWorld(setting, 8000, 224, 3, share=0.0)
    _, hardness = features.make_texts(8000, np.random.default_rng([3, 6]))
    within = world.logits - np.array([world.logits[world.categories == k].mean() for k in range(8)])[world.categories]
    assert np.corrcoef(within, hardness)[0, 1] ** 2 == pytest.approx(0.5, abs=0.03)
    assert within.std() == pytest.approx(plain.logits.std() * np.sqrt(1 - 0.4**2), rel=0.05)
    x = np.column_stack([features.features_of(world.texts), np.ones(8000)]).astype(float)
    left = hardness - x @ np.linalg.lstsq(x, hardness, rcond=None)[0]
    assert left.var() < 0.3  # of 1: what the features make of the texts


def test_the_comparison_runs(features, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(features, "_STEPS", 32)
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["curriculum_features.py", "--prompts", "20000", "--json", str(path)])
    features.main()
    none, text, shuffled, full, full_80 = json.loads(path.read_text())
    assert text["never_visited"] > none["never_visited"] + 0.15
    assert abs(shuffled["never_visited"] - none["never_visited"]) < 0.05
    assert np.isnan(full["never_visited"]) and full_80["effective"] > full["effective"] + 0.02
    monkeypatch.setattr(sys, "argv", ["curriculum_features.py", "--cost", "--prompts", "2000"])
    features.main()
    assert "62 bytes a prompt" in capsys.readouterr().out
