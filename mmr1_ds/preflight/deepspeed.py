"""The DeepSpeed config of a run: the user's JSON with "auto" filled in and contradictions refused by name.

DeepSpeed itself is not imported: a dry run resolves everything in milliseconds. A file of the user's own is read by
DeepSpeed besides (`engine.deepspeed_config`).
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import resolved_critic, trains_critic
from mmr1_ds.config.loading import config_folders
from mmr1_ds.config.ranges import value_at
from mmr1_ds.errors import UserError, require
from mmr1_ds.preflight.models import model_hidden_size

logger = logging.getLogger(__name__)

KEY = "worker.actor.deepspeed"
_AUTO = "auto"
_KNOWN_TO_DEEPSPEED = ("data_types.keep_in_fp32_modules",)  # "auto" is a value there
_SECTIONS = (  # outer ones first
    "zero_optimization", "zero_optimization.offload_param", "zero_optimization.offload_optimizer",
    "bf16", "bfloat16", "fp16", "optimizer", "optimizer.params", "scheduler", "scheduler.params",
    "activation_checkpointing", "aio", "comms_logger", "data_types", "flops_profiler",
    "tensor_parallel",
)  # fmt: skip
_NUMBERS = (  # or "auto", where that is filled in
    "steps_per_print", "optimizer.params.eps",
    "zero_optimization.allgather_bucket_size", "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_max_live_parameters", "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_param_persistence_threshold", "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.sub_group_size",
)  # fmt: skip
# Keys with the values that are what this trainer does, and what to do instead of another.
_ONLY: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("prescale_gradients", (False,), "ZeRO-3 divides gradients once they are reduced; remove it"),
    ("gradient_predivide_factor", (1,), "ZeRO-3 divides gradients once they are reduced; remove it"),
    ("sequence_parallel_size", (1,), "set worker.actor.ulysses_size"),
    ("tensor_parallel.autotp_size", (0, 1), "ZeRO-3 partitions the model; remove it"),
    ("zero_optimization.cpu_offload", (False,), 'it is the old name of "offload_optimizer": {"device": "cpu"}'),
    ("zero_optimization.cpu_offload_param", (False,), 'it is the old name of "offload_param": {"device": "cpu"}'),
    ("zero_optimization.cpu_offload_use_pin_memory", (False,), "write pin_memory into the offload sections"),
)
_ADAM_EPS = 1e-8  # torch's own; the run config has no key for it
_SCHEDULE = "the learning rate follows worker.actor.optim (lr_scheduler_type, lr_warmup_steps, min_lr_ratio)"


@dataclass(frozen=True)
class _Setting:
    """A value that the run decides, and the config keys it comes from."""

    value: Any
    source: str


@dataclass(frozen=True)
class DeepspeedConfigs:
    """The complete DeepSpeed config of each engine of a run."""

    actor: Mapping[str, Any]
    reference: Mapping[str, Any]
    critic: Mapping[str, Any] | None  # with gae


def resolve_engines(config: RunConfig, world_size: int, on_gpu: bool) -> DeepspeedConfigs:
    """Return the complete DeepSpeed config of each engine. Raises: UserError, one line."""
    actor = resolve_deepspeed(config, world_size, on_gpu)
    critic = critic_deepspeed(config, actor, world_size, on_gpu) if trains_critic(config) else None
    return DeepspeedConfigs(actor, reference_deepspeed(config, actor, on_gpu), critic)


def engines_on_gpus(config: RunConfig, world_size: int) -> DeepspeedConfigs | None:
    """Return what a run on GPUs is given, for a dry run on a machine without; None for a run that is for the CPU.

    Raises: UserError, one line, for what a machine with GPUs would refuse.
    """
    is_for_cpu = config.worker.actor.dtype == "fp32" or os.environ.get("DS_ACCELERATOR") == "cpu"
    given = config.worker.actor.deepspeed
    if is_for_cpu or (isinstance(given, str) and Path(given).name == "zero3_cpu.json"):
        return None
    was_disabled, logger.disabled = logger.disabled, True  # its warnings were given for this machine
    try:
        return resolve_engines(config, world_size, on_gpu=True)
    except UserError as error:
        raise UserError(f"{error} (so on a GPU; DS_ACCELERATOR=cpu in the environment is for a run on CPUs)") from None
    finally:
        logger.disabled = was_disabled


def resolve_deepspeed(config: RunConfig, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """Return the actor's complete DeepSpeed config, as `deepspeed.initialize(config=...)` takes it.

    Raises: UserError, one line, for a file that is missing or not JSON, a stage other than ZeRO-3, fp16, a scheduler,
        an optimizer other than Adam and AdamW, and any number that contradicts the run config.
    """
    resolved, name = load_deepspeed(config, on_gpu)
    _check_finite(resolved, name)
    _check_kinds(resolved, name)
    _check_stage(resolved, name)
    _check_zero(resolved["zero_optimization"], world_size, name)
    for section, setting in _batch_settings(config, world_size).items():
        _settle(resolved, section, setting, name)
    _settle_precision(resolved, config.worker.actor.dtype, on_gpu, name)
    _settle_optimizer(resolved, config, on_gpu, name)
    _drop_scheduler(resolved, name)
    _settle_linear(resolved["zero_optimization"], config, on_gpu, name)
    _settle_buckets(resolved["zero_optimization"], config)
    _settle_offload(resolved["zero_optimization"], config, on_gpu)
    _settle_adam(resolved, config, on_gpu)
    _check_offload_states(resolved, config, on_gpu)
    _check_strategy(resolved, config, "actor", on_gpu)
    for section in ("zero_optimization", "bf16"):
        _drop_autos(resolved[section])
    left = [key for key in _autos(resolved) if key not in _KNOWN_TO_DEEPSPEED]
    if left:
        raise UserError(f'{name}: {left[0]}="auto" is no key that this trainer fills in; give its value or remove it')
    return resolved


def with_dropped_sections(config: RunConfig, actor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the actor's config with the sections that a run drops, as the user wrote them: DeepSpeed reads these too.

    Such are fp16, which is off, and the offload sections on the CPU.
    """
    written, _ = load_deepspeed(config, on_gpu=False)
    zero = dict(actor["zero_optimization"])
    for key in ("offload_param", "offload_optimizer"):
        if isinstance(section := written["zero_optimization"].get(key), dict):
            _drop_autos(section)
            zero[key] = section
    dropped = {}
    if isinstance(section := written.get("fp16"), dict):
        _drop_autos(section)
        dropped["fp16"] = section
    return {**actor, **dropped, "zero_optimization": zero}


