r"""Sets of numbers in their other notations: {x | x > 2}, ]0, 1], R without {2}, |x| < 1, P(1, 2), "no solution"."""

from __future__ import annotations

import re

_BUILDER = re.compile(
    r"\\\{ ?([a-zA-Z])(?: ?\\in ?\\mathbb\{R\})? ?(?:\\mid(?![a-zA-Z])|:|\|) ?(?P<condition>.*[<>=\\].*?) ?\\\}"
)
_FRENCH = re.compile(r"([\[\]]) ?([^\[\]()]+[,;][^\[\]()]+?) ?([\[\]])")
_MODULUS = re.compile(r"\| ?([a-zA-Z]) ?\| ?(<|\\le(?![a-zA-Z])) ?(.+)")
_POINT = re.compile(r"([ABDEFGHIJKLMOPQRSTUVWXYZ]) ?(\([^()]*,[^()]*\))|\( ?(x ?, ?y(?: ?, ?z)?) ?\) ?= ?(\(.*\))")
_CASES = re.compile(
    r"(?:\\\{ ?)?\\begin\{(cases|array|aligned)\}(?:\{[lcr]*\})?"
    r"(?P<rows>(?:(?!\\end).)*=(?:(?!\\end).)*)\\end\{\1\}(?: ?\\?\.)?"
)
_NAMED_TOGETHER = re.compile(r"\( ?((?!x ?, ?y)[a-zA-Z](?: ?, ?[a-zA-Z])+) ?\) ?= ?\(([^()]*)\)")
_REALS = ("\\mathbb{R}", "all real numbers", "all reals", "the real numbers", "real numbers")
_NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?:real )?(?:solutions?|roots?)|(?:the )?empty set|no real number", re.IGNORECASE
)
_WITHOUT = re.compile(r"\\mathbb\{R\} ?(?:\\setminus(?![a-zA-Z])|-) ?\\\{(.*)\\\}")
_UNEQUAL = re.compile(r"[a-zA-Z] ?\\ne(?![a-zA-Z]) ?(.+)|(-?[\d./]+) ?\\ne [a-zA-Z]")
_OPEN = re.compile(r"\(([^()\[\]]+),([^()\[\]]+)\)")


def rewritten(text: str) -> str | None:
    """Return a set in the notation that `values` reads; None where it is in that already. Args: undressed text."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    if words.casefold() in _REALS or text in _REALS:
        return r"(-\infty,\infty)"
    if _NOTHING.fullmatch(words):
        return r"\emptyset"
    if (builder := _BUILDER.fullmatch(text)) is not None:
        variable = rf"(?<![a-zA-Z\\]){builder[1]}(?![a-zA-Z])"
        return re.sub(variable, "x", builder["condition"])
    french = _FRENCH.fullmatch(text)
    if french is not None and (french[1] == "]" or french[3] == "["):
        return f"{'(' if french[1] == ']' else '['}{french[2]}{')' if french[3] == '[' else ']'}"
    if (modulus := _MODULUS.fullmatch(text)) is not None and re.fullmatch(r"[\d.]+|\\(?:frac|sqrt)\{.*\}", modulus[3]):
        return f"-{modulus[3]} {modulus[2]} {modulus[1]} {modulus[2]} {modulus[3]}"
    if (cases := _CASES.fullmatch(text)) is not None and "&" not in text:
        return ", ".join(row.strip(" ,;") for row in cases["rows"].split(r"\\") if row.strip())
    if (several := _NAMED_TOGETHER.fullmatch(text)) is not None:
        names, values = (re.split(r" ?, ?", part.strip()) for part in several.groups())
        return ", ".join(map(" = ".join, zip(names, values, strict=True))) if len(names) == len(values) else None
    point = _POINT.fullmatch(text)
    if point is None:
        return None
    return point[4] or f"{point[1]}={point[2]}"


def excluded_points(text: str) -> tuple[str, tuple[str, ...]] | None:
    r"""Return the variable, or "", and the numbers that a set of all others leaves out; None for another set.

    Such are `\mathbb{R} \setminus \{2\}`, `x \ne 2` and `(-\infty, 2) \cup (2, \infty)`.
    """
    if (without := _WITHOUT.fullmatch(text)) is not None:
        return "", tuple(part.strip() for part in without[1].split(","))
    unequal = _UNEQUAL.fullmatch(text)
    if unequal is not None and re.search(r"[,<>=]|\\", number := unequal[1] or unequal[2]) is None:
        return (re.sub(r"\\ne", "", text).replace(number, "").strip(), (number.strip(),))
    parts = [_OPEN.fullmatch(part.strip()) for part in re.split(r"\\cup(?![a-zA-Z])", text)]
    if len(parts) < 2 or any(part is None for part in parts):
        return None
    ends = {part[1].strip(): part[2].strip() for part in parts if part is not None}
    points, last = [], ends.pop(r"-\infty", None)
    while last is not None and last in ends:
        points.append(last)
        last = ends.pop(last)
    ends_well = last is not None and re.fullmatch(r"\+? ?\\infty", last) is not None
    return ("", tuple(points)) if points and not ends and ends_well else None
