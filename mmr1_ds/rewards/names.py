"""Names in front of values, and texts that look like arithmetic and are none."""

from __future__ import annotations

import re

from mmr1_ds.rewards.units import canonical_unit, is_unit

_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|omega|phi|varphi|rho|sigma|tau|ell|Delta|Omega"
_NAME = re.compile(
    rf"""m?\s?\\angle\s?\{{?(?:[A-Z]{{1,3}}|\d)\}}?
    | \|?(?:\\(?:overline|vec|triangle)\s?)?\{{?(?:[A-Z]{{1,3}}|[a-z])'*\}}?\|?
    | gcd | lcm | max | min | sum | ans | det
    | (?:[a-zA-Z]|\\(?:{_GREEK}))(?:_\{{?\w+\}}?)?'*(?:\(\s*-?\w+\s*\))? | \\frac\{{d\w\}}\{{d\w\}}
    | [a-zA-Z]\^\{{-1\}}\( ?\w ?\) | P\([\w ]+\) | \\text\{{[A-Za-z .]+\}} | [A-Z][a-z]{{3,}}""",
    re.VERBOSE,
)
_COORDINATES = ("x", "y", "z")
_TEXT = re.compile(r"\\text\s*\{[^{}]*\}|\\[a-zA-Z]+")
_RATIO_NAME = re.compile(r"[a-zA-Z]{1,2}(?: ?: ?[a-zA-Z]{1,2})+")
_TIME = re.compile(r"(\d{1,4}(?: ?: ?\d+)+) ?(?:([ap])\.?(?: ?m\.?)?)?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2}) ?([ap])(?:\. ?m\.?| ?m\.?)", re.IGNORECASE)
_DATE = re.compile(r"(\d{1,4})([-/])(\d{1,2})\2(\d{1,4})")
_CHAIN = re.compile(r"[A-Z](?: ?- ?[A-Z]){2,}|\d+(?: ?- ?\d+){3,}")  # a path A-B-D-C, an order 1-3-2-4
_CURRENCIES = "$\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}"
_END = rf"(?:\\?[{_CURRENCIES}])? ?(-?\d+(?:\.\d+)?) ?(\\?%|[a-zA-Z]{{2,}})?"
_RANGE = re.compile(rf"{_END} ?(?:-|to) ?{_END}")
_BASE = re.compile(r"\(?([0-9A-F]+)\)?(?: ?_ ?\{? ?\(? ?(?:base ?)?| \(?(?:in )?base )(\w+) ?\)? ?\}?")
_SIDE = r"\d+(?:\.\d+)?(?: (?!x |by )[a-z]{1,4})?"
_SIZES = re.compile(rf"{_SIDE}(?: ?(?:\\times|x|by) ?{_SIDE}(?![\d^.]))+")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?) ?([a-zA-Z]+)\.?")
_QUANTITIES = re.compile(rf"{_QUANTITY.pattern}(?:(?:,? and |,? ?){_QUANTITY.pattern}){{1,5}}")
# Joined by a comma or "and", these are still one quantity; 3 kg and 2 g are two.
_FAMILIES = ("year month week day h min s", "mile yd ft inch", "lb ounce", "dollar cent")
_BASES = {"two": "2", "three": "3", "five": "5", "eight": "8", "ten": "10", "sixteen": "16"}
_CASES = re.compile(r"([a-zA-Z](?:_\{?\w\}?| ?\( ?\w ?\))?) ?= ?(\\begin\{cases\}(?:(?!\\end).)*\\end\{cases\})")
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH_ENDS = "uary ruary ch il  e y ust (?:t|tember) ober ember ember".split(" ")
_MONTH = re.compile(  # not mark, maybe, octagon
    rf"\b(?:{'|'.join(f'{start}(?:{end})?' for start, end in zip(_MONTHS, _MONTH_ENDS, strict=True))})\b", re.IGNORECASE
)


def named(text: str) -> tuple[str, str]:
    """Split `AB = 5` into (`AB`, `5`), and so `5 = x`; the name is "" where there is none."""
    if (cases := _CASES.fullmatch(text)) is not None:
        return cases[1].replace(" ", ""), cases[2]
    left, _, right = (part.strip() for part in text.partition("="))
    if left and right and "=" not in right and not re.search(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]", text):
        for name, value in ((left, right), (right, left)):
            if _is_equation(name, value):
                continue
            if _NAME.fullmatch(name) or _RATIO_NAME.fullmatch(name):
                return _spelling(name, value), value
    return "", text


def _is_equation(name: str, value: str) -> bool:
    """Whether a name is a part of an equation: x = y, PV = nRT, AB = CD. Products of small letters are no names."""
    if name in _COORDINATES and value in _COORDINATES:
        return True
    words = re.findall(r"[a-zA-Z]{2,}", _TEXT.sub("", value))
    return name.isupper() and len(name) > 1 and any(not word.islower() and not is_unit(word) for word in words)


