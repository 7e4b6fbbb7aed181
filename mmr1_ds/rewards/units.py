"""Units of answers, each under one spelling."""

from __future__ import annotations

import re

_SPELLINGS = {
    "mm": "mm millimeter millimetre",
    "cm": "cm CM Cm centimeter centimetre",
    "dm": "dm decimeter decimetre",
    "m": "m meter metre",
    "km": "km KM Km kilometer kilometre",
    "inch": "inch inches in. in",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mile": "mile mi",
    "mg": "mg milligram",
    "g": "g gm gram",
    "kg": "kg KG Kg kilogram",
    "lb": "lb pound",
    "ml": "ml mL milliliter millilitre",
    "l": "l L liter litre",
    "ms": "ms millisecond",
    "s": "s sec second",
    "nm": "nm nanometer nanometre",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "km/h": "km/h kph",
    "m/s": "m/s",
    "N": "N newton",
    "J": "J joule",
    "W": "W watt",
    "V": "V volt",
    "A": "A ampere amp",
    "Hz": "Hz hertz",
    "Pa": "Pa pascal",
    **{prefix + unit: f"{prefix}{unit} {word}{name}" for prefix, word in (("k", "kilo"), ("M", "mega"), ("G", "giga"))
       for unit, name in (("N", "newton"), ("Pa", "pascal"), ("J", "joule"), ("W", "watt"), ("Hz", "hertz"),
                          ("V", "volt"), ("eV", "electronvolt"), ("Wh", "watthour"))},
    "mA": "mA milliampere milliamp",
    "mV": "mV millivolt",
    "mW": "mW milliwatt",
    "eV": "eV electronvolt",
    "N·m": "Nm N·m",
    "C": "C coulomb",
    "H": "H henry",
    "F": "F farad",
    "S": "S siemens",
    "T": "T tesla",
    "mol": "mol mole",
    "cal": "cal calorie",
    "kcal": "kcal kilocalorie",
    "gallon": "gallon gal",
    "quart": "quart qt",
    "pint": "pint pt",
    "ounce": "ounce oz",
    "acre": "acre",
    "hectare": "hectare",
    "ton": "ton tonne",
    "K": "K kelvin",
    "degree": "degree deg \N{DEGREE SIGN}",
    "dollar": "dollar USD buck",
    "cent": "cent",
    "euro": "euro EUR",
    "pound sterling": "GBP",
    "yen": "yen JPY",
    "yuan": "yuan RMB CNY",
    "rad": "rad radian",
    "ohm": "ohm",
    "mph": "mph mile/h",
    "%": "% percent pct",
    "unit": "unit",
}
_CANONICAL = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings.split()}
# Words, as their letters are those of no two units: meters, Hours; and abbreviations of which no other case is a unit.
_ABBREVIATIONS = frozenset("in in. ft yd mi lb oz min sec hr yr gal qt pt mph kph mol kcal deg rad usd eur".split())
_ANY_CASE = _ABBREVIATIONS | {name for name in _CANONICAL if len(name) > 3 and name.isalpha() and name.islower()}
_POWER_WORDS = {"square": "^2", "sq": "^2", "cubic": "^3"}
_POWERED = re.compile(r"(.*[A-Za-z]) (squared|cubed)")
_POWERS = re.compile(r"\^\s*\{?-?\d\}?|\b(?:square|sq|cubic|squared|cubed|per)\b", re.IGNORECASE)
_PER = re.compile(r"(?<=[a-z]) per (?=[a-z])")
_NEWTON_METRE = re.compile(r"(?<=\d) ?N ?\\cdot ?m$")
_PRODUCTS = ("mg", "ms", "nm", "mA", "Nm", "eV", "gm", "hr")
# These are variables as often as units, mg a weight: five metres are "5 m", with a space and behind a plain number.
_SHORT = (*(spelling for spelling in _CANONICAL if len(spelling) == 1 and spelling.isalpha()), *_PRODUCTS)
_PLAIN_NUMBER = re.compile(
    r"\\?\$? ?[-+]?[\d.,{}]*\d(?: ?/ ?\d+| \d+/\d+|[eE][-+]?\d+| ?(?:\\times|\\cdot|\*) ?10\^\{?[-+]?\d+\}?)?"
    r"|10\^\{?[-+]?\d+\}?"
)
_BARE = re.compile(
    r"(?P<value>.*[\w})](?<![sS]quare)(?<![cC]ubic)(?<!sq))(?P<space>\s*)(?<![A-Za-z])"
    r"(?P<unit>(?:(?:[sS]quare|sq|[cC]ubic)\s+)?[A-Za-z/]+)(?P<power>\s*\^\s*\{?[23]\}?)?",
    re.DOTALL,
)


