import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures.data_fixtures import write_vision_model
from fixtures.launching import ROOT, environment, processes_with, wait_until
from fixtures.tiny_run import write_run

sys.path.insert(0, str(ROOT / "benchmarks" / "throughput"))
import throughput
import throughput_figures
import throughput_report

from mmr1_ds.engine.model import flops
from mmr1_ds.engine.model.flops import Work
from mmr1_ds.errors import UserError
from mmr1_ds.loop.metrics import ActorWork

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
    # As a run has it in its own metrics.
    reached = ActorWork(shape, 0.001, num_epochs=1).utilisation(np.full(25, 61.0), 40.0 * 25, seconds=3.0, num_ranks=2)
    assert reached == pytest.approx(figures["mfu_update"])
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


@pytest.mark.parametrize("option", ["--ranks", "--steps", "--repeats"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_numbers_that_are_none(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        throughput.main([option, value])
    assert "error: argument" in capsys.readouterr().err


LAUNCHED = """\
Traceback (most recent call last):
  File "train.py", line 3, in <module>
torch.OutOfMemoryError: CUDA out of memory
mmr1-ds: fault (rank 0, host n1): rank 1 (host n1) has ended
mmr1_ds.cluster.watch.CollectiveError: rank 1 (host n1) has ended
[2026-01-01 00:00:00] [ERROR] [launch.py:325:sigkill_handler] exits with return code = 1
"""


def test_the_error_of_a_failed_run_is_not_the_launchers_last_word():
    assert throughput.error_in(LAUNCHED).splitlines()[-1] == "torch.OutOfMemoryError: CUDA out of memory"
    user_error = "mmr1-ds: error: data.train_files: no such file\n"
    assert throughput.error_in(LAUNCHED + user_error + "[launch.py] exits") == "\n".join(
        [*LAUNCHED.splitlines()[-4:], user_error.strip()]
    )
    without = LAUNCHED.replace("torch.OutOfMemoryError: ", "")
    assert throughput.error_in(without).splitlines()[-1].startswith("mmr1-ds: fault (rank 0")
    assert throughput.error_in("one\ntwo\n") == "one\ntwo"
    assert throughput.error_in("") == ""


DEMO = ["--config", str(ROOT / "configs" / "demo.yaml"), "--repeats", "1"]


@pytest.mark.parametrize(
    ("launcher", "said"),
    [("true", "No such file or directory: '{folder}/0_shuffle_0/metrics.jsonl'"), ("false", "exit code 1")],
)
def test_a_run_that_leaves_no_metrics_is_a_failed_cell(tmp_path, capsys, launcher, said):
    arguments = ["--launcher", launcher, "--sampling", "shuffle", "--work-dir", str(tmp_path)]
    assert throughput.main([*DEMO, *arguments]) == 1
    assert said.format(folder=tmp_path) in capsys.readouterr().out
    (cell,) = throughput_report.read(tmp_path / "throughput.json")["cells"]
    assert cell["error"] and cell["figures"] == {}


def test_metrics_of_another_kind_are_a_failed_cell(tmp_path, capsys):
    launcher = tmp_path / "launch"
    launcher.write_text('folder="${@: -1}"; folder="${folder#*=}"; mkdir -p "$folder"; '
                        'echo \'{"epoch": 1}\' > "$folder/metrics.jsonl"')  # fmt: skip
    arguments = ["--launcher", f"bash {launcher}", "--sampling", "shuffle", "--work-dir", str(tmp_path)]
    assert throughput.main([*DEMO, *arguments]) == 1
    assert "metrics.jsonl lacks 'step'" in capsys.readouterr().out


def test_sigterm_ends_the_run_and_keeps_what_was_measured(tmp_path):
    """The first cell fails, the second is going."""
    launcher, marker = tmp_path / "launch", f"MMR1_TEST_THROUGHPUT={tmp_path}"
    launcher.write_text(f'[[ "$*" == *shuffle* ]] && exit 1; sleep 600 & touch {tmp_path}/started; wait')
    command = [sys.executable, throughput.__file__, *DEMO, "--launcher", f"bash {launcher}", "--work-dir", tmp_path]
    command += ["--sampling", "shuffle", "online"]
    variables = environment(**dict([marker.split("=")]))
    benchmark = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "started").exists, 60, "the second run starts")
        assert len(processes_with(marker)) == 3
        benchmark.terminate()
        assert benchmark.wait(60) == 143
        wait_until(lambda: not processes_with(marker), 30, "no process left")
    finally:
        for line in processes_with(marker):
            os.kill(int(line.split(":")[0]), signal.SIGKILL)
        benchmark.wait()
    (cell,) = throughput_report.read(tmp_path / "throughput.json")["cells"]
    assert cell["sampling"] == "shuffle" and cell["error"] == "exit code 1"


def test_the_documented_schema_is_what_is_written():
    page = (ROOT / "docs" / "throughput.md").read_text()
    for name in (*throughput_report.KEY, "figures", "error", "refresh_steps", "tokens_per_second", "mfu_update"):
        assert f"`{name}`" in page, name


def test_the_batch_script_parses():
    script = ROOT / "launch" / "throughput.sbatch"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.nightly
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
