r"""Functions of an argument in formulas: f(x+1) is no product of f and x+1, though sympy would read it so.

Where the truth calls something, its calls and those of the same name in the answer become variables, one for each
argument, and what is left is algebra: f(2)+f(1) is f(1)+f(2), and neither 3f nor f(3).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mmr1_ds.rewards.dress import closing

MAX_CALLS = 8  # of both formulas; with more, texts alone are compared

# What is a function before any argument; another letter, as in x(x+1), only before a single symbol: x(t), \mu(n).
# h is a height more often than a function: h(a+b)/2.
_FUNCTIONS = frozenset(
    (*"fguvEFGOPT", *(rf"\{name}" for name in "delta phi varphi psi Phi Psi Gamma zeta Theta Omega".split()))
)
_LETTERS = frozenset(
    (*"abcdhjklmnoqrstwxyzABCDHIJKLMNQRSUVWXYZ", *(rf"\{name}" for name in "alpha beta gamma mu sigma tau".split()))
)
_HEAD = re.compile(
    r"(?P<name>\\[a-zA-Z]+|[A-Z][a-z]{1,3}(?=[(\[])|[a-zA-Z])(?P<scripts>(?: ?[_^] ?(?:\{[^{}]*\}|\w))*) ?(?=[(\[])"
)
_SYMBOL = re.compile(r"\\?[a-zA-Z]+|\d+")


def calls_as_variables(answer: str, truth: str, is_same: Callable[[str, str], bool]) -> tuple[str, str] | None:
    """Replace the calls of the functions that the truth has, in both formulas.

    Args: is_same: whether two arguments are equal.
    Returns: both formulas; None where there are too many calls.
    """
    names = {name for name, _, argument, _ in _calls(truth) if _is_function(name, argument)}
    if not names:
        return answer, truth
    known: list[tuple[str, str]] = []

    def replaced(text: str) -> str:
        parts, end = [], 0
        for _, head, argument, place in _calls(text, names):
            found = next((call for call in known if call[0] == head and is_same(argument, call[1])), (head, argument))
            if found not in known:
                known.append(found)
            parts += [text[end : place.start], rf"\Xi_{{{known.index(found) + 1}}}"]
            end = place.stop
        return "".join((*parts, text[end:]))

    if len(list(_calls(answer, names))) + len(list(_calls(truth, names))) > MAX_CALLS:
        return None
    truth = replaced(truth)
    return replaced(answer), truth


def _is_function(name: str, argument: str) -> bool:
    if name in _FUNCTIONS or (len(name) > 1 and name[0] != "\\"):
        return True
    return name in _LETTERS and _SYMBOL.fullmatch(argument) is not None


def _calls(text: str, names: set[str] | None = None) -> list[tuple[str, str, str, slice]]:
    """The outermost calls: name, name with its indices and powers, argument, and place. Args: names: of those alone."""
    found, end = [], 0
    for head in _HEAD.finditer(text):
        last = closing(text, head.end())
        if head.start() < end or last is None or (names is not None and head["name"] not in names):
            continue
        end = last + 1
        spelling = re.sub(r"[\s{}]", "", head["name"] + head["scripts"])
        found.append((head["name"], spelling, text[head.end() + 1 : last].strip(), slice(head.start(), end)))
    return found
