"""Upstream's spellings: how a configuration written for EasyR1 or MMR1 is read here.

Four kinds of key are not ours. Some are other names of our keys (`RENAMED`). Some name a choice of which only one
value is implemented here (`ONLY`): that value is taken, another is refused, never ignored. Some steer machinery that
does not exist here, FSDP and Ray mostly (`IGNORED`): they are named in one warning. A few need a rule each
(`_translate_special`). FSDP's CPU offload becomes ZeRO's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmr1_ds.config.keys import in_yaml
from mmr1_ds.errors import UserError

RENAMED = {
    "data.format_prompt_path": "data.format_prompt",
    "trainer.find_last_checkpoint": "trainer.resume",
    "trainer.test_freq": "trainer.val_freq",
    "trainer.total_epochs": "trainer.total_episodes",
    "worker.actor.clip_high": "worker.actor.clip_ratio_high",
    "worker.actor.clip_low": "worker.actor.clip_ratio_low",
    "worker.actor.clip_ratio_c": "worker.actor.clip_ratio_dual",
    "worker.actor.disable_kl": "algorithm.disable_kl",
    "worker.actor.entropy_coeff": "worker.actor.entropy_coef",
    "worker.actor.kl_coef": "algorithm.kl_coef",
    "worker.actor.kl_loss_coef": "algorithm.kl_coef",
    "worker.actor.kl_loss_type": "algorithm.kl_penalty",
    "worker.actor.kl_penalty": "algorithm.kl_penalty",
    "worker.actor.optim.warmup_style": "worker.actor.optim.lr_scheduler_type",
    "worker.actor.ulysses_sequence_parallel_size": "worker.actor.ulysses_size",
    "worker.actor.use_kl_loss": "algorithm.use_kl_loss",
    "worker.critic.optim.warmup_style": "worker.critic.optim.lr_scheduler_type",
    "worker.reward.num_cpus": "worker.reward.num_workers",
    "worker.reward.score_function": "worker.reward.reward_function",
    "worker.reward.score_function_kwargs": "worker.reward.reward_function_kwargs",
    "worker.reward.model_name": "worker.reward.judge.model",
    "worker.rollout.name": "worker.rollout.engine",
}

# Keys of verl's that are not read here -> ours, which are not the nearest in spelling
OF_OTHERS = {"data.train_batch_size": "data.rollout_batch_size"}

_BF16 = ("bf16", "bfloat16", "torch.bfloat16", None)
# key -> (values that are what this trainer does, what to do instead of another)
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "data.override_chat_template": ((None,), "set the chat template in the tokenizer's own folder"),
    **{
        f"worker.{part}.fsdp.mp_param_dtype": (_BF16, "forward and backward are in bf16 on a GPU")
        for part in ("actor", "critic", "ref")
    },
    **{
        f"worker.{part}.optim.training_steps": ((-1, None), "the schedule spans the run's own steps")
        for part in ("actor", "critic")
    },
    "worker.critic.ulysses_sequence_parallel_size": ((1,), "sequence parallelism is not implemented"),
    "worker.critic.ulysses_size": ((1,), "sequence parallelism is not implemented"),
    "worker.reward.skip_special_tokens": ((True,), "special tokens are not part of a response's text"),
    "worker.rollout.ignore_eos": ((False,), "a response ends at its end-of-sequence token"),
    **{
        f"worker.rollout.val_override_config.{key}": (accepted, f"{words} not implemented")
        for key, accepted, words in (
            ("presence_penalty", (0,), "a penalty of presence is"),
            ("frequency_penalty", (0,), "a penalty of frequency is"),
            ("min_tokens", (0,), "a least length is"),
            ("stop_token_ids", (None,), "stop tokens of one's own are"),
        )
    },
    "worker.rollout.val_override_config.seed": ((None,), "validation samples by worker.rollout.seed"),
}

# "x.*" is every key below x
IGNORED = (
    *(
        f"worker.{part}.fsdp{key}"
        for part in ("actor", "critic", "ref")
        for key in (
            "", ".enable_full_shard", ".enable_rank0_init", ".fsdp_size", ".mp_buffer_dtype", ".mp_reduce_dtype",
            ".torch_dtype", ".use_orig_params",
        )
    ),
    "data.mini_rollout_batch_size",
    "data.num_workers",
    "data.rollout_micro_batch_size",
    "fault_tolerance.*",
    "ray_init.*",
    "ray_kwargs.*",
    "trainer.ray_timeline",
    "trainer.remove_ckpt_after_load",
    "trainer.remove_previous_ckpt",
    "worker.actor.clip_cov_*",  # of a loss that earlier versions had: what such a run wrote as its config.yaml loads
    "worker.actor.global_batch_size_per_device",
    "worker.actor.strategy",
    "worker.actor.use_torch_compile",
    "worker.critic.global_batch_size_per_device",
    "worker.critic.model.tokenizer_path",  # it reads the actor's tokens
    "worker.critic.strategy",
    "worker.critic.use_torch_compile",
    "worker.hybrid_engine",
    "worker.ref.dynamic_batching",
    "worker.ref.fsdp.optimizer_offload",  # it has no optimiser
    "worker.ref.micro_batch_size_per_device_for_experience",
    "worker.ref.offload.optimizer_offload",
    "worker.ref.padding_free",  # as the actor's, and so its ulysses_size
    "worker.ref.strategy",
    "worker.ref.ulysses_sequence_parallel_size",
    "worker.ref.ulysses_size",
    "worker.ref.use_torch_compile",
    "worker.reward.batch_processing",
    "worker.reward.provider",  # azure or vllm: both are asked as OpenAI-compatible servers
    "worker.reward.workflow_id",
    "worker.rollout.disable_log_stats",
    "worker.rollout.disable_tqdm",
    "worker.rollout.enable_sleep_mode",
    "worker.rollout.prompt_length",
    "worker.rollout.response_length",
    "worker.rollout.trust_remote_code",
)

_VALUES = {
    "worker.rollout.dtype": {"bfloat16": "bf16", "float32": "fp32"},
    "algorithm.kl_penalty": {"k1": "kl", "k2": "mse", "k3": "low_var_kl"},
    "worker.actor.loss_avg_mode": {"token-mean": "token", "seq-mean-token-mean": "seq"},
    "worker.actor.loss_type": {"vanilla": "default", "geo_mean": "gmpo"},
    "worker.critic.loss_avg_mode": {"token-mean": "token", "seq-mean-token-mean": "seq"},
}
_FILTER_DEFAULTS = (("algorithm.filter_low", 0.01), ("algorithm.filter_high", 0.99))
_ACTOR_PARAMS, _ACTOR_OPTIMIZER = "worker.actor.offload.offload_params", "worker.actor.offload.offload_optimizer"
_CRITIC_PARAMS, _CRITIC_OPTIMIZER = "worker.critic.offload.offload_params", "worker.critic.offload.offload_optimizer"
_REF_PARAMS = "worker.ref.offload.offload_params"
# Every spelling of offload -> the keys it switches on. What one key of a source asks for, none of its others undoes.
_OFFLOAD = {
    _ACTOR_PARAMS: (_ACTOR_PARAMS,),
    _ACTOR_OPTIMIZER: (_ACTOR_OPTIMIZER,),
    _REF_PARAMS: (_REF_PARAMS,),
    "worker.actor.fsdp.enable_cpu_offload": (_ACTOR_PARAMS, _ACTOR_OPTIMIZER),
    "worker.actor.fsdp.optimizer_offload": (_ACTOR_OPTIMIZER,),
    "worker.actor.fsdp.param_offload": (_ACTOR_PARAMS,),
    "worker.actor.offload.optimizer_offload": (_ACTOR_OPTIMIZER,),
    "worker.actor.offload.param_offload": (_ACTOR_PARAMS,),
    _CRITIC_PARAMS: (_CRITIC_PARAMS,),
    _CRITIC_OPTIMIZER: (_CRITIC_OPTIMIZER,),
    "worker.critic.fsdp.enable_cpu_offload": (_CRITIC_PARAMS, _CRITIC_OPTIMIZER),
    "worker.critic.fsdp.optimizer_offload": (_CRITIC_OPTIMIZER,),
    "worker.critic.fsdp.param_offload": (_CRITIC_PARAMS,),
    "worker.critic.offload.optimizer_offload": (_CRITIC_OPTIMIZER,),
    "worker.critic.offload.param_offload": (_CRITIC_PARAMS,),
    "worker.ref.fsdp.enable_cpu_offload": (_REF_PARAMS,),
    "worker.ref.fsdp.param_offload": (_REF_PARAMS,),
    "worker.ref.offload.param_offload": (_REF_PARAMS,),
}
_BASE_URLS = "worker.reward.judge.base_urls"
_KEY_VARIABLE = "worker.reward.judge.key_variable"
_EXAMPLE_REWARDS = {
    f"examples/{folder}_function/{name}.py": name for folder in ("reward", "score") for name in ("math", "r1v")
}


@dataclass
class Translation:
    """One source's keys in our names."""

    values: dict[str, Any] = field(default_factory=dict)  # dotted key -> value
    ignored: list[str] = field(default_factory=list)  # keys, in the order met
    notes: list[str] = field(default_factory=list)  # a line for each key whose meaning changed on the way
    offloads: list[str] = field(default_factory=list)  # our names of keys that EasyR1 moves states by, not ZeRO's way
    is_ours: bool = False  # one of the project's own configs, whose keys no user set


