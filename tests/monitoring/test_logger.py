import errno
import json
import logging
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from mmr1_ds.config import TrainerConfig
from mmr1_ds.config.ranges import check_loggers
from mmr1_ds.errors import UserError
from mmr1_ds.monitoring import writers
from mmr1_ds.monitoring.logger import MetricsLogger, configure_logging
from mmr1_ds.monitoring.progress import format_duration
from mmr1_ds.monitoring.writers import ConsoleWriter, JsonLinesWriter


def open_logger(run_dir, names=("console", "jsonl"), resumed_step=0, total_steps=10, is_main=True):
    trainer = TrainerConfig(logger=list(names), experiment_name="trial", project_name="mmr1_ds")
    config = {"data": {"seed": 1, "api_key": "sk-secret", "urls": ["http://a:sk-secret@b"]}}
    return MetricsLogger.open(trainer, run_dir, total_steps, resumed_step, config, is_main)


FULL = OSError(errno.ENOSPC, "No space left on device")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="mmr1_ds")
    return caplog


def test_unknown_logger_lists_the_known():
    check_loggers(["console", "file", "jsonl", "tensorboard", "wandb"])
    with pytest.raises(UserError, match="tensorboard or wandb or swanlab or mlflow or trackio, got comet"):
        check_loggers(["console", "comet"])


def test_one_flat_object_a_step(tmp_path):
    with open_logger(tmp_path) as log:
        log.log(1, {"reward/overall": 0.5, "timing_s/gen": np.float32(1.5)})
        log.log(2, {"reward/overall": float("nan"), "actor/kl": float("inf")})
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/overall": 0.5, "timing_s/gen": 1.5},
        {"step": 2, "reward/overall": None, "actor/kl": None},
    ]


def test_the_same_step_is_merged_into_one_line(tmp_path):
    with open_logger(tmp_path) as log:
        log.log(0, {"val/accuracy_reward": 0.25})
        log.log(1, {"a": 1, "b": 1})
        log.log(1, {"a": 1, "b": 2})
        log.log(1, {"c": 3})
        log.log(2, {"long": 123456.789})
        log.log(2, {"long": 1})  # a shorter line than the one it replaces
        log.log(3, {"a": 5})
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "val/accuracy_reward": 0.25},
        {"step": 1, "a": 1.0, "b": 2.0, "c": 3.0},
        {"step": 2, "long": 1.0},
        {"step": 3, "a": 5.0},
    ]


