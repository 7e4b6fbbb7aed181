"""What a run asks of its model, by the table of families: refused, noted in the plan, of a hub model too."""


import pytest
from fixtures.configs import check, load, model_folder, refused
from fixtures.dry_runs import write_rows
from huggingface_hub import constants

from mmr1_ds.config import ModelConfig
from mmr1_ds.config.families import FAMILIES, PUBLISHED, describe
from mmr1_ds.engine.model import shapes
from mmr1_ds.preflight.deepspeed import DeepspeedConfigs
from mmr1_ds.preflight.models import weights_are_here
from mmr1_ds.preflight.plan import describe_plan

LORA, SERVER = "worker.actor.model.lora.rank=8", "worker.rollout.engine=server"
DEEPSPEED = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "train_batch_size": 6,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 1,
}


@pytest.mark.parametrize(
    ("family", "argument", "expected"),
    [
        (
            "qwen3_5_moe",
            "worker.actor.ulysses_size=2",
            "along which layers of qwen3_5_moe models carry a state; set it",
        ),
        ("phi3", "worker.actor.ulysses_size=2", "needs packed sequences, but phi3 models are padded; set it to 1"),
        ("qwen2", "worker.actor.router_replay.mode=R3", "R3 replays the routers of qwen3_moe, "),
        ("qwen3_5_moe", "worker.rollout.lora_sync=adapters", "is not for mixtures of experts; set worker.rollout"),
        ("qwen2", "worker.actor.model.override_config.model_type=qwen3", "would make another model of it; leave it"),
        (
            "mixtral",
            "worker.actor.router_replay.mode=R2",
            "qwen3_5_moe_text models, not of mixtral; set it to disabled",
        ),
    ],
)
def test_what_a_family_cannot_do_is_refused(valid, tmp_path, family, argument, expected):
    assert expected in refused(valid, model_folder(tmp_path / "model", model_type=family), argument)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_table_passes(valid, tmp_path, family):
    plan = check(valid, model_folder(tmp_path / "model", model_type=family))
    assert not [note for note in plan.notes if "tested" in note]


@pytest.mark.parametrize(
    ("family", "arguments", "expected"),
    [
        ("phi3", [], ["phi3 models were tested with nothing (docs/models.md)"]),
        (
            "qwen3",
            [LORA],
            ["worker.actor.model.lora was not tested with Qwen3: adapters find its layers by their names"],
        ),
        (
            "qwen2_vl",
            [SERVER],
            ["worker.rollout.engine=server was not tested with Qwen2-VL, only vLLM in the ranks was"],
        ),
        ("qwen3_moe", [LORA, SERVER], ["the experts and routers of Qwen3-MoE get no adapters and stay frozen"]),
        ("qwen2_vl", ["worker.actor.ulysses_size=2"], ["worker.actor.ulysses_size was not tested with Qwen2-VL"]),
        ("qwen2_5_vl", [LORA, SERVER, "worker.actor.ulysses_size=2"], []),
    ],
)
def test_what_was_not_tested_is_a_note_of_the_plan(valid, tmp_path, family, arguments, expected):
    plan = check(valid, model_folder(tmp_path / "model", model_type=family), *arguments)
    noted = [note for note in plan.notes if "tested" in note or "frozen" in note]
    assert len(noted) == len(expected) and all(map(str.__contains__, noted, expected))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"model_type": "qwen3_moe", "output_router_logits": True}, ""),
        ({"model_type": "qwen3_vl_moe", "text_config": {"output_router_logits": True}}, ".text_config"),
    ],
)
def test_a_loss_that_balances_experts_is_refused_with_ulysses_before_the_model_loads(valid, tmp_path, content, place):
    folder, ulysses = model_folder(tmp_path / "model", **content), "worker.actor.ulysses_size=2"
    key = f"worker.actor.model.override_config{place}.output_router_logits"
    check(valid, folder)
    message = refused(valid, folder, ulysses)
    assert message.startswith(f"{ulysses} cannot balance experts") and message.endswith(f"set {key}=false")
    check(valid, folder, ulysses, f"{key}=false")
    parts = {"text_config": {}} if place else {}
    quiet = model_folder(tmp_path / "quiet", model_type=content["model_type"], **parts)
    assert "cannot balance experts" in refused(valid, quiet, ulysses, f"{key}=true")


