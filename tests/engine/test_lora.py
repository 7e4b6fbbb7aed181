"""Adapters beside partitioned weights: what is trained, what vLLM is given, and the reference that they leave."""

import functools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from fixtures.dry_runs import valid_run
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model, save_vision_model
from safetensors import safe_open

from mmr1_ds.config import LoraConfig, ModelConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.engine.model.lora import (
    Adapter,
    adapted_layers,
    add_adapters,
    layers_to_adapt,
    merged,
    target_layers,
    wanted_modules,
)
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.checks import check_config
from mmr1_ds.preflight.deepspeed import DeepspeedConfigs, reference_deepspeed, resolve_deepspeed
from mmr1_ds.preflight.plan import describe_plan
from mmr1_ds.rollout.adapters import adapter_options, check_places

SAVE = {
    "vision": save_vision_model,
    "text": save_text_model,
    "hybrid": functools.partial(save_text_model, family="qwen3_5_text"),
}
LAYERS = ["visual.merger.0", "visual.blocks.0.proj", "layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"]


# --- which layers, and the sum ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", None, LAYERS),
        (["all-linear"], ".*visual.*", LAYERS[2:]),
        ("q_proj, v_proj", None, LAYERS[2:]),
        (["q_proj", "v_proj"], ["layers.0.q_proj"], LAYERS[3:]),
        (["proj"], None, LAYERS[1:2]),  # whole parts of a name, not q_proj
        (["layers.1.q_proj"], None, LAYERS[4:]),
        ("all-linear", ["q_proj", "proj", "0"], LAYERS[3:4]),
        ("All-Linear", "layers", LAYERS),  # a regex is of the whole name
    ],
)
def test_target_and_excluded_layers(targets, exclude, expected):
    settings = LoraConfig(rank=2, target_modules=targets, exclude_modules=exclude)
    assert target_layers(LAYERS, settings, "model") == expected


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_prj"], None, "target_modules: q_prj is no linear layer of model that may have an adapter; did you mean"),
        ("q_proj,lm_head", None, "target_modules: lm_head is no linear layer of model that may have an adapter"),
        (["q_proj"], ["q_proj"], "exclude_modules=['q_proj'] leaves none of 2 layers"),
    ],
)
def test_names_that_the_model_has_not(targets, exclude, expected):
    settings = LoraConfig(rank=2, target_modules=targets, exclude_modules=exclude)
    with pytest.raises(UserError) as caught:
        target_layers(LAYERS, settings, "model")
    assert str(caught.value).startswith(f"worker.actor.model.lora.{expected}") and "\n" not in str(caught.value)


def test_all_linear_means_all():
    assert wanted_modules(LoraConfig()) is None
    assert wanted_modules(LoraConfig(target_modules="a,b ,")) == ["a", "b"]


