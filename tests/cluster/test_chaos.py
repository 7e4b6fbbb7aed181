"""Whole runs whose ranks are killed at random moments end as a run that was never disturbed.

`make chaos KILLS=100` for many kills; each costs a start of two ranks.
"""

import contextlib
import logging
import os
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from fixtures.launching import ROOT, WarmProcess, environment, processes_with, wait_until
from fixtures.tiny_run import assert_same_run, write_run

pytestmark = pytest.mark.slow

logger = logging.getLogger(__name__)

NUM_KILLS = int(os.environ.get("MMR1_DS_CHAOS_KILLS", "4"))
NUM_STEPS = 12
SAVE_FREQ = 3  # else a checkpoint is being written behind every step


class Run:
    """Two ranks on one run directory."""

    def __init__(self, folder: Path, name: str, ranks: list[WarmProcess]) -> None:
        self.run_dir, self._ranks = folder / name, ranks
        self._began = time.monotonic()
        self.seconds = self.first_step = 0.0  # that it took, and until its first step was done
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.marker = f"{name}-{port}-{time.time_ns()}"
        self.logs = [folder / f"{name}.rank{rank}.log" for rank in range(len(ranks))]
        arguments = [str(ROOT / "mmr1_ds" / "train.py"), f"config={folder / 'run.yaml'}"]
        arguments += [f"trainer.run_dir={self.run_dir}", f"trainer.save_freq={SAVE_FREQ}"]
        for rank, process in enumerate(ranks):
            variables = environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(ranks)), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port, MMR1_TEST_MARKER=self.marker,
            )  # fmt: skip
            process.start(arguments, variables, self.logs[rank])

    def has_ended(self) -> bool:
        if not self.first_step and self.logs[0].exists() and " INFO step " in self.logs[0].read_text(errors="replace"):
            self.first_step = time.monotonic() - self._began
        return all(process.pid == 0 or process.has_ended() for process in self._ranks)

    def finish(self) -> list[int]:
        """The exit codes; nothing of the run is left."""
        wait_until(self.has_ended, 300, "the run ended")
        codes = [process.wait(300) for process in self._ranks]
        self.seconds = time.monotonic() - self._began
        wait_until(lambda: not processes_with(self.marker), 60, f"no process left, {processes_with(self.marker)}")
        return codes

    def saving(self) -> set[str]:
        """The checkpoint that is being written, if there is one: by the step itself, or behind the next."""
        return {path.name for path in self.run_dir.glob("checkpoints/.global_step_*.tmp")}

    def kill(self, rank: int) -> bool:
        """Returns: whether it was still there."""
        if self._ranks[rank].has_ended():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._ranks[rank].pid, signal.SIGKILL)
            return True
        return False

    def said(self) -> str:
        logs = [log for log in self.logs if log.exists()]  # a rank that was killed before it began has none
        return "".join(log.read_text(errors="replace") for log in logs)


def test_killed_runs_end_as_one_that_was_left_alone(tmp_path):
    write_run(tmp_path, NUM_STEPS)
    ranks = [WarmProcess(), WarmProcess()]
    chance, counts = random.Random(7), Counter()
    try:
        run = Run(tmp_path, "left_alone", ranks)
        assert run.finish() == [0, 0], run.said()[-3000:]
        start, steps = run.first_step, run.seconds - run.first_step
        number = 0
        while counts["kills"] < NUM_KILLS:
            number += 1
            name = f"killed_{number}"
            is_over = False
            while not is_over:
                run = Run(tmp_path, name, ranks)
                if counts["kills"] < NUM_KILLS:
                    kill_one(run, chance, start, steps, counts)
                codes = run.finish()
                is_over = codes == [0, 0]
                resumed = "going on from" in run.said()
                if is_over and not resumed:
                    # The first one compiles DeepSpeed's operators: a moment of it is mostly after the others' end.
                    start, steps = min(start, run.first_step), min(steps, run.seconds - run.first_step)
                counts["starts"] += 1
                counts["resumed"] += resumed
                counts["damaged checkpoints met"] += "is damaged" in run.said()
            assert_same_run(tmp_path / "left_alone", run.run_dir)
            told = ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
            logger.info("%d runs as the one that was left alone; %s", number, told)
        assert counts["resumed"] > 0
    finally:
        for process in ranks:
            process.close()


def kill_one(run: Run, chance: random.Random, start: float, steps: float, counts: Counter[str]) -> None:
    """Kill a random rank in the start, while a checkpoint is written, or at a moment of the steps when none is."""
    rank, kind = chance.randrange(2), chance.choices(["start", "steps", "save"], [0.1, 0.5, 0.4])[0]
    in_start, in_steps = chance.uniform(0.0, start), chance.uniform(0.0, steps)
    saves_to_wait_for, known, began = chance.randrange(1, 4), set[str](), time.monotonic()
    while not run.has_ended():
        new = run.saving() - known
        known |= new
        if kind == "save" and new:
            saves_to_wait_for -= 1
            if saves_to_wait_for == 0:
                time.sleep(chance.uniform(0.0, 0.03))  # somewhere in the save
                break
        now = time.monotonic() - began
        if kind == "start" and now >= in_start:
            break
        if kind == "steps" and run.first_step and now - run.first_step >= in_steps and not run.saving():
            break
        time.sleep(0.002)
    is_saving, is_start = bool(run.saving()), not run.first_step
    if not run.kill(rank):
        return
    counts["kills while a checkpoint was written" if is_saving else "kills at other moments"] += 1
    counts["kills before the first step's end"] += is_start
    counts["kills"] += 1
    counts[f"kills of rank {rank}"] += 1
