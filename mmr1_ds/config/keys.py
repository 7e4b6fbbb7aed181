"""What the schema states about each dotted key: its type, in words too, its limit, and its nearest neighbours."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from mmr1_ds.config.schema import OneOf, Range, RunConfig

_UNIONS = (types.UnionType, typing.Union)  # `Annotated[int, ...] | None` is the second
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


@cache
def leaf_types() -> Mapping[str, Any]:
    """Return the type of every key that is not a section, by dotted name."""
    return {key: hint for key, hint, _ in _leaves(RunConfig, "")}


@cache
def limits() -> Mapping[str, Range | OneOf]:
    """Return the range or choices of every key that has such, by dotted name."""
    return {key: limit for key, _, annotated in _leaves(RunConfig, "") for limit in _limits(annotated)}


@cache
def sections() -> frozenset[str]:
    """Return every dotted prefix that holds keys."""
    return frozenset(key.rsplit(".", depth)[0] for key in leaf_types() for depth in range(1, key.count(".") + 1))


def _leaves(cls: type, prefix: str) -> Iterable[tuple[str, Any, Any]]:
    """Yield each key with its type, and with its annotation as it stands in the schema."""
    hints, annotated = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        hint = hints[item.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hint, annotated[item.name]


def _limits(annotated: Any) -> Iterable[Range | OneOf]:
    """Yield the limit in `Annotated[T, limit]` and in `Annotated[T, limit] | None`."""
    for part in (annotated, *typing.get_args(annotated)):
        yield from (item for item in getattr(part, "__metadata__", ()) if isinstance(item, Range | OneOf))


def holds_mapping(hint: Any) -> bool:
    """Return whether a mapping is a value of this type, not a section."""
    return hint is Any or typing.get_origin(hint) is dict


def is_text(hint: Any) -> bool:
    """Return whether a word on the command line is the value itself, not YAML: `str` and `str | None`."""
    return hint is str or (typing.get_origin(hint) in _UNIONS and str in typing.get_args(hint))


def is_optional(hint: Any) -> bool:
    """Return whether null is a value of this type."""
    return hint is Any or (typing.get_origin(hint) in _UNIONS and type(None) in typing.get_args(hint))


def in_words(hint: Any) -> str:
    """Write the type as a user would: 'a whole number or null', 'a list of text'."""
    if typing.get_origin(hint) in _UNIONS:
        return " or ".join(in_words(part) for part in typing.get_args(hint))
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"a list of {_plural(parts[0])}, like [a,b]"
    if origin is tuple:
        return f"a list of {len(parts)} {_plural(parts[0])}"
    if origin is dict:
        return "a mapping"
    return _WORDS[hint]


def in_yaml(value: Any) -> str:
    """Write a value as YAML does: null, true, false."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plural(element: Any) -> str:
    return {str: "text", float: "numbers", int: "whole numbers"}.get(element, "mappings")


def elements_fit(hint: Any, value: Any) -> bool:
    """Return whether a list's elements are scalars, or mappings in a list of those. OmegaConf lets one into texts."""
    if typing.get_origin(hint) not in (list, tuple):
        return True
    if isinstance(value, list | tuple) and typing.get_origin(typing.get_args(hint)[0]) is dict:
        return all(isinstance(item, dict) for item in value)
    return not isinstance(value, list | tuple) or not any(isinstance(item, list | dict) for item in value)


def nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that is most likely meant: nearest in spelling, or the only one that ends the same."""
    known = sorted(set(known))
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = key.rpartition(".")[2]
    same_end = [name for name in known if name.rpartition(".")[2] == last]
    if same_end:
        return same_end[0]
    ends = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
    return ends[close[0]] if close else None
