"""The DeepSpeed config of a run: what is filled in, what is refused, and that DeepSpeed itself agrees."""

import json
import logging

import pytest

from mmr1_ds.config.loading import load_config
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.deepspeed import (
    critic_deepspeed,
    own_deepspeed,
    reference_deepspeed,
    resolve_deepspeed,
    with_dropped_sections,
)

BATCH = [
    "worker.actor.global_batch_size=6",
    "worker.rollout.n=5",
    "worker.actor.micro_batch_size_per_device_for_update=3",
    "worker.actor.micro_batch_size_per_device_for_experience=7",
    "worker.actor.max_grad_norm=0.5",
    "worker.actor.optim.lr=3e-5",
    "worker.actor.optim.betas=[0.8,0.95]",
    "worker.actor.optim.weight_decay=0.02",
]
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}},
}


def resolve(content, *argv, on_gpu=True, world_size=2):
    config = load_config([*BATCH, *argv]).config
    config.worker.actor.deepspeed = content
    return resolve_deepspeed(config, world_size, on_gpu)


def refused(content, *argv, on_gpu=True):
    with pytest.raises(UserError) as caught:
        resolve(content, *argv, on_gpu=on_gpu)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(**values):
    """AUTO with dotted keys (dots as __) set."""
    content = json.loads(json.dumps(AUTO))
    for key, value in values.items():
        *path, last = key.split("__")
        section = content
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return content


def test_every_auto_is_filled_in():
    assert resolve(AUTO) == {
        "train_batch_size": 30,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,  # 30 responses over 2 ranks, 3 at once
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        # The model is on the hub: DeepSpeed's own bucket sizes.
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 3e-5, "betas": [0.8, 0.95], "eps": 1e-8, "weight_decay": 0.02, "torch_adam": True, "fused": True
            },
        },
    }


def test_on_cpu_fp32_and_torch_s_adam():
    resolved = resolve(AUTO, on_gpu=False)
    assert resolved["bf16"] == {"enabled": False}
    assert resolved["optimizer"]["params"]["torch_adam"] is True


def test_a_gpu_takes_torch_s_fused_adam_unless_only_deepspeed_s_own_will_do():
    def chosen(content, *settings):
        params = resolve(content, *settings, on_gpu=True)["optimizer"]["params"]
        return params.get("torch_adam"), params.get("fused")

    assert chosen(AUTO) == (True, True)
    assert chosen(AUTO, "worker.actor.offload.offload_optimizer=true") == (None, None)
    assert chosen(AUTO, "worker.actor.offload_states=true") == (None, None)
    for said in (True, False):
        given = {**AUTO, "optimizer": {"type": "AdamW", "params": {"torch_adam": said}}}
        assert chosen(given) == (said, None)


def test_bf16_on_a_cpu_where_it_is_asked_for():
    asked = "worker.actor.dtype=bf16"
    assert resolve(AUTO, asked, on_gpu=False)["bf16"] == resolve(changed(bf16__enabled=True), asked)["bf16"]
    assert resolve(AUTO, asked, on_gpu=False)["bf16"] == {"enabled": True}
    assert "contradicts worker.actor.dtype=bf16" in refused(changed(bf16__enabled=False), asked, on_gpu=False)
    assert resolve(changed(bf16__enabled=True), on_gpu=False)["bf16"] == {"enabled": False}
    assert "worker.actor.dtype=fp32 is for the CPU" in refused(AUTO, "worker.actor.dtype=fp32")
    assert load_config([*BATCH, asked]).config.worker.rollout.dtype == "bf16"
    assert load_config([*BATCH, asked, "worker.rollout.dtype=fp32"]).config.worker.rollout.dtype == "fp32"


def test_absent_sections_are_added():
    resolved = resolve({"zero_optimization": {"stage": 3}})
    assert resolved["train_batch_size"] == 30 and resolved["gradient_clipping"] == 0.5
    assert resolved["optimizer"]["params"]["lr"] == 3e-5 and resolved["bf16"] == {"enabled": True}


