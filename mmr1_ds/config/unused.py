"""Keys that were set and that the rest of the configuration leaves without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Any

from mmr1_ds.config.keys import in_yaml, leaf_types
from mmr1_ds.config.ranges import value_at
from mmr1_ds.config.schema import RunConfig, names_a_file

_REWARD = "worker.reward.reward_function"


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _is_not(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


def _is_over(bound: int) -> Callable[[Any], bool]:
    return lambda value: value > bound


# Keys (x.* is every key below x), and what another key must be for them to have an effect. Of several the first counts.
# A function of the user's own sees what the choices in its place see.
_NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("data.curriculum_*",), "data.sampling_strategy", _is("curriculum")),
    (
        ("data.curriculum_update_freq", "data.curriculum_rollout_*", "data.curriculum_momentum"),
        "data.curriculum_refresh", _is("full"),
    ),
    (("data.curriculum_probe_fraction", "data.curriculum_features"), "data.curriculum_refresh", _is("online")),
    (("data.curriculum_candidates",), "data.curriculum_draw", _is("candidates")),
    (("algorithm.gamma",), "algorithm.adv_estimator", _is("gae", "reinforce_plus_plus")),
    (("algorithm.lam", "worker.critic.*"), "algorithm.adv_estimator", _is("gae")),
    (("algorithm.kl_*", "worker.ref.*"), "algorithm.disable_kl", _is(False)),
    (("algorithm.kl_target", "algorithm.kl_horizon"), "algorithm.kl_type", _is("adaptive")),
    (("algorithm.rollout_is_threshold",), "algorithm.rollout_is", _is_not("none")),
    (("algorithm.rollout_mask_low",), "algorithm.rollout_mask", _is_not("none", "k3")),
    (("algorithm.rollout_mask_high",), "algorithm.rollout_mask", _is_not("none")),
    (("algorithm.overlong_penalty",), "algorithm.overlong_buffer", _is_over(0)),
    (("algorithm.filter_*", "trainer.max_try_make_batch"), "algorithm.online_filtering", _is(True)),
    (("algorithm.filter_stop",), "algorithm.filter_oversample", _is_over(1)),
    (
        ("worker.actor.clip_ratio_low", "worker.actor.clip_ratio_high"),
        "worker.actor.loss_type", _is_not("sapo", "kl_cov"),
    ),
    (("worker.actor.clip_ratio_dual",), "worker.actor.loss_type", _is("default")),
    (("worker.actor.tau_*",), "worker.actor.loss_type", _is("sapo")),
    (("worker.actor.kl_cov_*",), "worker.actor.loss_type", _is("kl_cov")),
    (("worker.actor.max_grad_norm",), "worker.actor.optim.strategy", _is_not("muon")),
    *(
        ((f"worker.{part}.optim.{key}",), f"worker.{part}.optim.{other}", is_met)
        for part in ("actor", "critic")
        for key, other, is_met in (
            ("min_lr_ratio", "lr_scheduler_type", _is_not("constant")), ("muon_lr", "strategy", _is("muon")),
        )
    ),
    (  # not server_urls, nor max_staleness_steps: they are refused
        tuple(
            f"worker.rollout.{key}"
            for key in (
                "num_servers", "server_devices", "server_host", "server_key_variable", "server_start_seconds",
                "server_timeout_seconds", "servers_gone_seconds", "request_timeout_seconds", "max_in_flight",
                "weight_transfer", "weight_swap",
            )
        ),
        "worker.rollout.engine", _is("server"),
    ),
    (("worker.actor.model.lora.*",), "worker.actor.model.lora.rank", _is_over(0)),
    (("worker.reward.cos_len_reward_config.*",), _REWARD, _is("openr1", "openr1_vllm", "openr1_wo_LMM")),
    (("worker.reward.judge.*",), _REWARD, _is("openr1", "openr1_vllm")),
    (("trainer.best_metric",), "trainer.val_freq", _is_over(0)),
)  # fmt: skip


def without_effect(config: RunConfig, given: Iterable[str]) -> list[str]:
    """Return a line that names the keys without effect, and what leaves them so; none without any.

    Args: given: keys that the user's files and the command line set. One with its default, or with 0, false or nothing,
        asks for nothing; a validation alone reads a training's configuration.
    """
    given, default = set(given), RunConfig()
    if config.trainer.val_only:
        return []
    found: dict[str, list[str]] = {}
    for key in filter(given.__contains__, leaf_types()):
        value = value_at(config, key)
        if not value or value == value_at(default, key):
            continue
        for patterns, other, is_met in _NEEDS:
            if any(fnmatch(key, pattern) for pattern in patterns) and not _holds(config, other, is_met):
                found.setdefault(_setting(config, other), []).append(key)
                break
    reasons = [f"{', '.join(keys)} ({setting})" for setting, keys in found.items()]
    return [f"keys without effect: {'; '.join(reasons)}"] if reasons else []


def _rewards(config: RunConfig) -> list[Any]:
    reward = config.worker.reward
    return [entry.get("function") for entry in reward.functions] or [reward.reward_function]


def _holds(config: RunConfig, other: str, is_met: Callable[[Any], bool]) -> bool:
    if other == _REWARD:
        return any(map(is_met, _rewards(config)))
    value = value_at(config, other)
    return is_met(value) or (isinstance(value, str) and names_a_file(value))


def _setting(config: RunConfig, other: str) -> str:
    if other == _REWARD and config.worker.reward.functions:
        return f"worker.reward.functions: {', '.join(map(str, _rewards(config)))}"
    return f"{other}={in_yaml(value_at(config, other))}"