@pytest.mark.parametrize("kind", SAVE)
def test_the_layers_that_get_adapters_are_known_before_the_model_is_loaded(tmp_path, kind):
    """Servers are told of them as they start."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = ModelConfig(model_path=str(SAVE[kind](tmp_path / "model")), lora=LoraConfig(rank=2))
    config.lora.exclude_modules, config.freeze_vision_tower = ["layers.1.mlp.up_proj"], kind == "vision"
    family = AutoModelForImageTextToText if kind == "vision" else AutoModelForCausalLM
    model = family.from_pretrained(config.model_path)
    add_adapters(model, config, torch.float32)
    found = layers_to_adapt(config)
    assert found == adapted_layers(model)
    assert len(found) > 10 and not any("visual" in layer or layer.endswith("1.mlp.up_proj") for layer in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_rounded_once_and_the_base_stays(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 5), (3, 5), (7, 3)))
    before = weight.clone()
    exact = weight.double() + 0.3 * (b.double() @ a.double())
    sum_ = merged(weight, Adapter(torch.nn.Parameter(a), torch.nn.Parameter(b), 0.3))
    assert sum_.dtype == dtype and torch.equal(weight, before) and not sum_.requires_grad
    error = (sum_.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
    none = merged(weight, Adapter(torch.nn.Parameter(a), torch.nn.Parameter(torch.zeros_like(b)), 0.3))
    assert torch.equal(none, weight)


def test_values_of_other_kinds_are_refused(tmp_path):
    def refused(*argv):
        with pytest.raises(UserError) as caught:
            check_config(load_config([*valid_run(tmp_path), *argv]).config, 2)
        return str(caught.value)

    key = "worker.actor.model.lora"
    assert refused(f"{key}.rank=-1") == f"{key}.rank must be 0 or more, got -1"
    assert refused(f"{key}.rank=8", f"{key}.alpha=0") == f"{key}.alpha must be over 0, got 0.0"
    assert "target_modules must be all-linear or a list" in refused(f"{key}.rank=8", f"{key}.target_modules=3")
    assert "target_modules must be all-linear or a list" in refused(f"{key}.rank=8", f"{key}.target_modules=[]")
    assert "exclude_modules must be a regex, a list" in refused(f"{key}.rank=8", f"{key}.exclude_modules=3")
    assert "exclude_modules=(a is no regex: missing )" in refused(f"{key}.rank=8", f"{key}.exclude_modules=(a")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "worker.actor.model.lora.rank=0 makes no adapters; set the rank, or worker.rollout.lora_sync=merged"),
        (
            ["rank=8", "worker.rollout.engine=server", "worker.rollout.weight_swap=in_flight"],
            "keeps the adapter that it began with, worker.rollout.weight_swap=in_flight would change it; set it to",
        ),
        (["rank=8", "worker.rollout.engine=hf"], "needs vLLM, worker.rollout.engine=hf reads the actor's own weights"),
        (["rank=513"], "vLLM takes adapters up to rank 512, got worker.actor.model.lora.rank=513; lower it, or set"),
    ],
)
def test_adapters_alone_are_refused_where_nobody_takes_them(tmp_path, arguments, expected):
    argv = [f"worker.actor.model.lora.{one}" if one.startswith("rank") else one for one in arguments]
    with pytest.raises(UserError) as caught:
        check_config(load_config([*valid_run(tmp_path), "worker.rollout.lora_sync=adapters", *argv]).config, 2)
    assert str(caught.value).startswith("worker.rollout.lora_sync=adapters") and expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plan_has_no_second_model(tmp_path):
    def plan(*argv):
        config = load_config([*valid_run(tmp_path), *argv]).config
        actor = resolve_deepspeed(config, 2, False)
        reference = reference_deepspeed(config, actor, False)
        return describe_plan(config, check_config(config, 2), DeepspeedConfigs(actor, reference, None), False)

    key = "worker.actor.model.lora"
    text = plan(f"{key}.rank=8", f"{key}.target_modules=[q_proj,v_proj]", "worker.ref.offload.offload_params=true")
    assert "LoRA of rank 8 (alpha 16) on q_proj, v_proj, all else frozen" in text
    assert "the actor with its adapters off, no second model; KL (low_var_kl) 0.01 in the loss" in text
    assert "worker.ref.offload.offload_params: LoRA's reference is the actor" in text
    assert "on all-linear without .*visual.*, all" in plan(f"{key}.rank=8", f"{key}.exclude_modules=.*visual.*")
    assert "LoRA" not in plan() and "no second model" not in plan()
    alone = plan(f"{key}.rank=8", "worker.rollout.lora_sync=adapters")
    assert "all else frozen, adapters alone to vLLM" in alone and "alone" not in text


# --- on real ranks ------------------------------------------------------------------------------------------------


def four_steps(folder, kind):
    model = SAVE[kind](folder / "model")
    run_ranks("lora_updates.py", model, folder / "out", folder / "checkpoint", 1, 4, num_ranks=2)
    return model, [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Four steps of a text model on two ranks: its folder, and what each rank wrote."""
    return four_steps(tmp_path_factory.mktemp("text"), "text")


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return four_steps(tmp_path_factory.mktemp("vision"), "vision")


@pytest.fixture(params=["text", pytest.param("vision", marks=pytest.mark.nightly)])
def straight(request):
    return request.getfixturevalue(request.param)