def upstream_keys() -> list[str]:
    """Every upstream key that is read, for the nearest match of a misspelt one."""
    return [*RENAMED, *ONLY, *_OFFLOAD, *(key for key in IGNORED if not key.endswith("*"))]


def ours(key: str) -> str:
    """Our name of a key."""
    return RENAMED.get(key, key)


def translate(flat: Mapping[str, Any], where: str) -> Translation:
    """Read one source's keys (dotted -> value) in our names. `where` names the source in errors.

    Keys that neither side knows pass through: the schema names them.
    Raises: UserError for a value whose meaning this trainer does not implement, or a key given under two names.
    """
    result = Translation()
    for key, value in flat.items():
        if key == "algorithm.kl_coef" and value == 0 and "worker.actor.kl_loss_coef" in flat:
            continue  # the KL in the reward, upstream, switched off; the one in the loss has the coefficient
        if _translate_special(key, value, result, where):
            continue
        if key in ONLY:
            _accept_only(key, value)
        elif _is_ignored(key):
            result.ignored.append(key)
        else:
            _set(result, key, value, where)
    return result


def _is_ignored(key: str) -> bool:
    return any(
        key == name or (name.endswith("*") and (key.startswith(name[:-1]) or key == name[:-2])) for name in IGNORED
    )