_CHINESE = {
    "毫米": "mm", "厘米": "cm", "分米": "dm", "米": "m", "千米": "km", "公里": "km", "克": "g", "毫克": "mg",
    "千克": "kg", "公斤": "kg", "升": "l", "毫升": "ml", "秒": "s", "分钟": "min", "小时": "h", "天": "day",
    "元": "yuan",
    "度": "degree", "千米/时": "km/h", "千米/小时": "km/h", "公里/小时": "km/h", "米/秒": "m/s",
}  # fmt: skip
_CHINESE_POWERS = {"": "", "平方": "^2", "立方": "^3"}
_CHINESE_NAMES = "|".join(sorted(_CHINESE, key=len, reverse=True))
_CHINESE_UNIT = re.compile(
    r"(?P<value>.*[\da-zA-Z})]) ?(?:\\text\{ ?)?(?P<power>平方|立方)?(?P<unit>" + _CHINESE_NAMES + r") ?\}?"
)


def canonical_unit(text: str) -> str:
    """Return a unit's one spelling: `metres` is m, `square feet` is ft^2. An unknown unit stays as it is."""
    text = _PER.sub("/", text)
    if (powered := _POWERED.fullmatch(text)) is not None:
        text = powered[1] + ("^2" if powered[2] == "squared" else "^3")
    words = text.split()
    power = _POWER_WORDS.get(words[0].lower(), "") if len(words) > 1 else ""
    name = " ".join(words[1:] if power else words)
    base = re.sub(r"\^\s*\{?(-?[1-4])\}?$", "", name).strip()
    power = power or "".join(f"^{digits}" for digits in re.findall(r"\^\s*\{?(-?[1-4])\}?$", name))
    joined = "/".join(map(_product, base.split("/")))
    return (_known(base) or _known(joined) or joined) + power


def _product(text: str) -> str:
    """One spelling of units side by side: N m is N·m; m s is no ms."""
    return "·".join(_known(word) or word for word in re.split(r"\s+|\\cdot", text.strip()) if word)


def is_compound(text: str) -> bool:
    """Return whether all of a text are units that are known here, as `kg m/s^2` and `square feet` are."""
    words = [word for word in re.split(r"[\s/]+|\\cdot", _POWERS.sub(" ", text)) if word]
    return bool(words) and all(_known(word) is not None for word in words)


def is_unit(name: str) -> bool:
    """Return whether a word or letter is a unit that is known here."""
    return _known(name) is not None


def split_chinese_unit(text: str) -> tuple[str, str] | None:
    """Split `5厘米` into (`5`, `cm`), the spelling of `split_bare_unit`. None without such a unit."""
    found = _CHINESE_UNIT.fullmatch(text)
    if found is None:
        return None
    return found["value"], _CHINESE[found["unit"]] + _CHINESE_POWERS[found["power"] or ""]


def split_bare_unit(text: str) -> tuple[str, str] | None:
    """Split `5 cm^2` into (`5`, `cm^2`), a number and a unit in plain letters. None without a known unit."""
    text = _NEWTON_METRE.sub(" Nm", _PER.sub("/", text))
    powered = _POWERED.fullmatch(text)
    if powered is not None:
        text = powered[1] + ("^2" if powered[2] == "squared" else "^3")
    match = _BARE.fullmatch(text)
    if match is None:
        return None
    last = match["unit"].split()[-1]
    if any(_known(part) is None for part in last.split("/")) or not re.search(r"[\d\\]", match["value"]):
        return None
    may_be_variables = last not in _CANONICAL and all(part in _SHORT for part in last.split("/"))
    if (may_be_variables or last in _SHORT) and _PLAIN_NUMBER.fullmatch(match["value"]) is None:
        return None
    if not match["space"] and (last in _SHORT or not _ends_as_number(match["value"])):
        return None
    return match["value"], canonical_unit(match["unit"] + (match["power"] or ""))


def _ends_as_number(value: str) -> bool:
    r"""Whether a unit may follow without a space: behind digits, or 2\sqrt{3}, where no letter is a variable."""
    return value[-1].isdigit() or (value[-1] == "}" and not re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", value))


def _known(name: str) -> str | None:
    """The one spelling of a unit. Capitals count in symbols, Mg is not mg, but not in words."""
    singular = name.removesuffix("s") if len(name) > 2 else name  # Ns is no plural
    folded = {name.lower(), name.lower().removesuffix("s")} & _ANY_CASE
    return next((_CANONICAL[spelling] for spelling in (name, singular, *folded) if spelling in _CANONICAL), None)
