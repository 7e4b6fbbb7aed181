"""The interfaces of reward functions: EasyR1's present one and its earlier ones.

present     compute_score(reward_inputs: list[dict], **kwargs) -> list[dict]     batch
            compute_score(reward_input: dict, **kwargs) -> dict                  sequential
earlier     compute_score(predicts: list[str], ground_truths: list[str]) -> list[dict]
            compute_score(predict_str: str, ground_truth: str) -> dict | float

Batch or sequential is what `worker.reward.reward_type` says, else the file's `REWARD_TYPE`, else what the names of
the arguments say. A function of two texts is recognised by its second argument, which has no default and a known name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmr1_ds.errors import UserError

REWARD_TYPES = ("batch", "sequential")
_ONE_ITEM_NAMES = ("reward_input", "item", "sample")  # names of a function's only argument; any other name takes a list
_TRUTH_NAMES = ("ground_truth", "truth", "answer", "solution", "label", "target", "reference")  # or their plurals


@dataclass(frozen=True)
class CallStyle:
    """The way one function is called."""

    is_sequential: bool  # one response a call, not a list
    takes_texts: bool  # (response, ground truth), not a dictionary

    @property
    def num_arguments(self) -> int:
        return 2 if self.takes_texts else 1


def call_style(required: Sequence[str], reward_type: str | None) -> CallStyle:
    """Return how to call a function. Args: required: positional arguments without a default or a kwarg."""
    takes_texts = len(required) > 1 and required[1].removesuffix("s") in _TRUTH_NAMES
    if reward_type is not None:
        return CallStyle(reward_type == "sequential", takes_texts)
    if takes_texts:
        return CallStyle(not required[1].endswith("s"), takes_texts)  # ground_truth, ground_truths
    return CallStyle(bool(required) and required[0] in _ONE_ITEM_NAMES, takes_texts)


def adapt(
    function: Callable[..., Any], kwargs: Mapping[str, Any], reward_type: str | None, where: str
) -> Callable[[list[dict[str, Any]]], Any]:
    """Wrap the function in the present batch interface and bind its keyword arguments.

    Args: reward_type: batch, sequential or None; where: names the function in errors.
    Raises: UserError when the function does not take these arguments.
    """
    signature = inspect.signature(function)
    style = call_style(_required(signature, kwargs), reward_type)
    try:
        signature.bind(*[[]] * style.num_arguments, **kwargs)
    except TypeError as error:
        # Without this every response of the run would fail with the same TypeError.
        raise UserError(f"worker.reward.reward_function_kwargs do not fit {where}: {error}") from error
    bound = functools.partial(function, **kwargs)

    def score(items: list[dict[str, Any]]) -> Any:
        if style.is_sequential:
            return [bound(*_texts(item)) if style.takes_texts else bound(item) for item in items]
        if not style.takes_texts:
            return bound(items)
        return bound([item["response"] for item in items], [item["ground_truth"] for item in items])

    return score


def _required(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in positional and parameter.default is inspect.Parameter.empty and name not in kwargs
    ]


def _texts(item: Mapping[str, Any]) -> tuple[str, str]:
    return item["response"], item["ground_truth"]
