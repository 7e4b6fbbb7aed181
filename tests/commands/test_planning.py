"""`mmr1-ds plan`: FLOP against torch's own counter, bytes against what real models and engines hold, the words."""

import dataclasses
import json
import math
from contextlib import nullcontext

import pytest
import torch
import transformers
from fixtures.dry_runs import write_rows
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model, save_vision_model
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from mmr1_ds.commands import cli
from mmr1_ds.commands.plan import activations
from mmr1_ds.commands.plan.activations import MicroBatch
from mmr1_ds.commands.plan.command import estimate, in_words, largest_doubt
from mmr1_ds.commands.plan.hardware import GPUS, Assumptions
from mmr1_ds.commands.plan.memory import cache_bytes, plan_memory, state_bytes
from mmr1_ds.config import ModelConfig, RunConfig
from mmr1_ds.engine.model import flops
from mmr1_ds.engine.model.flops import Work
from mmr1_ds.engine.model.loading import checkpoint_gradients
from mmr1_ds.engine.model.log_probs import LogProbHead
from mmr1_ds.engine.model.policy import exact_types
from mmr1_ds.engine.model.shapes import policy_shape, shape_of
from mmr1_ds.errors import UserError

BAR = 0.15
EXACT = 0.003  # of FLOP: rotations are left out
LENGTHS, RESPONSES = (97, 41), (61, 7)
GRIDS = [(10, 6), (4, 14)]  # patches; the windows of the tiny Qwen2.5-VL are of 8 x 8
FAMILIES = [
    "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "llama",
    "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
]  # fmt: skip
VISION = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
# torch's own formulas, for what its counter does not know: the attention of the CPU, a product added in place.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, out_val=None, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
    # Its own takes a convolution by channels for one of all channels with each other.
    torch.ops.aten.convolution_backward: lambda gradient, _x, weight, *_, output_mask=None, out_shape=None, **__: (
        2 * math.prod(gradient) * math.prod(weight[1:]) * sum(tensor is not None for tensor in out_shape[:2])
    ),
    torch.ops.aten._grouped_mm: lambda a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[-1],
    torch.ops.aten.addmm_: lambda added, a, b, out_shape=None, **__: mm_flop(a, b),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model folder of each family."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: (save_vision_model if family in VISION else save_text_model)(root / family, family=family)
        for family in FAMILIES
    }


def load(folder, dtype=torch.float32, checkpointed=False):
    config = transformers.AutoConfig.from_pretrained(folder)
    has_images = hasattr(config, "vision_config")
    kind = transformers.AutoModelForImageTextToText if has_images else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).train()
    if checkpointed:
        checkpoint_gradients(model)
    return model


def inputs_of(model, place):
    """A prompt and response of LENGTHS[place] tokens, with an image at its start where the model takes images."""
    input_ids = torch.full((1, LENGTHS[place]), 5)
    if not hasattr(model.config, "vision_config"):
        return {"input_ids": input_ids}
    vision, grid = model.config.vision_config, GRIDS[place]
    tokens = grid[0] * grid[1] // vision.spatial_merge_size**2
    input_ids[0, 1 : 1 + tokens] = model.config.image_token_id
    input_ids[0, 0] = model.config.vision_start_token_id
    elements = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": input_ids,
        "pixel_values": torch.zeros(grid[0] * grid[1], elements),
        "image_grid_thw": torch.tensor([[1, *grid]]),
        "mm_token_type_ids": (input_ids == model.config.image_token_id).long(),
    }


def log_probs(model, place, responses):
    head = LogProbHead(model.get_output_embeddings(), [], 1.0)
    states = model.base_model(**inputs_of(model, place), use_cache=False).last_hidden_state[0, -responses:]
    return head(states, torch.full((responses,), 7))[0]


# Bytes that the backward keeps


