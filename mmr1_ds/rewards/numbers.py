"""Exact numbers with their units, as answers write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mmr1_ds.rewards.dress import undress
from mmr1_ds.rewards.units import canonical_unit, is_compound, split_bare_unit, split_chinese_unit

MAX_NUMBER_CHARS = 300  # a longer one is no number
MAX_EXPONENT = 300  # the largest exponent of ten; more would build gigabytes of digits

_DECIMAL = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?")
_POWER_OF_TEN = re.compile(r"([+-]?)10\^\{?([+-]?\d+)\}?")
_POWER = re.compile(r"(.+?)(?:\\times|\\cdot|\*)10\^\{?([+-]?\d+)\}?|(.+?)[eE]([+-]?\d+)")
_FRACTION = re.compile(r"([+-]?)\\frac\{([^{}]+)\}\{([^{}]+)\}|([^/]+)/([^/]+)")
_MIXED = re.compile(r"([+-]?)(\d+)(\\frac.+)")
_PLAIN_MIXED = re.compile(r"([+-]?)(\d+) (\d+)/(\d+)")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_LOOSE = re.compile(r"(?<=[-+}\d.]) (?=\\|\^)|(?<=\\times) |(?<=\\cdot) |(?<=[{(]) | (?=[)}])|(?<=^[-+]) | ?/ ?")
_TEXT_UNIT = re.compile(
    r"(?P<value>.*[^\s\\{(,;=])\s*\\(?:text|mbox)\s*\{(?P<unit>[^{}\d]*(?:\^\s*\{?-?[1-4]\}?)?)\}\s*"
    r"(?P<power>\^\s*\{?-?[1-4]\}?)?"
)
# Micrometres, but \mu g is an acceleration as often.
_SYMBOL_UNIT = re.compile(
    r"(?P<value>.*[\d}]) ?(?P<prefix>[kMm])? ?(?P<ohm>\\Omega)"
    r"|(?P<number>.*\d) \\mu ?(?:\\text\{ ?(?P<text>[a-zA-Z])(?:eter|etre)?s? ?\}|(?P<micro>[mslACFLV]))"
)
_DEGREES = re.compile(
    r"(?P<value>.+?)\s*(?:\^\s*\{?\s*\\circ\s*\}?\s*(?:\\text\{\s*)?(?P<scale>[CF]?)\s*\}?|\b(?:\\text\{\s*)?degrees?"
    r" (?P<named>[CF])(?:elsius|ahrenheit)?\s*\}?)",
    re.IGNORECASE,
)
_OF_FUNCTION = re.compile(  # what ends in an argument, and is no angle itself: \\sin 30, \\tan(x+15)
    r".*\\(?:sin|cos|tan|cot|sec|csc)(?! ?\^ ?\{? ?-)(?: ?\^ ?\d| ?\^\{\d\})? ?"
    r"(?:\{?[\w. ]*(?:\\[a-zA-Z]+)?\}?|\([^()]*\)|\\frac\{[^{}]*\}\{[^{}]*\})"
)
_PERCENT = re.compile(r"(?P<value>.+?)\s*(?:\\?%|\bpct|\bpercent|\bper cent|\\text\{\s*(?:percent|pct|per cent)\s*\})")
_CURRENCIES = {
    "dollar": r"\\?\$", "euro": "\N{EURO SIGN}", "pound sterling": "\N{POUND SIGN}", "yen": "\N{YEN SIGN}",
    "rupee": "\N{INDIAN RUPEE SIGN}",
}  # fmt: skip
_NO_UNITS = frozenset(
    "or and no not never without to through more less about approximately approx at least most if when where "
    "factorial squared cubed hundred half the is so times than as thousand million billion trillion dozen mod "
    "root".split()
)
# Plural nouns, not a loss nor a plus, and Chinese measure words. What scales the number is none
# (2 thirds, 3 pairs, ten thousands).
_THINGS = re.compile("[a-z]{2,}[a-hj-rtv-z]s|people|children|men|women|cup|rpm")
_COUNTED = re.compile(r"(?:[a-zA-Z]+ )*?(?P<thing>[a-zA-Z]+)(?: of [a-zA-Z ]+| per [a-zA-Z]+|/[a-zA-Z]+| old)?")
_WORDS = re.compile(
    rf"(?P<value>.*\d)(?:\s+(?P<unit>{_THINGS.pattern})|"
    r"\s*(?P<sign>(?:(?![十百千万亿成折倍半分点])[\u4e00-\u9fff]){1,2}))"
)
_PARTS = re.compile(
    r"halves|thirds|quarters|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|\w+red|\w+sand|\w+illion)ths"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ties|\w*(?:illions|thousands|hundreds)|pairs|couples|dozens|scores|tens"
    r"|always|perhaps|sometimes|besides|does|others|bias|whereas|\w+wards|times|digits|bits|roots|powers|zeros|zeroes"
    r"|ones|twos|threes|fours|fives|sixes|sevens|eights|nines"
)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|dot)\{(\d{1,20})\}")
_DOTTED = re.compile(r"\\dot\{(\d)\}(\d*)\\dot\{(\d)\}")  # the first and the last digit that repeat
_SCALES = {"hundred": 100, "dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
           "万": 10**4, "亿": 10**8}  # fmt: skip
_SCALED = re.compile(rf"(?P<value>.*\d)\s*(?:\\text\{{)?\s*(?P<scale>{'|'.join(_SCALES)})s?\s*\}}?")


@dataclass(frozen=True)
class Number:
    """An exact number as it was written."""

    value: Fraction
    unit: str  # its one spelling, "" without one


def same_unit(one: str, other: str) -> bool:
    """Return whether two units agree; one may be missing."""
    return not one or not other or one == other


def split_unit(text: str) -> tuple[str, str]:
    r"""Split `25\pi \text{ cm}^2` into (`25\pi`, `cm^2`); the unit is "" where there is none. Args: undressed text."""
    for unit, mark in _CURRENCIES.items():
        found = re.fullmatch(rf"([+-]?)\s*{mark}\s*(.+)|(.+?)\s*{mark}", text)
        if found is not None:
            return (found[1] or "") + (found[2] or found[3]), unit
    for pattern, unit in ((_PERCENT, "%"), (_DEGREES, "degree")):
        found = pattern.fullmatch(text)
        if found is not None and unit != "%" and not _is_angle(found["value"]):
            continue
        if found is not None:
            scale = found.groupdict().get("scale") or found.groupdict().get("named") or ""
            return found["value"], unit + scale.upper()
    if (symbol := _SYMBOL_UNIT.fullmatch(text)) is not None:
        if symbol["ohm"]:
            return symbol["value"], (symbol["prefix"] or "") + "ohm"
        return symbol["number"], "micro" + (symbol["text"] or symbol["micro"])
    coded = re.fullmatch(r"(USD|EUR|GBP) ?(\d.*)", text)
    if coded is not None:
        return coded[2], canonical_unit(coded[1])
    if (chinese := split_chinese_unit(text)) is not None:
        return chinese
    text = re.sub(r'(?<=\d)"$', " inch", text)
    found = _TEXT_UNIT.fullmatch(text)
    if found is None:
        return split_bare_unit(text) or (text, "")
    unit = re.sub(r"\.(?!\w)|[{}]", "", found["unit"]).strip()
    if _NO_UNITS & set(re.split(r"[^a-z]+", unit.lower())) or not (is_compound(unit) or _is_counted(unit)):
        return text, ""  # 3 up is not 3
    return found["value"], canonical_unit(unit + (found["power"] or ""))


def _is_angle(text: str) -> bool:
    """Whether degrees behind a text are its unit, not that of a function's argument, nor inside brackets."""
    return text.count("{") == text.count("}") and _OF_FUNCTION.fullmatch(text) is None


