"""Reading and comparing final answers: the last \\boxed{...}, and strict equality of what it holds.

Strict means one committed value. "7 or 8", "7, 8" and "the answer is 7" are not 7, and where the truth is a plain
number the answer must be written as one: "3+4" for 7 would reward copying the question. Numbers are compared
exactly as rationals, so 0.333 is not 1/3. Only where the truth is no plain number does `math-verify` (sympy)
decide whether two formulas are equal; it can be slow on absurd formulas, which the pool's time limit covers.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction

from mmr1_ds.rewards.choices import choice, choices
from mmr1_ds.rewards.units import canonical_unit, split_bare_unit

MAX_ANSWER_CHARS = 2000  # beyond this nothing is compared: no answer is that long
MAX_FORMULA_CHARS = 300  # beyond this only equal strings are equal
MAX_EXPONENT = 300  # the largest exponent of ten; more would build gigabytes of digits

MINUS_SIGN = "\N{MINUS SIGN}"

_BRACES = re.compile(r"(?P<box>\\?\\boxed\s*\{)|\\.|[{}]", re.DOTALL)  # an escaped brace is none
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"(?P<row>\\\\)|\\[ ,;:!>]|\\(?:quad|qquad)(?![a-zA-Z])|~|\s+")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,\\!|\\,)\d{3})+(?![\d,])")  # thousands: 1{,}000 1,\!000 1\,000
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"([+-]?)({_DIGITS}?)(?:\.(\d*))?")
_POWER_OF_TEN = re.compile(r"([+-]?)10\^\{?([+-]?\d+)\}?")
_POWER = re.compile(r"(.+?)(?:\\times|\\cdot|\*)10\^\{?([+-]?\d+)\}?|(.+?)[eE]([+-]?\d+)")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac(?:\{([^{}]+)\}|(\d))(?:\{([^{}]+)\}|(\d))|([^/]+)/([^/]+)")
_MIXED = re.compile(r"([+-]?)(\d+)(\\[dt]?frac.+)")
_UNIT = re.compile(
    r"(?P<value>.*\d\.?[})]?)(?:\s|\\[ ,;:!]|~)*"
    r"(?:\\(?:text|mathrm|mbox)\s*\{(?P<unit>[^{}\d]*)\}(?P<power>\^\{?[23]\}?)?)"
)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?$|°$")
_PLAIN_MIXED = re.compile(r"([+-]?)(\d+) (\d+)/(\d+)")
_ASSIGNMENT = re.compile(r"^([a-zA-Z])\s*=\s*(?=[^=]+$)")
_COMMAND_SPACE = re.compile(r"(\\times|\\cdot) (?=\d)")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_PLAIN = re.compile(r"[a-zA-Z][a-zA-Z '-]*")
_WORD = re.compile(r"[a-zA-Z]{2,}")
_CONJUNCTIONS = frozenset(("or", "and", "not", "to", "through"))
_OR = re.compile(r"(?<=[\d)}]) ?(?:or|and) ?(?=[-+\d(\\])")
_OPENING = re.compile(r"\\\{|[({\[]")
_CLOSING = re.compile(r"(?:\\\}|[)}\]])$")
_SYNONYMS = {
    MINUS_SIGN: "-", "\N{MULTIPLICATION SIGN}": r"\times ", "\N{DIVISION SIGN}": r"\div ",
    "\N{INFINITY}": r"\infty ", "\N{UNION}": r"\cup ", "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ", "\N{GREATER-THAN OR EQUAL TO}": r"\ge ", "\N{NOT EQUAL TO}": r"\ne ",
    "\N{EMPTY SET}": r"\emptyset ", "\N{PLUS-MINUS SIGN}": r"\pm ",
}  # fmt: skip
_COMMAND_SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne",
    "varnothing": "emptyset", "lbrace": "{", "rbrace": "}",
}  # fmt: skip
_RENAMED_COMMAND = re.compile(rf"\\({'|'.join(_COMMAND_SYNONYMS)})(?![a-zA-Z])")
_ROOT = re.compile("\N{SQUARE ROOT}\\s*(?:\\(([^()]*)\\)|(\\w+))")
_COUNTED = (",", ";", "=", "<", ">", r"\pm", r"\mp", r"\lor", r"\land", r"\cup", r"\ne", r"\le", r"\ge", "|")


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


def answers_equal(answer: str, truth: str) -> bool:
    """Return whether the boxed `answer` is the ground truth, as text, as an exact number, or as a formula."""
    if len(answer) > max(MAX_ANSWER_CHARS, len(truth)):
        return False
    answer_text, truth_text = normalise(answer), normalise(truth)
    if not answer_text or not truth_text:
        return False
    if answer_text == truth_text or _same_words(answer_text, truth_text):
        return True
    truth_choice, truth_choices = choice(truth_text), choices(truth_text)
    if truth_choice or truth_choices:
        return _commits_to(answer_text, truth_choice, truth_choices)
    if _named(answer_text) and _named(truth_text) and _named(answer_text) != _named(truth_text):
        return False  # x = 5 is not y = 5
    truth_number = parse_number(truth)
    if truth_number is not None:
        answer_number = parse_number(answer)
        return answer_number is not None and answer_number.equals(truth_number)
    if "," in truth_text and "," not in answer_text:
        answer_text = _OR.sub(",", answer_text)  # the values 2 or -2
    return _same_structure(answer_text, truth_text) and _formulas_equal(answer_text, truth_text)


def normalise(text: str) -> str:
    r"""Return the answer without what has no meaning: dollars, spaces, `\left`, `\text{}`, a final full stop."""
    text = text.strip().strip("$").strip()
    text = text.replace(r"\(", "").replace(r"\)", "").replace(r"\[", "").replace(r"\]", "")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])", "", text)
    for symbol, command in _SYNONYMS.items():
        text = text.replace(symbol, command)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    text = _RENAMED_COMMAND.sub(lambda command: "\\" + _COMMAND_SYNONYMS[command[1]], text)
    text = _GROUPED.sub(lambda digits: re.sub(r"\D+", ",", digits[0]), text).replace("{,}", ",")
    previous = ""
    while previous != text:  # wrappers may be nested
        previous, text = text, _WRAPPERS.sub(r" \1 ", text)
    text = (
        _COMMAND_SPACE.sub(r"\1", _SPACES.sub(lambda space: space["row"] or " ", text))
        .strip()
        .removesuffix(".")
        .strip()
    )
    if re.fullmatch(r"\(\s*[a-zA-Z]\s*\)", text):  # a choice: (A)
        text = text.strip("() ")
    return re.sub(r"(?<![a-zA-Z0-9.]) | (?![a-zA-Z0-9.])", "", text)


def _commits_to(answer: str, letter: str | None, letters: str | None) -> bool:
    """A choice is right by its letter; a list by its letters in their order, with or without commas."""
    if letter is not None:
        return choice(answer) == letter
    return (choices(answer) or answer) == letters


def _named(text: str) -> str:
    """x of `x = 5`; empty for anything else."""
    assignment = _ASSIGNMENT.match(text)
    return assignment[1] if assignment else ""


def _same_words(answer: str, truth: str) -> bool:
    """Equal but for capitals, which count in formulas only."""
    return _PLAIN.fullmatch(truth) is not None and answer.casefold() == truth.casefold()


@dataclass(frozen=True)
class Number:
    """An exact number as it was written."""

    value: Fraction
    unit: str  # as written, "" without one

    def equals(self, truth: Number) -> bool:
        """Compare two numbers. One unit may be missing, but not differ; 25% is 25 (percent as a unit) or 0.25."""
        if self.unit and truth.unit and self.unit != truth.unit:
            return False
        if self.value == truth.value:
            return True
        return (self.unit == "%") != (truth.unit == "%") and self.scaled() == truth.scaled()

    def scaled(self) -> Fraction:
        return self.value / 100 if self.unit == "%" else self.value


def parse_number(text: str) -> Number | None:
    r"""A number literal: 7, -1,234.50, 3/4, \frac{3}{4}, 2\frac{1}{2}, 1.5\times10^{3}, 25\%, 30^\circ, 7\text{ cm}.

    Returns: None for anything else, sums and products included.
    """
    text = text.strip().strip("$").strip().removesuffix(".").strip()
    text, unit = _split_unit(text)
    text = _ASSIGNMENT.sub("", normalise(text))
    text = text.strip().removeprefix(r"\$").removeprefix("$")
    mixed = _PLAIN_MIXED.fullmatch(text)
    if mixed is not None and int(mixed[4]):
        return Number(_sign(mixed[1]) * (int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))), unit)
    if " " in text or len(text) > MAX_FORMULA_CHARS:
        return None
    value = _literal(text)
    return None if value is None else Number(value, unit)


def _split_unit(text: str) -> tuple[str, str]:
    if text.endswith("%"):
        return text[:-1].removesuffix("\\").rstrip(), "%"
    degrees = _DEGREES.search(text)
    if degrees is not None:
        return text[: degrees.start()], "degree"
    match = _UNIT.fullmatch(text)
    if match is None:
        return split_bare_unit(_SPACES.sub(" ", text)) or (text, "")
    unit = re.sub(r"[.{}]", "", match["unit"]).strip()
    if _CONJUNCTIONS & set(unit.lower().split()):
        return text, ""
    return match["value"], canonical_unit(unit + (match["power"] or "")) if unit else ""


def _literal(text: str) -> Fraction | None:
    if len(text) > 2 and text[0] == "{" and text[-1] == "}":
        return _literal(text[1:-1])
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        return _signed(mixed[1], _sum(_decimal(mixed[2]), _literal(mixed[3])))
    fraction = _FRACTION.fullmatch(text)
    if fraction is not None:
        above = _decimal(fraction[2] or fraction[3] or fraction[6])
        below = _decimal(fraction[4] or fraction[5] or fraction[7])
        return None if above is None or not below else _signed(fraction[1] or "", above / below)
    of_ten = _POWER_OF_TEN.fullmatch(text)
    if of_ten is not None:
        return _sign(of_ten[1]) * Fraction(10) ** int(of_ten[2]) if abs(int(of_ten[2])) <= MAX_EXPONENT else None
    power = _POWER.fullmatch(text)
    if power is not None:
        base, exponent = _decimal(power[1] or power[3]), int(power[2] or power[4])
        return None if base is None or abs(exponent) > MAX_EXPONENT else base * Fraction(10) ** exponent
    return _decimal(text)


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    return _signed(match[1], Fraction(f"{match[2].replace(',', '') or '0'}.{match[3] or '0'}"))


def _signed(sign: str, value: Fraction | None) -> Fraction | None:
    return _sign(sign) * value if value is not None else None


def _sign(sign: str) -> int:
    return -1 if sign == "-" else 1


def _sum(first: Fraction | None, second: Fraction | None) -> Fraction | None:
    return None if first is None or second is None or second < 0 else first + second


def _same_structure(answer: str, truth: str) -> bool:
    """Whether the answer offers as many values as the truth, in no more words: what sympy would read too kindly."""
    if len(answer) > MAX_FORMULA_CHARS or len(truth) > MAX_FORMULA_CHARS or re.search(r"[\d)}] [\d({]", answer):
        return False
    answer, truth = _ASSIGNMENT.sub("", answer), _ASSIGNMENT.sub("", truth)
    if _brackets(answer) and _brackets(truth) and _brackets(answer) != _brackets(truth):
        return False  # (0, 1) is neither [0, 1] nor {0, 1}
    if _other_case(answer, truth) or _other_case(truth, answer):
        return False
    if any(_count(mark, answer) != _count(mark, truth) for mark in _COUNTED):
        return False
    words = set(_WORD.findall(_COMMAND.sub(" ", answer)))
    return words <= set(_WORD.findall(_COMMAND.sub(" ", truth))) and _is_formula(answer) and _is_formula(truth)


def _brackets(text: str) -> tuple[str, str] | None:
    """The first and the last bracket of a text that begins and ends with one; {1, 2} is written for a set."""
    opening, closing = _OPENING.match(text), _CLOSING.search(text)
    return (opening[0].strip("\\"), closing[0].strip("\\")) if opening and closing else None


def _other_case(one: str, other: str) -> bool:
    """Whether a variable of the one stands in the other only in the other case: x^2 is not X^2."""
    letters, others = (set(re.findall(r"[a-zA-Z]", _COMMAND.sub(" ", text))) for text in (one, other))
    return any(letter.swapcase() in others for letter in letters - others)


def _count(mark: str, text: str) -> int:
    return len(re.findall(re.escape(mark) + r"(?![a-zA-Z])" if mark[0] == "\\" else re.escape(mark), text))


def _is_formula(text: str) -> bool:
    """Plain words are no formulas: sympy would read them as products of letters, equal under any order."""
    return not _WORD.search(_COMMAND.sub(" ", text))


def _formulas_equal(answer: str, truth: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    latex = (LatexExtractionConfig(),)
    # No time limits here: they work by SIGALRM, and the pool has one for the whole response already. The library
    # warns of that, and logs whatever it cannot parse.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    parsed_truth = parse(f"${truth}$", extraction_config=latex, parsing_timeout=None)
    parsed_answer = parse(f"${answer}$", extraction_config=latex, parsing_timeout=None)
    if parsed_truth and parsed_answer and verify(parsed_truth, parsed_answer, timeout_seconds=None):
        return True
    return _same_spelling(answer, truth)


def _same_spelling(answer: str, truth: str) -> bool:
    """Equality under mathruler's rewriting of text, for what math-verify cannot read.

    Not its `grade_answer`: that evaluates the response as Python, and takes 30 hours for 30 minutes.
    """
    try:
        from mathruler.math_normalize import normalize_answer
    except ImportError:
        return False
    return bool(normalize_answer(answer) == normalize_answer(truth))
