"""Checks of what a run asks of its model's family, by the table of those that were tested."""

from __future__ import annotations

from mmr1_ds.config.derived import resolved_critic, trains_critic
from mmr1_ds.config.families import FAMILIES
from mmr1_ds.config.schema import RunConfig
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.models import balances_experts, model_type

NO_ADAPTERS_BESIDE_EXPERTS = (
    "worker.rollout.lora_sync=adapters is not for mixtures of experts; set worker.rollout.lora_sync=merged"
)


def check_family(config: RunConfig, model_type: str) -> None:
    """Check that the actor's family can do what the run asks of it.

    Args: model_type: of the actor's config.json. Raises: UserError naming the key that it cannot follow.
    """
    family, actor = FAMILIES.get(model_type), config.worker.actor
    if actor.ulysses_size > 1:
        key = f"worker.actor.ulysses_size={actor.ulysses_size}"
        if family is None:
            raise UserError(f"{key} needs packed sequences, but {model_type} models are padded; set it to 1")
        if family.carries_states:
            raise UserError(
                f"{key} cuts sequences, along which layers of {model_type} models carry a state; set it to 1"
            )
        if balances_experts(actor.model) and not config.trainer.val_only:
            place = "" if family is None or not family.takes_images else ".text_config"
            raise UserError(
                f"{key} cannot balance experts, and {actor.model.model_path} has output_router_logits=true; set "
                f"worker.actor.model.override_config{place}.output_router_logits=false"
            )
    if config.worker.rollout.lora_sync == "adapters" and family is not None and family.has_experts:
        raise UserError(NO_ADAPTERS_BESIDE_EXPERTS)
    mode = actor.router_replay.mode
    if mode != "disabled" and not config.trainer.val_only and (family is None or not family.has_experts):
        replayed = ", ".join(name for name, known in FAMILIES.items() if known.has_experts)
        raise UserError(
            f"worker.actor.router_replay.mode={mode} replays the routers of {replayed} models, not of {model_type}; "
            "set it to disabled"
        )


def untested_critic(config: RunConfig) -> list[str]:
    """Return a line on a critic of another family than the actor's; none for a hub model that was not looked at."""
    if not trains_critic(config):
        return []
    critic, actor = model_type(resolved_critic(config).model), model_type(config.worker.actor.model)
    if critic is None or actor is None or critic == actor:
        return []
    return [f"worker.critic.model is a {critic} model: critics were tested with the actor's family alone, {actor}"]


def untested(config: RunConfig, model_type: str) -> list[str]:
    """Return what the run asks of its model that the family was not tested with, a line each."""
    family, rank = FAMILIES.get(model_type), config.worker.actor.model.lora.rank
    if family is None:
        return [
            f"{model_type} models were tested with nothing (docs/models.md): in the first steps "
            "rollout/logprob_diff_max should be under 1e-4 in float32"
        ]
    lines = []
    if config.worker.actor.ulysses_size > 1 and not family.ulysses:
        lines.append(f"worker.actor.ulysses_size was not tested with {family.name}")
    if rank > 0 and family.lora == "by name":
        lines.append(
            f"worker.actor.model.lora was not tested with {family.name}: adapters find its layers by their names"
        )
    if rank > 0 and family.has_experts:
        lines.append(
            f"worker.actor.model.lora: the experts and routers of {family.name} get no adapters and stay frozen"
        )
    if config.worker.rollout.engine == "server" and family.servers != "tested":
        lines.append(f"worker.rollout.engine=server was not tested with {family.name}, only vLLM in the ranks was")
    return lines