def test_resume_repeats_no_step(tmp_path):
    with open_logger(tmp_path) as log:
        for step in range(5):
            log.log(step, {"a": step})
            log.generations(step, [{"response": f"r{step}"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "a"')  # killed while writing
    with open_logger(tmp_path, resumed_step=2) as log:
        log.log(2, {"val": 7})
        log.log(3, {"a": 33})
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "a": 0.0},
        {"step": 1, "a": 1.0},
        {"step": 2, "a": 2.0, "val": 7.0},
        {"step": 3, "a": 33.0},
    ]
    assert [line["step"] for line in read_lines(tmp_path / "generations.jsonl")] == [0, 1, 2]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    for _ in range(2):
        with open_logger(tmp_path) as log:
            log.log(0, {"a": 1})
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_steps_never_fall(tmp_path):
    writer = JsonLinesWriter(tmp_path, 0)
    writer.log(3, {})
    with pytest.raises(AssertionError, match="step 2 logged after step 3"):
        writer.log(2, {})


def test_generations(tmp_path, messages):
    rows = [
        {
            "prompt": "2+2?",
            "response": "<answer>4</answer>ä\n",
            "score": np.float32(1),
            "n": 3,
            "ok": True,
            "why": None,
        },
        {"prompt": "1+1?", "response": "3", "score": 0.0, "n": 4, "ok": False, "why": "off"},
    ]
    with open_logger(tmp_path) as log:
        log.generations(4, rows)
        log.generations(5, [])
    assert read_lines(tmp_path / "generations.jsonl") == [{"step": 4, **rows[0]}, {"step": 4, **rows[1]}]
    assert len(messages.records) == 1
    assert "step 4, first of 2 generations: prompt '2+2?'" in messages.text
    assert "1+1" not in messages.text


def test_console_line(tmp_path, messages):
    with open_logger(tmp_path, total_steps=60) as log:
        log.log(
            7,
            {
                "reward/overall": 0.51234,
                "reward/accuracy": 0.5,
                "curriculum/effective_group_fraction": 0.625,
                "response_length/mean": 11.25,
                "timing_s/gen": 1.234,
                "timing_s/update_actor": 0.5,
                "timing_s/step": 2.0,
                "actor/kl": 0.1,
            },
        )
    assert [record.getMessage() for record in messages.records] == [
        "step 7/60 | reward 0.512 | accuracy 0.500 | effective 0.62 | length 11.2 | "
        "seconds gen 1.23 update_actor 0.50 | 1:46 left"
    ]


def test_time_left_follows_the_clock(monkeypatch, messages):
    now = [100.0]
    monkeypatch.setattr("mmr1_ds.monitoring.logger.time.monotonic", lambda: now[0])
    console = ConsoleWriter(total_steps=10)
    console.log(0, {"val/accuracy_reward": 0.5})
    for step in (1, 2):
        now[0] += 3.0
        console.log(step, {"timing_s/step": 1.0})  # the clock also counts what is outside the step
    now[0] += 6.0
    console.log(2, {"val/accuracy_reward": 0.5})  # a validation is part of the time to the next step
    now[0] += 3.0
    console.log(3, {"timing_s/step": 1.0})
    assert [record.getMessage().split(" | ")[-1] for record in messages.records] == [
        "val accuracy 0.500",
        "27 s left",
        "24 s left",
        "24 s left",
        "35 s left",
    ]


def test_other_ranks_say_nothing(tmp_path, messages, capsys):
    with open_logger(tmp_path, names=["console", "tensorboard", "wandb"], is_main=False) as log:
        log.log(1, {"a": 1})
        log.generations(1, [{"response": "x"}])
        with log.progress(10, "refresh") as advance:
            advance(10)
    assert list(tmp_path.iterdir()) == []
    assert messages.records == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("total", "chunk", "lines"), [(100, 1, 10), (7, 1, 7), (23, 7, 4), (0, 1, 0)])
def test_progress_by_lines(tmp_path, messages, total, chunk, lines):
    with open_logger(tmp_path) as log, log.progress(total, "refresh") as advance:
        for start in range(0, total, chunk):
            advance(min(chunk, total - start))
    assert len(messages.records) == lines
    if total:
        assert messages.records[-1].getMessage() == f"refresh: {total} of {total}, 0 s left"


