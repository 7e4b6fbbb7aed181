"""Finding the reward function a config names."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from mmr1_ds.config import RewardConfig, user_files
from mmr1_ds.config.schema import names_a_file
from mmr1_ds.errors import UserError
from mmr1_ds.rewards.interfaces import ON_REQUEST, REWARD_TYPES, TOGETHER, adapt
from mmr1_ds.rewards.unscored import NotApplicable, Unscored

JUDGED = ("openr1", "openr1_vllm")  # upstream's names for two kinds of server; one client serves both
BUILT_IN = ("math", "r1v", *JUDGED, "openr1_wo_LMM")

RewardFunction = Callable[[list[dict[str, Any]]], Any]  # a list of items -> a list of scores


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class LoadedReward:
    """A reward function with its keyword arguments bound."""

    score: RewardFunction
    together: str = "one"  # which responses it must see in one call, one of TOGETHER
    takes: tuple[str, ...] = ()  # which of interfaces.ON_REQUEST an item must have
    warm_up: Callable[[], None] = _nothing  # what a built-in imports late; not to be charged to the first response


def split_reference(reward_function: str) -> tuple[str, str]:
    """Split `path/file.py:function` into (path, function).

    Raises: UserError when it is neither built in nor an existing file. No user code runs.
    """
    if not names_a_file(reward_function):
        raise UserError(
            f"worker.reward.reward_function {reward_function!r} is unknown; use {', '.join(BUILT_IN)} or "
            "path/file.py:function"
        )
    return user_files.split_reference("worker.reward.reward_function", reward_function)


_RESULT_KEYS = ("overall", "accuracy")  # which a part of several functions may not take


def check_reward_config(config: RewardConfig) -> None:
    """Check the section cheaply, without running user code; the judge's key must be in the environment.

    Raises: UserError for an unknown name, a missing file, or a judge that cannot be asked.
    """
    if config.reward_type is not None and config.reward_type not in REWARD_TYPES:
        known = "batch, sequential, group or null"
        raise UserError(f"worker.reward.reward_type must be {known}, got {config.reward_type!r}")
    if config.functions:
        default = RewardConfig().reward_function
        if config.reward_function != default:
            raise UserError(
                f"worker.reward.reward_function={config.reward_function} is not used beside worker.reward.functions; "
                f"name it there and leave it out here, or set it to {default}"
            )
        if config.reward_function_kwargs:
            raise UserError(
                "worker.reward.reward_function_kwargs is not used beside worker.reward.functions; give kwargs there"
            )
        for one in each_function(config):
            check_reward_config(one)
        return
    if config.reward_function not in BUILT_IN:
        split_reference(config.reward_function)
        return
    if config.reward_function in JUDGED:
        _check_judge(config)
    load_reward_function(reward_setup(config, max_response_length=1))  # whether its kwargs fit
    weight = config.reward_function_kwargs.get("format_weight", 0.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        # Past these bounds a wrong answer in the right format is the better one.
        raise UserError(
            f"worker.reward: format_weight of {config.reward_function!r} must be a number in [0, 1], got {weight!r}"
        )


def each_function(config: RewardConfig) -> list[RewardConfig]:
    """Return the section of each of `functions` as if it were the only one, or the section itself without them.

    Raises: UserError for an entry that is no {function, weight, kwargs}.
    """
    found = []
    for place, entry in enumerate(config.functions):
        key = f"worker.reward.functions[{place}]"
        if not isinstance(entry, dict) or "function" not in entry or entry.keys() - {"function", "weight", "kwargs"}:
            raise UserError(f"{key} must be like {{function: my.py:f, weight: 0.5, kwargs: {{}}}}, got {entry!r}")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"{key}.weight must be a finite number, got {weight!r}")
        if not isinstance(entry.get("kwargs") or {}, dict):
            raise UserError(f"{key}.kwargs must be a mapping, got {entry['kwargs']!r}")
        if str(entry["function"]).rpartition(":")[2] in _RESULT_KEYS:
            raise UserError(f"{key}.function={entry['function']!r}: its name is that of a result's own key; rename it")
        kwargs = entry.get("kwargs") or {}
        one = replace(config, reward_function=str(entry["function"]), reward_function_kwargs=kwargs, functions=[])
        found.append(one)
    return found or [config]


def reward_weights(config: RewardConfig) -> dict[str, float]:
    """Return the weight of each of `functions` by the name under which its number is a part of the reward."""
    found: dict[str, float] = {}
    for one, entry in zip(each_function(config), config.functions, strict=bool(config.functions)):
        name = one.reward_function.rpartition(":")[2]
        found[name if name not in found else f"{name}_{len(found) + 1}"] = float(entry.get("weight", 1.0))
    return found


def _check_judge(config: RewardConfig) -> None:
    from mmr1_ds.rewards.judge import read_key  # late: urllib takes longer than all the rest

    judge, name = config.judge, config.reward_function
    if not judge.base_urls:
        raise UserError(
            f"worker.reward.judge.base_urls is empty; {name} asks a language model, give the address of its server, "
            "like ['http://localhost:8000/v1'], or use openr1_wo_LMM"
        )
    if not judge.model:
        raise UserError(f"worker.reward.judge.model is not set; {name} needs the name that the server gives its model")
    for url in judge.base_urls:
        if "@" in url or "?" in url:
            # Not shown: it holds a password, or a key among its parameters.
            raise UserError("worker.reward.judge.base_urls holds a password; use worker.reward.judge.key_variable")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"worker.reward.judge.base_urls: {url!r} is no address of the form http://host:port/v1")
    read_key(judge.key_variable)


def reward_setup(config: RewardConfig, max_response_length: int) -> dict[str, Any]:
    """Return what a reward process needs, as JSON; it names the key's variable, never the key."""
    if config.functions:
        parts = [reward_setup(one, max_response_length) for one in each_function(config)]
        kwargs = {str(place): part["kwargs"] for place, part in enumerate(parts)}
        return {"parts": parts, "weights": reward_weights(config), "kwargs": kwargs}
    lengths = asdict(config.cos_len_reward_config)
    max_length = lengths.pop("max_length") or max_response_length
    return {
        "reward_function": config.reward_function,
        "kwargs": dict(config.reward_function_kwargs),
        "reward_type": config.reward_type,
        "cosine_values": lengths,
        "max_length": max_length,
        "judge": asdict(config.judge),
    }