def saved_bytes(model):
    """Of all tensors that autograd holds after a forward, weights left out, each piece of memory once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # and so alive: no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert log_probs(model, 0, LENGTHS[0]).requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept(folders, family, checkpointed, dtype):
    if family.startswith("qwen3_5") and not checkpointed:
        pytest.skip("what is planned is what a delta net's kernels for the GPU keep")
    shape = policy_shape(ModelConfig(model_path=str(folders[family])))
    patches = GRIDS[0][0] * GRIDS[0][1] if shape.vision else 0
    batch = MicroBatch(float(LENGTHS[0]), float(LENGTHS[0]), float(patches))
    planned = activations.training(shape, batch, dtype.itemsize, checkpointed, "cpu").kept
    assert planned == pytest.approx(saved_bytes(load(folders[family], dtype, checkpointed)), rel=BAR)


# FLOP


def counted(model):
    """FLOP of a forward, and of a forward and backward, by torch's counter, a sequence at a time."""
    totals = []
    for with_backward in (False, True):
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with counter, nullcontext() if with_backward else torch.no_grad():
            for place, responses in enumerate(RESPONSES):
                found = log_probs(model, place, responses)
                if with_backward:
                    found.sum().backward()
        totals.append(counter.get_total_flops())
    return totals


@pytest.mark.parametrize(
    ("family", "checkpointed", "frozen"),
    [*((family, True, False) for family in FAMILIES), ("qwen2", False, False), ("qwen2_5_vl", False, False),
     ("qwen2_5_vl", False, True)],
)  # fmt: skip
def test_flop_are_those_of_torch_s_counter(folders, family, checkpointed, frozen):
    model = load(folders[family], checkpointed=checkpointed)
    if checkpointed:
        model.disable_input_require_grads()
    if frozen:
        model.model.visual.requires_grad_(False)
    shape = policy_shape(ModelConfig(model_path=str(folders[family]), freeze_vision_tower=frozen))
    work = Work(LENGTHS, sum(RESPONSES), GRIDS if shape.vision else ())
    only, both = counted(model)
    found = flops.forward(shape, work)
    assert found.total == pytest.approx(only, rel=EXACT)
    assert not shape.vision or found.vision > 0.1 * only  # what is checked matters
    expected = found.total + flops.backward(shape, work).total
    if checkpointed:
        expected += flops.recomputed(shape, work).total
    assert expected == pytest.approx(both, rel=EXACT)


def test_published_models_have_their_published_sizes():
    """The parameter counts that their model cards state, and what is 2 a parameter and token is nearly all FLOP."""
    sizes = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336}
    for size, number in sizes.items():
        shape = policy_shape(ModelConfig(model_path=f"Qwen/Qwen2.5-VL-{size}-Instruct"))
        assert shape.num_parameters == shape.trained == number
        work = Work([2048.0], 1024.0)
        assert shape.vision is not None
        text = number - shape.vision.num_parameters - shape.vocabulary * shape.hidden * (1 if size == "3B" else 2)
        assert flops.forward(shape, work).text == pytest.approx(2 * text * 2048, rel=0.15)


def test_a_mixture_has_the_parameters_of_its_card_and_computes_with_the_active_ones(tmp_path):
    """Qwen3-30B-A3B: 30.5 billion in total, 3.3 activated."""
    transformers.Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, head_dim=128,
        num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
    ).save_pretrained(tmp_path)  # fmt: skip
    shape = policy_shape(ModelConfig(model_path=str(tmp_path)))
    assert shape.num_parameters == pytest.approx(30.5e9, rel=0.002)
    assert shape.num_active == pytest.approx(3.3e9, rel=0.02)
    of_layers, attention = shape.num_active - 2 * shape.vocabulary * shape.hidden, 4 * 48 * 32 * 128 * 2048**2
    text = flops.forward(shape, Work([2048.0], 1024.0)).text
    assert text == pytest.approx(2 * of_layers * 2048 + attention, rel=1e-3)
    assert shape.largest_parameter == 128 * 2 * 768 * 2048  # gathered whole


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jamba", "bamba"])
def test_other_mixtures_and_states_have_a_size(family):
    config = transformers.AutoConfig.for_model(family, num_hidden_layers=2, hidden_size=64, intermediate_size=96)
    assert shape_of(config, family).num_active > 0


@pytest.mark.parametrize(
    ("size", "num_parameters"),
    [("8B", 8.77e9), ("30B-A3B", 31.07e9)],  # of the published weights
)
def test_qwen3_vl_has_its_published_size(size, num_parameters):
    shape = policy_shape(ModelConfig(model_path=f"Qwen/Qwen3-VL-{size}-Instruct"))
    assert shape.num_parameters == pytest.approx(num_parameters, rel=5e-4)


