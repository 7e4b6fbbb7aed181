"""The engine on real parts: DeepSpeed ZeRO-3, vLLM and transformers, on one and two ranks."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model, save_vision_model
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

SAVE = {
    "vision": save_vision_model,
    "text": save_text_model,
    "hybrid": functools.partial(save_vision_model, family="qwen3_5"),
    "hybrid-text": functools.partial(save_text_model, family="qwen3_5_text"),
    "experts": functools.partial(save_text_model, family="qwen3_moe"),
    "hybrid-experts": functools.partial(save_vision_model, family="qwen3_5_moe"),
    "vision-experts": functools.partial(save_vision_model, family="qwen3_vl_moe"),
    "timestamps": functools.partial(save_vision_model, family="qwen3_vl"),  # of videos, as text
}


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("vision", True),
        ("text", False),
        pytest.param("vision", False, marks=pytest.mark.nightly),
        pytest.param("text", True, marks=pytest.mark.nightly),
    ],
    ids=["tied-vision", "untied-text", "untied-vision", "tied-text"],
)
def test_vllm_samples_from_the_actor_after_every_sync(tmp_path, kind, tied):
    model = SAVE[kind](tmp_path / "model", tied=tied)
    num_ranks = 2 if kind == "vision" else 1
    run_ranks("logprob_agreement.py", model, tmp_path / "out.json", 5, "vllm", 1, num_ranks=num_ranks)
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert len(steps) == 5
    for step in steps:
        assert step["rollout/logprob_diff_max"] < 1e-4
        assert step["forbidden"] == 0
        assert step["actor/grad_norm"] > 0.01  # else the sync had nothing to move
    assert len({tuple(step["lengths"]) for step in steps}) > 1


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_log_probabilities_of_cut_samples_are_the_actor_s_where_raw_ones_are_asked_for(tmp_path, engine):
    model = save_text_model(tmp_path / "model")
    run_ranks("logprob_agreement.py", model, tmp_path / "out.json", 3, engine, 1, 0, 0.8, 20)
    for step in json.loads((tmp_path / "out.json").read_text())["steps"]:
        assert step["rollout/logprob_diff_max"] < 1e-5
        assert step["actor/grad_norm"] > 0.01


@pytest.mark.parametrize(
    ("save", "family", "tied"),
    [
        pytest.param(save_vision_model, "qwen2_vl", False, marks=pytest.mark.nightly),
        (save_vision_model, "qwen3_vl", True),
        (save_vision_model, "qwen3_5", True),
        (save_text_model, "qwen3_moe", True),
        pytest.param(save_vision_model, "qwen3_vl_moe", False, marks=pytest.mark.nightly),
        pytest.param(save_vision_model, "qwen3_5_moe", True, marks=pytest.mark.nightly),
        pytest.param(save_text_model, "qwen3_5_moe_text", False, marks=pytest.mark.nightly),
        pytest.param(save_text_model, "qwen3", True, marks=pytest.mark.nightly),
        pytest.param(save_text_model, "qwen3_5_text", False, marks=pytest.mark.nightly),
        pytest.param(save_text_model, "llama", False, marks=pytest.mark.nightly),
    ],
    ids=[
        "qwen2_vl", "qwen3_vl", "qwen3_5", "qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3",
        "qwen3_5_text", "llama",
    ],
)
def test_every_other_family_is_trained_and_sampled_by_vllm(tmp_path, save, family, tied):
    """The vision models on prompts of 0 to 4 images and 0 to 2 videos, which share micro-batches with each other.

    Qwen3.5's linear attention is computed in float32 (fixtures/delta_net.py): vLLM's CPU build has it in bf16 alone.
    """
    model = save(tmp_path / "model", tied=tied, family=family)
    num_ranks = 2 if family == "qwen3_vl" else 1
    run_ranks("logprob_agreement.py", model, tmp_path / "out.json", 3, "vllm", 1, num_ranks=num_ranks)
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert len(steps) == 3
    for step in steps:
        assert step["rollout/logprob_diff_max"] < 1e-4
        assert step["forbidden"] == 0
        assert step["actor/grad_norm"] > 0.01
    if save is save_vision_model:
        of_rank_0 = slice(4 // num_ranks)
        images, videos = [[0, 2, 3, 0], [3, 0, 1, 2], [1, 2, 0, 4]], [[0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 2]]
        assert [step["images"] for step in steps] == [counts[of_rank_0] for counts in images]
        assert [step["videos"] for step in steps] == [counts[of_rank_0] for counts in videos]


def test_two_ranks_share_one_tensor_parallel_vllm(tmp_path):
    model = save_text_model(tmp_path / "model", num_heads=4)
    left_by_another_run = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # vLLM's name for the memory of the first rank
    left_by_another_run.touch()
    run_ranks("logprob_agreement.py", model, tmp_path / "out.json", 4, "vllm", 2, num_ranks=2)
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert all(step["rollout/logprob_diff_max"] < 1e-4 for step in steps)
    assert all(step["actor/grad_norm"] > 0.01 for step in steps)
    assert not list(Path("/dev/shm").glob("*-[[]0-1[]]-cpushm_*"))


@pytest.mark.parametrize("kind", [pytest.param("vision", marks=pytest.mark.nightly), "text"])
def test_transformers_engine_samples_alike_on_one_and_two_ranks(tmp_path, kind):
    model = SAVE[kind](tmp_path / "model")
    run_ranks("logprob_agreement.py", model, tmp_path / "two.json", 2, "hf", 1, num_ranks=2)
    run_ranks("logprob_agreement.py", model, tmp_path / "one.json", 1, "hf", 1)
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert two["steps"][0]["tokens"] == one["steps"][0]["tokens"][:6]  # rank 0 has the first two prompts
    for step in two["steps"] + one["steps"]:
        assert step["rollout/logprob_diff_max"] < 1e-4
        assert step["forbidden"] == 0
    assert two["shared_memory"] == []  # DeepSpeed leaves 66 MB a rank


def test_bf16_spares_the_rotary_frequencies_and_a_damaged_model_is_refused(tmp_path):
    model = save_vision_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    lost = next(name for name in weights if "down_proj" in name)
    shutil.copytree(model, tmp_path / "damaged")
    kept = {name: tensor for name, tensor in weights.items() if name != lost}
    save_file(kept, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})

    run_ranks("model_loading.py", model, tmp_path / "damaged", tmp_path / "out.json")

    result = json.loads((tmp_path / "out.json").read_text())
    assert result["parameter_types"] == ["torch.bfloat16"]
    # 10000^(-2i/32), in float32: bf16 has .5625 for the second of these.
    assert result["inv_freq"][:3] == pytest.approx([1.0, 0.5623413, 0.3162278], abs=1e-6)
    assert len(result["frequency_types"]) >= 2 and set(result["frequency_types"].values()) == {"torch.float32"}
    assert "lacks 1 of the model's tensors" in result["error"]


@pytest.mark.parametrize(
    "kind", ["vision", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in list(SAVE)[1:])]
)
def test_neither_ranks_nor_micro_batches_nor_a_stop_change_losses(tmp_path, kind):
    model = SAVE[kind](tmp_path / "model")
    results = []
    for num_ranks, micro_batch, folder in ((1, 12, "-"), (1, 4, "-"), (2, 2, tmp_path / "saved")):
        out = tmp_path / f"{num_ranks}-{micro_batch}.json"
        run_ranks("loss_curve.py", model, out, micro_batch, folder, num_ranks=num_ranks)
        results.append(json.loads(out.read_text()))
    stopped = results[2]
    assert stopped["again"] == stopped["curve"][-1]  # to the last bit
    assert stopped["digest_again"] == stopped["digest"] != stopped["before"]
    one = results[0]
    for other in results[1:]:
        assert other["drawn"] == one["drawn"]
        for expected, actual in zip(one["curve"], other["curve"], strict=True):
            for name in ("actor/pg_loss", "actor/kl_loss", "actor/entropy_loss", "actor/grad_norm", "actor/ppo_kl"):
                assert actual[name] == pytest.approx(expected[name], abs=1e-4), name
        for name, value in one["weights"].items():
            assert other["weights"][name] == pytest.approx(value, abs=1e-3), name
