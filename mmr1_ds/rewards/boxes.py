r"""Reading `\boxed{...}`."""

from __future__ import annotations

import re

_BRACES = re.compile(r"(?P<box>\\?\\boxed\s*\{)|\\.|[{}]", re.DOTALL)  # an escaped brace is none
_BETWEEN = re.compile(r"[\s$.]*(,|;|\band\b|\bor\b|,\s*and\b|,\s*or\b|和|或|\\text\s*\{\s*(?:and|or)\s*\})?[\s$]*")
_NAME = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z](?:_\{?\w\}?)?\s*=\s*$")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last balanced `\boxed{...}`, with nested braces, or None. `\{` is no brace."""
    boxes = _boxes(text)
    return boxes[-1][1] if boxes else None


def last_boxes(text: str) -> str | None:
    r"""Return the last box with those side by side before it: `5 or 6` of `\boxed{5}$ or $\boxed{6}`; None without one.

    Names stay where there are several: `x = \boxed{5}, y = \boxed{6}` is `x = 5, y = 6`.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    run = boxes[-1:]
    found = _with_name(text, *run[0])
    for box in reversed(boxes[:-1]):
        between = _BETWEEN.fullmatch(text, box[0].stop, _start(text, run[0][0]))
        if between is None:
            break
        run.insert(0, box)
        mark = between[1] or ","
        found = f"{_with_name(text, *box)}{' ' * (mark not in ',;')}{mark} {found}"
    return found if len({content for _, content in run}) > 1 else boxes[-1][1]


def _start(text: str, place: slice) -> int:
    """Where a box begins, with its name."""
    name = _NAME.search(text, 0, place.start)
    return place.start if name is None else name.start()


def _with_name(text: str, place: slice, content: str) -> str:
    return text[_start(text, place) : place.start] + content


def _boxes(text: str) -> list[tuple[slice, str]]:
    """All balanced boxes: their places and contents. Inner ones are before their outer one."""
    open_braces: list[tuple[int, int] | None] = []  # where a box and its content begin
    found = []
    for token in _BRACES.finditer(text):
        if token["box"]:
            open_braces.append(token.span())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                found.append((slice(box[0], token.end()), text[box[1] : token.start()]))
    return found
