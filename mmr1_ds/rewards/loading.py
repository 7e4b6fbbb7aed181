"""Finding the reward function a config names."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmr1_ds.errors import UserError

BUILT_IN = ("math",)

RewardFunction = Callable[[list[dict[str, Any]]], Any]  # a list of items -> a list of scores


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class LoadedReward:
    """A reward function with its keyword arguments bound."""

    score: RewardFunction
    warm_up: Callable[[], None] = _nothing  # what a built-in imports late; not to be charged to the first response


def split_reference(reward_function: str) -> tuple[str, str]:
    """`path/file.py:function` -> (path, function).

    Raises: UserError when it is neither built in nor an existing file. Runs no user code.
    """
    path, _, name = os.path.expanduser(reward_function).rpartition(":")
    if not path.endswith(".py") or not name:
        raise UserError(
            f"worker.reward.reward_function {reward_function!r} is unknown; use {', '.join(BUILT_IN)} or "
            "path/file.py:function"
        )
    if not os.path.isfile(path):
        raise UserError(f"worker.reward.reward_function: no such file {path!r}")
    return path, name


def check_reward_function(reward_function: str) -> None:
    """Raises: UserError for an unknown name or a missing file; cheap, for checks before anything loads."""
    if reward_function not in BUILT_IN:
        split_reference(reward_function)


def load_reward_function(reward_function: str, kwargs: Mapping[str, Any]) -> LoadedReward:
    """Import the reward function and bind its keyword arguments. Runs the user's module: for worker processes.

    EasyR1's `REWARD_TYPE = "sequential"` marks a function of one item; it is wrapped.
    Raises: UserError when the function is missing or does not take these arguments; what the module itself raises.
    """
    if reward_function in BUILT_IN:
        module = importlib.import_module(f"mmr1_ds.rewards.{reward_function}")
        name = "compute_score"
    else:
        path, name = split_reference(reward_function)
        module = _import_file(path)
    function = module.__dict__.get(name)
    if not callable(function):
        raise UserError(f"worker.reward.reward_function: {reward_function!r} has no function {name!r}")
    try:
        inspect.signature(function).bind([], **kwargs)
    except TypeError as error:
        # Without this every response of the run would fail with the same TypeError.
        raise UserError(f"worker.reward.reward_function_kwargs do not fit {reward_function!r}: {error}") from error
    bound = functools.partial(function, **kwargs)
    if module.__dict__.get("REWARD_TYPE") == "sequential":
        return LoadedReward(lambda items: [bound(item) for item in items])
    return LoadedReward(bound, module.warm_up) if reward_function in BUILT_IN else LoadedReward(bound)


def _import_file(path: str) -> Any:
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # the file may import its neighbours
    spec = importlib.util.spec_from_file_location("user_reward", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look modules up by name
    spec.loader.exec_module(module)
    return module
