"""The check of every key by itself, against the range or choices in its annotation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

from mmr1_ds.config.keys import leaf_types, limits, nearest
from mmr1_ds.config.redaction import check_variable
from mmr1_ds.config.schema import OneOf, Range, RunConfig
from mmr1_ds.errors import UserError

MOST_ERROR = 0.2  # adaptive KL: a relative error counts for this at most


def value_at(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def check_choices(config: RunConfig) -> None:
    """Check every key that takes one of several words. Raises: UserError for another word."""
    for key, limit in limits().items():
        value = value_at(config, key)
        if isinstance(limit, OneOf) and value is not None:
            _check(key, value, limit)
    for key in ("worker.rollout.server_key_variable", "worker.reward.judge.key_variable"):
        check_variable(key, value_at(config, key))


def check_ranges(config: RunConfig) -> None:
    """Check every number. Raises: UserError for one outside its key's range, or not finite."""
    for key in leaf_types():
        value = value_at(config, key)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key} must be finite, got {number}")
        limit = limits().get(key)
        if isinstance(limit, Range) and value is not None:
            _check(key, value, limit)


def check_loggers(names: Sequence[str]) -> None:
    """Check `trainer.logger`. Raises: UserError that lists the known names."""
    _check("trainer.logger", names, limits()["trainer.logger"])


def _check(key: str, value: Any, limit: Range | OneOf) -> None:
    is_list = isinstance(value, list | tuple)
    for item in value if is_list else [value]:
        if item not in limit:
            advice = limit.reason if isinstance(limit, Range) else ""
            if isinstance(limit, OneOf) and (close := nearest(item, limit.choices)):
                advice = f"did you mean {close}?"
            text = f"{key} must {'each ' if is_list else ''}be {limit}, got {item}"
            raise UserError(f"{text}; {advice}" if advice else text)