def _is_counted(text: str) -> bool:
    """Whether a text names what a number counts: red balls, people, pages per day, litres of water, years old."""
    found = _COUNTED.fullmatch(text)
    if found is None:
        return False
    thing = found["thing"].lower()
    return is_compound(found["thing"]) or (_THINGS.fullmatch(thing) is not None and not _PARTS.fullmatch(thing))


def split_words(text: str) -> tuple[str, str]:
    """Split `3 people` or `1200 rpm` into a number and what is no known unit; that is "" where there is none."""
    found = _WORDS.fullmatch(text)
    thing = "" if found is None else found["unit"] or found["sign"]
    words = set(thing.lower().split())
    is_unit = split_unit(text)[1] or words & (_NO_UNITS | _SCALES.keys())
    if found is None or is_unit or _PARTS.fullmatch(thing) or parse_number(found["value"]) is None:
        return text, ""
    return found["value"], thing


def parse_number(text: str) -> Number | None:
    r"""A number literal: 7, -1,234.50, 3/4, \frac{3}{4}, 2\frac{1}{2}, 1.5\times10^{3}, 25\%, 30^\circ, 7\text{ cm}.

    Returns: None for anything else, sums and products included. Commas that part thousands may be bare.
    """
    text, unit = split_unit(undress(text))
    value = literal(_THOUSANDS.sub(lambda digits: digits[0].replace(",", ""), text))
    return None if value is None else Number(value, unit)