def test_qwen3_5_has_its_published_size():
    """8.95e9 parameters of text, as its quantised files say; three of four layers are linear attention."""
    shape = policy_shape(ModelConfig(model_path="Qwen/Qwen3.5-9B"))
    assert shape.vision is not None and shape.linear is not None
    assert shape.num_parameters - shape.vision.num_parameters == 8_953_803_264
    assert (shape.attention_layers, shape.linear.layers) == (8, 24)
    assert cache_bytes(shape, 2) == 8 * 2 * 4 * 256 * 2
    assert state_bytes(shape) == 24 * (32 * 128 * 128 + 8192 * 3) * 4


def test_a_mixture_of_qwen3_5_has_the_parameters_of_its_card():
    """Qwen3.5-35B-A3B: 35 billion in total and 3 activated; one more expert a layer, which every token goes to."""
    shape = policy_shape(ModelConfig(model_path="Qwen/Qwen3.5-35B-A3B"))
    assert shape.vision is not None and shape.linear is not None and shape.experts is not None
    of_text, hidden = shape.num_parameters - shape.vision.num_parameters, 2048
    delta_net = hidden * (8192 + 4096 + 32 + 32) + 8192 * 4 + 32 + 32 + 128 + 4096 * hidden
    attention = hidden * (2 * 4096 + 2 * 512) + 4096 * hidden + 2 * 256
    mixture = (256 + 1) * 3 * 512 * hidden + 256 * hidden + hidden
    norms = 40 * 2 * hidden + hidden
    assert of_text == 30 * delta_net + 10 * attention + 40 * mixture + norms + 2 * 248320 * hidden
    assert of_text == pytest.approx(35e9, rel=0.01)
    assert shape.num_parameters - shape.num_active == 40 * (256 - 8) * 3 * 512 * hidden
    assert shape.num_active - shape.vision.num_parameters - 2 * 248320 * hidden == pytest.approx(2.44e9, rel=0.01)
    assert shape.mlp_width == (8 + 1) * 512


# Memory


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "checkpointing"), [(1, False), pytest.param(2, True, marks=pytest.mark.nightly)])
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


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A published model, a few prompts."""
    rows = write_rows(tmp_path_factory.mktemp("rows"))
    model = "worker.actor.model.model_path=Qwen/Qwen2.5-VL-7B-Instruct"
    return ["config=mmr1_h100", f"data.train_files={rows}", "data.prompt_key=problem", model]


def planned(settings, *more, **assumed):
    return estimate([*settings, *more], GPUS["h100"], dataclasses.replace(Assumptions(), **assumed))


@pytest.fixture(scope="module")
def plain(settings):
    return planned(settings, prompt_tokens=1000.0, response_tokens=1000.0, images_per_prompt=0.0)


def test_parts_follow_from_the_model_and_the_ranks(settings, plain):
    """7B, full training: 18 bytes a parameter over the ranks, by the count on the model's card."""
    number = 8_292_166_656
    learning = plain.memory.learning
    assert plain.shape.num_parameters == number
    assert learning["optimiser states"] == 12 * number / 8
    assert 2 * number / 8 < learning["actor weights"] < 2 * number / 8 + 0.1e9  # and what is kept whole
    buckets = 2 * 2 * 2e8  # two of the preset's, in bf16
    assert learning["gradients and buckets"] == 4 * number / 8 + buckets
    assert exact_types({})["data_types"]["grad_accum_dtype"] == "fp32"  # DeepSpeed's own default: the weights' type
    on_16 = planned(settings, "trainer.nnodes=2", images_per_prompt=0.0).memory.learning
    assert on_16["optimiser states"] == 12 * number / 16
    assert on_16["activations"] == learning["activations"]
    halved = planned(settings, "worker.actor.optim.strategy=adamw_bf16", images_per_prompt=0.0).memory.learning
    assert halved["optimiser states"] == 8 * number / 8
    offloaded = planned(settings, "worker.actor.offload.offload_optimizer=true")
    assert offloaded.memory.learning["optimiser states"] == 0
    assert offloaded.memory.host_per_rank > 12 * number / 8
    assert offloaded.seconds["update_actor"] > plain.seconds["update_actor"]


def test_what_leaves_the_gpu_while_vllm_samples_is_there_when_it_starts(settings, plain):
    moved = planned(settings, "worker.actor.offload_states=true").memory
    assert moved.sampling == plain.memory.sampling and moved.host_per_rank > plain.memory.host_per_rank


