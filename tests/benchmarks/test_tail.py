"""The schedule that the benchmark counts is vLLM's, of what was asked for and nothing else."""

import importlib
import json
import sys

import numpy as np
import pytest
from fixtures.launching import ROOT

pytestmark = pytest.mark.slow  # imports vLLM


@pytest.fixture
def tail(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "rollout"))
    return importlib.import_module("tail")


def test_steps_are_those_of_a_plain_list(tail):
    """Of slots that each take the next response when they are free; the prompts cost no step of their own."""
    lengths = np.array([[7, 3, 9], [30, 1, 4], [2, 2, 8]])
    free = [0, 0]
    for length in lengths.ravel().tolist():
        free[free.index(min(free))] += length
    steps, tokens = tail.Engine(2, 10_000, 16, 401).sample(range(3), lengths)
    assert steps == max(free)
    # A response's last token is not computed on; all of a group share its prompt's block once it is there.
    assert tokens <= lengths.sum() - 9 + 9 * 16


def test_it_runs(tail, monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(tail, "CASES", (tail.Case("all", 21), tail.Case("some", 5), tail.Case("none", 5, seen=0.0)))
    shape = ["--prompts", "8", "--responses", "3", "--limit", "401", "--prompt-tokens", "20"]
    monkeypatch.setattr(sys, "argv", ["tail.py", "--seeds", "1", "--ranks", "2", *shape, "--json", str(path)])
    tail.main()
    rows = json.loads(path.read_text())
    assert rows["none"]["now"] == rows["none"]["drawn"]
    assert rows["some"]["longest"] <= rows["some"]["best"] <= rows["some"]["drawn"]
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1 == 5
