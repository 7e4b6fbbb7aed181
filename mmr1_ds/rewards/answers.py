r"""Reading and comparing final answers: the last \boxed{...}, and strict equality of what it holds.

Strict means one committed value. "7 or 8", "7, 8" and "the answer is 7" are not 7, and where the truth is a plain
number the answer must be written as one: "3+4" for 7 would reward copying the question. Numbers are compared
exactly as rationals, so 0.333 is not 1/3. What the text is (a number, a list, a set, an interval) is decided from both
sides: see `values`. Only where two single values are no plain numbers does `math-verify` (sympy) decide whether they
are equal, and only where they are small enough to be compared in time: see `formulas`.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from mmr1_ds.rewards.choices import choice, choices, chooses, joined, judgement, keep_order, same_letters, statements
from mmr1_ds.rewards.dress import split, undress
from mmr1_ds.rewards.formulas import equations_equal, formulas_equal
from mmr1_ds.rewards.names import named, opaque, same_parts
from mmr1_ds.rewards.numbers import Number, literal, parse_number, same_unit, split_unit, split_words
from mmr1_ds.rewards.parts import labelled
from mmr1_ds.rewards.sets import rewritten
from mmr1_ds.rewards.sizes import depth_of_brackets
from mmr1_ds.rewards.truths import read_truth, unwrapped
from mmr1_ds.rewards.values import Value, readings

__all__ = ["Number", "answers_equal", "normalise", "parse_number"]

MAX_ANSWER_CHARS = 2000  # beyond this nothing is compared: no answer is that long
MAX_BRACKETS = 40  # inside one another; with more, texts alone are compared
MAX_DEPTH = 6  # of brackets inside brackets
MAX_VALUES = 50  # of a list
MIN_PERCENT = 10  # of a number with decimals that may mean a percentage

_WRAPPERS = re.compile(r"\\(?:text|mbox)\s*\{([^{}]*)\}")
_NUMBERS = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BEFORE_DIGIT = re.compile(r"(?:(?<=\\times)|(?<=\\cdot)|(?<=\\[lgn]e)) (?=\d)")
_PLAIN = re.compile(r"[a-zA-Z][a-zA-Z '-]*|[a-zA-Z]{3,}[\w '-]*|0[xX][0-9a-fA-F]+")
_WORD = re.compile(  # a-b and xyz are formulas, Co is no CO
    r"(?<![a-z])(?:(?=[a-z]{0,2}[aeiou])[a-z]{3}(?![a-z])|(?=[a-z]*[aeiouy])[a-z]{4,})|^no$|^0x", re.IGNORECASE
)
_PRODUCT = re.compile("[a-zA-Z]{2,3}")
_LETTERS_APART = re.compile(r"(?<![a-zA-Z\\])(?<!\d )([a-zA-Z]) (?=[a-zA-Z](?![a-zA-Z]))")  # a b is ab, not 5 m s 5 ms
_LABEL = re.compile(r"(?:\\text\s*\{\s*)?(?:final )?answer\s*:\s*\}?\s*", re.IGNORECASE)
_APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])\s*")
_TIMES = re.compile(r"(?<=\d) ?(?:\\times|\\cdot|\*) ?(?=\d)")
_TO = re.compile(r"(?<=\d) ?(?:\\text\{ ?to ?\}|to) ?(?=\d)")
_OPTION = re.compile(r"(?:option|choice|answer)\s*:?\s*(\(?[A-Z]\)?)", re.IGNORECASE)


def answers_equal(answer: str, truth: str) -> bool:
    """Return whether the boxed `answer` is the ground truth: as text, an exact number, a formula, or many of them.

    A truth may stand in a wrapper: see `truths.read_truth`.
    """
    truth = read_truth(truth)
    if len(answer) > max(MAX_ANSWER_CHARS, len(truth)):
        return False
    if max(depth_of_brackets(answer), depth_of_brackets(truth)) > MAX_BRACKETS:
        return answer == truth
    answer, truth = (_without(_LABEL, undress(text)) for text in (answer, truth))
    if _APPROXIMATELY.match(truth) is not None:  # the answer may say so too
        answer, truth = (_without(_APPROXIMATELY, text) for text in (answer, truth))
    answer_text, truth_text = normalise(answer), normalise(truth)
    if not answer_text or not truth_text:
        return False
    if answer_text == truth_text or _same_words(answer_text, truth_text):
        return True
    if (parts := labelled(truth)) is not None:
        return _same_labelled(answer, parts)
    answer_text, truth_text = (_OPTION.sub(r"\1", text) for text in (answer_text, truth_text))
    if (numbers := statements(truth_text)) is not None:
        return statements(answer_text) == numbers
    if joined(truth_text) and chooses(answer_text, truth_text):
        return True
    truth_choice, truth_choices = choice(truth_text), choices(truth_text)
    if truth_choices or (truth_choice and truth_choice.isupper()):  # i and x are no options
        return _commits_to(answer_text, truth_choice, truth_choices)
    if len(truth) > MAX_ANSWER_CHARS:
        return False
    return _same(answer, truth, 0) or _same_count(answer, truth)


def _without(label: re.Pattern[str], text: str) -> str:
    """The text without a label in front of it."""
    found = label.match(text)
    return text if found is None else text[found.end() :]


def final_answer(response: str) -> str:
    r"""Return the answer that a response commits to, normalised, for votes: equal texts are the same answer.

    What stands in the last `\boxed{}`, in `<answer>` or behind `####`; without any of them the last line, of which a
    number at its end is enough.
    """
    found = unwrapped(response)
    if found == response.strip():
        line = found.splitlines()[-1] if found else ""
        numbers = _NUMBERS.findall(line.removesuffix("."))
        found = numbers[-1].replace(",", "") if numbers else line.rpartition(":")[2].casefold()
    return normalise(found[:MAX_ANSWER_CHARS])


def normalise(text: str) -> str:
    r"""Return the answer without what has no meaning: dollars, spaces, `\left`, `\text{}`, a final full stop."""
    text = undress(text).replace("{,}", ",")
    previous = ""
    while previous != text:  # wrappers may be nested
        previous, text = text, _WRAPPERS.sub(r" \1 ", text)
    text = _BEFORE_DIGIT.sub("", re.sub(r"\s+", " ", text)).strip().removesuffix(".").strip()
    if re.fullmatch(r"\(\s*[a-zA-Z]\s*\)", text):  # a choice: (A)
        text = text.strip("() ")
    text = re.sub(r"([\^_])\{(\w)\}(?! ?\d)", r"\1\2", text)
    text = re.sub(r"(?<![a-zA-Z0-9.,]) | (?![a-zA-Z0-9.])", "", text)
    return _LETTERS_APART.sub(r"\1", text)


def _commits_to(answer: str, letter: str | None, letters: str | None) -> bool:
    """A choice is right by its letter; a list by its letters, with or without commas."""
    if letter is not None:
        return choice(answer) == letter or (letter == "E" and answer == "e")
    return letters is not None and same_letters(choices(answer) or answer, letters)


def _same_labelled(answer: str, truth: dict[str, str]) -> bool:
    """Whether an answer has the same parts under the same labels, or without any the same in their order."""
    parts = labelled(answer)
    if parts is None:
        values = next((found for found in (split(answer, mark) for mark in ";,") if len(found) == len(truth)), [])
        parts = dict(zip(truth, values, strict=False))
    return parts.keys() == truth.keys() and all(answers_equal(parts[label], truth[label]) for label in truth)


def _same_words(answer: str, truth: str) -> bool:
    """Equal but for capitals, which count in formulas only."""
    return (
        _PLAIN.fullmatch(truth) is not None
        and _WORD.search(truth) is not None
        and answer.casefold() == truth.casefold()
    )


def _same_count(answer: str, truth: str) -> bool:
    """Whether both count the same, 3 people; one may leave out what is counted."""
    (own, other), (value, thing) = split_words(answer), split_words(truth)
    if not (thing or other) or (thing and other and thing != other):
        return False
    if (not other and split_unit(answer)[1]) or (not thing and split_unit(truth)[1]):
        return False
    number = parse_number(own)
    return number is not None and number == parse_number(value)


def _same(answer: str, truth: str, depth: int) -> bool:
    """Whether any reading of the answer is any reading of the truth."""
    if depth > MAX_DEPTH:
        return False
    if _dotted(answer) == _dotted(truth):
        return True
    if (judged := judgement(truth)) is not None and judged == judgement(answer) and len(judged) > 1:
        return True
    if r"\cdot" in truth:  # it is no size of 2 by 3
        answer = _dotted(answer)
    if ":" in truth:  # nor 3 to 5 a range
        answer = _TO.sub(":", answer)
    (answer_name, answer_value), (truth_name, truth_value) = named(answer), named(truth)
    same_names = not answer_name or not truth_name or answer_name == truth_name
    if truth_value.startswith(r"\begin{cases}") and normalise(answer_value) == normalise(truth_value):
        return same_names
    parts = opaque(answer) or opaque(answer_value), opaque(truth) or opaque(truth_value)
    if any(parts):  # dates, times, ranges, bases: equal by their parts, never by arithmetic
        return same_names and same_parts(*parts)
    return any(_match(one, other, depth) for other in readings(truth, is_truth=True) for one in readings(answer))


def _dotted(text: str) -> str:
    r"""The text with one sign for products of numbers: 2 \times 3 is 2 \cdot 3. Between vectors the signs differ."""
    return _TIMES.sub(r"\\cdot ", text)


def _match(answer: Value, truth: Value, depth: int) -> bool:
    if answer.kind != truth.kind or answer.brackets != truth.brackets or len(answer.items) != len(truth.items):
        return False
    if answer.name and truth.name and answer.name != truth.name:
        return False
    if truth.kind == "atom":
        return _same_atom(answer, truth, depth)
    same = functools.partial(_same_item, depth=depth + 1)
    if len(truth.items) > MAX_VALUES:
        return answer.items == truth.items
    if answer.is_either != truth.is_either and not _are_values(truth):
        return False
    if truth.is_ordered or keep_order(truth.items) or _needs_names(answer, truth):
        return all(map(same, answer.items, truth.items))
    units, answer_units = ([split_unit(item)[1] for item in value.items] for value in (truth, answer))
    if len(set(units)) > 1 and not (units[-1] and len({*units} - {""}) == 1):  # of 3, 5 cm both are in cm
        if sorted(units) != sorted(answer_units):
            return all(map(same, answer.items, truth.items))
        same = functools.partial(_same_with_unit, depth=depth + 1)
    rest = list(answer.items)
    for item in truth.items:
        found = next((other for other in rest if same(other, item)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _same_with_unit(answer: str, truth: str, depth: int) -> bool:
    """Whether values are the same and so are their units, of which no one may be missing."""
    return split_unit(answer)[1] == split_unit(truth)[1] and _same_item(answer, truth, depth)


def _same_item(answer: str, truth: str, depth: int) -> bool:
    r"""Whether two values of a list are the same: there \{1\} is not 1."""
    is_set = re.match(r"\\\{(?! ?\\\})[^|:]*$", truth) is not None
    return (not is_set or answer.startswith(r"\{")) and _same(answer, truth, depth)


def _needs_names(answer: Value, truth: Value) -> bool:
    """Whether values without names stand for x = 1, y = 2: then their order says which is which."""
    names = {named(rewritten(item) or item)[0] for item in truth.items}
    return len(names) > 1 and not all(named(rewritten(item) or item)[0] for item in answer.items)


def _are_values(found: Value) -> bool:
    """Whether a list has values of one thing, where "or" and "and" say the same; not so A or B, x = 1 or y = 2."""
    names = {named(item)[0] for item in found.items}
    return len(names) == 1 and not any(re.fullmatch(r"[A-Za-z ]+|.*[<>].*", item) for item in found.items)


def _same_atom(answer: Value, truth: Value, depth: int) -> bool:
    """Compare two single values, each with or without a name and a unit."""
    (answer_text,), (truth_text,) = answer.items, truth.items
    answer_name, answer_text = named(answer_text)
    truth_name, truth_text = named(truth_text)
    if answer_name != truth_name and answer_name and truth_name:
        both_plain = len(answer_name) == len(truth_name) == 1 or {answer_name, truth_name} == {"f(x)", "y"}
        if {answer_name, truth_name} != {"f(x)", "y"}:
            return both_plain and equations_equal(answer.items[0], truth.items[0])
    elif "=" in answer_text or "=" in truth_text:
        has_variables = re.search(r"(?<![a-zA-Z\\])[a-zA-Z]{1,3}(?![a-zA-Z])", truth_text) is not None
        return has_variables and equations_equal(answer.items[0], truth.items[0])
    if "'" in answer_name and not truth_name:
        return False  # the derivative of what was asked for
    if answer_name and all(map(_PRODUCT.fullmatch, (answer_text, truth_text))):  # V = RI is V = IR; RI may be a word
        return equations_equal(answer.items[0], truth.items[0])
    if answer_name or truth_name:
        if "angle" in truth_name and parse_number(truth_text) is not None and not split_unit(truth_text)[1]:
            truth_text += r"^\circ"  # an angle has no other unit
        return _same(answer_text, truth_text, depth + 1)
    (answer_value, answer_unit), (truth_value, truth_unit) = split_unit(answer_text), split_unit(truth_text)
    if not same_unit(answer_unit, truth_unit):
        return False
    if answer_unit == "degree" and not truth_unit and re.search(r"\\pi(?![a-zA-Z])", truth_value):
        return False  # the truth is in radians
    answer_number, truth_number = literal(answer_value), literal(truth_value)
    if truth_number is not None:
        if answer_number is None or not _comma_fits(answer, truth, truth_number.denominator):
            return False
        if answer_number == truth_number and not (answer_unit == "%" and not truth_unit and _is_share(truth_number)):
            return True
        if (answer_unit == "%") == (truth_unit == "%"):
            return False
        scaled = (number / 100 if unit == "%" else number
                  for number, unit in ((answer_number, answer_unit), (truth_number, truth_unit)))  # fmt: skip
        return len(set(scaled)) == 1  # 25% is 25, percent being its unit, or 0.25
    if answer.has_decimal_comma or truth.has_decimal_comma:
        return False
    if answer_unit or truth_unit:
        return _same(answer_value, truth_value, depth + 1)
    if answer_number is not None:  # 1e-3 is no formula of e
        answer_value = str(answer_number)
    return formulas_equal(normalise(answer_value), normalise(truth_value))


def _is_share(number: Fraction) -> bool:
    """Whether a number without a unit may be one of whole things: 0.5, 1 and 1.5 are 50%, 100% and 150%; 25 is 25%."""
    return abs(number) <= 1 or (number.denominator != 1 and abs(number) < MIN_PERCENT)


def _comma_fits(answer: Value, truth: Value, denominator: int) -> bool:
    """Whether a bare comma may be a decimal one: where the other side is written with a point, or is no whole."""
    if truth.has_decimal_comma:  # 10,20 may be a list: its digits at least must be those
        written, expected = (split_unit(value.items[0])[0].replace("{,}", ".") for value in (answer, truth))
        return "." in written and written.lstrip("+") == expected.lstrip("+")
    return not answer.has_decimal_comma or denominator != 1
