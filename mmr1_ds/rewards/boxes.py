r"""Reading `\boxed{...}`."""

from __future__ import annotations

import re

_BRACES = re.compile(r"(?P<box>\\?\\boxed\s*\{)|\\.|[{}]", re.DOTALL)  # an escaped brace is none


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last balanced `\boxed{...}`, with nested braces, or None. `\{` is no brace."""
    open_braces: list[int | None] = []  # where the content begins, for those of a box
    found = None
    for token in _BRACES.finditer(text):
        if token["box"]:
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            found = found if start is None else slice(start, token.start())
    return None if found is None else text[found]
