"""Checks of groups whose sizes differ, `worker.rollout.n_min` and `n_max`."""

from __future__ import annotations

from mmr1_ds.config.schema import RunConfig, names_a_file
from mmr1_ds.errors import UserError


def check_group_sizes(config: RunConfig) -> None:
    """Check the bounds of group sizes, and that nothing else asks for equal ones. Raises: UserError."""
    data, algorithm, rollout = config.data, config.algorithm, config.worker.rollout
    if config.trainer.val_only or (rollout.n_min is None and rollout.n_max is None):
        return
    key = f"worker.rollout.n_min={_text(rollout.n_min)}, n_max={_text(rollout.n_max)}"
    if rollout.n_min is None or rollout.n_max is None:
        raise UserError(f"{key}: one alone says nothing; set both, or neither")
    if not rollout.n_min <= rollout.n <= rollout.n_max:
        raise UserError(f"{key} do not enclose the mean, worker.rollout.n={rollout.n}; lower n_min or raise n_max")
    if data.sampling_strategy != "curriculum" or data.curriculum_refresh != "online":
        raise UserError(
            f"{key} follow from beliefs, which only data.sampling_strategy=curriculum with "
            "data.curriculum_refresh=online has; set these two, or leave the bounds out"
        )
    if names_a_file(algorithm.adv_estimator):
        raise UserError(
            f"{key}: algorithm.adv_estimator={algorithm.adv_estimator} is handed groups of one size; leave the bounds "
            "out, or take a built-in estimator"
        )
    if algorithm.online_filtering:
        raise UserError(
            f"{key}: algorithm.online_filtering keeps some groups alone, whose mean is not worker.rollout.n; use one "
            "of them"
        )
    if rollout.partial is not None:
        raise UserError(
            f"{key}: with worker.rollout.partial={rollout.partial} a batch is of the groups that finish first, whose "
            "mean is not worker.rollout.n; use one of them"
        )
    if config.worker.actor.ulysses_size > 1:
        raise UserError(
            f"{key}: worker.actor.ulysses_size={config.worker.actor.ulysses_size} cuts sequences of which every rank "
            "has as many; set it to 1, or leave the bounds out"
        )


def _text(bound: int | None) -> str:
    return "null" if bound is None else str(bound)
