"""Runs killed at random moments draw what an unbroken run draws, on whatever number of ranks they go on."""

import json
import os
import random
import socket
from pathlib import Path

import pytest
from fixtures.launching import PROGRAMS, environment, run_ranks, wait_until, warm_processes

PROGRAM = "curriculum_until_killed.py"
NUM_STEPS = 300
# More by MMR1_DS_KILLS=50; each start takes seconds.
NUM_KILLS = int(os.environ.get("MMR1_DS_KILLS", "3"))


def drawn(folder: Path, rank: int) -> list[tuple[tuple[int, int], list[int], list[int]]]:
    """(step, draw of the step), batch, probes of each draw, in the order they were made."""
    lines = (folder / f"drawn.{rank}.jsonl").read_text().splitlines()
    found = []
    for line in lines:
        try:
            step, attempt, batch, probes = json.loads(line)
        except json.JSONDecodeError:
            continue  # the kill came in the middle of a line
        found.append(((step, attempt), batch, probes))
    return found


def run_until_killed(folder: Path, refresh: str, num_ranks: int, after_lines: int) -> bool:
    """Start ranks, kill them once rank 0 has drawn `after_lines` more. Returns: whether all were still going."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = folder / "drawn.0.jsonl"
    before = log.read_bytes().count(b"\n") if log.exists() else 0
    processes = warm_processes(num_ranks)

    def reached() -> bool:
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        return lines >= before + after_lines or any(process.has_ended() for process in processes)

    try:
        for rank, process in enumerate(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            variables = environment(**ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            arguments = [str(PROGRAMS / PROGRAM), str(folder), refresh, str(NUM_STEPS), "7"]
            process.start(arguments, variables, folder / f"rank{rank}.log")
        wait_until(reached, 120, f"{after_lines} more draws")
    finally:
        running = [process for process in processes if not process.has_ended()]
        for process in processes:
            process.stop_program()
    return len(running) == num_ranks


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [pytest.param("full", marks=pytest.mark.nightly), "online"])
def test_killed_runs_draw_what_an_unbroken_one_draws(tmp_path, refresh):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run_ranks(PROGRAM, whole, refresh, str(NUM_STEPS), "7")
    expected = {step: (batch, probes) for step, batch, probes in drawn(whole, 0)}
    assert len(expected) == 2 * NUM_STEPS  # 1, 2, 3, 1, 2, 3, ... draws a step
    assert any(probes for _, probes in expected.values()) == (refresh == "online")

    chance = random.Random(5)
    kills = 0
    for _ in range(NUM_KILLS):
        num_ranks, after_lines = chance.choice([1, 2, 3]), chance.randrange(1, 4 * NUM_STEPS // NUM_KILLS)
        kills += run_until_killed(broken, refresh, num_ranks, after_lines)
    assert kills >= NUM_KILLS / 2
    run_ranks(PROGRAM, broken, refresh, str(NUM_STEPS), "7", num_ranks=2)
    for rank in range(3):
        if (broken / f"drawn.{rank}.jsonl").exists():
            for step, batch, probes in drawn(broken, rank):
                assert (batch, probes) == expected[step], (rank, step)
    assert drawn(broken, 0)[-1][0][0] == NUM_STEPS
