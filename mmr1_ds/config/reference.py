"""Every key of the configuration with its default and its meaning, read from the comments in `config.py`.

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

from mmr1_ds.config import schema as config
from mmr1_ds.config.schema import RunConfig


class Key(NamedTuple):
    """One line of the reference."""

    name: str  # dotted, as on the command line
    default: str  # as YAML
    meaning: str  # values, range and unit; empty would be a mistake


class Section(NamedTuple):
    """One dataclass of the tree."""

    name: str
    meaning: str
    keys: list[Key]


def sections() -> list[Section]:
    """The whole tree, in its order; sections without keys of their own are left out."""
    found: list[Section] = []
    _collect(RunConfig, "", found)
    return found


def markdown() -> str:
    """The reference as a page."""
    lines = [
        "# Configuration",
        "",
        "Every key, its default, and what it means. `mmr1-ds keys [PART OF A NAME]` prints it.",
        "",
    ]
    for section in sections():
        lines += [f"## {section.name}", "", section.meaning, "", "| key | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{key.name}` | `{key.default}` | {key.meaning.replace('|', chr(92) + '|')} |" for key in section.keys
        ]
        lines.append("")
    return "\n".join(lines)


def plain(part: str = "") -> str:
    """One line a key whose name contains `part`; empty when there is none."""
    keys = [key for section in sections() for key in section.keys if part in key.name]
    return "".join(f"{key.name}={key.default}  # {key.meaning}\n" for key in keys)


def _collect(kind: type, prefix: str, found: list[Section]) -> None:
    comments, hints = _comments(kind), get_type_hints(kind, vars(config))
    section = Section(prefix.rstrip("."), inspect.cleandoc(kind.__doc__ or ""), [])
    if prefix:
        found.append(section)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            if field.name in comments:  # a remark on the whole section
                section.keys.append(Key(f"{prefix}{field.name}", "...", comments[field.name]))
            _collect(hints[field.name], f"{prefix}{field.name}.", found)
        else:
            section.keys.append(Key(prefix + field.name, _yaml(_default(field)), comments.get(field.name, "")))
    if prefix and not section.keys:
        found.remove(section)


def _comments(kind: type) -> dict[str, str]:
    """Field -> the comment at the end of its definition."""
    source = textwrap.dedent(inspect.getsource(kind))
    by_line = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        node.target.id: by_line[node.end_lineno]
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in by_line
    }


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _yaml(value: Any) -> str:
    return json.dumps(value)  # which YAML reads