def test_ranks_that_share_sequences_take_more_of_them(settings, plain):
    two = planned(settings, "worker.actor.ulysses_size=2", images_per_prompt=0.0)
    assert two.memory.learning["activations"] == plain.memory.learning["activations"]


def test_time_follows_from_flops_and_bandwidth(settings, plain):
    # 2 x parameters x tokens for a forward, nearly all of it, at 45 % of 989 TFLOP/s.
    tokens = plain.responses_per_step / 8 * 2000
    text = 6.5e9 + 0.5e9  # the layers; the head for half of the tokens is .27e9 more
    assert plain.seconds["ref"] == pytest.approx(2 * text * tokens / (0.45 * 989.4e12), rel=0.15)
    assert plain.seconds["update_actor"] > 3 * plain.seconds["ref"]


def test_what_lies_beside_the_passes_by_hand(settings):
    """7B on eight H100: 64 prompts a rank, 8 responses of 1,701 tokens to each, of at most 4,096."""
    number = 8_292_166_656
    more = ["worker.reward.num_workers=7", "trainer.save_freq=5", "trainer.nnodes=1", "data.max_pixels=1003520"]
    found = planned(settings, *more, response_tokens=1701.0, image_seconds=30.0, reward_seconds=0.03, disk_gb_s=3.0)
    seconds = found.seconds
    assert seconds["tail"] == pytest.approx((4096 - 1701) * (2 * number / (3.35e12 * 0.6) + 0.004))
    assert seconds["reward"] == pytest.approx(512 * 0.03 / 7)
    assert seconds["save"] == pytest.approx(12 * number / 8 / (64e9 * 0.5) / 5)  # the copy
    at_once = planned(settings, *more, "trainer.async_save=false", disk_gb_s=3.0).seconds
    assert at_once["save"] == pytest.approx(12 * number / 3e9 / 5)
    assert seconds["sleep"] == 3.0
    # 1,280 tokens of 28 x 28 pixels each, by four threads, beside the sampling.
    assert seconds["images"] == pytest.approx(64 * 1.00352 * 30 / 4 - seconds["gen"])
    assert "sleep" not in planned(settings, "worker.rollout.sleep=false").seconds


def test_attention_and_vision_are_parts_of_the_update(settings, tmp_path):
    found = planned(settings, prompt_tokens=1399.0, response_tokens=1701.0)
    # 28 layers, 28 heads of 128: forward, recomputed, and 2.5 of it backward; half of it is causal.
    attention = 4 * 28 * 3584 * 3100**2 * 512 * 0.5 * (1 + 1 + 2.5)
    assert found.of_passes["attention"] == pytest.approx(attention / (989.4e12 * 0.4), rel=1e-3)
    assert 0 < found.of_passes["vision"] < found.seconds["update_actor"]
    assert planned(settings, images_per_prompt=0.0).of_passes["vision"] == 0
    # 24 pairs of frames, each of 64 tokens of 4 patches of 14 x 14 pixels: alone, they attend to no other pair.
    rows = write_rows(tmp_path, rows=[{"problem": "p", "answer": "1", "videos": []}] * 2)
    more = [*settings, "data.max_prompt_length=2048", f"data.train_files={rows}", "data.video_max_frames=48"]
    more += [f"data.{key}={64 * 28 * 28}" for key in ("video_max_pixels", "max_pixels", "min_pixels")]
    seen, unseen = (planned(more, images_per_prompt=0.0, videos_per_prompt=n) for n in (1.0, 0.0))
    images = planned([*more, f"data.train_files={settings[1].partition('=')[2]}"], images_per_prompt=1.0)
    assert seen.of_passes["vision"] == pytest.approx(24 * images.of_passes["vision"], rel=1e-6)
    assert unseen.of_passes["vision"] == 0


def test_weights_stay_gathered_without_gradient_checkpointing():
    """Where torch's own linear keeps views of them."""
    shape = policy_shape(ModelConfig(model_path="Qwen/Qwen2.5-VL-3B-Instruct"))
    config = RunConfig()

    def gathered(checkpointed, efficient, ranks):
        config.worker.actor.model.enable_gradient_checkpointing = checkpointed
        zero = {"memory_efficient_linear": efficient, "stage3_max_live_parameters": 1e8}
        zero |= {"stage3_max_reuse_distance": 1e8}
        found = plan_memory(config, shape, None, {"actor": zero, "reference": zero}, ranks, GPUS["h100"],
                            Assumptions(), 0.0)  # fmt: skip
        return found.learning["gathered weights"]

    assert gathered(False, False, 7) == 2 * 3_754_622_976
    assert gathered(True, False, 7) == gathered(False, True, 7) < 2e9
    assert gathered(False, False, 1) == 0


