"""The interfaces of reward functions: EasyR1's present one and its earlier ones, verl's and TRL's.

present     compute_score(reward_inputs: list[dict], **kwargs) -> list[dict]     batch
            compute_score(reward_input: dict, **kwargs) -> dict                  sequential
            compute_score(group: list[dict], **kwargs) -> list[dict]             group
earlier     compute_score(predicts: list[str], ground_truths: list[str]) -> list[dict]
            compute_score(predict_str: str, ground_truth: str) -> dict | float
verl        compute_score(data_source, solution_str, ground_truth, extra_info=None) -> dict | float
            compute_score(data_sources, solution_strs, ground_truths, extra_infos) -> list[dict | float]
TRL         reward(prompts, completions, **columns) -> list[float]

Columns of the row (`data.reward_columns`) are further keys of a dictionary, keyword arguments in TRL's form, and
data_source and extra_info in verl's. TRL's prompts and completions are lists of messages where the row's prompt is one,
and texts where it is a text, as in TRL.

verl's is told by the name solution_str or solution_strs, TRL's by completions or completion_ids; both are called by
keyword. An async function is awaited.
Batch, group or sequential is what `worker.reward.reward_type` says, else the file's `REWARD_TYPE`, else what the names
of the arguments say. A batch is all responses of a rank, a group those to one prompt; a list that nobody calls either
holds one response. A function of two texts is recognised by its second argument, which has no default and a known name.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmr1_ds.errors import UserError
from mmr1_ds.rewards.unscored import NotApplicable

REWARD_TYPES = ("batch", "sequential", "group")
TOGETHER = ("one", "group", "batch")  # what a function sees in one call, from few responses to many
NO_ARGUMENT = (
    "names no argument, so that no one knows how to call it; a reward takes one list of dictionaries, or names "
    "completions as TRL's, or solution_str as verl's"
)
_ONE_ITEM_NAMES = ("reward_input", "item", "sample")  # names of a function's only argument; any other name takes a list
_GROUP_NAMES = ("group", "group_inputs", "reward_group")  # names of a function's only argument that takes a group
_TRUTH_NAMES = ("ground_truth", "truth", "answer", "solution", "label", "target", "reference")  # or their plurals

# An argument that tells whose interface it is -> that interface.
_KEYWORDS = {"solution_str": "verl", "solution_strs": "verl_lists", "completions": "trl", "completion_ids": "trl"}
_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_TRL_TRUTHS = ("ground_truth", "answer", "solution", "label")  # TRL's examples give the ground truth these names
_NAME_IT = "name it in data.reward_columns"
_TEXTS = "completions are texts, because the rows' prompts are"
_MESSAGES = "completions are lists of messages, because the rows' prompts are"
_IDS = ("prompt_ids", "response_ids")
ON_REQUEST = (*_IDS, "messages")  # of an item: long, and few functions read them


@dataclass(frozen=True)
class CallStyle:
    """The way one function is called."""

    is_sequential: bool  # one response a call, not a list
    takes_texts: bool  # (response, ground truth), not a dictionary
    keywords: str = ""  # verl, verl_lists or trl: called by keyword, in that project's names
    together: str = "one"  # one of TOGETHER

    @property
    def num_arguments(self) -> int:
        return 2 if self.takes_texts else 1


def call_style(required: Sequence[str], by_keyword: Sequence[str], reward_type: str | None) -> CallStyle:
    """Return how to call a function.

    Args: required: positional arguments without a default or a kwarg; by_keyword: the likes that are keyword-only.
    """
    together = reward_type if reward_type in TOGETHER else "one"
    for name in (*required, *by_keyword):
        if name in _KEYWORDS:
            return CallStyle(name == "solution_str", False, _KEYWORDS[name], together)
    takes_texts = len(required) > 1 and required[1].removesuffix("s") in _TRUTH_NAMES
    if reward_type is not None:
        return CallStyle(reward_type == "sequential", takes_texts, together=together)
    if takes_texts:
        return CallStyle(not required[1].endswith("s"), takes_texts)  # ground_truth, ground_truths
    if required and required[0] in _GROUP_NAMES:
        return CallStyle(False, takes_texts, together="group")
    return CallStyle(bool(required) and required[0] in _ONE_ITEM_NAMES, takes_texts)


Items = list[dict[str, Any]]


def adapt(
    function: Callable[..., Any], kwargs: Mapping[str, Any], reward_type: str | None, where: str
) -> tuple[Callable[[Items], Any], str, tuple[str, ...]]:
    """Wrap the function in the present batch interface and bind its keyword arguments.

    Args: reward_type: one of REWARD_TYPES or None; where: names the function in errors.
    Returns: the function of a list of items, which responses it must see in one call, one of TOGETHER, and which of
        ON_REQUEST its items must have.
    Raises: UserError when the function does not take these arguments.
    """
    signature = inspect.signature(function)
    parameter = inspect.Parameter
    required = _required(signature, kwargs, parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    style = call_style(required, _required(signature, kwargs, parameter.KEYWORD_ONLY), reward_type)
    if style.keywords:
        named = _by_keyword(function, signature, kwargs, style.keywords, where)
        return *_in_parts(named, style.together), _taken(signature) if style.keywords == "trl" else ()
    if all(one.kind is parameter.VAR_KEYWORD for one in signature.parameters.values()):
        raise UserError(f"worker.reward.reward_function {where} {NO_ARGUMENT}")
    try:
        signature.bind(*[[]] * style.num_arguments, **kwargs)
    except TypeError as error:
        # Without this every response of the run would fail with the same TypeError.
        raise UserError(f"worker.reward: the kwargs do not fit {where}: {error}") from error
    bound = _awaited(functools.partial(function, **kwargs))

    def score(items: Items) -> Any:
        if style.is_sequential:
            return [bound(*_texts(item)) if style.takes_texts else bound(_with_columns(item)) for item in items]
        if not style.takes_texts:
            return bound([_with_columns(item) for item in items])
        return bound([item["response"] for item in items], [item["ground_truth"] for item in items])

    return *_in_parts(score, style.together), ()


def _in_parts(score: Callable[[Items], Any], together: str) -> tuple[Callable[[Items], Any], str]:
    """Have a function called with as many responses as it expects, where another one needs to see more of them."""

    def score_all(items: Items) -> Any:
        parts = _parts(items, together)
        if len(parts) == 1:
            return score(parts[0])
        found: list[Any] = []
        for part in parts:
            values = score(part)
            if not isinstance(values, (list, tuple)) or len(values) != len(part):
                raise ValueError(f"returned {values!r:.200}; want a list with one dictionary a response, {len(part)}")
            found += values
        return found

    return score_all, together


def _parts(items: Items, together: str) -> list[Items]:
    """The items without the number of their group, cut into calls."""
    if together == "batch":
        cut = [items]
    elif together == "one":
        cut = [[item] for item in items]
    else:
        cut = [list(part) for _, part in itertools.groupby(items, lambda item: item.get("group"))]
    return [[{key: item[key] for key in item if key != "group"} for item in part] for part in cut]


def _by_keyword(
    function: Callable[..., Any], signature: inspect.Signature, kwargs: Mapping[str, Any], keywords: str, where: str
) -> Callable[[Items], Any]:
    """Wrap a function that verl or TRL would call, with those of their arguments that it takes."""
    takes_all, offer = _takes_all(signature), _OFFERS[keywords]

    def arguments(items: Items) -> dict[str, Any]:
        offered = offer(items)
        return {name: offered[name] for name in offered if name in signature.parameters or takes_all} | dict(kwargs)

    try:
        signature.bind_partial(**arguments([{"response": "", "ground_truth": "", "prompt": "", "response_length": 0}]))
    except TypeError as error:
        project = keywords.partition("_")[0]
        raise UserError(f"worker.reward.reward_function {where}: {error}; {project} gives no such argument") from error
    awaited = _awaited(function)

    def called(items: Items) -> Any:
        given = arguments(items)
        try:
            signature.bind(**given)
        except TypeError as error:  # the columns are those of the row, so that only a call can tell
            raise TypeError(f"{error}; data.reward_columns hands over columns of the data") from None
        try:
            return awaited(**given)
        except KeyError as error:  # kwargs["rubric"]
            key = error.args[0] if error.args else None
            if keywords == "trl" and takes_all and isinstance(key, str) and key not in given:
                raise LookupError(f"no {key!r}; where that is a column of the data, {_NAME_IT}") from error
            raise
        except (TypeError, AttributeError) as error:
            hint = _form_hint(str(error), items) if keywords == "trl" else ""
            if hint:
                raise TypeError(f"{error}; {hint}") from error
            raise

    def score(items: Items) -> Any:
        if keywords == "verl":
            return [_with_accuracy(called([item])) for item in items]
        values = called(items)
        if not isinstance(values, (list, tuple)):
            return values if len(items) > 1 else [_with_accuracy(values)]
        nothing = NotApplicable("the reward does not apply: it returned None")
        return [nothing if value is None else _with_accuracy(value) for value in values]

    return score


def _takes_all(signature: inspect.Signature) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values())


def _taken(signature: inspect.Signature) -> tuple[str, ...]:
    """Those of ON_REQUEST that a function in TRL's form is given; the form of its completions hangs on messages."""
    of_arguments = {"prompt_ids": _IDS, "completion_ids": _IDS, "prompts": ("messages",), "completions": ("messages",)}
    if _takes_all(signature):
        return ON_REQUEST
    taken = {name for argument in of_arguments.keys() & signature.parameters.keys() for name in of_arguments[argument]}
    return tuple(name for name in ON_REQUEST if name in taken)


