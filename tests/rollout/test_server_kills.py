"""A run whose rollout server hangs, is killed again and again, or goes away: nothing is lost, nothing used twice."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest
import yaml
from fixtures.launching import ROOT, environment, processes_with, wait_until
from fixtures.tiny_models import save_vision_model

pytestmark = pytest.mark.slow

NUM_KILLS = int(os.environ.get("MMR1_DS_SERVER_KILLS", "1"))
PROMPTS, BATCH, RESPONSES = 12, 4, 3

REWARD = """
import json
from pathlib import Path

LOG = Path(__file__).with_name("rewarded.jsonl")


def score(reward_input):
    with LOG.open("a") as file:
        file.write(json.dumps([reward_input["ground_truth"], reward_input["response"]]) + "\\n")
    return {"overall": float(reward_input["response_length"] % 3), "accuracy": 0.0}
"""


def run_config(folder: Path, num_steps: int) -> Path:
    save_vision_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"what is {i}?", "answer": i} for i in range(PROMPTS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "data": {
            "train_files": str(folder / "data.jsonl"),
            "max_prompt_length": 64,
            "max_response_length": 24,
            "rollout_batch_size": BATCH,
        },
        "worker": {
            "actor": {
                "global_batch_size": BATCH,
                "model": {"model_path": str(folder / "model")},
                "optim": {"lr": 1e-3},
            },
            "rollout": {
                "engine": "server",
                "n": RESPONSES,
                "kv_cache_gb": 1,
                "enforce_eager": True,
                "max_staleness_steps": 1,
            },
            "reward": {"reward_function": f"{folder / 'reward.py'}:score", "num_workers": 1},
        },
        "trainer": {
            "max_steps": num_steps,
            "report_freq": None,
            "n_gpus_per_node": 1,
            "val_before_train": False,
            "run_dir": str(folder / "run"),
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def steps_of(folder: Path) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def restarts_in(lines: list[dict]) -> float:
    return sum(line["rollout/num_server_restarts"] for line in lines)


def servers(marker: str) -> list[int]:
    """The processes of the run's server and of its engine; not the one that watches over them."""
    found = [line.partition(": ") for line in processes_with(marker) if "server_minder" not in line]
    return [int(pid) for pid, _, command in found if "vllm.entrypoints" in command or "VLLM" in command]


def start(folder: Path, marker: str, *words: str, **variables: str) -> subprocess.Popen:
    """A command of the program with the run's configuration; its output goes to run.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with (folder / "run.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *words, f"config={folder / 'run.yaml'}"],
            env=environment(MMR1_TEST_MARKER=marker, MASTER_PORT=port, **variables),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.nightly
def test_a_server_that_hangs_or_is_killed_costs_time_alone(tmp_path):
    faults = [signal.SIGSTOP, *[signal.SIGKILL] * NUM_KILLS]
    num_steps, marker = 5 * (len(faults) + 1), uuid.uuid4().hex
    run_config(tmp_path, num_steps)
    process = start(tmp_path, marker, "mmr1_ds.train", "worker.rollout.server_timeout_seconds=15")
    chance = random.Random(7)

    def is_next(number: int) -> bool:
        """Whether the restart for the fault before has been counted: a hung server that is killed too restarts once."""
        lines = steps_of(tmp_path)
        return len(lines) > 0 and restarts_in(lines) >= number

    try:
        for number, fault in enumerate(faults):
            wait_until(
                lambda number=number: process.poll() is not None or is_next(number),
                300,
                f"the step before fault {number}",
            )
            assert process.poll() is None, (tmp_path / "run.log").read_text()[-4000:]
            os.kill(chance.choice(servers(marker)), fault)
        assert process.wait(timeout=300) == 0, (tmp_path / "run.log").read_text()[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    wait_until(lambda: not processes_with(marker), 30, f"no process left, {processes_with(marker)}")
    lines = steps_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    assert restarts_in(lines) >= len(faults)
    assert all(line["rollout/logprob_diff_max"] < 1e-4 for line in lines if line["rollout/policy_lag_max"] == 0)
    assert max(line["rollout/policy_lag_max"] for line in lines) == 1
    # Every response that was asked for was rewarded once: the walk visits each prompt once an epoch.
    rewarded = [json.loads(line) for line in (tmp_path / "rewarded.jsonl").read_text().splitlines()]
    assert len(rewarded) == num_steps * BATCH * RESPONSES
    per_epoch = PROMPTS * RESPONSES
    for first in range(0, len(rewarded) // per_epoch * per_epoch, per_epoch):
        counts = Counter(truth for truth, _ in rewarded[first : first + per_epoch])
        assert set(counts.values()) == {RESPONSES} and len(counts) == PROMPTS


@pytest.mark.nightly
def test_a_run_without_servers_saves_what_it_has_and_goes_on(tmp_path):
    """The server is somebody else's and goes away; responses are cut and go on in the next step, also over the stop."""
    num_steps, marker = 7, uuid.uuid4().hex
    run_config(tmp_path, num_steps)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    key = {"MMR1_DS_SERVER_KEY": uuid.uuid4().hex}
    ready = f"rollout server ready: http://127.0.0.1:{port}"
    settings = [
        f"worker.rollout.server_urls=['http://127.0.0.1:{port}']",
        "worker.rollout.servers_gone_seconds=12",  # over what handing over the weights takes on a busy machine
        "worker.rollout.max_staleness_steps=0",
        "worker.rollout.partial=10",
    ]

    def log() -> str:
        return (tmp_path / "run.log").read_text()

    for attempt in (1, 2):
        server = start(tmp_path, marker, "mmr1_ds.commands.cli", "serve", f"--port={port}", **key)
        wait_until(lambda n=attempt: log().count(ready) == n, 200, f"the server ready: {log()[-2000:]}")
        process = start(tmp_path, marker, "mmr1_ds.train", *settings, **key)
        if attempt == 1:
            wait_until(lambda p=process: p.poll() is not None or len(steps_of(tmp_path)) >= 2, 200, "two steps")
            server.terminate()
            assert process.wait(timeout=200) == 2, log()[-4000:]
            assert "no rollout server has answered for" in log() and f"http://127.0.0.1:{port}" in log()
            done = steps_of(tmp_path)[-1]["step"]
            assert 2 <= done < num_steps
            assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"global_step_{done}"
        else:
            assert process.wait(timeout=200) == 0, log()[-4000:]
            server.terminate()
        assert server.wait(timeout=60) == 0
    wait_until(lambda: not processes_with(marker), 30, f"no process left, {processes_with(marker)}")
    assert key["MMR1_DS_SERVER_KEY"] not in log()
    trained = [line["step"] for line in steps_of(tmp_path) if "actor/pg_loss" in line]
    assert trained == list(range(1, num_steps + 1))
    rewarded = [json.loads(line) for line in (tmp_path / "rewarded.jsonl").read_text().splitlines()]
    assert len(rewarded) == num_steps * BATCH * RESPONSES
    assert max(Counter(truth for truth, _ in rewarded).values()) <= RESPONSES * (num_steps * BATCH // PROMPTS + 2)