def own_deepspeed(config: RunConfig) -> str | None:
    """Return the name of the user's own DeepSpeed config; None for one of the project's, which is known to be good."""
    given = config.worker.actor.deepspeed
    if isinstance(given, Mapping):
        return KEY
    if given is None or given == "":
        return None
    path = _find(str(given)).resolve()
    return None if any(path.is_relative_to(folder.resolve()) for folder in config_folders()) else str(path)


def reference_deepspeed(config: RunConfig, actor: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """Return the frozen reference's DeepSpeed config: ZeRO-3 like the actor's, no optimizer.

    Its parameters are offloaded when worker.ref.offload.offload_params says so, whatever the actor's are.
    """
    zero = copy.deepcopy(actor["zero_optimization"])
    zero.pop("offload_optimizer", None)
    offload_param = zero.pop("offload_param", None)
    if config.worker.ref.offload.offload_params and on_gpu:
        zero["offload_param"] = _offloaded(offload_param or {})
    return {
        "train_micro_batch_size_per_gpu": config.worker.actor.micro_batch_size_per_device_for_experience,
        "zero_optimization": zero,
        "bf16": copy.deepcopy(actor["bf16"]),
        "data_types": copy.deepcopy(actor.get("data_types", {})),  # or its buffers' precision differs
        "steps_per_print": actor.get("steps_per_print", 2**31 - 1),
    }


def critic_deepspeed(config: RunConfig, actor: Mapping[str, Any], world_size: int, on_gpu: bool) -> dict[str, Any]:
    """Return the critic's DeepSpeed config: the actor's, with the critic's batch sizes, clipping and optimiser.

    worker.critic.offload alone says what is offloaded.
    """
    critic, n = resolved_critic(config), config.worker.rollout.n
    assert critic.global_batch_size is not None and critic.micro_batch_size_per_device_for_update is not None
    responses, micro = critic.global_batch_size * n, critic.micro_batch_size_per_device_for_update
    resolved = copy.deepcopy(dict(actor))
    resolved |= {
        "train_batch_size": responses,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": responses // (world_size * micro),
        "gradient_clipping": critic.max_grad_norm,
    }
    optim = critic.optim
    own = {"lr": optim.lr, "betas": list(optim.betas), "weight_decay": optim.weight_decay}
    resolved["optimizer"]["params"] |= own
    zero, offload = resolved["zero_optimization"], critic.offload
    for key, asked in (("offload_param", offload.offload_params), ("offload_optimizer", offload.offload_optimizer)):
        given = zero.pop(key, {})
        if asked and on_gpu:
            zero[key] = _offloaded(given)
    if on_gpu and resolved["optimizer"]["params"].pop("fused", False):  # the actor's choice, without its offload
        del resolved["optimizer"]["params"]["torch_adam"]
    _settle_adam(resolved, config, on_gpu)
    _check_offload_states(resolved, config, on_gpu)
    _check_strategy(resolved, config, "critic", on_gpu)
    return resolved


def load_deepspeed(config: RunConfig, on_gpu: bool) -> tuple[dict[str, Any], str]:
    """Read worker.actor.deepspeed. Returns: the content as written, and its name for messages.

    Without one: configs/deepspeed/zero3_h100.json on GPU, zero3_cpu.json on CPU.
    """
    given = config.worker.actor.deepspeed
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given)), KEY
    if given is None or given == "":
        given = "zero3_h100.json" if on_gpu else "zero3_cpu.json"
    if not isinstance(given, str):
        raise UserError(f"{KEY} must be the path of a JSON file or a mapping, got {given}")
    path = _find(given)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except _Repeated as error:
        raise UserError(f"{path}: the key {error} stands twice in one section; keep one") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}; {KEY} must name a JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, with zero_optimization in it")
    return content, str(path)