def _verl_arguments(item: Mapping[str, Any]) -> dict[str, Any]:
    columns = dict(item.get("columns", {}))
    source, own = columns.pop("data_source", ""), columns.pop("extra_info", None)
    extra = columns | {"prompt": item.get("prompt", ""), "response_length": item.get("response_length", 0)}
    extra |= own if isinstance(own, Mapping) else {}
    return dict(zip(_VERL, (source, item["response"], item["ground_truth"], extra), strict=True))


def _verl_lists(items: Items) -> dict[str, Any]:
    """What verl's batch form takes: the same names with an s, a list of each."""
    rows = [_verl_arguments(item) for item in items]
    return {f"{name}s": [row[name] for row in rows] for name in _VERL}


def _trl_arguments(items: Items) -> dict[str, Any]:
    rows = [item.get("columns", {}) for item in items]
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    chats = [_trl_chat(item) for item in items]
    return {name: [item["ground_truth"] for item in items] for name in _TRL_TRUTHS} | columns | {
        "prompts": [prompt for prompt, _ in chats],
        "prompt_ids": [item.get("prompt_ids", []) for item in items],
        "completions": [completion for _, completion in chats],
        "completion_ids": [item.get("response_ids", []) for item in items],
        "trainer_state": None,
    }


def _form_hint(error: str, items: Items) -> str:
    """What to do about an error of a function that reads its completions in the other form; "" for another error."""
    text = 'completion[0]["content"]'
    if not any(item.get("messages") for item in items):
        is_other = "string indices" in error  # completion[0]["content"]
        return f"{_TEXTS}; use completion instead of {text}, or give prompts as lists of messages" if is_other else ""
    is_other = "'list' object" in error or "got 'list'" in error  # completion.strip(), re.search(pattern, completion)
    return f"{_MESSAGES}; use {text} instead of completion, or give prompts as texts" if is_other else ""


