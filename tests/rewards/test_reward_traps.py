"""Answers that lenient matching gets wrong, in both directions, under every built-in reward that goes by rules."""

from __future__ import annotations

import functools
import threading
import time

import pytest

from mmr1_ds.rewards import answers, formulas, math, r1v
from mmr1_ds.rewards.openr1 import OpenR1Reward

RIGHT = [  # (answer, truth)
    *[(letter, letter) for letter in "ABCDE"],
    # numbers
    ("\\frac{1}{2}", "0.5"), ("0.5", "\\frac{1}{2}"), ("1/2", "0.50"), ("\\frac{-1}{2}", "-\\frac12"),
    ("1 1/2", "1.5"), ("1\\frac12", "\\frac{3}{2}"), ("1,000", "1000"), ("1000", "1,000"), ("1{,}000", "1000"),
    ("1,\\!000", "1000"), ("1\\,000", "1000"), ("10^3", "1000"), ("-10^{3}", "-1000"), ("1.2 \\times 10^3", "1200"),
    ("3.0", "3"), ("0", "-0"), ("\N{MINUS SIGN}5", "-5"), ("x = 5", "5"), ("5", "x=5"),
    # percent and units
    ("50\\%", "0.5"), ("50%", "50"), ("50", "50\\%"), ("5 cm", "5"), ("5", "5\\text{ cm}"), ("5cm", "5 centimeters"),
    ("5\\,\\text{cm}", "5 cm"), ("5 \\text{ cm}^2", "5\\text{ cm}^{2}"), ("5 cm^2", "5 square centimetres"),
    ("5 meters", "5 m"), ("90 degrees", "90^\\circ"), ("90\N{DEGREE SIGN}", "90"), ("\\$5", "5 dollars"),
    # formulas
    ("x^2+2x+1", "(x+1)^2"), ("\\sqrt{12}", "2\\sqrt3"), ("\N{SQUARE ROOT}2", "\\sqrt{2}"),
    ("\N{GREEK SMALL LETTER PI}/2", "\\frac{\\pi}{2}"), ("y=2x+1", "y=1+2x"), ("3x+2y=6", "2y+3x=6"),
    ("x \\ge 2", "x\\geq 2"), ("\\emptyset", "\\varnothing"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    # sets, intervals, several values
    ("\\{1,2,3\\}", "\\{3,2,1\\}"), ("{1,2}", "\\{2, 1\\}"), ("\\left[0,\\frac{1}{2}\\right)", "[0,0.5)"),
    ("(-\\infty,2)\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)"), ("\\left(1,2\\right)", "(1, 2)"),
    ("2 \\text{ or } -2", "-2, 2"), ("2,-2", "-2, 2"),
    # choices and words
    ("(A)", "A"), ("A", "(A)"), ("A.", "A"), ("A)", "A"), ("[A]", "A"), ("\\text{(A)}", "A"), ("\\textbf{A}", "A"),
    ("a", "A"), ("(A) 12", "A"), ("A. an apple", "A"), ("A: 12", "A"), ("A", "A. 12"), ("A \\text{ and } C", "A, C"),
    ("AC", "A, C"), ("C, A", "A, C"), ("\\text{Monday}", "monday"), ("North-East", "\\text{north-east}"),
    # more of all kinds
    ("7", "7"), (" 7. ", "7"), ("$7$", "7"), ("+7", "7"), ("7.0", "7"), ("-7", "\N{MINUS SIGN}7"), ("x = 7", "7"),
    ("1,234", "1234"), ("1{,}234", "1234"), ("0.5", "1/2"), (".5", "\\frac{1}{2}"), ("\\dfrac12", "0.5"),
    ("-\\frac{3}{4}", "-0.75"), ("2\\frac{1}{2}", "2.5"), ("1.5\\times 10^{3}", "1500"), ("2e-3", "0.002"),
    ("25\\%", "25"), ("25%", "0.25"), ("30^\\circ", "30"), ("7\\text{ cm}", "7"), ("7", "7\\text{ cm}"),
    ("7\\text{ cm}^2", "7"), ("\\$7.50", "7.5"), ("\\text{7}", "7"), ("\\boxed{7}", "7"), ("\\text{A}", "A"),
    ("a.", "A"), ("yes", "Yes"), ("7 apples", "7"), ("\\left( 1, 2 \\right)", "(1,2)"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("3\\sqrt{2}", "\\sqrt{18}"), ("1+2x+x^2", "x^2+2x+1"),
    ("\\frac{3\\pi}{4}", "0.75\\pi"), ("2, 1", "1, 2"), ("\\{3, 1\\}", "\\{1, 3\\}"), ("7 or 8", "7 or 8"),
]  # fmt: skip

WRONG = [
    ("12", "1"), ("1", "12"), ("-5", "5"), ("5", "-5"), ("-1/2", "1/2"), ("0.5", "50"), ("1.0", "10"), ("100", "1000"),
    ("1,000", "1"), ("1.000", "1000"), ("1,5", "15"), ("52", "5^2"), ("103", "10^3"), ("7 0.5", "7.5"), ("3 4", "7"),
    *[(letter, truth) for truth in "AE" for letter in "ABCDE" if letter != truth],
    ("0.33", "\\frac13"), ("3.14", "\\pi"), ("1.414", "\\sqrt{2}"), ("\\frac{2}{1}", "\\frac12"), ("7/0", "7"),
    ("2^{10}", "1024"), ("5=5", "5"), ("\\approx 7", "7"), ("7?", "7"), ("about 7", "7"), ("7 or 8", "7"), ("", "5"),
    ("5 million", "5"), ("5", "5 million"), ("nan", "5"), ("inf", "5"), ("1e400", "\\infty"),
    ("\N{ARABIC-INDIC DIGIT ONE}", "2"), ("\N{SUPERSCRIPT TWO}", "2"),
    # percent and units
    ("50\\%", "5"), ("5 cm", "5 m"), ("5 cm^2", "5 cm^3"), ("5 cm", "5 cm^2"), ("30 minutes", "30 hours"),
    ("5 kg", "5\\text{ g}"), ("5m", "5"), ("30^\\circ", "30 cm"),
    # formulas
    ("x^2", "x^3"), ("x^2", "X^2"), ("2x+1", "y=2x-1"), ("x=5", "y=5"), ("x", "y"), ("x<2", "x\\le 2"), ("x>2", "x<2"),
    ("\\pm 2", "2"), ("2", "\\pm 2"),
    # sets, intervals, several values
    ("[0,1]", "(0,1)"), ("[0,1)", "(0,1]"), ("(0,1)", "\\{0,1\\}"), ("(1,2)", "(2,1)"), ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("1,2,3", "1,2"), ("1", "1, 2"), ("0.5", "[0,1]"),
    # choices and words
    ("AB", "A"), ("A or B", "A"), ("A, B", "A"), ("(A) or (B)", "A"), ("A. B", "A"), ("(A)(B)", "A"), ("not A", "A"),
    ("A\\text{ or }B", "A"), ("\\text{A, B, C, D, E}", "A"), ("Area", "A"), ("apple", "A"), ("B", "A. 12"),
    ("A) not this", "A"), ("A", "A, C"), ("ABC", "A, C"), ("A, B, C", "C, A, B"), ("yes or no", "yes"), ("no", "yes"),
    ("not yes", "yes"), ("not enough", "no"), ("unknown", "no"), ("the answer", "answer the"),
    # more of all kinds
    ("8", "7"), ("", "7"), ("7", ""), ("7, 8", "7"), ("7,8", "7"), ("7 8", "7"), ("7 \\quad 8", "15"),
    ("7\\ 8", "78"), ("7 8", "78"), ("not 7", "7"), ("the answer is 7", "7"), ("7 thirds", "7"), ("7 hundreds", "7"),
    ("7\\text{ or }8", "7"), ("7\\text{ or so}", "7"), ("\\{7, 8\\}", "7"), ("7\\pm 0", "7"), ("x=7=8", "7"),
    ("5+2", "7"), ("3\\cdot 4\\cdot 5", "60"), ("\\min(7,8)", "7"), ("\\sqrt{49}", "7"), ("7!", "5040"),
    ("0.333", "1/3"), ("0.3333333333333333", "\\frac{1}{3}"), ("7.0001", "7"), ("1,23", "123"), ("12,34", "1234"),
    ("1/0", "0"), ("7\\text{ cm}", "7\\text{ m}"), ("7\\text{ cm}^2", "7\\text{ cm}^3"), ("25\\%", "0.2"),
    ("A", "B"), ("BA", "AB"), ("X^2", "Y^2"), ("\\text{nope}", "\\text{peno}"), ("(2,1)", "(1,2)"),
    ("\\frac{1}{\\sqrt{2}} \\lor 1", "\\frac{1}{\\sqrt{2}}"), ("1e999999999", "1"), ("\\frac{", "\\sqrt{2}"),
    ("\\sqrt{2} \\text{ or } \\sqrt{3}", "\\sqrt{2}"),
]  # fmt: skip

OPENR1 = OpenR1Reward({f"{end}_value_{kind}": 0.0 for end in ("min", "max") for kind in ("wrong", "correct")}, 9, None)


def accuracies(answer, truth):
    """Under math, r1v and openr1_wo_LMM, by name."""
    response = f"<think>so</think><answer>\\boxed{{{answer}}}</answer>"
    items = [{"response": response, "response_length": 9, "ground_truth": truth}]
    functions = {"math": math.compute_score, "r1v": r1v.compute_score, "openr1_wo_LMM": OPENR1.compute_score}
    return {name: function(items)[0]["accuracy"] for name, function in functions.items()}


@pytest.fixture(autouse=True, scope="module")
def formulas_compared_once():
    """The three rewards compare the same pair one after the other, and sympy takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "formulas_equal", functools.cache(answers.formulas_equal))
        yield


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_a_right_answer_counts_in_every_form(answer, truth):
    assert set(accuracies(answer, truth).values()) == {1.0}


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_a_wrong_answer_never_counts(answer, truth):
    assert set(accuracies(answer, truth).values()) == {0.0}


def test_formulas_are_compared_on_any_thread():
    """math-verify's own time limits work by signals, on the main thread alone; ours are the pool's."""
    found = []
    thread = threading.Thread(target=lambda: found.append(accuracies("x^2+2x+1", "(x+1)^2")["math"]))
    thread.start()
    thread.join()
    assert found == [1.0]


ODD = ["and", "or", "1a", "1 hand ", "1 and ", "1, ", "1 x ", "\\$3-", "a:", ". ", "1,200 and "]


@pytest.mark.parametrize("text", ODD)
def test_no_text_raises_or_takes_long(text):
    """What raises would be masked in place of wrong, and patterns that try all splits never end."""
    began = time.monotonic()
    for long in (text, text * (1900 // len(text))):
        assert not answers.answers_equal(long, "5 ft 6 in") and not answers.answers_equal("5 ft 6 in", long)
    assert time.monotonic() - began < 5


HUGE = [
    "9^{9^{9^9}}", "(x+1)^{5000}", "(x+9)^{99999999}", "(10^9)!", "9!!!", "\\binom{10^9}{10^8}", "(x+1)^{30}(x+2)^{30}",
]  # fmt: skip


@pytest.mark.parametrize("formula", HUGE)
def test_a_formula_without_end_is_refused_by_its_size(formula, monkeypatch):
    """Before any algebra; as a text it is still equal to itself."""
    monkeypatch.setattr(formulas, "_parse", lambda text: pytest.fail(f"sympy was given {text}"))
    assert not answers.answers_equal(formula, "\\sqrt{2}+y") and not answers.answers_equal("\\sqrt{2}+y", formula)
    assert not answers.answers_equal(formula, "7") and answers.answers_equal(formula, formula)
