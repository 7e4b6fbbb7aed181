"""What DeepSpeed refuses in a config, and what it would pass over, named before a run needs it."""

import copy

import pytest

from mmr1_ds.engine.deepspeed_config import check_deepspeed
from mmr1_ds.errors import UserError

GOOD = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "prescale_gradients": False,
    "communication_data_type": "fp32",
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "betas": [0.9, 0.95], "eps": 1e-8, "torch_adam": True}},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "data_types": {"grad_accum_dtype": "fp32"},
    "aio": {"block_size": 1048576, "queue_depth": 8},
    "flops_profiler": {"enabled": False},
    "comms_logger": {"enabled": False},
}


def changed(path, value):
    content = copy.deepcopy(GOOD)
    *sections, key = path.split(".")
    section = content
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    return content


def test_a_good_config_is_read_and_left_as_it_is():
    before = copy.deepcopy(GOOD)
    check_deepspeed(GOOD, "x.json")
    assert before == GOOD


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("fp16", {"enabled": False, "loss_scale": 0, "hysteresis": 2, "fp16_master_weights_and_grads": False}),
        ("timers", {"throughput": {"enabled": True, "synchronized": False}}),
        ("checkpoint", {"tag_validation": "Ignore", "parallel_write": {"pipeline_stage": False}}),
    ],
)
def test_sections_that_deepspeed_reads_pass(path, value):
    check_deepspeed(changed(path, value), "x.json")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("gradient_cliping", 1.0, "knows no key gradient_cliping; did you mean gradient_clipping"),
        ("zero_optimization.offload_optimizer.device", "gpu", "offload_optimizer.device='gpu'"),
        ("zero_optimization.reduce_bucket_size", -1, "reduce_bucket_size=-1"),
        ("bf16.enable", True, "enable"),
        ("optimizer.tpye", "Adam", "did you mean optimizer.type"),
        ("optimizer.params.weight_decy", 0.1, "did you mean optimizer.params.weight_decay"),
        ("activation_checkpointing.profle", True, "did you mean activation_checkpointing.profile"),
        ("data_types.grad_accum_dtyp", "fp32", "did you mean data_types.grad_accum_dtype"),
        ("aio.queue_deph", 1, "did you mean aio.queue_depth"),
        ("flops_profiler.enable", True, "did you mean flops_profiler.enabled"),
        ("comms_logger.enable", True, "enable"),
        ("fp16.loss_scal", 0, "knows no key fp16.loss_scal; did you mean fp16.loss_scale?"),
        ("zero_optimization.overlap_com", True, "did you mean zero_optimization.overlap_comm?"),
        ("zero_optimization.offload_param.devic", "cpu", "did you mean zero_optimization.offload_param.device?"),
        ("timers.throughputs", {}, "did you mean timers.throughput?"),
        ("checkpoint.parallel_write.pipeline_stages", True, "did you mean checkpoint.parallel_write.pipeline_stage?"),
        ("communication_data_type", "fp33", "fp33"),
        ("data_types.grad_accum_dtype", "fp33", "fp33"),
        ("torch_autocast.enabld", True, "did you mean torch_autocast.enabled"),
        ("autotuning.enabled", False, "DeepSpeed's autotuning is not used with ZeRO-3 here; remove it"),
        ("data_efficiency.enabled", True, "data_efficiency is not used"),
        ("pipeline.stages", "auto", "pipeline is not used"),
        ("sparse_gradients", True, "has been removed"),
        ("elasticity", {"enabled": True}, "has been removed"),
        ("zero_optimization.mics_shard_size", 2, "has been removed"),
        ("checkpoint.tag_validation", "Foo", "invalid tag_validation"),
    ],
)
def test_what_deepspeed_refuses_or_passes_over_is_named(path, value, words):
    with pytest.raises(UserError, match=r"x.json: DeepSpeed") as refused:
        check_deepspeed(changed(path, value), "x.json")
    assert words in str(refused.value) and "\n" not in str(refused.value)
