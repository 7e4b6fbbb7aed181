"""How large a formula is, by its text: what algebra would make of it is bounded before any is done.

Counted are the terms that an expansion would have, the powers that would be multiplied out, and brackets and functions
inside one another. LaTeX is read roughly: what is not known counts as one factor.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace

MAX_TERMS = 100  # of the expansion
MAX_EXPONENT = 1000  # of a number
MAX_DEGREE = 100  # of a variable
MAX_POWER = 40  # of a bracket, all powers in it included
MAX_POWER_OF_FUNCTIONS = 6  # of a bracket that holds some: they have identities to look for
MAX_TOKENS = 120
MAX_DEPTH = 10  # of brackets in brackets
MAX_FUNCTIONS = 4
MAX_NESTED_FUNCTIONS = 2
MAX_ROOTS = 12

_TOKENS = re.compile(r"\\[a-zA-Z]+|\d*\.?\d+|\\.|\S")
_PASSED_OVER = {r"\left", r"\right", r"\,", r"\!", r"\;", r"\:", r"\ ", r"\displaystyle"}
_ROOT = r"\sqrt"
_NAMES = "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan exp ln log lg gcd Gamma zeta"
_FUNCTIONS = {rf"\{name}" for name in _NAMES.split()}
_PAIRS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_BREAKS = {"+", "-", "=", "<", ">", ",", ";", "&", "|", r"\\", r"\pm", r"\mp", r"\le", r"\ge"}


def depth_of_brackets(text: str) -> int:
    """Return how many brackets stand inside one another, whatever their kinds."""
    depths = itertools.accumulate((char in "([{") - (char in ")]}") for char in text)
    return max(depths, default=0)


class _TooLarge(Exception):
    """Nothing is to be computed of it."""


@dataclass(frozen=True)
class _Size:
    """The size of a factor."""

    terms: int = 1  # of its expansion
    power: int = 1  # the highest in it
    is_number: bool = False
    has_functions: bool = False

    def raised(self, exponent: int) -> _Size:
        """The size of a power of it. Raises: _TooLarge."""
        is_group = self.terms > 1 or self.power > 1 or self.has_functions
        limit = MAX_EXPONENT if self.is_number else MAX_POWER if is_group else MAX_DEGREE
        if self.has_functions:
            limit = MAX_POWER_OF_FUNCTIONS
        power = self.power * exponent
        if power > limit:
            raise _TooLarge
        return _Size(math.comb(exponent + self.terms - 1, exponent), power, self.is_number, self.has_functions)


def is_small(text: str, most_functions: int = MAX_FUNCTIONS) -> bool:
    """Return whether sympy can hold and compare a formula of this size in time; with functions, so many at most."""
    reader = _Reader([token for token in _TOKENS.findall(text) if token not in _PASSED_OVER])
    if len(reader.tokens) > MAX_TOKENS:
        return False
    try:
        while reader.at < len(reader.tokens):  # a closing bracket too many ends a part
            reader.part("", 0, 0)
    except _TooLarge:
        return False
    return reader.num_functions <= most_functions and reader.num_roots <= MAX_ROOTS


class _Reader:
    """Reads tokens from left to right."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0
        self.num_functions = self.num_roots = 0

    def part(self, closed_by: str, depth: int, nested: int) -> _Size:
        """Read up to a closing bracket. Returns: its size. Raises: _TooLarge."""
        if depth > MAX_DEPTH or nested > MAX_NESTED_FUNCTIONS:
            raise _TooLarge
        start, functions = self.at, self.num_functions
        terms, power = 0, 1
        others, factor = 1, _Size()  # of the product so far: the terms without those of its last factor, and that one
        in_function = False
        while self.at < len(self.tokens) and self.tokens[self.at] != closed_by:
            token = self.tokens[self.at]
            self.at += 1
            if token in _BREAKS:
                terms, others, factor = terms + others * factor.terms, 1, _Size()
            elif token == "^":
                factor = factor.raised(self.exponent())
            else:
                others *= factor.terms
                if token in _PAIRS:
                    factor = self.part(_PAIRS[token], depth + 1, nested + in_function)
                    factor = replace(factor, has_functions=factor.has_functions or in_function)
                else:
                    factor = _Size(is_number=token[-1].isdigit())
            power = max(power, factor.power)
            self.num_functions += token in _FUNCTIONS
            self.num_roots += token == _ROOT
            in_function = token in _FUNCTIONS or (in_function and token == "^")
            if terms + others * factor.terms > MAX_TERMS:
                raise _TooLarge
        is_number = self.at - start == 1 and factor.is_number
        self.at += 1
        return _Size(terms + others * factor.terms, power, is_number, self.num_functions > functions)

    def exponent(self) -> int:
        """Read what follows `^`. Returns: its largest value, variables being 1. Raises: _TooLarge."""
        start = self.at
        for _ in range(1 + 2 * (self.tokens[start : start + 1] == [r"\frac"])):
            self._pass_over()
        text = " ".join(self.tokens[start : self.at])
        if text.count("^") > 1 or re.search(r"!|\\binom|[\d)}\]] \^", text):  # of a variable it may be another power
            raise _TooLarge
        numbers = [float(number) for number in re.findall(r"\d*\.?\d+", text)]
        value = math.prod(max(number, 1 / number) if number else 1.0 for number in numbers)
        if value > MAX_EXPONENT:
            raise _TooLarge
        return max(1, round(value))

    def _pass_over(self) -> None:
        """Pass over one token, or what is in brackets."""
        depth = 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            depth += (token in _PAIRS) - (token in _PAIRS.values())
            self.at += 1
            if depth <= 0:
                return