class _Repeated(ValueError):
    """A key that a section has twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise _Repeated(key)
    return dict(pairs)


def _find(name: str) -> Path:
    given = Path(os.path.expanduser(name))
    folders = [part for folder in config_folders() for part in (folder / "deepspeed", folder)]
    for path in (given, *(folder / given for folder in folders)):
        if os.path.isfile(path):  # Path.is_file raises for a name over 255 characters
            return path
    known = sorted(path.name for folder in folders[::2] for path in folder.glob("*.json"))
    raise UserError(f"{KEY}: no such file {name!r:.80}; the project's own are {', '.join(known)}")


# --- what must be -------------------------------------------------------------------------------------------------


def _check_finite(section: Mapping[str, Any], name: str, prefix: str = "") -> None:
    for key, value in section.items():
        if isinstance(value, Mapping):
            _check_finite(value, name, f"{prefix}{key}.")
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{name}: {prefix}{key} must be finite, got {number}")


def _check_kinds(resolved: dict[str, Any], name: str) -> None:
    """Check that sections are mappings, sizes numbers, and the keys of _ONLY as they say.

    A section that is null is taken out: it counts as absent.
    """
    for dotted in _SECTIONS:
        parent, key = _parent(resolved, dotted)
        if parent.get(key) is None:
            parent.pop(key, None)
        elif not isinstance(parent[key], Mapping):
            raise UserError(f"{name}: {dotted} must be a mapping, got {json.dumps(parent[key])}")
    for dotted in _NUMBERS:
        parent, key = _parent(resolved, dotted)
        value = parent.get(key, _AUTO)
        if value != _AUTO and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{name}: {dotted} must be a number, got {json.dumps(value)}")
        if key == "sub_group_size" and value == 0:  # DeepSpeed takes it, and divides by it once the model is there
            raise UserError(f"{name}: {dotted} must be over 0, got 0; remove it")
        if key == "eps" and value != _AUTO and value < 0:
            raise UserError(f"{name}: {dotted} must be 0 or more, got {value}")
    for dotted, accepted, remedy in _ONLY:
        parent, key = _parent(resolved, dotted)
        if parent.get(key) not in (None, *accepted):
            raise UserError(f"{name}: {dotted}={json.dumps(parent[key])} is not supported; {remedy}")


def _parent(resolved: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that holds the last part of a dotted key (empty when it is absent), and that part."""
    *path, key = dotted.split(".")
    section = resolved
    for part in path:
        section = section.get(part, {})
    return section, key