@pytest.mark.parametrize(
    ("critic", "expected"),
    [
        ("qwen3", ["worker.critic.model is a qwen3 model: critics were tested with the actor's family alone, qwen2"]),
        ("phi3", ["worker.critic.model is a phi3 model: critics were tested with the actor's family alone, qwen2"]),
        ("qwen2", []),
        (None, []),
    ],
)
def test_a_critic_of_another_family_is_a_note(valid, tmp_path, critic, expected):
    arguments = [*valid, model_folder(tmp_path / "model", model_type="qwen2")]
    if critic is not None:
        model_folder(tmp_path / "critic", model_type=critic)
        arguments.append(f"worker.critic.model.model_path={tmp_path / 'critic'}")
    assert [note for note in check(arguments, "algorithm.adv_estimator=gae").notes if "critics" in note] == expected
    assert not [note for note in check(arguments).notes if "critics" in note]  # it has none


def test_the_plan_names_the_family(valid, tmp_path):
    arguments = [*valid, model_folder(tmp_path / "model", model_type="qwen3_vl")]
    text = describe_plan(load(*arguments), check(arguments), DeepspeedConfigs(DEEPSPEED, DEEPSPEED, None), on_gpu=False)
    assert (
        "family      Qwen3-VL (qwen3_vl): images and videos; packed; log-probabilities within 1.9e-6 of vLLM's, "
        "tested tiny, in fp32 on the CPU" in text
    )
    assert " responses in packed micro-batches" in text
    model_folder(tmp_path / "model", model_type="gemma3_text")
    text = describe_plan(load(*arguments), check(arguments), DeepspeedConfigs(DEEPSPEED, DEEPSPEED, None), on_gpu=False)
    assert " responses in padded micro-batches" in text
    assert describe("phi3") == "phi3, in no row of docs/models.md: padded, and tested with nothing"


def test_a_hub_model_that_was_downloaded_is_looked_at(valid, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments = [*valid, "worker.actor.model.model_path=org/mixture", LORA]
    text = describe_plan(load(*arguments), check(arguments), DeepspeedConfigs(DEEPSPEED, DEEPSPEED, None), on_gpu=False)
    assert "family      a hub model that is not in the cache: looked at when the run starts" in text
    repository = tmp_path / "hub" / "models--org--mixture"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / "0123abc"
    model_folder(snapshot, model_type="qwen3_moe", num_experts=4)
    (snapshot / "model.safetensors").unlink()
    assert not weights_are_here(load(*arguments).worker.actor.model)
    (snapshot / "model.safetensors.index.json").write_text("{}")
    assert weights_are_here(load(*arguments).worker.actor.model)
    message = refused(arguments, "worker.rollout.lora_sync=adapters")
    assert message.startswith("worker.rollout.lora_sync=adapters is not for mixtures of experts")
    assert any("routers of Qwen3-MoE get no adapters" in note for note in check(arguments).notes)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen2", "has a video and the model takes none"), ("qwen2_5_vl", "has <video> and the row no video; set data")],
)
def test_a_marker_without_a_video_is_named_before_the_queue(valid, tmp_path, family, expected):
    cell = [{"role": "user", "content": "<video> what is it?"}]
    data = write_rows(tmp_path, "a.json", [{"problem": "p", "answer": "1"}, {"problem": cell, "answer": "1"}])
    vision = {"vision_config": {}} if family.endswith("vl") else {}
    message = refused(valid, model_folder(tmp_path / "model", model_type=family, **vision), f"data.train_files={data}")
    assert "row 1" in message and expected in message


def test_published_models_are_known_by_name(valid, tmp_path, monkeypatch):
    """As transformers' classes, which the plan builds from the same names, say."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert PUBLISHED.keys() == shapes.PUBLISHED.keys()
    for name, family in PUBLISHED.items():
        assert shapes.read_config(ModelConfig(model_path=name)).model_type == family
    model = "worker.actor.model.model_path=Qwen/Qwen3-VL-30B-A3B-Instruct"
    assert "mixtures of experts" in refused(valid, model, LORA, "worker.rollout.lora_sync=adapters")


def test_servers_take_no_videos(valid, tmp_path):
    rows = [{"problem": "p", "answer": "1", "videos": value} for value in ([], ["a.mp4"])]
    data = write_rows(tmp_path, "a.json", rows)
    model = model_folder(tmp_path / "model", model_type="qwen2_5_vl", vision_config={})
    message = refused(valid, model, SERVER, f"data.train_files={data}", "data.video_key=videos")
    assert "row 1" in message and message.endswith("worker.rollout.engine=server takes none; set it to vllm")