def _accept_only(key: str, value: Any) -> None:
    accepted, instead = ONLY[key]
    value = None if value == [] else value
    if value is None and key.startswith("worker.rollout."):  # an empty key upstream: the default
        return
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in accepted):
        known = " or ".join(in_yaml(choice) for choice in accepted)
        raise UserError(f"{key} must be {known}, got {in_yaml(value)}: {instead}")


def _set(result: Translation, key: str, value: Any, where: str, name: str | None = None) -> None:
    """Set our key. Args: name: ours, where the upstream key has a rule of its own."""
    name = name or ours(key)
    if isinstance(value, str):
        value = _VALUES.get(name, {}).get(value, value)
        if name == "worker.reward.reward_function" and value.endswith(".py"):
            value += ":main"  # EasyR1's default
    if name in result.values and result.values[name] != value:
        raise UserError(f"{where} gives {name} twice under different names, last as {key}; keep one")
    result.values[name] = value


def _translate_special(key: str, value: Any, result: Translation, where: str) -> bool:
    """Translate a key that has a rule of its own. Returns whether `key` is one."""
    match key:
        case "worker.actor.clip_ratio":
            for side in ("low", "high"):
                _set(result, key, value, where, f"worker.actor.clip_ratio_{side}")
        case "algorithm.filter_low" | "algorithm.filter_high":
            # Upstream's defaults are its test for groups of equal rewards, which are found by comparison here; as
            # bounds of the mean they would drop groups whose rewards are not in [0, 1].
            result.values[key] = None if (key, value) in _FILTER_DEFAULTS else value
        case "data.curriculum_metric":
            _set(result, key, [value], where, "data.curriculum_metrics")
        case _ if key in _OFFLOAD:
            for target in _OFFLOAD[key]:
                result.values[target] = value or result.values.get(target, False)
            if value and not key.endswith(".enable_cpu_offload"):  # FSDP's own, whose optimiser steps on the CPU
                result.offloads += _OFFLOAD[key]
        case (
            "worker.actor.optim.min_lr_ratio"
            | "worker.critic.optim.min_lr_ratio"
            | "trainer.experiment_name"
            | "worker.rollout.val_override_config"
            | "worker.rollout.val_override_config.min_p"
            | "worker.rollout.val_override_config.repetition_penalty"
        ):
            if value is not None:  # an empty key upstream: the default
                result.values[key] = value
        case "worker.reward.compute_score":
            _set(result, key, value, where, "worker.reward.reward_function")
        case "worker.reward.reward_type" if value == "function":  # EasyR1's word before it knew two types
            result.ignored.append(key)
        case "worker.reward.base_url" | "worker.reward.base_urls":
            urls = [value] if isinstance(value, str) else value or []
            if not result.values.get(_BASE_URLS):  # a file may have both keys, one of them empty
                result.values[_BASE_URLS] = urls
            elif urls:
                _set(result, key, urls, where, _BASE_URLS)
        case "worker.reward.api_key":
            result.ignored.append(key)
            if value not in (None, "", "none", "EMPTY"):
                result.notes.append(f"{key} is not read: export the key and name its variable in {_KEY_VARIABLE}")
        case _:
            return False
    return True


def replace_example_files(values: dict[str, Any], configs: list[Path]) -> list[str]:
    """Upstream's YAML names files of its own repository; where they are missing, ours take their place.

    Changes `values` (dotted key -> value) in place. Returns a note for each replacement.
    """
    notes = []
    reward = values.get("worker.reward.reward_function")
    if isinstance(reward, str):
        path = Path(reward.rpartition(":")[0] or reward)
        for example, name in _EXAMPLE_REWARDS.items():
            if path.as_posix().endswith(example) and not os.path.isfile(path):
                values["worker.reward.reward_function"] = name
                notes.append(f"worker.reward.reward_function={reward} is missing; the built-in {name} is used")
    template = values.get("data.format_prompt")
    if isinstance(template, str) and "examples/format_prompt/" in template and not os.path.isfile(template):
        for folder in configs:
            candidate = folder / "format_prompt" / Path(template).name
            if os.path.isfile(candidate):
                values["data.format_prompt"] = str(candidate)
                notes.append(f"data.format_prompt={template} is missing; {candidate} is used")
                break
    return notes
