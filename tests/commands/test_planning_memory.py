"""What the planner says of memory, against what real engines hold and take; and the command's words."""

import dataclasses
import json

import pytest
import torch
import transformers
from fixtures.dry_runs import write_rows
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

from mmr1_ds.commands import cli
from mmr1_ds.commands.plan.command import estimate
from mmr1_ds.commands.plan.hardware import GPUS, Assumptions, find_gpu
from mmr1_ds.engine.model.policy import exact_types
from mmr1_ds.errors import UserError

BAR = 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "checkpointing"), [(1, False), (2, True)])
def test_a_real_engine_holds_and_takes_what_was_planned(tmp_path, monkeypatch, num_ranks, checkpointing):
    """38 million parameters, so that what is planned outweighs Python's own memory."""
    folder = save_text_model(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 768, 2048, 6
    config.num_attention_heads, config.num_key_value_heads = 12, 4
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back at once
    out = tmp_path / "out.json"
    arguments = (folder, out, "700", "true" if checkpointing else "false")
    run_ranks("planned_memory.py", *arguments, num_ranks=num_ranks, warm=False)
    found = json.loads(out.read_text())
    for what, measured in found["measured"].items():
        assert found["planned"][what] == pytest.approx(measured, rel=BAR), what


def settings(tmp_path, *more: str) -> list[str]:
    """A published model, a few prompts."""
    return [
        "config=mmr1_h100", f"data.train_files={write_rows(tmp_path)}", "data.prompt_key=problem",
        "worker.actor.model.model_path=Qwen/Qwen2.5-VL-7B-Instruct", *more,
    ]  # fmt: skip


def test_parts_follow_from_the_model_and_the_ranks(tmp_path):
    """7B, full training: 18 bytes a parameter over the ranks, by the count on the model's card."""
    number = 8_292_166_656
    found = estimate(settings(tmp_path), GPUS["h100"], Assumptions())
    learning = found.memory.learning.bytes
    assert found.shape.num_parameters == number
    assert learning["optimiser states"] == 12 * number / 8
    assert 2 * number / 8 < learning["actor weights"] < 2 * number / 8 + 0.1e9  # and what is kept whole
    buckets = 2 * 2 * 2e8  # two of the preset's, in bf16
    assert learning["gradients and buckets"] == 4 * number / 8 + buckets
    on_16 = estimate(settings(tmp_path, "trainer.nnodes=2"), GPUS["h100"], Assumptions()).memory.learning.bytes
    assert on_16["optimiser states"] == 12 * number / 16
    assert on_16["activations"] == learning["activations"]
    offloaded = estimate(settings(tmp_path, "worker.actor.offload.offload_optimizer=true"), GPUS["h100"], Assumptions())
    assert offloaded.memory.learning.bytes["optimiser states"] == 0
    assert offloaded.memory.host_per_rank > 12 * number / 8
    assert offloaded.seconds["update_actor"] > found.seconds["update_actor"]


def test_gradients_are_summed_in_float32():
    """What the planner takes for granted; DeepSpeed's own default is the weights' type."""
    assert exact_types({})["data_types"]["grad_accum_dtype"] == "fp32"


def test_what_leaves_the_gpu_while_vllm_samples_is_there_when_it_starts(tmp_path):
    plain = estimate(settings(tmp_path), GPUS["h100"], Assumptions()).memory
    moved = estimate(settings(tmp_path, "worker.actor.offload_states=true"), GPUS["h100"], Assumptions()).memory
    assert moved.sampling == plain.sampling and moved.host_per_rank > plain.host_per_rank


@pytest.mark.parametrize("dynamic", ["true", "false"])
def test_ranks_that_share_sequences_take_more_of_them(tmp_path, dynamic):
    more = [f"worker.actor.dynamic_batching={dynamic}"]
    one = estimate(settings(tmp_path, *more), GPUS["h100"], Assumptions()).memory.learning.bytes
    two = estimate(settings(tmp_path, *more, "worker.actor.ulysses_size=2"), GPUS["h100"], Assumptions())
    assert two.memory.learning.bytes["activations"] == one["activations"]


def test_time_follows_from_flops_and_bandwidth(tmp_path):
    given = {"prompt_tokens": 1000.0, "response_tokens": 1000.0, "images_per_prompt": 0.0}
    h100 = estimate(settings(tmp_path), GPUS["h100"], dataclasses.replace(Assumptions(), **given))
    # 2 x parameters x tokens for a forward, nearly all of it, at 45 % of 989 TFLOP/s.
    tokens = h100.responses_per_step / 8 * 2000
    text = 6.5e9 + 0.5e9  # the layers; the head for half of the tokens is .27e9 more
    assert h100.seconds["ref"] == pytest.approx(2 * text * tokens / (0.45 * 989.4e12), rel=0.15)
    assert h100.seconds["update_actor"] > 3 * h100.seconds["ref"]
    faster = dataclasses.replace(GPUS["h100"], bf16_tflops=2 * 989.4)
    twice = estimate(settings(tmp_path), faster, dataclasses.replace(Assumptions(), **given))
    assert twice.seconds["ref"] == pytest.approx(h100.seconds["ref"] / 2, rel=0.3)


def test_what_a_refresh_costs_is_the_paper_s_share_of_training(tmp_path):
    """Of n prompts every T steps, r responses each: n r / T beside B R a step."""
    more = ["data.sampling_strategy=curriculum", "data.curriculum_update_freq=5", "data.curriculum_rollout_n=12"]
    found = estimate(settings(tmp_path, *more), GPUS["h100"], dataclasses.replace(Assumptions(), num_prompts=7000))
    assert found.refresh["full"] == pytest.approx(7000 * 12 / 5)
    assert found.refresh["online"] == pytest.approx(0.1 * found.responses_per_step)
    assert found.refresh_seconds["full"] / found.refresh_seconds["online"] == pytest.approx(
        found.refresh["full"] / found.refresh["online"]
    )


def test_the_command_names_what_does_not_fit_and_the_remedy(tmp_path, capsys):
    arguments = ["plan", *settings(tmp_path)]
    assert cli.main([*arguments, "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("estimated, not measured:") and said.rstrip().splitlines()[-1] == "fits"
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["problems"] == [] and written["memory_gb"]["learning"]["optimiser states"] == pytest.approx(
        12.44, 0.01
    )
    assert cli.main([*arguments, "--gpu-memory-gb", "24"]) == 1
    said = capsys.readouterr().out
    assert "does not fit: learning takes" in said and "offload_optimizer=true" in said
    assert cli.main([*arguments, "worker.rollout.gpu_memory_utilization=0.2"]) == 1
    assert "vLLM's cache holds" in capsys.readouterr().out
    assert cli.main([*arguments, "--gpu", "h1000"]) == 2
    assert "--gpu h1000: unknown; known: a100, h100" in capsys.readouterr().err
    assert cli.main([*arguments, "--assume", "speed=3"]) == 2
    assert "no such assumption" in capsys.readouterr().err
    assert cli.main([*arguments, "worker.actor.model.model_path=/nowhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_gpu_is_an_error():
    with pytest.raises(UserError, match="--gpu-memory-gb must be over 0, got -1"):
        find_gpu("H100", -1)
    assert find_gpu("H100", 40).memory_gb == 40