def _check_stage(resolved: Mapping[str, Any], name: str) -> None:
    stage = resolved.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise UserError(
            f"{name}: zero_optimization.stage is {stage}, it must be 3: the model is loaded partitioned and "
            "its weights are gathered layer by layer for the rollout; set it to 3"
        )


def _check_zero(zero: Mapping[str, Any], world_size: int, name: str) -> None:
    """Check what DeepSpeed would find once the model is there."""
    for key in ("offload_param", "offload_optimizer"):
        offload = zero.get(key, {})
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            raise UserError(f"{name}: zero_optimization.{key}.device=nvme needs nvme_path, a folder there; set it")
    size = zero.get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and world_size % size:
        raise UserError(
            f"{name}: zero_optimization.zero_hpz_partition_size={size} must divide the ranks: {world_size} % {size} = "
            f"{world_size % size}; set it to the GPUs of a node, or remove it"
        )


def _batch_settings(config: RunConfig, world_size: int) -> dict[str, _Setting]:
    actor, n = config.worker.actor, config.worker.rollout.n
    responses, micro = actor.global_batch_size * n, actor.micro_batch_size_per_device_for_update
    both = f"worker.actor.global_batch_size * worker.rollout.n = {actor.global_batch_size} * {n}"
    return {
        "train_batch_size": _Setting(responses, both),
        "train_micro_batch_size_per_gpu": _Setting(micro, "worker.actor.micro_batch_size_per_device_for_update"),
        "gradient_accumulation_steps": _Setting(
            responses // (world_size * micro), f"{both} over {world_size} ranks and micro-batches of {micro}"
        ),
        "gradient_clipping": _Setting(actor.max_grad_norm, "worker.actor.max_grad_norm"),
    }


def _settle(section: dict[str, Any], key: str, setting: _Setting, name: str, prefix: str = "") -> None:
    """Fill in a value that is "auto" or absent; refuse another than the run's."""
    given = section.get(key, _AUTO)
    if given == _AUTO:
        section[key] = setting.value
    elif not _same(given, setting.value):
        raise UserError(
            f"{name}: {prefix}{key}={given} contradicts {setting.source}, which makes it {setting.value}; "
            'write "auto" or change one of them'
        )


def _same(given: Any, value: Any) -> bool:
    return (list(given) if isinstance(given, list | tuple) else given) == (
        list(value) if isinstance(value, list | tuple) else value
    )


