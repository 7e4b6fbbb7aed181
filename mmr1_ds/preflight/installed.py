"""Packages that the keys of a run ask for, looked for before anything is loaded."""

from __future__ import annotations

import importlib.util

from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import returns_experts
from mmr1_ds.errors import UserError, remedy, require
from mmr1_ds.rewards.loading import BUILT_IN, each_function


def check_installed(config: RunConfig) -> None:
    """Nothing is imported. Raises: UserError for a package that a key of the run needs and that is not installed."""
    actor, rollout = config.worker.actor, config.worker.rollout
    if actor.model.lora.rank > 0 and importlib.util.find_spec("peft") is None:
        raise UserError(
            f"worker.actor.model.lora.rank={actor.model.lora.rank} but peft is not installed; {remedy('gpu')} "
            "or set it to 0"
        )
    # Without it every response would count as one that could not be scored.
    for name in (one.reward_function for one in each_function(config.worker.reward)):
        if name in BUILT_IN:
            require("gpu", "math_verify", purpose=f"the reward {name}")
    if rollout.engine == "server":
        require("gpu", "aiohttp", "msgspec", purpose="worker.rollout.engine=server")
    if importlib.util.find_spec("vllm") is None:
        _check_without_vllm(config)


def _check_without_vllm(config: RunConfig) -> None:
    """Where vLLM is not installed, engine=auto samples by transformers, which lacks some of what vLLM has."""
    actor, rollout = config.worker.actor, config.worker.rollout
    asked = {
        f"worker.rollout.engine={rollout.engine}": (rollout.engine in ("vllm", "server"), "engine=hf"),
        "worker.actor.model.fp32_lm_head=true": (actor.model.fp32_lm_head, "it to false"),
        "worker.rollout.lora_sync=adapters": (rollout.lora_sync == "adapters", "merged"),
        "worker.rollout.shared_queue=true": (rollout.shared_queue, "it to false"),
        "worker.actor.offload_states=true": (actor.offload_states, "it to false"),
        f"worker.actor.ulysses_size={actor.ulysses_size}": (actor.ulysses_size > 1, "it to 1"),
        "worker.actor.router_replay.mode=R3": (returns_experts(config), "it to R2"),
    }
    for key, (is_asked, other) in asked.items():
        if is_asked:
            raise UserError(f"{key} but vllm is not installed; {remedy('vllm')} or set {other}")