def test_the_plan_says_what_was_not_tested(settings):
    """By the family that transformers finds, also where the folder has no such name."""
    model = "worker.actor.model.model_path=Qwen/Qwen3-"
    found = planned(settings, "worker.actor.model.lora.rank=8", f"{model}VL-8B-Instruct")
    assert "family: Qwen3-VL (qwen3_vl): images and videos; packed" in in_words(found)
    assert "\nnote: worker.actor.model.lora was not tested with Qwen3-VL" in in_words(found)
    with pytest.raises(UserError, match="along which layers of qwen3_5_moe models carry a state"):
        planned(settings, "worker.actor.ulysses_size=2", "worker.actor.model.model_path=Qwen/Qwen3.5-35B-A3B")


def test_keys_of_a_published_model_s_parts_are_replaced(settings):
    """As docs/models.md does it to turn on the loss that balances experts."""
    model = "worker.actor.model.model_path=Qwen/Qwen3-VL-30B-A3B-Instruct"
    key = "worker.actor.model.override_config.text_config"
    plain, half = planned(settings, model).shape, planned(settings, model, f"{key}.num_hidden_layers=24").shape
    assert half.layers == 24 and plain.layers == 48 and half.hidden == plain.hidden
    planned(settings, model, f"{key}.output_router_logits=true")


def test_the_largest_doubt_is_the_assumption_that_matters_most():
    def step(chosen):
        return 100 * chosen.response_tokens + 30 / chosen.update_efficiency

    said = largest_doubt(dataclasses.replace(Assumptions(), response_tokens=2.0), step)
    assert said == "response_tokens=2 is assumed; 3 would make a step 375 s and not 275 (--assume)"
    assert largest_doubt(Assumptions(), lambda chosen: chosen.decode_efficiency).startswith("decode_efficiency=0.6 is")


def test_what_a_refresh_costs_is_the_paper_s_share_of_training(settings):
    """Of n prompts every T steps, r responses each: n r / T beside B R a step."""
    more = ["data.sampling_strategy=curriculum", "data.curriculum_update_freq=5", "data.curriculum_rollout_n=12"]
    found = planned(settings, *more, num_prompts=7000)
    assert found.refresh["full"] == pytest.approx(7000 * 12 / 5)
    assert found.refresh["online"] == 0.0  # it has no probes
    found = planned(settings, *more, "data.curriculum_probe_fraction=0.1", num_prompts=7000)
    assert found.refresh["online"] == pytest.approx(0.1 * found.responses_per_step)
    seconds, responses = found.refresh_seconds, found.refresh
    assert seconds["full"] / seconds["online"] == pytest.approx(responses["full"] / responses["online"])


def test_the_command_names_what_fits(settings, tmp_path, capsys):
    assert cli.main(["plan", *settings, "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("estimated, not measured:") and said.rstrip().splitlines()[-1] == "fits"
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["problems"] == []
    assert written["memory"]["learning"]["optimiser states"] == pytest.approx(12.44e9, 0.01)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--gpu-memory-gb", "24"], 1, ["does not fit: learning takes", "offload_optimizer=true"]),
        (["worker.rollout.gpu_memory_utilization=0.2"], 1, ["vLLM's cache holds"]),
        (["--gpu", "h1000"], 2, ["--gpu h1000: unknown; known: a100, h100"]),
        (["--gpu-memory-gb", "-1"], 2, ["--gpu-memory-gb must be over 0, got -1"]),
        (["--assume", "speed=3"], 2, ["--assume speed=3: no such assumption"]),
        (["worker.actor.model.model_path=/nowhere"], 2, ["/nowhere"]),
    ],
)
def test_what_does_not_fit_or_is_unknown_is_named(settings, capsys, words, code, told):
    assert cli.main(["plan", *settings, *words]) == code
    said = capsys.readouterr()
    assert all(part in (said.err if code == 2 else said.out) for part in told)
    assert len(said.err.splitlines()) == (code == 2)