def _settle_precision(resolved: dict[str, Any], dtype: str, on_gpu: bool, name: str) -> None:
    """Settle on bf16 or fp32. fp16's loss scaling skips optimiser steps: rollout and actor diverge."""
    if dtype == "fp32" and on_gpu:
        raise UserError("worker.actor.dtype=fp32 is for the CPU: on a GPU everything is made for bf16; set it to auto")
    in_bf16 = on_gpu or dtype == "bf16"
    fp16 = resolved.pop("fp16", {})
    if fp16.get("enabled", False) is True:
        raise UserError(
            f"{name}: fp16.enabled=true is not supported: its loss scaling skips optimiser steps and the weights of "
            'actor and rollout diverge; use bf16 ({"bf16": {"enabled": "auto"}})'
        )
    bf16 = resolved.setdefault("bf16", {})
    for key, value in resolved.pop("bfloat16", {}).items():  # DeepSpeed's older name of the section
        if bf16.setdefault(key, value) != value:
            raise UserError(f"{name}: bfloat16.{key}={value} contradicts bf16.{key}={bf16[key]}; keep bf16")
    if bf16.get("enabled", _AUTO) == _AUTO:
        bf16["enabled"] = in_bf16
    elif not on_gpu and dtype == "bf16" and bf16["enabled"] is not True:
        raise UserError(f'{name}: bf16.enabled={bf16["enabled"]} contradicts worker.actor.dtype=bf16; write "auto"')
    elif on_gpu and bf16["enabled"] is not True:
        raise UserError(f'{name}: bf16.enabled={bf16["enabled"]}, but the model is loaded in bf16 on GPU; write "auto"')
    elif not in_bf16 and bf16["enabled"] is not False:
        logger.warning("%s: bf16 is off: no GPU is here; worker.actor.dtype=bf16 has it on the CPU", name)
        bf16["enabled"] = False


def _settle_optimizer(resolved: dict[str, Any], config: RunConfig, on_gpu: bool, name: str) -> None:
    optim = config.worker.actor.optim
    optimizer = resolved.setdefault("optimizer", {"type": "AdamW", "params": {}})
    kind = str(optimizer.get("type", ""))
    if kind.lower() not in ("adam", "adamw"):
        raise UserError(f"{name}: optimizer.type={kind} is not supported, AdamW is; set it to AdamW")
    params = optimizer.setdefault("params", {})
    if params.get("adam_w_mode", True) is False:
        raise UserError(f"{name}: optimizer.params.adam_w_mode=false is not supported: weight decay is decoupled here")
    optimizer["type"] = "AdamW"  # DeepSpeed's Adam is AdamW unless adam_w_mode is false
    params.pop("adam_w_mode", None)
    settings = {
        "lr": _Setting(optim.lr, "worker.actor.optim.lr"),
        "betas": _Setting(list(optim.betas), "worker.actor.optim.betas"),
        "weight_decay": _Setting(optim.weight_decay, "worker.actor.optim.weight_decay"),
    }
    for key, setting in settings.items():
        _settle(params, key, setting, name, "optimizer.params.")
    if params.get("eps", _AUTO) == _AUTO:
        params["eps"] = _ADAM_EPS


def _drop_scheduler(resolved: dict[str, Any], name: str) -> None:
    """Drop a scheduler of "auto" values only, as Hugging Face writes it; refuse another, which contradicts ours."""
    if "scheduler" not in resolved:
        return
    scheduler = resolved.pop("scheduler")
    params = scheduler.get("params") or {"type": scheduler.get("type")}
    for key, value in params.items():
        if value != _AUTO:
            raise UserError(f"{name}: scheduler ({key}={value}) is not used: {_SCHEDULE}; remove the scheduler")


# --- what ZeRO-3 is given -----------------------------------------------------------------------------------------


def _settle_linear(zero: dict[str, Any], config: RunConfig, on_gpu: bool, name: str) -> None:
    """Keep torch's linear: DeepSpeed's, its default, takes torch's place in the whole process, for vLLM's layers too.

    It spares what torch's keeps for the backward pass, the gathered weights. So does gradient checkpointing, all but
    those of one layer.
    """
    if zero.get("memory_efficient_linear"):
        logger.warning("%s: memory_efficient_linear is set to false: it would replace vLLM's linear layers too", name)
    if on_gpu and not config.worker.actor.model.enable_gradient_checkpointing:
        logger.warning(
            "worker.actor.model.enable_gradient_checkpointing=false: every rank keeps the gathered weights of the "
            "whole model from the forward to the backward pass"
        )
    zero["memory_efficient_linear"] = False


