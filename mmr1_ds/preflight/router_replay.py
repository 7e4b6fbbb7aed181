"""Checks between worker.actor.router_replay and the rest of the run."""

from __future__ import annotations

import os

from mmr1_ds.config.schema import RunConfig
from mmr1_ds.errors import UserError

V1_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # vLLM's own; 0 chooses the runner that gpu-check compares with


def check_router_replay(config: RunConfig) -> None:
    """Raises: UserError where nothing could be replayed, or something else than the mode says."""
    actor, rollout, mode = config.worker.actor, config.worker.rollout, config.worker.actor.router_replay.mode
    if mode == "disabled" or config.trainer.val_only:
        return
    key = f"worker.actor.router_replay.mode={mode}"
    if mode == "R2":
        if actor.ulysses_size > 1:
            raise UserError(
                f"{key} notes the experts of whole sequences, worker.actor.ulysses_size={actor.ulysses_size} cuts "
                "them; set R3, or ulysses_size to 1"
            )
        if actor.ppo_epochs == 1 and config.data.rollout_batch_size == actor.global_batch_size:
            raise UserError(
                f"{key} replays the experts of the policy before the update, which the only optimiser step of a batch "
                "starts from; set R3, or worker.actor.global_batch_size below data.rollout_batch_size"
            )
        return
    if rollout.engine in ("hf", "server"):
        raise UserError(
            f"{key} needs the experts that vLLM chose in the ranks, worker.rollout.engine={rollout.engine} does not "
            "bring them; set worker.rollout.engine=vllm, or R2"
        )
    if os.environ.get(V1_RUNNER) == "0":
        raise UserError(
            f"{key}: vLLM hands out the experts by its V2 model runner alone, and {V1_RUNNER}=0 asks for V1; unset it, "
            "or set R2"
        )
    if rollout.partial is not None:
        raise UserError(
            f"{key}: with worker.rollout.partial={rollout.partial} the parts of a response are sampled by several "
            "policies, each with experts of its own; leave partial out, or set R2"
        )
