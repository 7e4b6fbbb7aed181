"""The whole program through the deepspeed launcher: two ranks, ZeRO-3, vLLM, images, videos, curriculum, resume."""

import json
import math
import re
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fixtures.launching import ROOT, environment, processes_with, wait_until
from fixtures.tiny_models import save_vision_model
from fixtures.tiny_run import OF_THE_MACHINE
from fixtures.videos import write_video
from PIL import Image

pytestmark = pytest.mark.slow

REWARD = """
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def score(reward_inputs, top):
    # While the test says so, a refresh of the run "stopped" that has kept something waits to be stopped.
    while (FOLDER / "hold").exists() and (FOLDER / "stopped" / "checkpoints" / "refresh.safetensors").exists():
        time.sleep(0.05)
    return [
        {
            "overall": (item["response_length"] * 7 + len(item["response"])) % (top + 1) / top,
            "accuracy": float(item["response_length"] % 2),
            "truth_length": len(item["ground_truth"]),
        }
        for item in reward_inputs
    ]
"""
GUIDE_METRICS = ["mean_weight", "std_weight", "min_weight", "max_weight", "consumed_batches", "random_position"]
NUM_STEPS = 10


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A random tiny Qwen2.5-VL, 12 prompts with images, two of 17 with videos, a reward file, and the run's config."""
    folder = tmp_path_factory.mktemp("assets")
    save_vision_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = []
    for i in range(17):
        row = {"question": f"what is {i}?", "answer": i, "image": [], "videos": []}
        if i % 4:
            noise = np.random.default_rng(i).integers(0, 256, (28, 28 * (i % 4), 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
            row |= {"question": f"<image>what is {i}?", "image": [f"{i}.png"]}
        if i in (4, 5):  # without images, and between an image and text
            videos = [write_video(folder / f"{i}{name}", num_frames=4 + 3 * i) for name in ("a.mp4", "b.webm")[: i - 3]]
            row |= {"question": row["question"] + "<video>" * len(videos), "videos": videos}
        rows.append(row)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "data": {
            "train_files": str(folder / "data.jsonl"),
            "val_files": str(folder / "data.jsonl"),
            "prompt_key": "question",
            "image_key": "image",
            "min_pixels": 784,
            "max_pixels": 12544,
            "video_max_frames": 6,
            "video_max_pixels": 6272,
            "max_prompt_length": 96,
            "max_response_length": 12,
            "rollout_batch_size": 4,
            "sampling_strategy": "curriculum",
            "curriculum_metrics": ["learnability", "self-bleu"],
            "curriculum_metric_weights": [0.8, 0.2],
            "curriculum_update_freq": 6,
            "curriculum_rollout_n": 2,
            "curriculum_rollout_batch_size": 7,
        },
        "worker": {
            "actor": {
                "global_batch_size": 2,
                "micro_batch_size_per_device_for_update": 4,
                "micro_batch_size_per_device_for_experience": 3,
                "model": {"model_path": str(folder / "model"), "enable_gradient_checkpointing": True},
                "optim": {"lr": 1e-3},
            },
            "rollout": {"engine": "vllm", "n": 4, "kv_cache_gb": 1, "enforce_eager": True},
            "reward": {
                "reward_function": f"{folder / 'reward.py'}:score",
                "reward_function_kwargs": {"top": 4},
                "num_workers": 1,
            },
        },
        "trainer": {
            "max_steps": NUM_STEPS,
            "report_freq": None,
            "n_gpus_per_node": 2,
            "preemption_seconds": 30,
            "val_freq": 5,
            "save_freq": 2,
            "save_limit": 2,
            "val_generations_to_log": 3,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def launch(assets: Path, run_dir: Path, marker: str, *overrides: str) -> subprocess.Popen:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    command += ["--module", "mmr1_ds.train", f"config={assets / 'run.yaml'}", f"trainer.run_dir={run_dir}", *overrides]
    log = open(run_dir.with_suffix(".log"), "ab")
    return subprocess.Popen(
        command,
        env=environment(MMR1_TEST_MARKER=marker),
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def metrics_of(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finish(process: subprocess.Popen, run_dir: Path, marker: str) -> None:
    process.wait(timeout=400)
    assert process.returncode == 0, run_dir.with_suffix(".log").read_text()[-6000:]
    wait_until(lambda: not processes_with(marker), 30, f"no process left, {processes_with(marker)}")


@pytest.fixture(scope="module")
def finished_run(assets):
    run_dir, marker = assets / "finished", uuid.uuid4().hex
    finish(launch(assets, run_dir, marker, "trainer.logger=[console,jsonl,tensorboard,wandb]"), run_dir, marker)
    return run_dir


def test_a_run_leaves_all_of_itself_in_its_directory(finished_run):
    lines = metrics_of(finished_run)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS + 1))  # 0 is the validation before training
    for line in lines[1:]:
        for name in [*(f"curriculum/{name}" for name in GUIDE_METRICS), "reward/accuracy", "timing_s/gen"]:
            assert math.isfinite(line[name]), name
        assert line["rollout/logprob_diff_max"] < 1e-4
        assert line["actor/grad_norm"] > 0
        assert line["reward/truth_length"] >= 1
    assert {line["step"] for line in lines if "val/accuracy_reward" in line} == {0, 5, 10}
    refreshed = [line["step"] for line in lines if "timing_s/refresh" in line]
    assert refreshed == [0, 6]  # before steps 1 and 7
    resolved = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert resolved["data"]["curriculum_metric_weights"] == [0.8, 0.2]
    assert resolved["data"]["curriculum_momentum"] == 0.0
    assert len((finished_run / "generations.jsonl").read_text().splitlines()) == 3 * 3
    best = (finished_run / "checkpoints" / "best").read_text().strip()
    accuracies = {line["step"]: line["val/accuracy_reward"] for line in lines[1:] if "val/accuracy_reward" in line}
    assert best == f"global_step_{max(accuracies, key=accuracies.get)}"
    names = {path.name for path in (finished_run / "checkpoints").iterdir()}
    assert names == {"global_step_8", "global_step_10", best, "best", "latest", "prompt_ids.safetensors"}
    assert list((finished_run / "tensorboard").glob("events.*"))
    assert list((finished_run / "wandb").glob("offline-run-*"))


def test_a_run_stopped_by_a_signal_goes_on_as_if_never_stopped(assets, finished_run):
    run_dir, marker = assets / "stopped", uuid.uuid4().hex
    kept = run_dir / "checkpoints" / "refresh.safetensors"
    # Stopped as a job manager does, in the middle of the second refresh, after step 6.
    process = launch(assets, run_dir, marker)
    steps = lambda: [line["step"] for line in metrics_of(run_dir)]  # noqa: E731
    # The checkpoint of step 2 takes the place of what the first refresh kept, which would hold up the training.
    wait_until(lambda: process.poll() is not None or 3 in steps(), 400, "step 3")
    (assets / "hold").touch()
    wait_until(lambda: process.poll() is not None or (6 in steps() and kept.exists()), 400, "a part of the refresh")
    process.terminate()
    told, log = "SIGTERM received: the run saves", run_dir.with_suffix(".log")
    wait_until(lambda: log.read_text().count(told) == 2, 60, "both ranks told")
    (assets / "hold").unlink()  # what is being judged is judged to its end
    assert process.wait(timeout=60) != 0
    wait_until(lambda: not processes_with(marker), 30, f"no process left, {processes_with(marker)}")
    assert steps()[-1] == 6
    finish(launch(assets, run_dir, marker), run_dir, marker)
    log = log.read_text()
    assert log.count("going on from") == 1
    assert re.search(r"SIGTERM received: 6 of 10 steps are done, saved in", log)
    assert re.search(r"resuming the refresh: (7|14) of 17 prompts are done", log)

    expected, actual = metrics_of(finished_run), metrics_of(run_dir)
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for one, other in zip(expected, actual, strict=True):
        figures = [{n: v for n, v in line.items() if not n.startswith(OF_THE_MACHINE)} for line in (one, other)]
        assert figures[0] == figures[1] and len(figures[0]) > 20
    for rank in (0, 1):
        name = f"checkpoints/global_step_10/actor/zero3/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        one, other = (torch.load(folder / name, weights_only=False) for folder in (finished_run, run_dir))
        key = "fp32_flat_groups"
        for a, b in zip(one["optimizer_state_dict"][key], other["optimizer_state_dict"][key], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
