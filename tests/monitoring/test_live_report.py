import logging
import os
import sys
from pathlib import Path

import pytest
from fixtures.launching import processes_with, wait_until

from mmr1_ds.monitoring import live_report
from mmr1_ds.monitoring.live_report import LiveReport


@pytest.fixture
def messages(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmr1_ds"), "propagate", True)
    caplog.set_level(logging.INFO, logger="mmr1_ds")
    return caplog


def stand_in(monkeypatch, folder: Path, program: str) -> str:
    """In place of the report's program: `python -m mmr1_ds.commands.report` finds it first. Returns: its marker."""
    (folder / "fake").mkdir()
    script = folder / "fake" / "python"
    script.write_text(f"#!{sys.executable}\nimport sys, time, pathlib\nrun = pathlib.Path(sys.argv[-1])\n{program}\n")
    os.chmod(script, 0o755)
    monkeypatch.setattr(live_report.sys, "executable", str(script))
    monkeypatch.setenv("MMR1_TEST_REPORT", str(folder))
    return f"MMR1_TEST_REPORT={folder}"


COUNT = "log = run / 'calls'; log.write_text((log.read_text() if log.exists() else '') + 'x')"


def test_every_few_steps_and_at_the_end(tmp_path, monkeypatch, messages):
    marker = stand_in(monkeypatch, tmp_path, COUNT)
    with LiveReport(tmp_path, 3) as report:
        for step in range(1, 8):
            report.after_step(step)
            wait_until(lambda: not processes_with(marker), 60, "the report to end")
        report.finish()
    assert (tmp_path / "calls").read_text() == "xxx"  # steps 3 and 6, and the end
    assert f"report: {tmp_path / 'report.html'}" in messages.text


@pytest.mark.parametrize(("every", "calls"), [(-1, 1), (None, 0)])
def test_only_at_the_end_or_never(tmp_path, monkeypatch, every, calls):
    stand_in(monkeypatch, tmp_path, COUNT)
    with LiveReport(tmp_path, every) as report:
        report.after_step(1)
        report.finish()
    assert (tmp_path / "calls").exists() == bool(calls)


def test_a_slow_one_is_not_started_twice_and_does_not_outlive_the_run(tmp_path, monkeypatch):
    marker = stand_in(monkeypatch, tmp_path, COUNT + "\ntime.sleep(600)")
    with LiveReport(tmp_path, 1) as report:
        report.after_step(1)
        wait_until((tmp_path / "calls").exists, 60, "the first report to begin")
        running = processes_with(marker)
        report.after_step(2)
        assert processes_with(marker) == running and len(running) == 1
    assert processes_with(marker) == [] and (tmp_path / "calls").read_text() == "x"


def test_one_that_fails_is_told_and_the_run_goes_on(tmp_path, monkeypatch, messages):
    stand_in(monkeypatch, tmp_path, "sys.exit('mmr1-ds: error: matplotlib is missing')")
    with LiveReport(tmp_path, -1) as report:
        report.finish()
    assert "no report was written: mmr1-ds: error: matplotlib is missing" in messages.text