def literal(text: str) -> Fraction | None:
    """Return the value of an undressed number without a unit; None for anything else."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    scaled = _SCALED.fullmatch(text)
    if scaled is not None:
        value = literal(scaled["value"])
        return None if value is None else value * _SCALES[scaled["scale"]]
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    text = _DOTTED.sub(r"\\overline{\1\2\3}", with_points(text))
    mixed = _PLAIN_MIXED.fullmatch(text)
    if mixed is not None and int(mixed[3]) < int(mixed[4]):
        return _sign(mixed[1]) * (int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4])))
    text = _LOOSE.sub(lambda space: space[0].strip(), text)
    return None if " " in text else _value(text)


def with_points(text: str) -> str:
    """Write the numbers of a formula without `{,}`: 1{,}000 as 1000, and 1{,}5, a decimal comma, as 1.5."""
    text = re.sub(r"(?<![\d.])[1-9]\d{0,2}(?:\{,\}\d{3})+(?!\d|\{,\})", lambda found: found[0].replace("{,}", ""), text)
    return re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text)


def _value(text: str) -> Fraction | None:
    while len(text) > 2 and text[0] + text[-1] in ("{}", "()"):
        text = text[1:-1]
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        return _signed(mixed[1], _sum(_decimal(mixed[2]), _value(mixed[3])))
    fraction = _FRACTION.fullmatch(text)
    if fraction is not None:
        above, below = _decimal(fraction[2] or fraction[4]), _decimal(fraction[3] or fraction[5])
        return None if above is None or not below else _signed(fraction[1] or "", above / below)
    if (inner := re.fullmatch(r"([+-])\(([\d.]+|\\frac\{\d+\}\{\d+\}|\d+/\d+)\)", text)) is not None:
        return _signed(inner[1], _value(inner[2]))
    repeating = _REPEATING.fullmatch(text)
    if repeating is not None:
        ahead, again = repeating[3], repeating[4]
        rest = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(ahead))
        return _signed(repeating[1], Fraction(f"{repeating[2] or '0'}.{ahead or '0'}") + rest)
    of_ten = _POWER_OF_TEN.fullmatch(text)
    if of_ten is not None:
        return _sign(of_ten[1]) * _ten_to(of_ten[2]) if abs(int(of_ten[2])) <= MAX_EXPONENT else None
    power = _POWER.fullmatch(text)
    if power is not None:
        base, exponent = _decimal(power[1] or power[3]), power[2] or power[4]
        return None if base is None or abs(int(exponent)) > MAX_EXPONENT else base * _ten_to(exponent)
    return _decimal(text)


def _ten_to(exponent: str) -> Fraction:
    return Fraction(10) ** int(exponent)


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[2] or match[3]) or not text.isascii():
        return None
    return _signed(match[1], Fraction(f"{match[2] or '0'}.{match[3] or '0'}"))


def _signed(sign: str, value: Fraction | None) -> Fraction | None:
    return _sign(sign) * value if value is not None else None


def _sign(sign: str) -> int:
    return -1 if sign == "-" else 1


def _sum(first: Fraction | None, second: Fraction | None) -> Fraction | None:
    """Of a mixed number: what is no proper fraction is a factor."""
    return None if first is None or second is None or not 0 <= second < 1 else first + second
