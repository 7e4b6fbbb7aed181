"""Router replay: what it does not go with is one line before any model loads."""

import pytest
from fixtures.configs import check, model_folder, refused

KEY = "worker.actor.router_replay.mode"


@pytest.fixture
def mixture(valid, tmp_path):
    """A configuration that every check passes, of a mixture of experts."""
    return [*valid, model_folder(tmp_path / "mixture", model_type="qwen3_vl_moe")]


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_a_mixture_can_replay(mixture, mode):
    check(mixture, f"{KEY}={mode}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["R3", "worker.rollout.engine=hf"],
            "worker.rollout.engine=hf does not bring them; set worker.rollout.engine=",
        ),
        (["R3", "worker.rollout.engine=server"], "worker.rollout.engine=server does not bring them"),
        (
            ["R3", "worker.rollout.partial=9"],
            "with worker.rollout.partial=9 the parts of a response are sampled by sev",
        ),
        (["R2", "worker.actor.ulysses_size=2"], "worker.actor.ulysses_size=2 cuts them; set R3, or ulysses_size to 1"),
        (["R2", "data.rollout_batch_size=6"], "which the only optimiser step of a batch starts from; set R3, or"),
    ],
)
def test_what_replay_does_not_go_with(mixture, arguments, expected):
    mode, *others = arguments
    assert expected in refused(mixture, f"{KEY}={mode}", *others)


def test_v1_s_runner_hands_out_no_experts(mixture, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "and VLLM_USE_V2_MODEL_RUNNER=0 asks for V1; unset it, or set R2" in refused(mixture, f"{KEY}=R3")
    check(mixture, f"{KEY}=R2")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    check(mixture, f"{KEY}=R3")
