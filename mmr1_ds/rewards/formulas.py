r"""Equality of two single formulas, by math-verify (sympy), of those that can be compared in time.

`9^{9^{9^9}}` would build a number that no machine holds and `(x+1)^{5000}` an expansion that takes hours: such formulas
are equal as texts alone, by their sizes (`sizes`). What passes takes half a second at most, as far as was found; the
reward pool's time limit covers what was not.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mmr1_ds.rewards.calls import calls_as_variables
from mmr1_ds.rewards.numbers import with_points
from mmr1_ds.rewards.sizes import is_small

MAX_FORMULA_CHARS = 300
MAX_FACTORIAL = 200
MAX_POWER_OF_POWER = 100
DIGITS = 25  # of constants that are compared first
MAX_FUNCTIONS_SIMPLIFIED = 1  # in a side of an equation: sines of many angles are simplified for seconds

_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[a-zA-Z]{2,}")
_CONJUNCTIONS = frozenset(("or", "and", "not", "to", "mod", "per"))
_WORD_BETWEEN = re.compile(r"\d [a-zA-Z]{2,}(?: [a-zA-Z]+)* \d")
_TWO_THINGS = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]+ \d")  # 1B 2A
_DECIMAL = re.compile(r"\d*\.\d+|\d+\.(?!\d)")
_TOWER = re.compile(r"\^\s*\{[^{}]*(?:\^|\{)[^{}]*[\^]|\^\s*\{[^{}]*\^\s*(?:\{[^{}]*)?\^")
_UNBOUNDED = re.compile(
    r"\\(?:sum|prod|int|lim|iint|oint|approx|sim|equiv|ldots|nabla|max|min|gcd)(?![a-zA-Z])|\?|\\frac\{(?:d|\\partial)(?![a-zA-Z}])"
    r"|\\frac\{ ?(?:d|\\partial)[^{}]*\}\{ ?(?:d|\\partial) ?\\?[a-zA-Z]"
)
# The order of points and of matrices means something, and sympy would multiply the one and sort the other.
_FIGURES = re.compile(
    r"\\(?:angle|triangle|bigtriangleup|square|odot|parallel|perp|cong|widehat|overset|stackrel)(?![a-zA-Z])"
    r"|\\Delta ?[A-Z]{3}(?![a-zA-Z])"
)
_TRANSPOSE = re.compile(r"(?<=[A-Z)]) ?\^ ?\{? ?(?:T|\\top|\\intercal)(?![a-zA-Z])")
_INVERSE = re.compile(r"[A-Z)] ?\^ ?\{? ?-")
_CROSS_PRODUCT = re.compile(
    r"(?:(?<![a-zA-Z\\])[a-z]|[A-Z}]) ?\\times ?(?:[A-Z]|\\(?:vec|overline|hat)(?![a-zA-Z])|\{)"
    r"|(?<![a-zA-Z\\])\{?[ijk]\}? ?\\times ?\{?[ijk](?![a-zA-Z])"
)
_VECTOR = r"(?:\\(?:vec|hat|overline) ?)?\{[^{}]*\}"
_SCALED_VECTOR = re.compile(  # (a \cdot b)c is no a(b \cdot c)
    rf"{_VECTOR} ?\\cdot ?{_VECTOR} ?\) ?{_VECTOR}|{_VECTOR} ?\( ?{_VECTOR} ?\\cdot ?{_VECTOR}"
)
_IMAGINARY = re.compile(r"(?<=\d)(?: | ?\\cdot ?)i(?![a-zA-Z])")
_CAPITAL_I = re.compile(r"(\\[a-zA-Z]+)|I")
_LETTER = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]")
_FIRST_LETTER = re.compile("[a-zA-Z]")
_FACTORIAL = re.compile(r"(\d*|[^\d])\s*!")
_BINOMIAL = re.compile(r"\\binom\{[^{}^]*\}\{[^{}^]*\}")
_LETTERS = re.compile("[a-z]{2,3}")
_PRODUCT = re.compile(r"\\(?:cdot|times)(?![a-zA-Z])")
_POWER_OF_POWER = re.compile(r"(?<=\^)\{(\d{1,2})\^\{?(\d)\}?\}")
_MIXED = re.compile(r"(?<![\d.^_])(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))")
# What \\Delta stands before it belongs to; it is no factor.
_DIFFERENCE = re.compile(r"\\Delta ?(?:\{([a-zA-Z])\}|(\\[a-zA-Z]+|[a-zA-Z]))(_\w|_\{\w+\})?")
# [x], and {x} - the integer and the fractional part - but not 2[(x+1)^2+3], [a+b], f[x]: brackets of one term are no
# brackets otherwise.
_PART = re.compile(
    r"(?<![a-zA-Z\\])(\[|\\\{) ?((?=[^\]]*(?<![a-zA-Z\\])[a-zA-Z])(?:[^-+()\[\]{},]|\{[^{}]*\})+?) ?\\?[\]}](?!_)"
)
_TRIGONOMETRIC = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = re.compile(
    r"(\\frac\{[^{}]*\}\{[^{}]*\}|\d+(?:\.\d+)?(?:\\?[a-zA-Z]+)?|\\?[a-zA-Z]+|\([^()]*\)|\{[^{}]*\})"
    r" ?\^\\circ(?![a-zA-Z])"
)
# Of a power, which sympy leaves as it is, since x may be negative.
_ODD_ROOT = re.compile(r"\\sqrt\[([3579])\]\{([a-zA-Z])\^\{?(\d+)\}?\}")
# Two factors side by side, neither a letter: 3(4), \binom{5}{2}\binom{4}{1}, (2)3; what has an index may be a function.
_FACTORS = re.compile(r"(?:(?<![\d.^_])\d+(?:\.\d+)?|[)}]) ?(?=\\binom|\\frac|\()|[)}] ?(?=[\d.])")
_MAY_BE_CALLED = re.compile(
    r"(?:\\[a-zA-Z]+|[a-zA-Z])(?: ?[_^] ?(?:\{[^{}]*\}|\w))* ?$|\\(?!frac|binom|sqrt)[a-zA-Z]+ ?\{[^{}]*\}$"
)


def formulas_equal(answer: str, truth: str) -> bool:
    """Return whether two normalised formulas are equal. Decimals are exact: 1.414214 is not the root of 2."""
    if answer == truth:
        return True
    if _LETTERS.fullmatch(truth) and _PRODUCT.search(answer):  # ab, which may be a word, beside a \\cdot b
        truth = r"\cdot ".join(truth)
    named = calls_as_variables(_written_out(answer), _written_out(truth), formulas_equal)
    if named is None or not _comparable(*named):
        return False
    answer, truth = named
    parsed_truth, parsed_answer = _parse(truth), _parse(answer)
    if not parsed_truth or not parsed_answer:
        return False
    if _TRIGONOMETRIC.search(truth) and _are_other_numbers(parsed_truth[0], parsed_answer[0]):
        return False
    from math_verify import verify

    return bool(verify(*_with_imaginary_unit(parsed_truth, parsed_answer), timeout_seconds=None))


def equations_equal(answer: str, truth: str) -> bool:
    """Return whether two equations say the same: one's sides differ by a constant multiple of the other's."""
    named = calls_as_variables(_written_out(answer), _written_out(truth), formulas_equal)
    if named is None:
        return False
    answer, truth = named
    sides = [part.strip() for text in (answer, truth) for part in text.split("=")]
    if len(sides) != 4 or not all(sides) or not all(is_small(side, MAX_FUNCTIONS_SIMPLIFIED) for side in sides):
        return False
    if not _comparable(answer.replace("=", "-"), truth.replace("=", "-")):
        return False
    import sympy  # type: ignore[import-untyped]

    one, other = (_parse(f"{left}-({right})") for left, right in (sides[:2], sides[2:]))
    if not one or not other or not isinstance(one[0], sympy.Expr) or not isinstance(other[0], sympy.Expr):
        return False
    ratio = sympy.simplify(one[0] / other[0])
    return bool(ratio.is_number and ratio.is_finite and ratio != 0 and one[0].free_symbols)


def _written_out(text: str) -> str:
    r"""A formula with its mixed numbers as sums, for 2\frac{1}{3}x is no product, and small powers of powers as one.

    Other numbers side by side are factors: math-verify would add 3\binom{4}{2} and 6(\frac{2}{3}) up as mixed ones.
    """
    text = _PART.sub(_part, _DIFFERENCE.sub(_difference, _MIXED.sub(_sum, text)))
    text = _ODD_ROOT.sub(r"\2^{\\frac{\3}{\1}}", text)
    if _TRIGONOMETRIC.search(text):  # math-verify would take the sine of 30 radians
        text = _DEGREES.sub(r"(\1\\cdot \\frac{\\pi}{180})", text)
    text = _FACTORS.sub(lambda left: left[0] if _is_name(text, left) else left[0] + r"\cdot ", text)
    return _POWER_OF_POWER.sub(_power, text)


def _difference(found: re.Match[str]) -> str:
    """Delta and its symbol as one variable."""
    return rf"\Delta_{{{found[1] or found[2]}{found[3] or ''}}}"


def _part(found: re.Match[str]) -> str:
    """The integer part [x], or the fractional part of a number."""
    whole = rf"\lfloor {found[2]}\rfloor "
    return whole if found[1] == "[" else f"({found[2]}-{whole})"


def _is_name(text: str, left: re.Match[str]) -> bool:
    """Whether what ends here is the name of a function: \\log_{2}, f^{-1}, \\text{Var}."""
    return left[0][0] == "}" and _MAY_BE_CALLED.search(text[: left.start() + 1]) is not None


def _power(found: re.Match[str]) -> str:
    value = int(found[1]) ** int(found[2])
    return f"{{{value}}}" if value <= MAX_POWER_OF_POWER else found[0]


def _sum(mixed: re.Match[str]) -> str:
    whole, above, below = mixed[1], mixed[2] or mixed[4], mixed[3] or mixed[5]
    is_proper = int(above) < int(below)
    return rf"({whole}+\frac{{{above}}}{{{below}}})" if is_proper else mixed[0]


def _with_imaginary_unit(*parsed: list[Any]) -> tuple[list[Any], ...]:
    """Parsed formulas of no variable but i with the imaginary unit in its place; beside others it may be one."""
    import sympy

    values = [found[0] for found in parsed]
    if not all(isinstance(value, sympy.Expr) for value in values):
        return parsed
    variables = set().union(*(value.free_symbols for value in values))
    if {variable.name for variable in variables} != {"i"}:
        return parsed
    return tuple([value.subs(dict.fromkeys(variables, sympy.I)).doit()] for value in values)


def _are_other_numbers(one: Any, other: Any) -> bool:
    """Whether both are constants of other values, of which algebra would take long to say so."""
    import sympy

    if not all(isinstance(value, sympy.Expr) and not value.free_symbols for value in (one, other)):
        return False
    difference = one.evalf(DIGITS) - other.evalf(DIGITS)
    return bool(difference.is_number and abs(difference) > 10 ** (5 - DIGITS) * (1 + abs(other.evalf(DIGITS))))


def _comparable(answer: str, truth: str) -> bool:
    """Whether both are formulas, small enough, with the same kinds of letters: what sympy would read too kindly."""
    return (
        _is_bounded(answer)
        and _is_bounded(truth)
        and not re.search(r"[\d)}] [\d({]", answer)
        and not any(mark in text for mark in ",'" for text in (answer, truth))
        and not (r"\pi" in truth and r"^\circ" in answer and r"^\circ" not in truth)  # of radians
        and not _other_segments(answer, truth)
        and not _other_case(answer, truth)
        and not _other_case(truth, answer)
        and all(_same_count(mark, answer, truth) for mark in ("|", "=", "<", ">"))
    )


def _is_bounded(text: str) -> bool:
    """Whether sympy reads it as a formula and can hold what it makes of it."""
    if len(text) > MAX_FORMULA_CHARS or _UNBOUNDED.search(text) or _TOWER.search(text):
        return False
    letters = _COMMAND.sub(" ", text)
    if _FIGURES.search(text) or _is_product_of_matrices(text) or ":" in text or _WORD_BETWEEN.search(letters):
        return False
    if re.search(r"[a-zA-Z]\d", letters) or _TWO_THINGS.search(text):  # CO2 is a name, x2 nobody's formula
        return False
    words = _WORD.findall(letters)
    if words and (max(map(len, words)) > 3 or not re.search(r"[-+\d^\\=]|/ ?\(", text) or _CONJUNCTIONS & set(words)):
        return False  # sympy would read words as products of letters
    if text.count("^") - text.count(r"^\circ") > 12 or re.search(r"\d{40}", text):
        return False
    if not is_small(text):
        return False
    factorials = _FACTORIAL.findall(text)
    if any(not base.isalnum() or (base.isdigit() and int(base) > MAX_FACTORIAL) for base in factorials):
        return False
    num_binomials = text.count(r"\binom")
    return num_binomials == len(_BINOMIAL.findall(text)) and not (num_binomials and re.search(r"\d{4}", text))


@lru_cache(maxsize=256)  # of a list against a list each value is asked for often
def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # No time limits here: they work by SIGALRM, and the pool has one for the whole response already. The library
    # warns of that, and logs whatever it cannot parse.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    text = _IMAGINARY.sub("i", _DECIMAL.sub(_exact, with_points(text)))  # 3 \\cdot i would have a variable
    text = _CAPITAL_I.sub(lambda found: found[1] or r"\iota ", text)  # a current, of which I^2 would be I
    # The units that the library would strip are variables as often, 2x+3t would be 2x+3; ours are off before (`units`).
    extraction = LatexExtractionConfig()
    normalization = dataclasses.replace(extraction.normalization_config, units=False)
    extraction = dataclasses.replace(extraction, normalization_config=normalization)
    found: list[Any] = parse(f"${text}$", extraction_config=(extraction,), parsing_timeout=None)
    return found


def _exact(decimal: re.Match[str]) -> str:
    """A decimal as a fraction: math-verify rounds decimals."""
    value = Fraction(decimal[0] if decimal[0] != "." else "0")
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _is_product_of_matrices(text: str) -> bool:
    """Whether there is a transpose, a product of vectors, or capitals with an inverse: order means something there."""
    if any(order.search(text) for order in (_TRANSPOSE, _CROSS_PRODUCT, _SCALED_VECTOR)):
        return True
    return len(re.findall(r"[A-Z]", _COMMAND.sub(" ", text))) > 1 and _INVERSE.search(text) is not None


def _other_segments(one: str, other: str) -> bool:
    r"""Whether both name segments, but others: AB \cdot CD is not AC \cdot BD, though it has the same letters."""
    names, others = (
        {"".join(sorted(name)) for name in re.findall(r"[A-Z]{2,}", _COMMAND.sub(" ", text))} for text in (one, other)
    )
    return bool(names and others) and names != others


def _other_case(one: str, other: str) -> bool:
    r"""Whether a variable of the one stands in the other only in the other case: x^2 is not X^2, nor \Delta \delta."""
    letters, others = (set(_LETTER.findall(text)) for text in (one, other))
    return any(_FIRST_LETTER.sub(lambda first: first[0].swapcase(), letter, 1) in others for letter in letters - others)


def _same_count(mark: str, answer: str, truth: str) -> bool:
    return answer.count(mark) == truth.count(mark)