def test_the_user_s_content_is_left_alone():
    content = changed()
    resolve(content)
    assert content == AUTO


def test_other_settings_pass_through():
    resolved = resolve(changed(comms_logger__enabled=True, zero_optimization__overlap_comm=False))
    assert resolved["comms_logger"] == {"enabled": True} and resolved["zero_optimization"]["overlap_comm"] is False


def test_torch_s_linear_stays_in_its_place(caplog):
    asked = changed(zero_optimization__memory_efficient_linear=True)
    kept = "worker.actor.model.enable_gradient_checkpointing=false"
    assert resolve(asked, kept)["zero_optimization"]["memory_efficient_linear"] is False
    assert "memory_efficient_linear is set to false" in caplog.text and "keeps the gathered weights" in caplog.text


def test_bucket_sizes_from_the_width_of_a_local_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "text_config": {"hidden_size": 128}}))
    zero = resolve(AUTO, f"worker.actor.model.model_path={tmp_path}")["zero_optimization"]
    assert zero["reduce_bucket_size"] == 128**2
    assert zero["stage3_prefetch_bucket_size"] == 14745  # 0.9 * 128^2
    assert zero["stage3_param_persistence_threshold"] == 1280


def test_numbers_that_agree_are_kept():
    assert resolve(changed(train_batch_size=30, gradient_clipping=0.5))["train_batch_size"] == 30


@pytest.mark.parametrize(
    "values, names",
    [
        ({"train_batch_size": 64}, ["train_batch_size=64", "worker.actor.global_batch_size", "6 * 5", "makes it 30"]),
        (
            {"train_micro_batch_size_per_gpu": 4},
            ["train_micro_batch_size_per_gpu=4", "worker.actor.micro_batch_size_per_device_for_update", "it 3"],
        ),
        (
            {"gradient_accumulation_steps": 1},
            ["gradient_accumulation_steps=1", "2 ranks and micro-batches of 3", "it 5"],
        ),
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "worker.actor.max_grad_norm", "it 0.5"]),
        ({"optimizer__params__lr": 1e-3}, ["optimizer.params.lr=0.001", "worker.actor.optim.lr", "it 3e-05"]),
        ({"optimizer__params__betas": [0.9, 0.999]}, ["optimizer.params.betas", "worker.actor.optim.betas"]),
        ({"optimizer__params__weight_decay": 0.1}, ["weight_decay=0.1", "worker.actor.optim.weight_decay", "0.02"]),
    ],
)
def test_contradictions_are_refused_with_both_names_and_values(values, names):
    message = refused(changed(**values))
    for name in names:
        assert name in message


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"zero_optimization__stage": 2}, "zero_optimization.stage is 2, it must be 3"),
        ({"zero_optimization": {}}, "zero_optimization.stage is 0, it must be 3"),
        ({"fp16__enabled": True}, "fp16.enabled=true is not supported"),
        ({"bf16__enabled": False}, "bf16.enabled=False, but the model is loaded in bf16"),
        ({"optimizer__type": "Lamb"}, "optimizer.type=Lamb is not supported"),
        ({"optimizer__params__adam_w_mode": False}, "adam_w_mode=false is not supported"),
        ({"scheduler__params__warmup_num_steps": 10}, "scheduler (warmup_num_steps=10) is not used"),
        ({"scheduler__params": {}}, "scheduler (type=WarmupLR) is not used"),
        ({"wall_clock_breakdown": "auto"}, 'wall_clock_breakdown="auto" is no key that this trainer fills in'),
        ({"zero_optimization__sub_group_size": float("nan")}, "zero_optimization.sub_group_size must be finite"),
        ({"gradient_clipping": float("inf")}, "gradient_clipping must be finite, got inf"),
        ({"optimizer__params__betas": [0.9, float("nan")]}, "optimizer.params.betas must be finite"),
        ({"optimizer__params__eps": -1}, "optimizer.params.eps must be 0 or more, got -1"),
        ({"zero_optimization__sub_group_size": 0}, "zero_optimization.sub_group_size must be over 0, got 0; remove it"),
        ({"prescale_gradients": True}, "prescale_gradients=true is not supported; ZeRO-3 divides gradients once"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor=2.0 is not supported; ZeRO-3"),
        ({"sequence_parallel_size": 4}, "sequence_parallel_size=4 is not supported; set worker.actor.ulysses_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size=2 is not supported; ZeRO-3"),
        ({"zero_optimization__cpu_offload": True}, "cpu_offload=true is not supported; it is the old name of"),
        ({"zero_optimization__cpu_offload_param": True}, 'the old name of "offload_param": {"device": "cpu"}'),
    ],
)
def test_refused(values, expected):
    assert expected in refused(changed(**values))


