"""The judge against vLLM's own OpenAI server, with a key."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request

import pytest
from fixtures.launching import wait_until
from fixtures.tiny_models import save_text_model

from mmr1_ds.config import JudgeConfig, RewardConfig
from mmr1_ds.rewards.pool import RewardItem, RewardPool

KEY = "sk-test-do-not-show"
START_SECONDS = 240


def is_healthy(process, url):
    assert process.poll() is None, "the server ended"
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.nightly
def test_vllms_server_answers_the_judge(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = save_text_model(tmp_path / "model")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    # The judge's prompt is longer than what the tiny model's configuration admits.
    command += ["--hf-overrides", '{"max_position_embeddings": 4096}', "--max-model-len", "4096"]
    command += ["--enforce-eager", "--max-num-seqs", "4"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_API_KEY": KEY}
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **settings})
    try:
        wait_until(lambda: is_healthy(process, f"http://127.0.0.1:{port}/health"), START_SECONDS, "the server is up")
        item = RewardItem("<think>a</think><answer>seven</answer>", 9, "7", "user\nHow many?\nassistant\n")
        reasons = []
        for name, variable in (("judge", "JUDGE_KEY"), ("judge", None), ("other", "JUDGE_KEY")):
            judge = JudgeConfig([f"http://127.0.0.1:{port}/v1"], name, variable, max_tokens=4)
            with RewardPool(RewardConfig("openr1_vllm", num_workers=1, judge=judge)) as pool:
                (result,) = pool.score([item])
            assert result.failure == "unscored"
            reasons.append(result.reason)
    finally:
        process.terminate()
        process.wait(60)
    # A model of random weights answers, but with no verdict; without the key, or by another name, it does not.
    assert reasons[0].startswith("the judge gave no verdict")
    assert "HTTP 401" in reasons[1] and "HTTP 404" in reasons[2]
