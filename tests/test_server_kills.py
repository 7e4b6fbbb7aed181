"""A run whose rollout server is killed again and again: nothing is lost, nothing is trained on twice."""

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
from launching import ROOT, environment, processes_with, wait_until
from tiny_models import save_vision_model

pytestmark = pytest.mark.slow

NUM_KILLS = int(os.environ.get("MMR1_DS_SERVER_KILLS", "2"))
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


def servers(marker: str) -> list[int]:
    """The processes of the run's server, its engine and its workers."""
    found = [line.partition(": ") for line in processes_with(marker)]
    return [int(pid) for pid, _, command in found if "vllm.entrypoints" in command or "VLLM" in command]


def test_a_killed_server_costs_time_alone(tmp_path):
    num_steps = 3 * (NUM_KILLS + 1)
    config, marker = run_config(tmp_path, num_steps), uuid.uuid4().hex
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = (tmp_path / "run.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "mmr1_ds.train", f"config={config}"],
        env=environment(MMR1_TEST_MARKER=marker, MASTER_PORT=port),
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    chance = random.Random(7)
    kills = 0
    try:
        for kill in range(NUM_KILLS):
            wait_until(
                lambda kill=kill: (
                    process.poll() is not None or len(steps_of(tmp_path)) > 3 * kill + chance.random() * 2
                ),
                300,
                f"the step before kill {kill}",
            )
            assert process.poll() is None, (tmp_path / "run.log").read_text()[-4000:]
            os.kill(chance.choice(servers(marker)), signal.SIGKILL)
            kills += 1
        assert process.wait(timeout=300) == 0, (tmp_path / "run.log").read_text()[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    wait_until(lambda: not processes_with(marker), 30, f"no process left, {processes_with(marker)}")
    lines = steps_of(tmp_path)
    assert kills == NUM_KILLS and [line["step"] for line in lines] == list(range(1, num_steps + 1))
    assert sum(line["rollout/num_server_restarts"] for line in lines) >= NUM_KILLS
    assert all(line["rollout/logprob_diff_max"] < 1e-4 for line in lines if line["rollout/policy_lag_max"] == 0)
    assert max(line["rollout/policy_lag_max"] for line in lines) == 1
    # Every response that was asked for was rewarded once: the walk visits each prompt once an epoch.
    rewarded = [json.loads(line) for line in (tmp_path / "rewarded.jsonl").read_text().splitlines()]
    assert len(rewarded) == num_steps * BATCH * RESPONSES
    per_epoch = PROMPTS * RESPONSES
    for start in range(0, len(rewarded) // per_epoch * per_epoch, per_epoch):
        counts = Counter(truth for truth, _ in rewarded[start : start + per_epoch])
        assert set(counts.values()) == {RESPONSES} and len(counts) == PROMPTS