def test_progress_on_a_terminal(tmp_path, monkeypatch, messages, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with open_logger(tmp_path) as log, log.progress(4, "validation") as advance:
        assert advance(3) is None
    assert "validation" in capsys.readouterr().err
    assert messages.records == []


def test_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_logger(tmp_path, names=["tensorboard"]) as log:
        for step in (1, 2, 3):
            log.log(step, {"reward/overall": step / 2})
    with open_logger(tmp_path, names=["tensorboard"], resumed_step=2) as log:
        log.log(3, {"reward/overall": 30.0})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/overall")] == [(1, 0.5), (2, 1.0), (3, 30.0)]


def test_bar_over_the_steps_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with open_logger(tmp_path, resumed_step=4) as log:
        log.log(5, {"reward/overall": 0.25, "val/accuracy_reward": 0.5, "timing_s/step": 2.0})
        log.log(6, {"reward/overall": 0.75})
        with log.progress(3, "checkpoint of step 6", with_lines=False) as advance:
            advance(3)
    shown = capsys.readouterr().err
    assert "5/10 steps, reward 0.250, val accuracy 0.500, 10 s left" in shown
    assert "6/10 steps, reward 0.750, val accuracy 0.500" in shown  # the validation's figure stays
    assert "checkpoint of step 6" in shown


def test_no_bar_elsewhere(tmp_path, capsys, monkeypatch):
    # Another test's handler writes to a stream that is closed by now.
    monkeypatch.setattr(logging.getLogger("mmr1_ds"), "handlers", [])
    with open_logger(tmp_path) as log, log.progress(3, "checkpoint", with_lines=False) as advance:
        log.log(5, {"reward/overall": 0.25})
        advance(3)
    assert capsys.readouterr().err == ""


RENEWAL = {"kind": "full", "weight_counts": [1, 0, 2], "pass_rate_counts": [3, 0, 0], "num_unknown": 0}


def test_records_are_lines_of_their_own_files(tmp_path):
    with open_logger(tmp_path) as log:
        log.record("curriculum", 0, RENEWAL)
        log.record("draws", 1, {"prompts": [3, 5]})
        log.record("draws", 2, {"prompts": [4]})
    with open_logger(tmp_path, resumed_step=1) as log:
        log.record("curriculum", 0, RENEWAL | {"kind": "again"})  # refreshed again by a run that was stopped in it
        log.record("curriculum", 1, RENEWAL)
    assert read_lines(tmp_path / "draws.jsonl") == [{"step": 1, "prompts": [3, 5]}]
    assert read_lines(tmp_path / "curriculum.jsonl") == [{"step": step, **RENEWAL} for step in (0, 1)]


def test_the_time_at_work_goes_on_where_it_was(tmp_path):
    with open_logger(tmp_path) as log:
        log.log(1, {"perf/elapsed_seconds": 500.0})
        log.log(2, {"perf/elapsed_seconds": 900.0})
    with open_logger(tmp_path, resumed_step=1) as log:
        assert 500.0 <= log.elapsed_seconds < 600.0


def test_histograms_in_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_logger(tmp_path, names=["tensorboard"]) as log:
        log.record("curriculum", 4, RENEWAL)
        log.record("draws", 4, {"prompts": [1]})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Histograms("curriculum/weight_histogram")
    assert event.step == 4 and event.histogram_value.num == 3
    assert event.histogram_value.sum == pytest.approx(1 / 6 + 2 * 5 / 6)
    assert list(event.histogram_value.bucket) == [1, 0, 2]


def test_a_full_disk_costs_no_step_and_no_line(tmp_path, monkeypatch, messages):
    with open_logger(tmp_path, names=[]) as log:
        log.log(1, {"a": 1})
        log.record("draws", 1, {"prompts": [1]})
        real = Path.open
        monkeypatch.setattr(Path, "open", lambda *arguments, **options: (_ for _ in ()).throw(FULL))
        for step in (2, 3):
            log.log(step, {"a": step})
            log.record("draws", step, {"prompts": [step]})
        monkeypatch.setattr(Path, "open", real)
        log.log(3, {"b": 3})
        log.record("draws", 4, {"prompts": [4]})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert read_lines(tmp_path / "metrics.jsonl")[-1] == {"step": 3, "a": 3.0, "b": 3.0}
    assert [line["step"] for line in read_lines(tmp_path / "draws.jsonl")] == [1, 2, 3, 4]
    warnings = [record.getMessage() for record in messages.records]
    assert len(warnings) == 2 and "No space left on device" in warnings[0] and "kept in memory" in warnings[0]


def test_lines_that_wait_are_written_at_the_end_or_told_lost(tmp_path, monkeypatch, messages):
    full = lambda *arguments, **options: (_ for _ in ()).throw(FULL)  # noqa: E731
    real = Path.open
    with open_logger(tmp_path, names=[]) as log:
        monkeypatch.setattr(Path, "open", full)
        log.record("draws", 1, {"prompts": [1]})
        monkeypatch.setattr(Path, "open", real)
    assert read_lines(tmp_path / "draws.jsonl") == [{"step": 1, "prompts": [1]}]
    with open_logger(tmp_path, names=[], resumed_step=1) as log:
        monkeypatch.setattr(Path, "open", full)
        log.record("draws", 2, {"prompts": [2]})
    assert "draws.jsonl: the last 1 lines are lost" in messages.records[-1].getMessage()


@pytest.fixture
def fake_wandb(monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **arguments: calls.append(arguments) or Run()
    fake.Settings = lambda **arguments: arguments
    fake.Table = lambda columns, data: (columns, data)
    fake.Histogram = lambda np_histogram: [values.tolist() for values in np_histogram]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("variables", "mode"),
    [({}, "offline"), ({"WANDB_API_KEY": "s3cret"}, None), ({"WANDB_MODE": "disabled"}, None)],
)
def test_wandb_mode(tmp_path, fake_wandb, messages, monkeypatch, variables, mode):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with open_logger(tmp_path, names=["wandb"]):
        pass
    assert fake_wandb[0]["mode"] == mode
    assert len(messages.records) == (mode == "offline")
    assert "s3cret" not in messages.text


def test_wandb_gets_metrics_generations_and_config(tmp_path, fake_wandb):
    with open_logger(tmp_path, names=["wandb"]) as log:
        log.log(3, {"a": 1.0})
        log.generations(3, [{"prompt": "p", "score": 1}, {"score": 2, "prompt": "q"}])
        log.record("curriculum", 3, RENEWAL)
    started, *logged = fake_wandb
    assert (started["project"], started["name"], started["dir"]) == ("mmr1_ds", "trial", str(tmp_path))
    assert started["config"] == {"data": {"seed": 1, "api_key": "***", "urls": ["http://***@b"]}}
    assert logged == [
        (3, {"a": 1.0}),
        (3, {"val/generations": (["prompt", "score"], [["p", 1], ["q", 2]])}),
        (3, {"curriculum/weight_histogram": [[1, 0, 2], [0.0, 1 / 3, 2 / 3, 1.0]]}),
        (3, {"curriculum/pass_rate_histogram": [[3, 0, 0], [0.0, 1 / 3, 2 / 3, 1.0]]}),
        "finished",
    ]


@pytest.mark.slow  # wandb starts a service of its own
def test_wandb_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from mmr1_ds.config.schema import TrainerConfig\n"
        "from mmr1_ds.monitoring.logger import MetricsLogger\n"
        "with MetricsLogger.open(TrainerConfig(logger=['wandb']), Path(sys.argv[1]), 2, 0, {}, True) as log:\n"
        "    log.log(1, {'a': 1.0})\n"
        "    log.generations(1, [{'prompt': 'p', 'score': 1.0}])\n"
    )
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_writer_that_fails_to_close_does_not_keep_the_others_open():
    closed = []

    class Writer:
        def __init__(self, error):
            self.error = error

        def close(self):
            closed.append(self)
            if self.error:
                raise self.error

    with pytest.raises(OSError, match="disk full"):
        MetricsLogger([Writer(None), Writer(OSError("disk full")), Writer(None)]).close()
    assert len(closed) == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_log_lines_of_other_ranks_are_warnings_only(own_logging, capsys):
    configure_logging(is_main=False)
    logging.getLogger("mmr1_ds.loop.trainer").info("quiet")
    logging.getLogger("mmr1_ds.loop.trainer").warning("loud")
    printed = capsys.readouterr().err
    assert "loud" in printed and "quiet" not in printed


@pytest.mark.parametrize("block_bytes", [7, 64, 1 << 20])
def test_a_resume_reads_the_end_of_long_files_alone(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(writers, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "draws.jsonl"
    lines = [json.dumps({"step": step, "text": "\N{LATIN SMALL LETTER U WITH DIAERESIS}" * (step % 9)}).encode() + b"\n"
             for step in range(1, 60)]  # fmt: skip
    path.write_bytes(b"".join(lines) + lines[-1][:11])  # the last is torn
    found = list(writers.lines_from_end(path))
    assert [line for _, line in found] == [lines[-1][:11], *reversed(lines)]
    assert all(path.read_bytes()[start:].startswith(line) for start, line in found)
    asked = []
    parse = json.loads
    monkeypatch.setattr(writers.json, "loads", lambda text: asked.append(text) or parse(text))
    writers.drop_lines_after(path, 55)
    assert path.read_bytes() == b"".join(lines[:55])
    assert len(asked) == 5  # of 59 lines
    assert writers.last_line(path)[0]["step"] == 55
    writers.drop_lines_after(path, 99)
    assert path.read_bytes() == b"".join(lines[:55])
