"""Answers in labelled parts: `(1) 5 (2) 7`, `a) 5, b) 7`, `1. 5 2. 7`, of which each label keeps its value."""

from __future__ import annotations

import re

_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩"
_NUMBERS = [str(number) for number in range(1, 11)]
_FAMILIES = {  # how labels of one kind are written, and their order
    r"\d{1,2}": _NUMBERS,
    "[ivxIVX]+": "i ii iii iv v vi vii viii ix x".split(),
    "[a-jA-J]": list("abcdefghij"),
}
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_NO_VALUE = re.compile(r"|[*/^=+,;].*|.*[-+*/^=]")  # what stands so beside a bracket makes it a factor
_RESPECTIVELY = re.compile(r"[ ,]*(?:\\text\{[ ,]*respectively ?\}|\brespectively)$|^分别[为是]:? ?")


def labelled(text: str) -> dict[str, str] | None:
    """Return the values of an undressed text by their labels, which are the first two or more of a kind.

    Returns: None for a text without such labels, or with nothing behind one.
    """
    text = _TEXT.sub(r"\1", text).strip()
    for family, order in _FAMILIES.items():
        marks = list(re.finditer(rf"\(({family})\)|(?:(?<=[\s,;])|^)({family})[.)]\s|([{_CIRCLED}])", text))
        if len(marks) < 2 or marks[0].start() != 0:
            continue
        labels = [_name(mark) for mark in marks]
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        values = [text[mark.end() : end].lstrip(" ,;:").rstrip(" ,;:\\") for mark, end in zip(marks, ends, strict=True)]
        if sorted(labels) == sorted(order[: len(labels)]) and not any(map(_NO_VALUE.fullmatch, values)):
            return dict(zip(labels, values, strict=True))
    return None


def without_respectively(text: str) -> tuple[str, bool]:
    """Return a text without the word that says that its values keep their order, and whether it said so."""
    found = _RESPECTIVELY.sub("", text)
    return found.strip(), found != text


def _name(mark: re.Match[str]) -> str:
    """One spelling of a label."""
    return str(_CIRCLED.index(mark[3]) + 1) if mark[3] else (mark[1] or mark[2]).lower()
