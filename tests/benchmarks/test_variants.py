"""The table of runs that were stopped and resumed has their figures, and says whatever is not the same."""

import importlib
import json

import pytest
from fixtures.dry_runs import planned
from fixtures.launching import ROOT


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "real_model"))
    return importlib.import_module("variants")


def a_run(folder, saved_after=(), changes=None):
    """A run directory of six steps, with what `changes` has put in place: (step, name) -> value."""
    folder.mkdir()
    lines = []
    for step in range(1, 7):
        row = {
            "step": step, "actor/grad_norm": 1 / step, "perf/num_rollouts": 32.0 * step,
            "perf/elapsed_seconds": 7.0 * step, "rollout/logprob_diff_mean": 1e-6 * step,
            "rollout/logprob_diff_max": 1e-5 * step,
            "memory_gb/gen": 4.0, "memory_gb/update_actor": 5.0 + step, "timing_s/gen": 2.0, "timing_s/old": 1.0,
            "timing_s/update_actor": 10.0 * step, "timing_s/sync": 0.5,
        }  # fmt: skip
        lines.append(row | {name: value for (at, name), value in (changes or {}).items() if at == step})
        if step in saved_after:
            lines.append({"step": step, "timing_s/save_checkpoint": 0.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7')
    draws = [{"step": step, "prompts": [step, 2 * step]} for step in range(1, 7)]
    (folder / "draws.jsonl").write_text("".join(json.dumps(draw) + "\n" for draw in draws))
    saved = folder / "checkpoints" / "global_step_6"
    saved.mkdir(parents=True)
    files = {"actor/states.pt": {"bytes": 7, "sha256": "ab"}, "config.yaml": {"bytes": 9, "sha256": folder.name}}
    (saved / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def test_a_resumed_run_that_is_the_same(variants, tmp_path):
    found = variants.compare(a_run(tmp_path / "alone", [6]), a_run(tmp_path / "stopped", [4, 6]))
    assert (found["same_draws"], found["differing_metrics"], found["same_checkpoint"]) == (True, [], True)
    assert (found["drift_mean"], found["drift_max"]) == pytest.approx((3.5e-6, 6e-5), rel=1e-9)
    assert found["memory_gb"] == 11.0
    assert found["seconds"]["update"] == 10.0 and found["seconds"]["save"] == 0.7


def test_what_differs_is_named_but_for_the_clock(variants, tmp_path):
    changes = {(5, "actor/grad_norm"): 0.2 + 1e-16, (5, "timing_s/gen"): 9.0, (6, "perf/num_rollouts"): 193.0}
    resumed = a_run(tmp_path / "stopped", [3], changes | {(6, "perf/elapsed_seconds"): 1.0, (4, "actor/new"): 1.0})
    (resumed / "draws.jsonl").write_text('{"step": 1, "prompts": [1, 3]}\n')
    (resumed / "checkpoints" / "global_step_6" / "manifest.json").write_text('{"files": {}}')
    found = variants.compare(a_run(tmp_path / "alone", [6]), resumed)
    assert found["differing_metrics"] == ["4 actor/new", "5 actor/grad_norm", "6 perf/num_rollouts"]
    assert not found["same_draws"] and not found["same_checkpoint"]


def test_the_table_has_a_column_a_variant(variants, tmp_path):
    same = variants.compare(a_run(tmp_path / "a", [6]), a_run(tmp_path / "b", [3, 6]))
    same |= {"stopped_after": 3, "start_new": 20.4, "start_resumed": 21.6}
    rows = variants.table({"full_1": same, "lora_2": same | {"differing_metrics": ["4 a", "5 b"]}}).splitlines()
    assert rows[:2] == ["|  | full, one rank | LoRA, two ranks |", "| --- | --- | --- |"]
    assert "| drift, mean and largest | 3.5e-06, 6.0e-05 | 3.5e-06, 6.0e-05 |" in rows
    assert "| start, new and resumed, s | 20, 22 | 20, 22 |" in rows
    assert "| same metrics | yes | no, 2 differ |" in rows


@pytest.mark.parametrize("name", ["full_1", "full_2", "lora_1", "lora_2"])
def test_a_variant_is_planned(variants, name, tmp_path):
    """With log-probabilities before the update: two optimiser steps a step."""
    (tmp_path / "train.json").write_text('[{"prompt": "What is 1 + 1?", "answer": "2", "family": "a"}]')
    _, num_ranks, settings = variants.VARIANTS[name]
    own = [f"data.{part}_files={tmp_path / 'train.json'}" for part in ("train", "val")]
    own += ["data.id_key=null", "worker.actor.model.model_path=org/name", f"trainer.n_gpus_per_node={num_ranks}"]
    plan = planned([f"config={variants.CONFIG}", *variants.SETTINGS, *settings, *own])
    assert "4 prompts x 8 responses = 32; 2 optimiser step(s)" in plan
