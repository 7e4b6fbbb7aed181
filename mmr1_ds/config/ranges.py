"""Which values a key may take: choices and ranges, checked one key at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

from mmr1_ds.config.keys import nearest
from mmr1_ds.config.redaction import check_variable
from mmr1_ds.config.schema import RunConfig
from mmr1_ds.errors import UserError

MOST_ERROR = 0.2  # of an adaptive KL: a relative error counts for this at most

# key -> the values implemented, and why there are no others
_CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "data.sampling_strategy": (("shuffle", "sequential", "curriculum"), ""),
    "data.curriculum_refresh": (("full", "online"), ""),
    "algorithm.adv_estimator": (
        ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "gae"),
        "",
    ),
    "algorithm.kl_penalty": (("kl", "abs", "mse", "low_var_kl"), ""),
    "algorithm.kl_type": (("fixed", "adaptive"), ""),
    "algorithm.rollout_is": (("token", "sequence", "none"), ""),
    "worker.actor.loss_type": (("default", "gspo", "gspo_token", "cispo", "sapo"), ""),
    "worker.actor.loss_avg_mode": (("token", "seq", "seq_sum"), ""),
    "worker.actor.optim.strategy": (("adamw",), "other optimisers are not implemented"),
    "worker.actor.optim.lr_scheduler_type": (("constant", "cosine", "linear"), ""),
    "worker.critic.loss_avg_mode": (("token", "seq"), ""),
    "worker.critic.optim.strategy": (("adamw",), "other optimisers are not implemented"),
    "worker.critic.optim.lr_scheduler_type": (("constant", "cosine", "linear"), ""),
    "worker.rollout.engine": (("auto", "vllm", "server", "hf"), ""),
    "worker.rollout.weight_transfer": (("auto", "nccl", "ipc", "shared_memory"), ""),
    "worker.rollout.weight_swap": (("boundary", "in_flight"), ""),
    "worker.rollout.dtype": (("auto", "bf16", "fp32"), ""),
}

# key -> range, "[" and "]" include the bound
_RANGES = {
    "data.max_prompt_length": "[1, inf)",
    "data.max_response_length": "[1, inf)",
    "data.rollout_batch_size": "[1, inf)",
    "data.seed": "[0, inf)",
    "data.min_pixels": "[1, inf)",
    "data.max_pixels": "[1, inf)",
    "data.filter_overlong_prompts_workers": "[1, inf)",
    "data.curriculum_mixture_ratio": "[0, 1]",
    "data.curriculum_update_freq": "[0, inf)",
    "data.curriculum_rollout_n": "[2, inf)",
    "data.curriculum_rollout_batch_size": "[1, inf)",
    "data.curriculum_momentum": "[0, 1)",
    "data.curriculum_weight_floor": "[0, 1]",
    "data.curriculum_probe_fraction": "[0, 1]",
    "algorithm.gamma": "[0, 1]",
    "algorithm.lam": "[0, 1]",
    "algorithm.kl_coef": "[0, inf)",
    "algorithm.kl_target": "[0, inf)",  # upstream's files have 0 where the coefficient is fixed
    "algorithm.kl_horizon": "[0, inf)",
    "algorithm.rollout_is_threshold": "[1, inf)",
    "algorithm.filter_low": "(-inf, inf)",
    "algorithm.filter_high": "(-inf, inf)",
    "trainer.critic_warmup": "[0, inf)",
    "trainer.max_try_make_batch": "[-1, inf)",
    "worker.actor.global_batch_size": "[1, inf)",
    "worker.actor.micro_batch_size_per_device_for_update": "[1, inf)",
    "worker.actor.micro_batch_size_per_device_for_experience": "[1, inf)",
    "worker.actor.ulysses_size": "[1, inf)",
    "worker.actor.max_grad_norm": "(0, inf)",
    "worker.actor.clip_ratio_low": "[0, 1]",
    "worker.actor.clip_ratio_high": "[0, inf)",
    "worker.actor.clip_ratio_dual": "(1, inf)",
    "worker.actor.tau_positive": "(0, inf)",
    "worker.actor.tau_negative": "(0, inf)",
    "worker.actor.loss_scale_factor": "(0, inf)",
    "worker.actor.ppo_epochs": "[1, inf)",
    "worker.actor.model.lora.rank": "[0, inf)",
    "worker.actor.model.lora.alpha": "(0, inf)",
    "worker.actor.optim.lr": "(0, inf)",
    "worker.actor.optim.weight_decay": "[0, inf)",
    "worker.actor.optim.lr_warmup_ratio": "[0, 1]",
    "worker.actor.optim.lr_warmup_steps": "[0, inf)",
    "worker.actor.optim.min_lr_ratio": "[0, 1]",
    "worker.critic.global_batch_size": "[1, inf)",
    "worker.critic.micro_batch_size_per_device_for_update": "[1, inf)",
    "worker.critic.micro_batch_size_per_device_for_experience": "[1, inf)",
    "worker.critic.max_grad_norm": "(0, inf)",
    "worker.critic.cliprange_value": "(0, inf)",
    "worker.critic.ppo_epochs": "[1, inf)",
    "worker.critic.optim.lr": "(0, inf)",
    "worker.critic.optim.weight_decay": "[0, inf)",
    "worker.critic.optim.lr_warmup_ratio": "[0, 1]",
    "worker.critic.optim.lr_warmup_steps": "[0, inf)",
    "worker.critic.optim.min_lr_ratio": "[0, 1]",
    "worker.rollout.n": "[2, inf)",  # a group of one has no advantage
    "worker.rollout.temperature": "(0, inf)",
    "worker.rollout.top_p": "(0, 1]",
    "worker.rollout.seed": "[0, inf)",
    "worker.rollout.limit_images": "[0, inf)",
    "worker.rollout.gpu_memory_utilization": "(0, 1]",
    "worker.rollout.kv_cache_gb": "[1, inf)",
    "worker.rollout.tensor_parallel_size": "[1, inf)",
    "worker.rollout.max_model_len": "[1, inf)",
    "worker.rollout.max_num_batched_tokens": "[1, inf)",
    "worker.rollout.max_num_seqs": "[1, inf)",
    "worker.rollout.num_servers": "[1, inf)",
    "worker.rollout.server_start_seconds": "(0, inf)",
    "worker.rollout.server_timeout_seconds": "(0, inf)",
    "worker.rollout.request_timeout_seconds": "(0, inf)",
    "worker.rollout.servers_gone_seconds": "(0, inf)",
    "worker.rollout.max_in_flight": "[1, inf)",
    "worker.rollout.partial": "[1, inf)",
    "worker.rollout.max_staleness_steps": "[0, inf)",
    "worker.rollout.val_override_config.temperature": "[0, inf)",
    "worker.rollout.val_override_config.top_p": "(0, 1]",
    "worker.rollout.val_override_config.n": "[1, inf)",
    "worker.reward.num_workers": "[1, inf)",
    "worker.reward.timeout_seconds": "(0, inf)",
    "worker.reward.cos_len_reward_config.min_value_wrong": "(-inf, inf)",
    "worker.reward.cos_len_reward_config.max_value_wrong": "(-inf, inf)",
    "worker.reward.cos_len_reward_config.min_value_correct": "(-inf, inf)",
    "worker.reward.cos_len_reward_config.max_value_correct": "(-inf, inf)",
    "worker.reward.cos_len_reward_config.max_length": "[1, inf)",
    "worker.reward.judge.timeout_seconds": "(0, inf)",
    "worker.reward.judge.request_timeout_seconds": "(0, inf)",
    "worker.reward.judge.max_retries": "[0, inf)",
    "worker.reward.judge.max_tokens": "[1, inf)",
    "trainer.total_episodes": "[1, inf)",
    "trainer.max_steps": "[1, inf)",
    "trainer.nnodes": "[1, inf)",
    "trainer.n_gpus_per_node": "[1, inf)",
    "trainer.val_generations_to_log": "[0, inf)",
    "trainer.train_generations_to_log": "[0, inf)",
    "trainer.collective_timeout_seconds": "(0, inf)",
    "trainer.max_wall_seconds": "(0, inf)",
    "trainer.preemption_seconds": "(0, inf)",
    "trainer.max_bad_updates": "[1, inf)",
}
_COUNT_OR_NONE = (  # >= 1, or -1 for "no limit" or "never"
    "data.val_batch_size",
    "worker.rollout.top_k",
    "worker.rollout.val_override_config.top_k",
    "trainer.val_freq",
    "trainer.save_freq",
    "trainer.save_limit",
    "trainer.report_freq",
)


def value_at(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def check_choices(config: RunConfig) -> None:
    """Raises: UserError for a value that is none of its key's."""
    for key, (choices, reason) in _CHOICES.items():
        _check_choice(key, value_at(config, key), choices, reason)
    check_loggers(config.trainer.logger)
    for key in ("worker.rollout.server_key_variable", "worker.reward.judge.key_variable"):
        check_variable(key, value_at(config, key))