def load_reward_function(setup: Mapping[str, Any]) -> LoadedReward:
    """Import the reward function and bind its keyword arguments. It runs the user's module: for worker processes.

    Args: setup: what `reward_setup` returns.
    Raises: UserError when the function is missing or does not take these arguments; what the module itself raises.
    """
    if "parts" in setup:
        return _weighted_sum(setup)
    reward_function, kwargs = setup["reward_function"], setup["kwargs"]
    if reward_function in BUILT_IN:
        score, *_ = adapt(_built_in(setup), kwargs, "batch", repr(reward_function))
        return LoadedReward(score, warm_up=_import_math_verify)
    path, name = split_reference(reward_function)
    module = user_files.import_file(path)
    function = module.__dict__.get(name)
    if not callable(function):
        raise UserError(f"worker.reward.reward_function: {reward_function!r} has no function {name!r}")
    reward_type = setup["reward_type"] or module.__dict__.get("REWARD_TYPE")
    if reward_type not in (None, *REWARD_TYPES):
        known = "batch, sequential or group"
        raise UserError(f"worker.reward.reward_function: REWARD_TYPE is {reward_type!r}; use {known}")
    return LoadedReward(*adapt(function, kwargs, reward_type, repr(reward_function)))


def _weighted_sum(setup: Mapping[str, Any]) -> LoadedReward:
    """The weighted sum of several functions; each one's own number is a part under its name.

    The accuracy is that of the first function that gives one. A function that does not apply to a response adds
    nothing there, as in TRL; the response is unscored where none applies, or where one could not judge it.
    """
    loaded = [load_reward_function(part) for part in setup["parts"]]

    def score(items: list[dict[str, Any]]) -> list[dict[str, Any] | Unscored]:
        totals: list[dict[str, Any]] = [{"overall": 0.0} for _ in items]
        unscored: dict[int, Unscored] = {}  # place -> why; beside the totals, whose keys are the functions' own
        for (name, weight), reward in zip(setup["weights"].items(), loaded, strict=True):
            for place, (total, found) in enumerate(zip(totals, reward.score(items), strict=True)):
                if isinstance(found, NotApplicable):
                    total[name] = found
                elif isinstance(found, Unscored):
                    unscored[place] = found
                else:
                    total[name] = overall = _overall(found, name)
                    total["overall"] += weight * overall
                    rest = found if isinstance(found, Mapping) else {}
                    total |= {key: rest[key] for key in rest if key not in total}
        names = setup["weights"]
        return [unscored.get(place) or _unless_absent(total, names) for place, total in enumerate(totals)]

    def warm_up() -> None:
        for reward in loaded:
            reward.warm_up()

    together = max((reward.together for reward in loaded), key=TOGETHER.index)
    takes = tuple(name for name in ON_REQUEST if any(name in reward.takes for reward in loaded))
    return LoadedReward(score, together, takes, warm_up)


def _overall(found: object, name: str) -> float:
    """The number that a function gave. Raises: ValueError for text, which alone would be no result either."""
    value = found.get("overall") if isinstance(found, Mapping) else found
    if not hasattr(value, "__float__"):
        raise ValueError(f"{name} returned {found!r:.200}; want a number, or a dictionary with the number 'overall'")
    return float(value)


def _unless_absent(total: dict[str, Any], names: Collection[str]) -> dict[str, Any] | Unscored:
    absent = [total[name] for name in names if isinstance(total[name], Unscored)]
    return absent[0] if len(absent) == len(names) else total


def _built_in(setup: Mapping[str, Any]) -> Callable[..., Any]:
    name = setup["reward_function"]
    if name in ("math", "r1v"):
        function: Callable[..., Any] = importlib.import_module(f"mmr1_ds.rewards.{name}").compute_score
        return function
    from mmr1_ds.rewards.judge import build_judge
    from mmr1_ds.rewards.openr1 import OpenR1Reward

    assert name in (*JUDGED, "openr1_wo_LMM"), name
    judge = build_judge(setup["judge"]) if name in JUDGED else None
    return OpenR1Reward(setup["cosine_values"], setup["max_length"], judge).compute_score


def _import_math_verify() -> None:
    """What comparing formulas needs (half a second)."""
    import math_verify  # noqa: F401