@pytest.mark.slow
def test_only_adapters_are_trained_and_stay_partitioned(straight):
    _, results = straight
    for result in results:
        assert result["are_partitioned"] and result["are_released"] and result["leaves_random_state"]
        assert result["trained"] == result["still_trained"]  # the reference switches them off and on
        assert all(".lora_A." in name or ".lora_B." in name for name in result["trained"])
        assert len(result["trained"]) == 2 * len(result["adapters"])
        assert not any(part in name for name in result["adapters"] for part in ("lm_head", "embed"))
        assert list(result["base"]) == result["names"] == list(result["merged"])
        for name, weight in result["base_at_first"].items():
            assert torch.equal(result["base"][name], weight) and torch.equal(result["merged_at_first"][name], weight)
        # Down to the first layer, which nothing before it asks a gradient of.
        for name, (a, b) in result["adapters"].items():
            assert not torch.equal(a, result["at_first"][name][0]) and b.any() and not result["at_first"][name][1].any()


@pytest.mark.slow
def test_what_is_synchronised_is_the_sum(straight):
    _, results = straight
    scale = 6.0 / 3
    for result in results:
        for name, weight in result["merged"].items():
            expected = result["base"][name].double()
            if name in result["adapters"]:
                a, b = result["adapters"][name]
                expected = expected + scale * (b.double() @ a.double())
                assert not torch.equal(weight, result["base"][name])
            assert (weight.double() - expected).abs().max() < 1e-6, name
    assert results[0]["digest"] == results[1]["digest"]


@pytest.mark.slow
def test_the_reference_is_the_model_it_was_loaded_from(straight):
    _, results = straight
    for result in results:
        assert result["curve"][0]["actor/ref_kl"] == result["curve"][0]["own_minus_off"] == 0
        for step in result["curve"]:
            assert step["off_minus_separate"] < 1e-6
        for step in result["curve"][1:]:
            assert step["own_minus_off"] > 1e-2 and step["actor/ref_kl"] > 0


@pytest.mark.slow
def test_adapters_start_the_same_on_any_number_of_ranks_and_go_on_after_a_restart(text, tmp_path):
    model, results = text
    run_ranks("lora_updates.py", model, tmp_path / "one", tmp_path / "unused", 1, 1)
    one = torch.load(f"{tmp_path / 'one'}.0")
    assert list(one["at_first"]) == list(results[0]["at_first"])
    for name, (a, _) in one["at_first"].items():
        assert torch.equal(a, results[0]["at_first"][name][0]) and torch.equal(a, results[1]["at_first"][name][0])
        assert 0.5 < float(a.abs().max()) * a.shape[1] ** 0.5 <= 1
    assert len({float(a.flatten()[0]) for a, _ in one["at_first"].values()}) > 2  # each layer its own

    run_ranks("lora_updates.py", model, tmp_path / "first", tmp_path / "checkpoint", 1, 2, num_ranks=2)
    run_ranks("lora_updates.py", model, tmp_path / "second", tmp_path / "checkpoint", 3, 4, num_ranks=2)
    halves = [torch.load(f"{tmp_path / part}.0") for part in ("first", "second")]
    assert halves[0]["curve"] + halves[1]["curve"] == results[0]["curve"]
    assert halves[1]["digest"] == results[0]["digest"] != halves[0]["digest"]
    for name, weight in results[0]["merged"].items():
        assert torch.equal(halves[1]["merged"][name], weight)


@pytest.mark.slow
def test_mistakes_are_told_before_training(text):
    _, results = text
    errors = results[0]["errors"]
    assert "q_projj is no linear layer" in errors["name"] and "did you mean q_proj?" in errors["name"]
    layers = len(results[0]["adapters"])
    theirs = f"has adapters of rank 3 (scaled by 2) for {layers} layers, the run adapters of rank"
    assert f"{theirs} 2 (scaled by 3) for {layers} layers" in errors["rank"]
    assert f"{theirs} 3 (scaled by 2) for 2 layers" in errors["layers"]
    assert "holds adapters alone" in errors["none"]