def _check_choice(key: str, value: str, choices: Sequence[str], reason: str) -> None:
    if value in choices:
        return
    close = nearest(value, choices)
    advice = reason or (f"did you mean {close}?" if close else "")
    raise UserError(f"{key} must be {' or '.join(choices)}, got {value}" + (f"; {advice}" if advice else ""))


def check_ranges(config: RunConfig) -> None:
    """Raises: UserError for a number outside its key's range."""
    for key, interval in _RANGES.items():
        value = value_at(config, key)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{key} must be finite, got {value}")
        if value is not None and not _inside(value, interval):
            raise UserError(f"{key} must be {_in_words(interval)}, got {value}")
    for key in _COUNT_OR_NONE:
        value = value_at(config, key)
        if value is not None and value != -1 and value < 1:
            raise UserError(f"{key} must be 1 or more, or -1, got {value}")
    for key in ("worker.actor.optim.betas", "worker.critic.optim.betas"):
        for beta in value_at(config, key):
            if not 0 <= beta < 1:
                raise UserError(f"{key} must each be in [0, 1), got {beta}")


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _in_words(interval: str) -> str:
    low = interval[1:].partition(",")[0]
    if interval.endswith("inf)"):
        return f"{low} or more" if interval[0] == "[" else f"over {low}"
    return f"in {interval}"


LOGGERS = ("console", "jsonl", "file", "tensorboard", "wandb")  # file: EasyR1's name of jsonl


def check_loggers(names: Sequence[str]) -> None:
    """Check `trainer.logger`. Raises: UserError that lists the known names."""
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"trainer.logger: unknown logger {name!r}; known: {', '.join(LOGGERS)}")
