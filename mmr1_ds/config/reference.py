"""Every key of the configuration with its default, its values and its meaning, read from `schema`.

`mmr1-ds keys` prints it; docs/configuration.md is its `markdown()`, which a test compares.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import textwrap
import tokenize
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from mmr1_ds.config.keys import limits
from mmr1_ds.config.schema import RunConfig


class Key(NamedTuple):
    """One line of the reference."""

    name: str  # dotted, as on the command line
    default: str  # as YAML
    meaning: str  # with its unit; empty would be a mistake
    values: str  # range or choices, in words; empty where the type says all


class Section(NamedTuple):
    """One dataclass of the tree."""

    name: str
    meaning: str
    keys: list[Key]


def sections() -> list[Section]:
    """Return the whole tree, in its order, without sections that hold no keys themselves."""
    found: list[Section] = []
    _collect(RunConfig, "", found)
    return found


def markdown() -> str:
    """Write the reference as a page."""
    lines = [
        "# Configuration",
        "",
        "Every key, its default, the values it takes, and what it means. `mmr1-ds keys [WORD]` prints it: all, or",
        "the keys with the word in their names or, where there are none, in their meanings.",
        "",
    ]
    for section in sections():
        lines += [f"## {section.name}", "", section.meaning, "", "| key | default | values | meaning |"]
        lines.append("|---|---|---|---|")
        lines += [
            f"| `{key.name}` | `{key.default}` | {key.values} | {key.meaning.replace('|', chr(92) + '|')} |"
            for key in section.keys
        ]
        lines.append("")
    return "\n".join(lines)


def plain(part: str = "") -> str:
    """Write a line for each key whose name, or else whose meaning, contains `part`; empty when there is none."""
    keys = [key for section in sections() for key in section.keys]
    found = [key for key in keys if part in key.name]
    found = found or [key for key in keys if part.lower() in " ".join(key[2:]).lower()]
    return "".join(f"{key.name}={key.default}  # {'; '.join(filter(None, key[2:]))}\n" for key in found)


def _collect(kind: type, prefix: str, found: list[Section]) -> None:
    comments, hints = _comments(kind), get_type_hints(kind)
    section = Section(prefix.rstrip("."), inspect.cleandoc(kind.__doc__ or ""), [])
    if prefix:
        found.append(section)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            if field.name in comments:  # a remark on the whole section
                section.keys.append(Key(f"{prefix}{field.name}", "...", comments[field.name], ""))
            _collect(hints[field.name], f"{prefix}{field.name}.", found)
        else:
            key = prefix + field.name
            default, limit = _default(field), limits().get(key, "")
            values = f"each {limit}" if limit and isinstance(default, list | tuple) else str(limit)
            section.keys.append(Key(key, json.dumps(default), comments.get(field.name, ""), values))
    if prefix and not section.keys:
        found.remove(section)


def _comments(kind: type) -> dict[str, str]:
    """Return by field the comment at the end of its definition, or in the line above."""
    source = textwrap.dedent(inspect.getsource(kind))
    by_line = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found, end = {}, 0
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = by_line.get(node.lineno - 1, "") if node.lineno - 1 > end else ""
            found[node.target.id] = by_line.get(node.end_lineno or 0, above)
        end = node.end_lineno or 0
    return {name: comment for name, comment in found.items() if comment}


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
