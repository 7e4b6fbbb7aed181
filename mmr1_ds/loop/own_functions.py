"""A try of a loss, an average and an estimator of the user's own, on made-up numbers, before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmr1_ds.algorithm.aggregation import GlobalBatch, Segments, token_weights
from mmr1_ds.algorithm.experience import StepRewards, estimate
from mmr1_ds.algorithm.losses import PolicyLoss
from mmr1_ds.config import ActorConfig, AlgorithmConfig
from mmr1_ds.config.schema import names_a_file
from mmr1_ds.config.user_files import load_function
from mmr1_ds.errors import UserError, first_line

_LENGTHS = [3, 1, 4, 2]  # tokens of two groups of two responses


class _OneRank:
    """The totals of a run on one rank."""

    def sum(self, values: Any, stage: str) -> dict[str, float]:
        return dict(values)

    max = sum


def try_functions(actor: ActorConfig, algorithm: AlgorithmConfig) -> None:
    """Call each function of the user's own files once, as training does.

    Raises: UserError where one cannot be loaded, fails, or returns what training cannot use.
    """
    random, num_tokens = np.random.default_rng(0), sum(_LENGTHS)
    segments = Segments.of(_LENGTHS)

    def loss() -> torch.Tensor:
        logprobs_T, old_T, advantages_T = (torch.tensor(row) for row in random.normal(-1, 0.3, (3, num_tokens)))
        policy_loss = PolicyLoss(actor.loss_type, actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_dual)
        loss_T, figures = policy_loss(logprobs_T.requires_grad_(), old_T, advantages_T, segments)
        if not loss_T.requires_grad:
            raise ValueError("the loss has no gradient")
        for name, values_T in figures.items():
            _check_shape(name, values_T.numpy())
        return loss_T.detach()

    def average() -> torch.Tensor:
        return token_weights(actor.loss_avg_mode, segments, GlobalBatch(float(num_tokens), 4.0), 4.0)

    def advantages() -> np.ndarray:
        rewards_GN = np.array([[1.0, 0.0], [0.25, 0.5]])
        token_rewards_T = random.normal(size=num_tokens)
        known_GN, lengths_B = np.ones((2, 2), dtype=bool), np.array(_LENGTHS)
        step = StepRewards(rewards_GN, known_GN, lengths_B, token_rewards_T, None, _OneRank(), algorithm)
        return estimate(algorithm.adv_estimator, step)

    _try("worker.actor.loss_type", actor.loss_type, loss)
    _try("worker.actor.loss_avg_mode", actor.loss_avg_mode, average)
    _try("algorithm.adv_estimator", algorithm.adv_estimator, advantages)


def _try(key: str, name: str, call: Callable[[], Any]) -> None:
    if not names_a_file(name):
        return
    load_function(key, name)
    try:
        values = np.asarray(call())
        _check_shape("the result", values)
        if not np.isfinite(values).all():
            raise ValueError("the result is not finite")
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{key}: {name} fails on a try with {len(_LENGTHS)} responses of {sum(_LENGTHS)} tokens: "
            f"{type(error).__name__}: {first_line(error)}; its signature is in docs/training.md"
        ) from error


def _check_shape(name: str, values: np.ndarray) -> None:
    if values.shape != (sum(_LENGTHS),):
        raise ValueError(f"{name} has shape {values.shape}, not one number for each of {sum(_LENGTHS)} tokens")
