"""The learning-rate schedule: a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from mmr1_ds.config import OptimConfig


def learning_rate(optim: OptimConfig, update: int, num_updates: int) -> float:
    """Learning rate of optimiser step `update` (from 0) of `num_updates`.

    Linear warm-up to lr, then constant, cosine or linear decay to min_lr_ratio * lr at the last step.
    """
    warmup = optim.lr_warmup_steps
    if warmup is None:
        warmup = int(optim.lr_warmup_ratio * num_updates)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, num_updates - 1 - warmup))
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[optim.lr_scheduler_type]
    floor = 1.0 if optim.lr_scheduler_type == "constant" else optim.min_lr_ratio
    return optim.lr * (floor + (1.0 - floor) * decay)