def _trl_chat(item: Mapping[str, Any]) -> tuple[Any, Any]:
    """Prompt and completion in the form that TRL gives them: the data's, messages or texts."""
    messages = list(item.get("messages", ()))
    if not messages:
        return item.get("prompt", ""), item["response"]
    prefill = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    if isinstance(prefill, list):
        prefill = "".join(part["text"] for part in prefill)
    return messages, [{"role": "assistant", "content": prefill + item["response"]}]


_OFFERS: dict[str, Callable[[Items], dict[str, Any]]] = {
    "verl": lambda items: _verl_arguments(items[0]),
    "verl_lists": _verl_lists,
    "trl": _trl_arguments,
}


def _with_accuracy(value: Any) -> Any:
    """verl's dictionaries name the reward `score` and the accuracy `acc`."""
    if not isinstance(value, Mapping) or "overall" in value or "score" not in value:
        return value
    rest = {key: part for key, part in value.items() if key not in ("score", "acc")}
    return {"overall": value["score"], **({"accuracy": float(value["acc"])} if "acc" in value else {}), **rest}


def _awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an async function in one that waits for its result."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return asyncio.run(_result(found)) if inspect.isawaitable(found) else found

    return call


async def _result(found: Awaitable[Any]) -> Any:
    return await found


def _required(signature: inspect.Signature, kwargs: Mapping[str, Any], *kinds: object) -> list[str]:
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in kinds and parameter.default is inspect.Parameter.empty and name not in kwargs
    ]


def _with_columns(item: Mapping[str, Any]) -> dict[str, Any]:
    """A response's dictionary as EasyR1's, with its row's columns; ours come before one of the same name."""
    return dict(item.get("columns", {})) | {key: item[key] for key in item if key not in ("columns", *ON_REQUEST)}


def _texts(item: Mapping[str, Any]) -> tuple[str, str]:
    return item["response"], item["ground_truth"]
