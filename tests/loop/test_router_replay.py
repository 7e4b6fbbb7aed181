"""The experts of a mixture on their way through a step: sampled, exchanged between ranks, packed, replayed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from fixtures.launching import run_ranks, run_training
from fixtures.responses import response
from fixtures.tiny_models import save_text_model
from fixtures.tiny_run import write_run

from mmr1_ds.loop.in_flight import pack_responses, unpack_responses


def test_experts_travel_with_their_responses():
    random = np.random.default_rng(1)
    shapes = [(7, 3, 2), (1, 3, 2), (12, 3, 2)]
    for kind in (np.uint8, np.uint16):
        sent = [
            replace(response([5] * length), experts=random.integers(0, 200, shape).astype(kind))
            for length, shape in zip((3, 1, 4), shapes, strict=True)
        ]
        for one, other in zip(sent, unpack_responses(pack_responses(sent)), strict=True):
            assert other.experts.dtype == kind
            np.testing.assert_array_equal(one.experts, other.experts)
    assert unpack_responses(pack_responses([response([5])]))[0].experts is None


def write_mixture_run(folder, **changes):
    """Returns: the config of a run of a tiny mixture, its sections changed."""
    path = write_run(folder, num_steps=3)
    save_text_model(folder / "model", family="qwen3_moe")
    config = yaml.safe_load(path.read_text())
    config["data"] |= {"rollout_batch_size": 8, "max_response_length": 40}
    config["worker"]["actor"] |= {"global_batch_size": 8, "micro_batch_size_per_device_for_update": 4}
    for name, values in changes.items():
        section = config
        for part in name.split("."):
            section = section.setdefault(part, {})
        section |= values
    path.write_text(yaml.safe_dump(config))
    return path


def metrics_of(folder):
    (path,) = folder.glob("**/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_replay_what_vllm_chose(tmp_path, monkeypatch):
    """The weights are vLLM's in each step, and so are the experts, if each sequence has its own behind it."""
    path = write_mixture_run(
        tmp_path,
        algorithm={"use_kl_loss": False},  # so that the old policy's log-probabilities are computed, and the KL from it
        trainer={"run_dir": str(tmp_path / "run"), "save_freq": -1},
        **{
            "worker.rollout": {"engine": "vllm", "kv_cache_gb": 1},
            "worker.actor.router_replay": {"mode": "R3"},
        },
    )
    run_ranks("train_with_experts.py", f"config={path}", num_ranks=2)
    steps = metrics_of(tmp_path / "run")
    assert len(steps) == 3
    for step in steps:
        assert step["actor/rerouted_fraction"] == 0
        assert step["rollout/logprob_diff_max"] < 1e-4
        assert step["actor/grad_norm"] > 0.01
    assert steps[0]["actor/ref_kl"] < 1e-6  # the reference is not replayed, but has the same routers still
    assert any(step["global_seqlen/balanced_max"] < step["global_seqlen/max"] for step in steps)  # groups moved


@pytest.mark.slow
@pytest.mark.nightly
def test_what_the_old_policy_chose_is_replayed_in_later_updates(tmp_path):
    path = write_mixture_run(
        tmp_path,
        trainer={"run_dir": str(tmp_path / "run"), "save_freq": -1, "n_gpus_per_node": 1},
        **{"worker.actor": {"global_batch_size": 2, "router_replay": {"mode": "R2"}}},
    )
    run_training(f"config={path}")
    for step in metrics_of(tmp_path / "run"):
        assert 0 < step["actor/rerouted_fraction"] < 0.5  # of four updates, after the first
        assert step["rollout/logprob_diff_max"] < 1e-4
