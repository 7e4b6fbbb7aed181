"""The benchmark beside TRL: its model cannot end a response, its report is what the figures say."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from fixtures.launching import ROOT, environment
from fixtures.pins import pins

BENCHMARKS = ROOT / "benchmarks" / "step"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The benchmarks are programs beside one another, not a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(trainer, seconds, memory):
    return {"trainer": trainer, "setup": "s", "seconds_per_step": seconds, "tokens_per_second": 1.0, "cpu_seconds": 1.0,
            "peak_memory_bytes": memory, "rounds": [seconds, 2 * seconds], "stages": {"gen": 0.25}}  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "memory", "held"), [(2.0, 100, True), (2.01, 100, False), (1.0, 101, False), (1.0, 99, True)]
)
def test_the_bar_is_half_as_fast_again_at_no_more_memory(seconds, memory, held):
    from bench_step import report

    text = report([row("mmr1_ds", seconds, memory), row("trl", 3.0, 100)])
    assert ("DOES NOT HOLD" not in text) == held
    assert f"ours is {3 / seconds:.2f} times faster" in text and f"at {memory / 100:.2f} of the memory" in text


def test_no_response_of_its_model_can_end(tmp_path):
    from bench_step_sides import INSTRUCTION, LONGEST_PROMPT, prepare, prompt_tokens
    from transformers import AutoModelForCausalLM

    prepare(tmp_path, INSTRUCTION)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert 0.55e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.7e6
    ids = torch.randint(0, 112, (5, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert float(logits[..., model.generation_config.eos_token_id].max()) < -60
    others = torch.arange(112) != model.generation_config.eos_token_id
    assert float(logits[..., others].abs().max()) < 10
    assert prompt_tokens(tmp_path) < LONGEST_PROMPT - 5


def test_without_trl_it_says_what_to_install(monkeypatch):
    import bench_step

    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench_step.py"])
    with pytest.raises(SystemExit, match=r"requirements/bench\.txt"):
        bench_step.main()
    assert set(pins(ROOT / "requirements" / "bench.txt")) == {"trl"}
    for name in ("cpu", "gpu"):
        assert "trl" not in pins(ROOT / "requirements" / f"{name}.lock")


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("trl") is None, reason="requirements/bench.txt is not installed")
def test_both_sides_do_the_work(tmp_path):
    command = [sys.executable, BENCHMARKS / "bench_step.py", "--setups", "zero3_two_ranks_transformers"]
    command += ["--steps", "1", "--warm-up", "1", "--json", tmp_path / "rows.json"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [item["trainer"] for item in rows] == ["mmr1_ds", "trl"]
    for item in rows:
        assert item["setup"] == "zero3_two_ranks_transformers" and len(item["rounds"]) == 1
        assert item["tokens_per_second"] == pytest.approx(4096 / item["seconds_per_step"])
        assert item["peak_memory_bytes"] > 100e6 and item["stages"]["gen"] > 0
