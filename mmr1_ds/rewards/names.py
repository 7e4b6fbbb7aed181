"""Names in front of values, and texts that look like arithmetic and are none."""

from __future__ import annotations

import re

_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|omega|phi|varphi|rho|sigma|tau|ell|Delta|Omega"
_NAME = re.compile(
    rf"""m?\\angle\s?\{{?[A-Z]{{1,3}}\}}? | \|?(?:\\(?:overline|vec|triangle)\s?)?\{{?[A-Za-z]{{1,3}}'*\}}?\|?
    | (?:[a-zA-Z]|\\(?:{_GREEK}))(?:_\{{?\w+\}}?)?'*(?:\(\s*-?\w+\s*\))? | \\frac\{{d\w\}}\{{d\w\}}
    | P\([\w ]+\) | \\text\{{[A-Za-z .]+\}} | [A-Z][a-z]{{3,}}""",
    re.VERBOSE,
)
_TIME = re.compile(r"(\d{1,4}(?: ?: ?\d+)+) ?([ap])?\.?(?:m\.?)?", re.IGNORECASE)
_DATE = re.compile(r"(\d{1,4})([-/])(\d{1,2})\2(\d{1,4})")
_RANGE = re.compile(r"(\d+(?:\.\d+)?) ?(?:-|to) ?(\d+(?:\.\d+)?)")
_BASE = re.compile(r"\(?([0-9A-F]+)\)?_ ?\{? ?(\w+) ?\}?")
_BASES = {"two": "2", "three": "3", "five": "5", "eight": "8", "ten": "10", "sixteen": "16"}
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = re.compile(rf"\b({'|'.join(_MONTHS)})[a-z]*\b", re.IGNORECASE)


def named(text: str) -> tuple[str, str]:
    """Split `AB = 5` into (`AB`, `5`), and so `5 = x`; the name is "" where there is none."""
    left, _, right = (part.strip() for part in text.partition("="))
    if left and right and "=" not in right and not re.search(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]", text):
        for name, value in ((left, right), (right, left)):
            if _NAME.fullmatch(name):
                return re.sub(r"[\s{}|]|\\text|\\overline|\\vec", "", name), value
    return "", text


def opaque(text: str) -> tuple[object, ...] | None:
    """Return the parts of a time or ratio, a date, a range or score, a number in a base, or a derivative, else None.

    Evaluated as formulas these would equal other ones: 5:10 is not 10:20, nor 3-5 the number -2.
    """
    text = " ".join(re.sub(r"\\(?:text|mbox)\s*\{([^{}]*)\}", r"\1", text).split())
    time = _TIME.fullmatch(text)
    if time is not None:
        return "time", tuple(int(part) for part in time[1].split(":")), (time[2] or "").lower()
    date = _DATE.fullmatch(text)
    if date is not None:
        return "date", int(date[1]), int(date[3]), int(date[4])
    spread = _RANGE.fullmatch(text)
    if spread is not None:
        return "range", float(spread[1]), float(spread[2])
    base = _BASE.fullmatch(text)
    if base is not None:
        return "base", base[1], _BASES.get(base[2], base[2])
    month = _MONTH.search(text)
    if month is not None and re.search(r"\d", text) and "\\" not in text and "=" not in text:
        numbers = [int(digits) for digits in re.findall(r"\d{1,9}", text)]
        if re.fullmatch(r"[\d\s,.]*(?:st|nd|rd|th)?( of)? ?[A-Za-z.]+[\d\s,.]*(?:st|nd|rd|th)?[\d\s,.]*", text):
            return "date", month[1].lower(), tuple(numbers)
    if "'" in text and "=" not in text:
        return "derivative", text.replace(" ", "")
    return None
