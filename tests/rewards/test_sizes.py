"""Formulas that would hang are refused by their size, before any algebra; those that people write are compared."""

from unittest import mock

import pytest

from mmr1_ds.rewards import formulas
from mmr1_ds.rewards.answers import answers_equal
from mmr1_ds.rewards.sizes import is_small

LARGE = [
    "9^{9^{9^9}}", "(x+1)^{5000}", "(10!)!", r"\left(10!\right)!", "{10!}!", "10!!", "1000!", "2^{999^{999}}",
    "2^{200!}", "((2^{999})^{999})^{999}", "2^{999\\cdot999}", "2^{\\frac{999}{0.001}}", "9^\\frac{9999}{1}",
    "(x+1)^{20}(y+1)^{20}", "(x+y+z+w+a+b+c)^{20}", "(\\sin x+\\cos x)^{40}", "(\\sqrt2+\\sqrt3+\\sqrt5+\\sqrt7)^{40}",
    "\\frac{x^{1000}-1}{x-1}", "((((x+1)^9+1)^9+1)^9+1)^9", "\\sin(\\sin(\\sin(\\sin(x))))",
    "\\tan(\\tan(\\tan(\\tan(7))))",
    "+".join(["x"] * 130), "".join(f"(x+{k})" for k in range(1, 20)), "2x" * 70,
    "\\frac{d^{40}}{dx^{40}}(\\sin x)^{9}", "\\sum_{n=1}^{1000000} n", "x^{999}+1", "\\binom{\\binom{99}{50}}{3333}",
]  # fmt: skip
SMALL = [
    "(x+1)^{40}", "x^{100}-1", "2^{999}", "e^{x^2}", "e^{-\\frac{x^2}{2}}", "\\frac{\\sqrt{2+\\sqrt{3}}}{2}",
    "(x-1)(x-2)(x-3)(x-4)",
    "\\sin^2(x)+\\cos^2(x)", "\\frac{n(n+1)(2n+1)}{6}", "\\left(\\frac{a+b}{2}\\right)^2", "100!", "\\binom{10}{3}",
    "\\ln(\\sin(x))", "2^{2n+1}-1", "x^3+3x^2y+3xy^2+y^3", "30^\\circ",
]  # fmt: skip


@pytest.mark.parametrize("text", LARGE)
def test_what_would_hang_is_not_computed(monkeypatch, text):
    parse = mock.Mock(side_effect=AssertionError("algebra"))
    monkeypatch.setattr(formulas, "_parse", parse)
    for answer, truth in ((text, "\\sqrt{7}"), ("\\sqrt{7}", text), (f"y={text}", "y=x^2")):
        assert not answers_equal(answer, truth)
    assert answers_equal(text, text)


@pytest.mark.parametrize("text", SMALL)
def test_what_people_write_is_small(text):
    assert is_small(text)


@pytest.mark.parametrize("bracket", ["()", "[]", "{}", ("\\{", "\\}")])
def test_brackets_without_end_are_no_answer(bracket):
    assert not answers_equal(bracket[0] * 500 + "1" + bracket[1] * 500, "\\sqrt{7}")


def test_a_long_list_of_formulas_reads_each_once(monkeypatch):
    formulas._parse.cache_clear()
    one, other = (",".join(f"\\sqrt{{{k}}}" for k in range(first, first + 30)) for first in (2, 3))
    assert not answers_equal(one, other)
    assert formulas._parse.cache_info().misses <= 31