def _spelling(name: str, value: str) -> str:
    r"""One spelling of a name. A segment's bars are dress, but |x| = 2 and \bar{x} = 2 are not x = 2."""
    name = re.sub(r"[\s{}]|\\text|m(?= ?\\angle)", "", name)
    bare = re.sub(r"\\overline|\\vec|\|", "", name)
    if re.fullmatch(r"[A-Z]{2,3}'*", bare):
        return bare
    is_vector = "|" in name or re.search(r",|\\begin|\\vec|[ijk]", value) is not None
    return name.replace(r"\vec", "") if is_vector else name


def opaque(text: str) -> tuple[object, ...] | None:
    """Return the parts of a time or ratio, a date, a chain, a range or score, a size, a number in a base, a derivative.

    Evaluated as formulas these would equal other ones: 5:10 is not 10:20, 3-5 not -2, 5 ft 6 in not 6 ft 5 in.

    Returns: what the text is, its parts, and the unit of a range or size, last; None for anything else.
    """
    text = " ".join(re.sub(r"\\(?:text|mbox)\s*\{([^{}]*)\}", r" \1 ", text).split())
    time = _TIME.fullmatch(text)
    if time is not None:
        first, *others = (part.strip() for part in time[1].split(":"))
        if not time[2]:  # 2:05 is a time then, and no ratio 2:5
            others = [part if re.match(r"0\d", part) else str(int(part)) for part in others]
            return "time", (int(first), *others), ""
        return "time", (int(first), *map(int, others)), time[2].lower()
    hour = _HOUR.fullmatch(text)
    if hour is not None:
        return "time", (int(hour[1]), 0), hour[2].lower()
    date = _DATE.fullmatch(text)
    if date is not None:
        return "date", int(date[1]), int(date[3]), int(date[4])
    if _CHAIN.fullmatch(text):
        return "chain", text.replace(" ", "")
    base = _BASE.fullmatch(text)
    if base is not None:
        return "base", base[1], _BASES.get(base[2], base[2])
    found = _range(text) or _quantities(text)
    if found is not None:
        return found
    if _SIZES.fullmatch(text):
        units = [canonical_unit(unit) for unit in re.findall(r"(?<=\d )(?!by )[a-wyz]\w*", text)]
        sides = tuple(float(side) for side in re.findall(r"\d+(?:\.\d+)?", text))
        return "size", sides, units[0] if len(set(units)) == 1 else ",".join(units)
    month = _MONTH.search(text)
    if month is not None and re.search(r"\d", text) and "\\" not in text and "=" not in text:
        numbers = [int(digits) for digits in re.findall(r"\d{1,9}", text)]
        if re.fullmatch(r"[\d\s,.]*(?:st|nd|rd|th)?( of)? ?[A-Za-z.]+[\d\s,.]*(?:st|nd|rd|th)?[\d\s,.]*", text):
            return "date", month[0][:3].lower(), tuple(numbers)
    if "'" in text and "=" not in text:
        return "derivative", text.replace(" ", "")
    return None


def same_parts(one: tuple[object, ...] | None, other: tuple[object, ...] | None) -> bool:
    """Return whether two results of `opaque` are the same; of ranges and sizes one may lack the unit."""
    if one is None or other is None:
        return False
    if one[0] == other[0] and one[0] in ("range", "size"):
        return one[1] == other[1] and ("" in (one[2], other[2]) or one[2] == other[2])
    return one == other


def _range(text: str) -> tuple[object, ...] | None:
    inner = text[1:-1] if text[:1] + text[-1:] == "()" else text
    spread = _RANGE.fullmatch(inner.strip())
    if spread is None:
        return None
    units = [unit.replace("\\", "") for unit in (spread[2], spread[4]) if unit]
    if any(unit != "%" and not is_unit(unit) for unit in units) or len(set(units)) > 1 or (spread[2] and not spread[4]):
        return None
    currencies = re.findall(rf"[{_CURRENCIES}]", text)
    unit = currencies[0] if currencies else "%" if "%" in units else canonical_unit(units[0]) if units else ""
    return "range", (float(spread[1]), float(spread[3])), unit


def _quantities(text: str) -> tuple[object, ...] | None:
    """The parts of 5 ft 6 in; letters that are no units are variables."""
    if not _QUANTITIES.fullmatch(text):
        return None
    parts = _QUANTITY.findall(text)
    if not all(is_unit(unit) or len(unit) > 2 for _, unit in parts):
        return None
    units = [canonical_unit(unit) for _, unit in parts]
    units = ["min" if unit == "m" and "h" in units else unit for unit in units]  # 1h 30m
    in_family = any(units == [unit for unit in family.split() if unit in units] for family in _FAMILIES)
    if not in_family and re.search(r",|and ", text):
        return None
    return "quantities", *((float(value), unit) for (value, _), unit in zip(parts, units, strict=True))
