"""More forbidden tokens than vLLM's model runner on a GPU takes as biases of a request."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model
from torch import nn

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.config import DataConfig, ModelConfig, RolloutConfig
from mmr1_ds.errors import UserError
from mmr1_ds.records import Prompt, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.base import generate
from mmr1_ds.rollout.colocated import engine
from mmr1_ds.rollout.servers.engine import ServerRollout

NUM_FORBIDDEN = 1500


@pytest.mark.slow
def test_the_v2_runner_takes_what_we_ask_for(monkeypatch):
    """Its own check of a request, vllm/v1/worker/gpu/sample/logit_bias.py, which runs without a GPU."""
    logit_bias = pytest.importorskip("vllm.v1.worker.gpu.sample.logit_bias")
    asked = []
    unfinished = ["0-abc"]
    core = SimpleNamespace(batch_queue=None, scheduler=SimpleNamespace(has_requests=lambda: False))
    llm_engine = SimpleNamespace(
        has_unfinished_requests=lambda: bool(unfinished),
        step=lambda: [SimpleNamespace(request_id=unfinished.pop().partition("-")[0], finished=True, outputs=[])],
        engine_core=SimpleNamespace(engine_core=core),
    )
    llm = SimpleNamespace(
        enqueue=lambda inputs, parameters, **settings: asked.extend(parameters) or [*unfinished],
        llm_engine=llm_engine,
        reset_prefix_cache=lambda: None,
        collective_rpc=lambda function, args=(): [False],
    )
    monkeypatch.setattr(engine, "_start_engine", lambda *arguments: llm)
    encoder = SimpleNamespace(is_multimodal=False, forbidden_token_ids=range(NUM_FORBIDDEN), eos_token_ids=(1501,))
    ranks = SimpleNamespace(on_gpu=True, any=lambda flag, stage: flag)
    config = SimpleNamespace(
        tensor_parallel_size=1, sleep=False, logprobs="processed", temperature=1.0, max_num_seqs=8,
        max_num_batched_tokens=64,
    )  # fmt: skip
    rollout = engine.VllmRollout(config, ModelConfig(), None, ranks, encoder, 1, Preemption(60.0, None))
    generate(rollout, [RolloutRequest(Prompt(0, "0", (5, 6), (), "1"), 2, 7)], SamplingSettings(1.0, 1.0, -1, 3))

    state = object.__new__(logit_bias.LogitBiasState)  # its buffers are pinned, which needs CUDA
    for name in ("allowed_token_ids", "logit_bias", "logit_bias_token_ids", "stop_token_ids"):
        setattr(state, name, MagicMock())
    numbers = "num_allowed_token_ids", "num_logit_bias", "num_stop_token_ids", "min_lens", "restore_when_all_masked"
    for name in numbers:
        setattr(state, name, SimpleNamespace(np=np.zeros(3, dtype=np.int32)))
    state.prompt_len_np, state.use_logit_bias = np.array([2, 2, 2]), np.zeros(3, dtype=bool)
    for parameters in asked:
        state.add_request(1, parameters)
        with pytest.raises(ValueError, match="Too many logit bias tokens"):
            parameters.logit_bias = dict.fromkeys(range(NUM_FORBIDDEN), -100.0)
            state.add_request(1, parameters)
    assert asked and "vllm" in sys.modules


def test_the_output_layer_of_vllm_s_model_gives_them_no_chance():
    model = nn.Module()
    model.compute_logits = lambda hidden: None if hidden is None else torch.zeros(2, 8)[:, :7]
    engine._forbid(SimpleNamespace(get_model=lambda: model, device="cpu"), (1, 5))
    with torch.inference_mode():
        logits = model.compute_logits("hidden states")
    assert torch.isneginf(logits).tolist() == 2 * [[False, True, False, False, False, True, False]]
    assert model.compute_logits(None) is None  # of a tensor-parallel worker that does not sample


def test_servers_that_could_not_take_them_are_not_started(monkeypatch):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    encoder = SimpleNamespace(is_multimodal=False, forbidden_token_ids=range(NUM_FORBIDDEN))
    with pytest.raises(UserError, match="1,500 tokens that are not to be sampled, and a request to a server names"):
        ServerRollout(
            RolloutConfig(), ModelConfig(), DataConfig(), SimpleNamespace(on_gpu=True), encoder,
            first_device=1, most_images=1, log_folder=Path("logs"), preemption=Preemption(60.0, None),
        )  # fmt: skip


@pytest.mark.slow
def test_unused_rows_of_the_embedding_are_never_sampled_and_log_probabilities_agree(tmp_path):
    """Of the 1,612 rows that the random model likes equally well, 112 are tokens."""
    model = save_text_model(tmp_path / "model", num_unused=NUM_FORBIDDEN)
    run_ranks("logprob_agreement.py", model, tmp_path / "out.json", 3, "vllm", 1)
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert len(steps) == 3
    for step in steps:
        assert step["forbidden"] == 0
        assert step["rollout/logprob_diff_max"] < 1e-4
        assert step["actor/grad_norm"] > 0.01
