"""What an answer is: one value, a list or set, a tuple or interval, a union, a matrix; a text may be several."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mmr1_ds.rewards import sets
from mmr1_ds.rewards.dress import closing, split
from mmr1_ds.rewards.names import named
from mmr1_ds.rewards.numbers import split_unit
from mmr1_ds.rewards.parts import without_respectively

_MATRIX = re.compile(r"(?:\[|\()? ?\\begin\{(p|b|B|v|V|)matrix\}(.*)\\end\{\1matrix\} ?(?:\]|\))?", re.DOTALL)
_ARRAY = re.compile(r"[\[(] ?\\begin\{array\}\{[lcr| ]*\}(.*)\\end\{array\} ?[\])]", re.DOTALL)
_WORDS = re.compile(
    r",?\s*(?:\\text\s*\{\s*(or|and|或者?|[和且])\s*\}|(?<![a-zA-Z])(or|and)(?![a-zA-Z])|或者?|[和且])\s*(?:\\text\{\s*\})?"
)
_EITHER, _BOTH = (  # what parts systems: first "or", without it "and"
    re.compile(rf",?\s*(?:\\text\s*\{{\s*(?:{word}|{sign})\s*\}}|(?<![a-zA-Z]){word}(?![a-zA-Z])|{sign})\s*")
    for word, sign in (("or", "或者?"), ("and", "[和且]"))
)
_LAND = re.compile(r"\\(?:land|wedge)(?![a-zA-Z])")
_SUBJECT = re.compile(r"([^=<>]+?) ?(?:=|<|>|\\(?:le|ge|ne)(?![a-zA-Z]))")
_OR = re.compile(r"(?<![a-zA-Z])or(?![a-zA-Z])|或")
_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_ONE_NUMBER = re.compile(rf"[^\w(){{}},;]*{_THOUSANDS.pattern}(?:\.\d+)?(?!\d)[^\d,;]*")
# One number with a decimal comma: it has a unit or a power of ten behind, begins with 0,0, or has many digits.
_ONE_DECIMAL = re.compile(r"[^\w()\[\]{}|,;]*(?P<whole>\d+),(?P<digits>\d+)(?P<rest>[^,;()\[\]|]*)")
_POWER_OF_TEN = re.compile(r" ?(?:\\times|\\cdot) ?10 ?\^")
_GROUPED_DECIMAL = re.compile(
    r"(?P<before>[^\w()\[\]{}|,;]*)(?P<whole>[1-9]\d{0,2}(?:(?:[. ]|\{,\})\d{3})+),(?P<digits>\d+)"
    r"(?P<rest>(?![\d.])[^,;()\[\]|]*)"
)
_LAKHS = re.compile(r"\d{1,2}(?:,\d{2})+,\d{3}")
_RELATION = re.compile(r"(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>)")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_NAME = re.compile(r"[a-zA-Z]|\\[a-zA-Z]+|[a-zA-Z]_\{?\w\}?")
_MEMBER = re.compile(r"([a-zA-Z]) ?\\in(?![a-zA-Z])")
_INFINITE = re.compile(r"\+ ?\\infty")


@dataclass(frozen=True)
class Value:
    """A value and its parts, as undressed texts."""

    kind: str  # atom, list, tuple, union, matrix, relation, ratio, except (all reals but those), or a sign between
    items: tuple[str, ...]
    brackets: str = ""  # of a tuple or interval; of relations their signs; of a matrix its shape
    is_ordered: bool = False
    name: str = ""  # the variable of an interval, where it is written as an inequality
    has_decimal_comma: bool = False  # a bare comma was read so
    is_either: bool = False  # its parts are joined by "or"


def readings(text: str, is_truth: bool = False) -> list[Value]:
    """Return all readings of an undressed text. A truth of `1,200` is one number; an answer may mean `1, 200`."""
    text, keeps_order = without_respectively(text.strip())
    if keeps_order:
        return [replace(found, is_ordered=True) for found in readings(text, is_truth)]
    if is_truth and _ONE_NUMBER.fullmatch(text) is not None:
        return [Value("atom", (text.replace(",", "{,}"),))]
    if is_truth and (decimal := _with_point(text)) is not None:
        return [Value("atom", (decimal,))]
    if (written := sets.rewritten(text) or _conditions(text)) is not None:
        return readings(written, is_truth)
    if (points := sets.excluded_points(text)) is not None:
        variable, numbers = points
        return [Value("except", numbers, name=variable)]
    member = _MEMBER.match(text)
    if member is not None:
        return [_of_member(member[1], value) for value in readings(text[member.end() :], is_truth=True)]
    name, value = named(text)
    if name and name not in ("y", "f(x)"):
        of_name = [replace(found, name=name) for found in readings(value, is_truth)]
        if all(found.kind in ("list", "tuple", "matrix", "union") for found in of_name):
            return of_name
    matrix = _matrix(text)
    if matrix is not None:
        return [matrix]
    if re.search(r"\\cup(?![a-zA-Z])", text):
        return [Value("union", tuple(part.strip() for part in re.split(r"\\cup(?![a-zA-Z])", text)))]
    inner = _bracketed(text, is_truth)
    if inner is not None:
        return inner
    if (unordered := _unordered(text)) is not None:
        return [unordered]
    found = _bare_commas(text, is_truth)
    if len(found) == 1 and found[0].kind == "atom":
        terms = split(text, ":")
        ratio = Value("ratio", tuple(terms), is_ordered=True) if len(terms) > 1 and all(terms) else None
        return [_relation(text) or ratio or found[0]]
    return found


def _with_point(text: str) -> str | None:
    """A truth of one number with a decimal comma, written with a point; None where it may be a list of two."""
    grouped = _GROUPED_DECIMAL.fullmatch(text)
    if grouped is not None:
        whole = re.sub(r"\D", "", grouped["whole"])
        return f"{grouped['before']}{whole}.{grouped['digits']}{grouped['rest']}"
    found = _ONE_DECIMAL.fullmatch(text)
    if found is None:
        return None
    begins_with_zero = found["whole"] == "0" and len(found["digits"]) > 1
    is_one = begins_with_zero or len(found["digits"]) > 4 or _POWER_OF_TEN.match(found["rest"]) is not None
    pointed = text.replace(",", ".")
    return pointed if is_one or split_unit(pointed)[1] else None


def _of_member(name: str, value: Value) -> Value:
    r"""What a variable is in: x \in \{2\} is x = 2, whether truth or answer."""
    if value.kind == "atom":
        return replace(value, items=(f"{name} = {value.items[0]}",))
    return replace(value, name=name)


def _matrix(text: str) -> Value | None:
    found = _MATRIX.fullmatch(text)
    array = None if found else _ARRAY.fullmatch(text)
    if found is None and array is None:
        return None
    kind, body = (found[1], found[2]) if found is not None else ("p", array[1] if array is not None else "")
    rows = [row.split("&") for row in body.strip().removesuffix("\\\\").split("\\\\")]
    shape = f"{'v' if kind in ('v', 'V') else 'm'}{[len(row) for row in rows]}"
    return Value("matrix", tuple(cell.strip() for row in rows for cell in row), shape, is_ordered=True)


def _bracketed(text: str, is_truth: bool) -> list[Value] | None:
    r"""What stands in one pair of brackets: \{1, 2\} is a list, (1, 2) and [1, 2) keep theirs, (5) is 5, not \{5\}."""
    is_set = text.startswith(r"\{")
    start = 1 if is_set else 0
    if not text or text[start] not in "({[" or closing(text, start) != len(text) - 1:
        return None
    opening, inner, closed = text[start], text[start + 1 : -1].removesuffix("\\").strip(), text[-1]
    items = _items(inner)
    if opening == "{":
        if "emptyset" in inner:
            return [Value("list", (inner,))]
        if not inner:
            return [Value("atom", (r"\emptyset",))]
        if len(items) > 1:
            return [Value("list", tuple(value for item in items for value in _both_signs(item)))]
        found = _bare_commas(inner)
        if not is_set or [one.kind for one in found] != ["atom"]:
            return found
        of_one = Value("list", (inner,))  # what a set of one is a truth may say without braces, not an answer with them
        return [of_one, *found] if is_truth else [of_one]
    if len(items) == 1:
        return readings(inner, is_truth) if opening + closed == "()" else None
    items = [_INFINITE.sub(r"\\infty", item) for item in items]
    return [Value("tuple", tuple(items), opening + closed, is_ordered=True)]


def _items(text: str) -> list[str]:
    """Split at semicolons, or else at commas; where others have spaces, or words part, those of thousands do not."""
    parts = split(text, ";")
    if len(parts) > 1:
        return [part if part[0] in "([" else re.sub(r"(?<=\d),(?=\d)", "{,}", part) for part in parts if part]
    if ", " in text or _WORDS.search(text):
        text = _THOUSANDS.sub(lambda digits: digits[0].replace(",", "{,}"), text)
    return [part for part in split(text, ",") if part] or [text]


def _bare_commas(text: str, is_truth: bool = False) -> list[Value]:
    """A list, a number with thousands or a decimal comma, or one value."""
    if (systems := _systems(text)) is not None:
        return [systems]
    is_or = False
    parts: list[str] = []
    for part in _items(text):
        words = _WORDS.split(part)
        pieces = [piece.strip() for piece in words[::3]]
        is_or |= _OR.search(part) is not None
        is_list = len(pieces) > 1 and all(map(_is_value, pieces)) and pieces[-1]
        parts += [piece for piece in pieces if piece] if is_list else [part]
    if _LAKHS.fullmatch(text):
        return [Value("list", tuple(parts), is_ordered=True), Value("atom", (text.replace(",", ""),))]
    expanded = [value for part in parts for value in _both_signs(part)] or [text]  # of "and" alone nothing is left
    if len(expanded) == 1:
        return [Value("atom", (expanded[0],))]
    if is_or and all(_RELATION.search(part) for part in expanded):
        return [Value("union", tuple(expanded))]
    is_sequence = any(r"\ldots" in part or "..." in part for part in expanded)
    found = [Value("list", tuple(expanded), is_ordered=is_sequence, is_either=is_or)]
    names, coordinates = zip(*map(named, expanded), strict=True)
    in_order = is_truth and all(len(name) == 1 for name in names) and list(names) == sorted(set(names))
    if (in_order or names in (("x", "y"), ("x", "y", "z"))) and not is_or:
        found.append(Value("tuple", coordinates, "()", is_ordered=True))
    if not is_or and (both := _within(expanded)) is not None:
        found.append(both)
    if ", " in text or ";" in text or text.count(",") == 0:
        return found
    if any(re.fullmatch(r"0\d+", part) for part in expanded):  # 1,000 and 0,05 list nothing
        found.clear()
    if re.sub(_THOUSANDS, "", text).count(",") == 0:
        if re.search(r",\d{3}\.\d", text):  # 12,345.67 is no list
            return [Value("atom", (text.replace(",", "{,}"),))]
        found.append(Value("atom", (text.replace(",", "{,}"),)))
    elif text.count(",") == 1 and re.search(r"\d,\d", text):
        found.append(Value("atom", (text.replace(",", "."),), has_decimal_comma=True))
    return found


def _systems(text: str) -> Value | None:
    """Several systems of the same names, x = 2, y = 3 or x = 3, y = 2; flattened their values could change places."""
    for mark in (_EITHER, _BOTH):
        parts = [part for part in mark.split(text) if part]
        if len(parts) < 2:
            continue
        subjects = [
            sorted(found[1] if (found := _SUBJECT.match(item)) else "" for item in _items(_BOTH.sub(",", part)))
            for part in parts
        ]
        one = subjects[0]
        if len(one) > 1 and "" not in one and len(set(one)) == len(one) and all(other == one for other in subjects):
            is_union = mark is _EITHER and "=" not in text
            return Value("union" if is_union else "list", tuple(parts), is_either=mark is _EITHER and not is_union)
    return None


def _is_value(text: str) -> bool:
    return not text or re.search(r"[\d\\=<>]|^(?:.|[IVX]+)$", text) is not None


def _both_signs(text: str) -> list[str]:
    r"""The two values of a \pm b."""
    if text.count(r"\pm") != 1:
        return [text]
    plus = re.sub(r"\\pm ?", "+", text).replace(r"\mp", "-")
    minus = re.sub(r"\\pm ?", "-", text).replace(r"\mp", "+")
    return [re.sub(r"(^|= ?)\+", r"\1", plus), minus]


def _relation(text: str) -> Value | None:
    """An inequality or chain of them, its signs pointing one way; around one variable it is an interval."""
    parts = [part.strip() for part in _RELATION.split(text)]
    items, signs = parts[::2], parts[1::2]
    if not signs or "" in items or "=" in text:
        return None
    if signs[0] in (">", r"\ge"):
        items, signs = items[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    if any(sign not in ("<", r"\le") for sign in signs):
        is_ne = signs == [r"\ne"]
        return Value("relation", tuple(sorted(items) if is_ne else items), "".join(signs), is_ordered=not is_ne)
    opening, closed = ("[" if signs[0] == r"\le" else "("), ("]" if signs[-1] == r"\le" else ")")
    names = [bool(_NAME.fullmatch(item)) and item not in (r"\pi", r"\infty") for item in items]
    if len(items) == 3 and names == [False, True, False]:
        return Value("tuple", (items[0], items[2]), opening + closed, is_ordered=True, name=items[1])
    if len(items) == 2 and names == [True, False] and not _has(items[1], items[0]):
        return Value("tuple", (r"-\infty", items[1]), "(" + closed, is_ordered=True, name=items[0])
    if len(items) == 2 and names == [False, True] and not _has(items[0], items[1]):
        return Value("tuple", (items[0], r"\infty"), opening + ")", is_ordered=True, name=items[1])
    return Value("relation", tuple(items), "".join(signs), is_ordered=True)


def _within(parts: list[str]) -> Value | None:
    """The interval of x > 2 and x < 5, one variable from below and from above."""
    ends = [_relation(part) for part in parts]
    if len(parts) != 2 or any(end is None or end.kind != "tuple" for end in ends):
        return None
    low, high = sorted((end for end in ends if end is not None), key=lambda end: r"-\infty" in end.items)
    if low.name != high.name or low.items[1] != r"\infty" or high.items[0] != r"-\infty":
        return None
    ends_of_both = (low.items[0], high.items[1])
    return Value("tuple", ends_of_both, low.brackets[0] + high.brackets[1], is_ordered=True, name=low.name)


def _conditions(text: str) -> str | None:
    r"""Conditions joined by \land as a list, x > 2 and x < 5; None for p \land q, which is one statement."""
    parts = _LAND.split(text)
    return r" \text{ and } ".join(parts) if len(parts) > 1 and all(map(_SUBJECT.match, parts)) else None


def _unordered(text: str) -> Value | None:
    r"""An intersection, or lines that are parallel or perpendicular: what stands on both sides may change places.

    So may p \land q, but not the vectors of u \wedge v.
    """
    if (parts := _LAND.split(text))[1:] and all(parts) and not re.search(r"[(),;]|(?<![a-zA-Z])or(?![a-zA-Z])", text):
        return Value(r"\land", tuple(part.strip() for part in parts), is_ordered=r"\wedge" in text)
    for sign in (r"\cap", r"\parallel", r"\perp"):
        parts = [part.strip() for part in re.split(rf"\{sign}(?![a-zA-Z])", text)]
        if len(parts) > 1 and all(parts) and not any(re.search(r"[,;=]|\\c[au]p(?![a-zA-Z])", part) for part in parts):
            is_balanced = all(part.count("(") == part.count(")") for part in parts)
            return Value(sign, tuple(parts)) if is_balanced else None
    return None


def _has(text: str, name: str) -> bool:
    return re.search(r"(?<![a-zA-Z\\])" + re.escape(name) + r"(?![a-zA-Z])", text) is not None