def test_the_neutral_values_of_keys_that_are_not_supported():
    content = changed(prescale_gradients=False, gradient_predivide_factor=1.0, sequence_parallel_size=1)
    resolve(content | {"tensor_parallel": {"autotp_size": 0}})
    resolve(changed(zero_optimization__cpu_offload=False, optimizer__params__eps=0))


def test_what_deepspeed_fills_in_is_left_to_it():
    """The "auto"s of OpenRLHF's and transformers' files, and of an offload section."""
    names = (
        "sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance", "overlap_comm",
        "stage3_gather_16bit_weights_on_model_save", "contiguous_gradients",
    )  # fmt: skip
    content = changed(**{f"zero_optimization__{name}": "auto" for name in names})
    content["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": "auto", "ratio": "auto"}
    zero = resolve(content)["zero_optimization"]
    assert {*names} & {*zero} == set()
    assert zero["offload_optimizer"] == {"device": "cpu"}


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage": 2}}')
    assert "the key stage stands twice" in refused(str(path))


def test_the_projects_own_files_need_no_second_reading(tmp_path):
    config = load_config(BATCH).config
    for given, own in ((None, None), ("zero3_h100.json", None), ({"a": 1}, "worker.actor.deepspeed")):
        config.worker.actor.deepspeed = given
        assert own_deepspeed(config) == own
    config.worker.actor.deepspeed = str(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text("{}")
    assert own_deepspeed(config) == str(tmp_path / "mine.json")


@pytest.mark.parametrize(
    "section",
    [
        "fp16", "bf16", "bfloat16", "optimizer", "optimizer__params", "scheduler", "scheduler__params",
        "zero_optimization__offload_param", "zero_optimization__offload_optimizer", "comms_logger",
    ],
)  # fmt: skip
def test_sections_are_mappings_or_null(section):
    for value, shown in ((True, "true"), ("auto", '"auto"'), ([1], "[1]")):
        expected = f"{section.replace('__', '.')} must be a mapping, got {shown}"
        assert expected in refused(changed(**{section: value}))
    if not section.startswith("scheduler"):  # a scheduler without params is refused for its type
        resolve(changed(**{section: None}))


def test_a_stage_of_null_is_none():
    assert "zero_optimization.stage is 0" in refused(changed(zero_optimization=None))
    assert "zero_optimization must be a mapping, got 3" in refused(changed(zero_optimization=3))


@pytest.mark.parametrize("key", ["zero_optimization__reduce_bucket_size", "steps_per_print", "optimizer__params__eps"])
def test_numbers_are_numbers(key):
    for value in ("big", True, None):
        assert f"{key.replace('__', '.')} must be a number" in refused(changed(**{key: value}))
    resolve(changed(**{key: 5e8}))


def test_bfloat16_is_bf16():
    content = {"zero_optimization": {"stage": 3}, "bfloat16": {"enabled": True}}
    assert resolve(content)["bf16"] == {"enabled": True} and "bfloat16" not in resolve(content)
    assert "bfloat16.enabled=False contradicts bf16.enabled=True" in refused(
        content | {"bfloat16": {"enabled": False}, "bf16": {"enabled": True}}
    )


def test_a_long_name_of_a_file():
    assert "no such file" in refused("x" * 300)


def test_adam_is_adamw():
    assert resolve(changed(optimizer__type="Adam"))["optimizer"]["type"] == "AdamW"


def test_bf16_is_switched_off_with_a_warning_where_there_is_no_gpu(caplog):
    logging.getLogger("mmr1_ds").propagate = True
    assert resolve(changed(bf16__enabled=True), on_gpu=False)["bf16"] == {"enabled": False}
    assert "no GPU is here" in caplog.text


def test_file_that_is_not_json_names_file_and_line(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{\n  "zero_optimization": {"stage": 3},\n}\n')
    message = refused(str(path))
    assert message.startswith(f"{path}, line 3: not JSON:")
    path.write_text("[3]")
    assert "must hold a JSON object" in refused(str(path))


def test_missing_file_lists_the_project_s_own():
    message = refused("nowhere.json")
    assert "no such file 'nowhere.json'" in message and "zero3_b200.json" in message


def test_default_by_device():
    assert resolve(None, on_gpu=False)["zero_optimization"]["stage3_param_persistence_threshold"] == 1000
    assert resolve(None, on_gpu=True)["zero_optimization"]["overlap_comm"] is True


def test_a_preset_is_found_by_its_name():
    zero = resolve("zero3_offload.json")["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"


OFFLOAD = ["worker.actor.offload.offload_params=true", "worker.actor.offload.offload_optimizer=true"]


def test_offload_of_the_run_config_is_laid_over():
    zero = resolve(AUTO, *OFFLOAD)["zero_optimization"]
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    nvme = {"device": "nvme", "nvme_path": "/local"}
    assert (
        resolve(changed(zero_optimization__offload_optimizer=nvme), *OFFLOAD)["zero_optimization"]["offload_optimizer"]
        == nvme
    )


def test_on_cpu_there_is_nothing_to_offload():
    zero = resolve("zero3_offload.json", *OFFLOAD, on_gpu=False)["zero_optimization"]
    assert "offload_param" not in zero and "offload_optimizer" not in zero


def test_reference_has_no_optimizer_and_its_own_offload():
    config = load_config(BATCH).config
    actor = resolve(AUTO, *OFFLOAD)
    reference = reference_deepspeed(config, actor, on_gpu=True)
    assert reference["train_micro_batch_size_per_gpu"] == 7 and reference["bf16"] == {"enabled": True}
    assert "optimizer" not in reference and "train_batch_size" not in reference
    # The actor's offload is not the reference's.
    assert reference["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}

    config.worker.ref.offload.offload_params = True
    assert reference_deepspeed(config, actor, on_gpu=True)["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert (
        "offload_param"
        not in reference_deepspeed(config, resolve(AUTO, on_gpu=False), on_gpu=False)["zero_optimization"]
    )
    assert "offload_optimizer" in actor["zero_optimization"]  # a copy was changed


def test_the_critic_has_an_optimizer_and_offload_of_its_own():
    own = ["worker.critic.global_batch_size=12", "worker.critic.micro_batch_size_per_device_for_update=5"]
    own += ["worker.critic.max_grad_norm=0.25", "worker.critic.optim.lr=7e-6", "worker.critic.optim.betas=[0.7,0.9]"]
    config = load_config([*BATCH, *own, "worker.critic.optim.weight_decay=0.03"]).config
    actor = resolve(AUTO, *OFFLOAD)
    critic = critic_deepspeed(config, actor, 2, on_gpu=True)
    assert (critic["train_batch_size"], critic["train_micro_batch_size_per_gpu"]) == (60, 5)
    assert critic["gradient_accumulation_steps"] == 6 and critic["gradient_clipping"] == 0.25
    params = critic["optimizer"]["params"]
    assert (params["lr"], params["betas"], params["weight_decay"]) == (7e-6, [0.7, 0.9], 0.03)
    assert critic["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}
    assert actor["optimizer"]["params"]["lr"] == 3e-5 and "offload_optimizer" in actor["zero_optimization"]

    config.worker.critic.offload.offload_optimizer = True
    zero = critic_deepspeed(config, actor, 2, on_gpu=True)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu" and "offload_param" not in zero
    on_device = resolve(AUTO)
    assert "torch_adam" not in critic_deepspeed(config, on_device, 2, on_gpu=True)["optimizer"]["params"]
    assert on_device["optimizer"]["params"]["fused"] is True  # a copy was changed
    on_cpu = critic_deepspeed(config, resolve(AUTO, on_gpu=False), 2, on_gpu=False)
    assert "offload_optimizer" not in on_cpu["zero_optimization"]


def test_states_that_are_offloaded_already_cannot_be_moved():
    offload = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}}
    message = refused({**AUTO, "zero_optimization": offload}, "worker.actor.offload_states=true")
    assert "DeepSpeed moves no states while zero_optimization.offload_optimizer keeps a part of them in nvme" in message
    resolve({**AUTO, "zero_optimization": {"stage": 3}}, "worker.actor.offload_states=true", on_gpu=True)
    of_torch = {**AUTO, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    assert "DeepSpeed moves the states of its own Adam only" in refused(of_torch, "worker.actor.offload_states=true")
    resolve(of_torch, "worker.actor.offload_states=true", on_gpu=False)  # nothing of it is moved there


def test_a_machine_without_gpus_has_the_offload_sections_read_too():
    """A run there drops them; a misspelt key in them would fail in the queue."""
    config = load_config(BATCH).config
    config.worker.actor.deepspeed = changed(zero_optimization__offload_param={"devise": "cpu", "buffer_size": "auto"})
    actor = resolve_deepspeed(config, 2, on_gpu=False)
    assert "offload_param" not in actor["zero_optimization"]
    assert with_dropped_sections(config, actor)["zero_optimization"]["offload_param"] == {"devise": "cpu"}
    assert "offload_param" not in actor["zero_optimization"]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_fp16_that_is_off_is_read_too(on_gpu):
    config = load_config(BATCH).config
    config.worker.actor.deepspeed = changed(fp16={"enabled": "auto", "loss_scal": 0})
    actor = resolve_deepspeed(config, 2, on_gpu)
    assert "fp16" not in actor and with_dropped_sections(config, actor)["fp16"] == {"loss_scal": 0}


def test_8_bit_moments_ask_for_their_library(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(AUTO, "worker.actor.optim.strategy=adamw_8bit", on_gpu=False)
    assert message.endswith("needs bitsandbytes, not installed here: pip install 'mmr1_ds[optimizers]'")


@pytest.mark.parametrize("name", ["adamw_bf16", "muon"])
def test_states_of_other_optimisers_are_neither_offloaded_nor_moved(name):
    """DeepSpeed updates in host memory, and moves the states of, its own Adam alone."""
    strategy = f"worker.actor.optim.strategy={name}"
    assert resolve(AUTO, strategy)["optimizer"]["type"] == "AdamW"
    offload = "worker.actor.offload.offload_optimizer=true"
    refusal = f"strategy={name} keeps its states on the GPU, not with offload_optimizer; switch that off or set adamw"
    assert refusal in refused(AUTO, strategy, offload)
    resolve(AUTO, strategy, offload, on_gpu=False)  # all of it is in host memory there
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert "not with offload_optimizer" in refused({**AUTO, "zero_optimization": zero}, strategy)
    moved = refused({**AUTO, "zero_optimization": {"stage": 3}}, strategy, "worker.actor.offload_states=true")
    assert "worker.actor.offload_states=true moves the states of adamw only" in moved


@pytest.mark.parametrize("part", ["offload_param", "offload_optimizer"])
def test_a_disk_needs_its_folder(part):
    zero = {"stage": 3, part: {"device": "nvme"}}
    assert f"zero_optimization.{part}.device=nvme needs nvme_path" in refused({"zero_optimization": zero}, on_gpu=False)
    resolve({"zero_optimization": {"stage": 3, part: {"device": "nvme", "nvme_path": "/nvme"}}})


def test_secondary_partitions_divide_the_ranks():
    zero = {"stage": 3, "zero_hpz_partition_size": 3}
    assert "zero_hpz_partition_size=3 must divide the ranks: 2 % 3 = 2" in refused({"zero_optimization": zero})
    resolve({"zero_optimization": zero | {"zero_hpz_partition_size": 2}})
