import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.data_fixtures import write_vision_model
from fixtures.launching import ROOT, environment
from fixtures.tiny_run import write_run

sys.path.insert(0, str(ROOT / "benchmarks" / "throughput"))
import throughput
import throughput_figures
import throughput_report

from mmr1_ds.commands.plan import flops
from mmr1_ds.commands.plan.flops import Work
from mmr1_ds.errors import UserError

SECONDS = {"gen": 2.0, "reward": 0.25, "curriculum": 0.125, "old": 0.5, "ref": 0.75, "update_actor": 3.0, "sync": 0.5}


def rows(num_steps=7, refreshes=()):
    """Steps 1.. of the seconds above and half a second of nothing; the third is 10 s slower, a hiccup."""
    found = [{"step": 0, **({"timing_s/refresh": 99.0} if 0 in refreshes else {})}]
    for step in range(1, num_steps + 1):
        row = {f"timing_s/{name}": seconds for name, seconds in SECONDS.items()}
        row |= {"timing_s/step": sum(SECONDS.values()) + 0.5, "perf/total_num_tokens": 1525.0}
        row |= {"response_length/mean": 40.0, "prompt_length/mean": 21.0, "memory_gb/gen": 3.0, "memory_gb/sync": 2.0}
        if step == 3:
            row["timing_s/gen"] += 10.0
            row["timing_s/step"] += 10.0
        if step in refreshes:
            row["timing_s/refresh"] = refreshes[step]
        found.append({"step": step, **row})
    return found


def settings(**changes):
    return throughput_figures.Settings(**({
        "warmup": 2, "num_responses": 25, "refresh_steps": 30, "ranks": 2, "peak_tflops": None,
    } | changes))  # fmt: skip


def test_figures_by_hand():
    figures = throughput_figures.run_figures(rows(), settings(), None)
    assert figures["seconds/step"] == figures["seconds/all"] == 7.625
    assert figures["seconds/log_probs"] == 1.25 and figures["seconds/update"] == 3.0
    assert figures["seconds/other"] == pytest.approx(0.5) and figures["seconds/refresh"] == 0.0
    assert figures["tokens_per_second"] == 1525 / 7.625
    assert figures["tokens_per_second_per_rank"] == 1525 / 7.625 / 2
    assert figures["samples_per_second"] == 25 / 7.625
    assert figures["generated_tokens_per_second"] == 40 * 25 / 2.0
    assert figures["memory_gb"] == 3.0
    assert "mfu" not in figures


def test_a_refresh_is_spread_over_the_steps_to_the_next_and_the_first_does_not_count():
    figures = throughput_figures.run_figures(rows(refreshes={0: 99.0, 2: 6.0, 4: 9.0}), settings(), None)
    assert figures["seconds/refresh"] == statistics.median([6.0, 9.0]) / 30
    assert figures["seconds/all"] == 7.625 + 0.25
    with pytest.raises(ValueError, match="one refresh alone"):
        throughput_figures.run_figures(rows(refreshes={0: 99.0}), settings(), None)


def test_a_run_of_nothing_but_warm_up_has_no_figures():
    with pytest.raises(ValueError, match="no step after the warm-up of 7"):
        throughput_figures.run_figures(rows(), settings(warmup=7), None)


def test_share_of_the_peak(tmp_path):
    shape = throughput_figures.model_shape(write_vision_model(tmp_path / "model"))
    figures = throughput_figures.run_figures(rows(), settings(peak_tflops=0.001), shape)
    work = Work([61.0] * 25, 40.0 * 25)
    forward, backward = flops.forward(shape, work, 0.5), flops.backward(shape, work, 0.5)
    update = forward.text + forward.head + backward.text + backward.head
    assert figures["mfu_update"] == pytest.approx(update / (3.0 * 2 * 1e9))
    whole = update + 3 * (forward.text + forward.head)  # sampling, old and reference policy
    assert figures["mfu"] == pytest.approx(whole / (7.625 * 2 * 1e9))


def result(**figures):
    names = ("tokens_per_second", "seconds/all")
    spread = {name: {"median": 2.0, "min": 1.5, "max": 2.5} for name in names} | figures
    cell = {"model": "/models/tiny", "ranks": 2, "engine": "vllm", "lengths": "32:24", "sampling": "full"}
    return {"schema": 1, "cells": [cell | {"figures": spread, "error": None}]}


def test_two_results_side_by_side():
    faster = result(tokens_per_second={"median": 3.0, "min": 2.6, "max": 3.5})
    lines = throughput_report.compare(result(), faster).splitlines()
    assert lines[0] == "full:"
    assert lines[1].split() == ["tokens/s", "2", "3", "1.50x", "*"]
    assert lines[2].split() == ["s", "a", "step", "2.00", "2.00", "1.00x"]
    other = result()
    other["cells"][0]["ranks"] = 4
    with pytest.raises(UserError, match="no cell in common"):
        throughput_report.compare(result(), other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "has schema list, this version reads 1"),
        ('{"schema": 2}', "has schema 2, this version reads 1"),
        ("{", "is not readable as JSON"),
        ('{"schema": 1, "cells": [{"model": "x"}]}', "cell 0 has no ranks"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, capsys, text, said):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert throughput.main(["--compare", str(path), str(path)]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_a_cell_that_failed_is_told_and_the_others_stand():
    found = result()
    found["cells"].append(found["cells"][0] | {"sampling": "online", "figures": {}, "error": "a\nout of memory"})
    lines = throughput_report.table(found).splitlines()
    assert lines[2].startswith("| full | 2 |") and lines[3] == "| online | failed: out of memory |"


@pytest.mark.parametrize("lengths", ["512", "a:b", "1:2:3"])
def test_lengths_that_are_none(capsys, tmp_path, lengths):
    assert throughput.main(["--lengths", lengths, "--work-dir", str(tmp_path)]) == 2
    assert "give prompt:response" in capsys.readouterr().err


def test_the_documented_schema_is_what_is_written():
    page = (ROOT / "docs" / "throughput.md").read_text()
    for name in (*throughput_report.KEY, "figures", "error", "refresh_steps", "tokens_per_second", "mfu_update"):
        assert f"`{name}`" in page, name


def test_the_batch_script_parses():
    script = ROOT / "launch" / "throughput.sbatch"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.slow
def test_a_real_grid(tmp_path):
    config = write_run(tmp_path, 1)
    command = [
        sys.executable, throughput.__file__, "--config", config, "--engines", "hf", "--steps", "3", "--warmup", "2",
        "--repeats", "1", "--sampling", "full", "--peak-tflops", "0.1",
        "--work-dir", tmp_path / "work",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = throughput_report.read(tmp_path / "work" / "throughput.json")
    (cell,) = found["cells"]
    assert cell["figures"]["seconds/refresh"]["median"] > 0 and 0 < cell["figures"]["mfu"]["median"] < 1
    lines = [json.loads(line) for line in (tmp_path / "work" / "0_full_0" / "metrics.jsonl").read_text().splitlines()]
    tokens = [line["perf/total_num_tokens"] for line in lines if line["step"] > 2]
    rate = statistics.median(tokens) / cell["figures"]["seconds/all"]["median"]
    assert cell["figures"]["tokens_per_second"]["median"] == pytest.approx(rate)
    assert (tmp_path / "work" / "throughput.png").stat().st_size > 10_000
    assert Path(done.stdout.splitlines()[-1]) == tmp_path / "work" / "throughput.json"
