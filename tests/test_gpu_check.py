"""The runner of `make gpu-check` over parts that pass, fail, hang and cannot run; the CPU twins of its checks."""

import json
import os
import subprocess
import sys

import pytest
import torch
from gpu.checks import CHECKS

from benchmarks.gpu_check import Part, all_parts, log_prob_verdict, run_all

MACHINE = {"torch": "1", "topology": ""}


def python(name, program, limit=20.0, **settings):
    return Part(name, (sys.executable, "-c", program), limit, **settings)


def test_one_report_of_all_that_happened(tmp_path):
    parts = [
        python("fails", "raise SystemExit('the cause')"),
        python("hangs", "import signal; print('waits', flush=True); signal.pause()", limit=1.0),
        python("says why not", "print('no such thing'); raise SystemExit(77)"),
        python("many GPUs", "", num_gpus=3, twin="its twin", differences="another order"),
        python("works", "print('a figure')"),
    ]
    assert run_all(parts, tmp_path, 1, MACHINE) == 1
    found = {part["name"]: part for part in json.loads((tmp_path / "report.json").read_text())["parts"]}
    statuses = {name: part["status"] for name, part in found.items()}
    assert list(statuses.values()) == ["failed", "failed", "skipped", "skipped", "passed"]
    assert found["fails"]["reason"] == "exit code 1\nthe cause"
    assert found["hangs"]["reason"] == "longer than 1 s\nwaits"
    assert found["says why not"]["reason"] == "no such thing"
    assert found["many GPUs"]["reason"] == "needs 3 GPU(s), 1 here"
    assert found["works"]["reason"] == "a figure"
    report = (tmp_path / "report.md").read_text()
    assert "the cause" in report and "- many GPUs (twin: its twin): another order" in report
    assert run_all(parts[2:], tmp_path, 1, MACHINE) == 0


def test_interrupted_it_still_reports(tmp_path):
    interrupts = f"import os, signal; os.kill({os.getpid()}, signal.SIGINT); signal.pause()"
    parts = [python("first", ""), python("interrupted", interrupts), python("last", "")]
    assert run_all(parts, tmp_path, 0, MACHINE) == 130
    found = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert [part["status"] for part in found] == ["passed", "not run", "not run"]


def test_log_probs_that_differ_or_are_not_there(tmp_path):
    assert log_prob_verdict(tmp_path, 0.1, 0.0)[0]
    for value, problem in ((0.05, False), (0.2, True), (float("nan"), True)):
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps({"rollout/logprob_diff_max": x}) + "\n" for x in (0.01, value))
        )
        assert log_prob_verdict(tmp_path, 0.1, 0.0)[0] is problem


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_cpu_twin(name):
    CHECKS[name](torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", sorted(CHECKS))
def test_on_the_gpu(name):
    command = next(part.command for part in all_parts() if part.name == name)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 77), done.stderr