def _settle_buckets(zero: dict[str, Any], config: RunConfig) -> None:
    """Fill in the sizes from the model's width h, as transformers does (h^2, 0.9 h^2, 10 h); without it DeepSpeed's."""
    width = model_hidden_size(config.worker.actor.model)
    sizes = {
        "reduce_bucket_size": lambda h: h * h,
        "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
        "stage3_param_persistence_threshold": lambda h: 10 * h,
    }
    for key, size in sizes.items():
        if zero.get(key) == _AUTO:
            del zero[key]
            if width is not None:
                zero[key] = size(width)


def _settle_offload(zero: dict[str, Any], config: RunConfig, on_gpu: bool) -> None:
    """Lay the run config's offload flags over the JSON's. On CPU everything is in host memory: no flag stays."""
    offload = config.worker.actor.offload
    for key, asked in (("offload_param", offload.offload_params), ("offload_optimizer", offload.offload_optimizer)):
        device = zero.get(key, {}).get("device", "none")
        if not on_gpu and device in ("cpu", "none"):
            zero.pop(key, None)
        elif asked and device == "none" and on_gpu:
            zero[key] = _offloaded(zero.get(key, {}))


def _settle_adam(resolved: dict[str, Any], config: RunConfig, on_gpu: bool) -> None:
    """Take torch's AdamW, which nobody has to compile: on a GPU its fused kernel, which passes over the states once.

    DeepSpeed's own stays where it alone will do: it updates in host memory, and only its states are moved there.
    """
    params, zero = resolved["optimizer"]["params"], resolved["zero_optimization"]
    updates_on_host = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if not on_gpu:
        params["torch_adam"] = True
    elif "torch_adam" not in params and not updates_on_host and not config.worker.actor.offload_states:
        params |= {"torch_adam": True, "fused": True}


def _check_offload_states(resolved: Mapping[str, Any], config: RunConfig, on_gpu: bool) -> None:
    if not config.worker.actor.offload_states:
        return
    if on_gpu and resolved["optimizer"]["params"].get("torch_adam", False):
        raise UserError(
            "worker.actor.offload_states=true: DeepSpeed moves the states of its own Adam only, not of torch's; "
            "remove optimizer.params.torch_adam or switch offload_states off"
        )
    for key in ("offload_param", "offload_optimizer"):
        device = resolved["zero_optimization"].get(key, {}).get("device", "none")
        if device != "none":
            raise UserError(
                f"worker.actor.offload_states=true: DeepSpeed moves no states while zero_optimization.{key} keeps a "
                f"part of them in {device} memory; switch one of the two off"
            )


def _check_strategy(resolved: Mapping[str, Any], config: RunConfig, part: str, on_gpu: bool) -> None:
    """DeepSpeed updates in host memory, and moves the states of, its own Adam alone."""
    strategy = value_at(config, f"worker.{part}.optim.strategy")
    if strategy == "adamw":
        return
    key, zero = f"worker.{part}.optim.strategy={strategy}", resolved["zero_optimization"]
    if strategy == "adamw_8bit":
        require("optimizers", "bitsandbytes", purpose=key)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise UserError(f"{key} keeps its states on the GPU, not with offload_optimizer; switch that off or set adamw")
    if on_gpu and config.worker.actor.offload_states:
        raise UserError(f"{key}: worker.actor.offload_states=true moves the states of adamw only; switch it off")


def _offloaded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an offload section as it is given, with host memory where it names no device."""
    is_placed = given.get("device", "none") != "none"
    return {**given} if is_placed else {**given, "device": "cpu", "pin_memory": True}


def _drop_autos(section: dict[str, Any]) -> None:
    """Leave to DeepSpeed what it fills in itself: in these sections "auto" is its own default."""
    for key, value in list(section.items()):
        if value == _AUTO:
            del section[key]
        elif isinstance(value, dict):
            _drop_autos(value)


def _autos(section: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys that are still "auto"."""
    if not isinstance(section, Mapping):
        return []
    found = [prefix + key for key, value in section.items() if value == _AUTO]
    return found + [key for name, value in section.items() for key in _autos(value, f"{prefix}{name}.")]