@pytest.mark.slow
def test_a_checkpoint_leaves_the_frozen_weights_out_and_is_of_their_model_alone(text, tmp_path):
    model, results = text
    num_frozen = sum(weight.numel() for weight in results[0]["base"].values())
    files = list((model.parent / "checkpoint").rglob("*.pt"))
    assert len(files) == 4 and sum(path.stat().st_size for path in files) < num_frozen * 4 / 2
    other = save_text_model(tmp_path / "model", seed=4)
    shutil.copytree(model.parent / "checkpoint", tmp_path / "checkpoint")
    with pytest.raises(AssertionError, match="has adapters for other weights than"):
        run_ranks("lora_updates.py", other, tmp_path / "out", tmp_path / "checkpoint", 5, 5, num_ranks=2)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The folder of a kind of model, and the steps of logprob_agreement.py with it, once for each way of a sync."""

    @functools.cache
    def model(kind):
        return SAVE[kind](tmp_path_factory.mktemp(kind) / "model", tied=kind == "text")

    @functools.cache
    def steps(kind, way):
        out = model(kind).parent / f"{way}.json"
        engine = {"merged": "vllm"}.get(way, way)
        run_ranks("logprob_agreement.py", model(kind), out, 4, engine, 1, 3, num_ranks=2 if kind == "vision" else 1)
        return model(kind), json.loads(out.read_text())["steps"]

    return steps


KINDS = ["text", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in SAVE if kind != "text")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["merged", "adapters", "server-adapters"])
def test_vllm_samples_from_weights_and_adapters_after_every_sync(sampled, kind, way):
    _, steps = sampled(kind, way)
    assert len(steps) == 4
    assert all(step["rollout/logprob_diff_max"] < 1e-4 and step["actor/grad_norm"] > 0.01 for step in steps)
    assert all(step["moved"] > 1e-2 for step in steps[1:])  # from the model's own, or the sync had nothing to do


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_sample_what_merged_weights_do_and_are_all_that_is_sent(sampled, kind):
    (model, merged_steps), (_, steps) = sampled(kind, "merged"), sampled(kind, "adapters")
    _, of_servers = sampled(kind, "server-adapters")
    for one, *others in zip(merged_steps, steps, of_servers, strict=True):
        for other in others[: 1 if kind == "vision" else 2]:  # servers take no videos, and got other prompts
            assert one["tokens"] == other["tokens"]
            assert one["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=1e-4)
    assert {step["sync_bytes"] for step in of_servers} == {step["sync_bytes"] for step in steps}
    with safe_open(model / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    elements = sum(math.prod(shape) for shape in shapes.values())
    assert {step["sync_bytes"] for step in merged_steps} == {4 * elements}
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name and "head" not in name]
    assert {step["sync_bytes"] for step in steps} == {4 * 3 * sum(sum(shape) for shape in linear)}


@pytest.mark.parametrize(
    ("layers", "rank", "expected"),
    [
        (["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], 1, (1, ["q_proj", "up_proj"], False)),
        (["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], 9, (16, ["up_proj"], False)),
        (["model.visual.blocks.0.attn.qkv"], 257, (320, ["qkv"], True)),
        # Of these vLLM would take the first block and the convolution at the tower's entrance for adapted ones too.
        (
            ["model.visual.merger.mlp.0", "model.visual.blocks.1.attn.proj", "model.layers.0.mlp.up_proj"],
            512,
            (512, ["up_proj", "visual.blocks.1.attn.proj", "visual.merger.mlp.0"], True),
        ),
    ],
)
def test_vllm_gets_room_for_the_adapters_alone(layers, rank, expected):
    options = adapter_options(layers, rank)
    named = ("max_lora_rank", "lora_target_modules", "enable_tower_connector_lora")
    assert options["enable_lora"] and options["max_loras"] == 1
    assert tuple(options.get(name) for name in named) == expected


def test_a_layer_that_vllm_would_pass_over_is_named():
    parts = {"model.layers.0.mlp.gate_up_proj": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]}
    manager = SimpleNamespace(
        modules={"model.layers.0.mlp.down_proj": None}, packed_modules=parts, model=SimpleNamespace()
    )
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager)))
    placed = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    check_places(worker, placed)
    with pytest.raises(UserError) as caught:
        check_places(worker, [*placed, "model.layers.0.mlp.router", "model.layers.1.mlp.down_proj"])
    assert "vLLM says there is no place for 2 adapters, model.layers.0.mlp.router among them; set" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_transformers_engine_samples_from_the_sum(tmp_path):
    model = save_text_model(tmp_path / "model")
    run_ranks("logprob_agreement.py", model, tmp_path / "out.json", 3, "hf", 1, 3, num_ranks=2)
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert all(step["rollout/logprob_diff_max"] < 1e-4 and step["actor/grad_norm"] > 0.01 for step in steps)
    assert all(step["moved"] > 1e-2 for step in steps[1:])
