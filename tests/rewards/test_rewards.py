"""The built-in reward: which box counts, what equals what, what the format is, and what must not pay."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr1_ds.rewards.answers import answers_equal, parse_number
from mmr1_ds.rewards.boxes import last_boxed
from mmr1_ds.rewards.math import accuracy_reward, compute_score, format_reward

DEMO = "<think>6 7 5</think><answer>\\boxed{7}</answer>"


def score(response, truth, **kwargs):
    (result,) = compute_score([{"response": response, "response_length": 9, "ground_truth": truth}], **kwargs)
    return result


def test_the_demos_response():
    assert score(DEMO, "7") == {"overall": 1.0, "format": 1.0, "accuracy": 1.0}
    assert score(DEMO, "8") == pytest.approx({"overall": 0.1, "format": 1.0, "accuracy": 0.0})
    assert score("\\boxed{7}", "7") == pytest.approx({"overall": 0.9, "format": 0.0, "accuracy": 1.0})
    assert score(DEMO, "8", format_weight=0.5)["overall"] == 0.5


# --- the box ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{7}", "7"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\sqrt{\\frac{a}{b}}} so", "\\sqrt{\\frac{a}{b}}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{1 \\boxed{2}", "2"),
        ("\\boxed{\\boxed{3}}", "\\boxed{3}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{a \\} b}", "a \\} b"),
        ("\\boxed{}", ""),
        ("\\boxed{", None),
        ("boxed{7}", None),
        ("7", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\", "x"]), max_size=12).map("".join))
def test_what_is_boxed_is_balanced(text):
    content = last_boxed(text)
    if content is not None:
        bare = re.sub(r"\\.", "", content, flags=re.DOTALL)
        assert bare.count("{") == bare.count("}")
        assert "{" + content + "}" in text


# --- equality: more of it in test_reward_traps.py ------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["\\frac{", "7" * 5000, "\\boxed{7}"])
def test_what_cannot_be_boxed(answer):
    assert answers_equal(answer, "7") == (answer == "\\boxed{7}")


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_are_exact(above, below):
    value = Fraction(above, below)
    assert parse_number(f"\\frac{{{above}}}{{{below}}}").value == value
    assert parse_number(f"{above}/{below}").value == value
    assert parse_number(f"{above:,}").value == above
    assert answers_equal(f"{above}/{below}", f"{value.numerator}/{value.denominator}")
    assert not answers_equal(f"{above}/{below}", f"{above + 1}/{below}")


@given(st.text(max_size=40))
def test_no_text_breaks_number_parsing(text):
    parse_number(text)
    last_boxed(text)
    format_reward(text)


# --- which part of a response counts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "accuracy"),
    [
        (DEMO, 1.0),
        ("It is \\boxed{7}.", 1.0),
        ("\\boxed{3}, no: \\boxed{7}", 1.0),
        ("\\boxed{7}, no: \\boxed{3}", 0.0),
        ("\\boxed{7} or \\boxed{8}", 0.0),
        ("<think>\\boxed{7}</think> unsure", 0.0),
        ("<think>\\boxed{7}", 0.0),
        ("<think>a</think><answer>7</answer>", 0.0),
        ("< think >a< /think > \\boxed{7}", 1.0),
        ("7", 0.0),
        ("", 0.0),
    ],
)
def test_accuracy_reads_the_final_box(response, accuracy):
    assert (
        score(response, "7")["accuracy"]
        == accuracy
        == accuracy_reward(re.sub("< ?(/?) ?think >", r"<\1think>", response), "7")
    )


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (DEMO, 1),
        ("<think>a</think> \\boxed{7}", 1),
        ("<think>a</think>\nSo the answer is \\boxed{7}.", 1),
        (" <think>a\nb</think>\n<answer>so \\boxed{7}\n</answer>\n", 1),
        ("< think >a</ think >\\boxed{7}", 1),
        ("<think></think>\\boxed{7}", 1),
        ("<think>a</think><answer>7</answer>", 0),
        ("<think>a</think><answer>\\boxed{}</answer>", 0),
        ("<think>a</think><answer>\\boxed{7</answer>", 0),
        ("<think>a</think>\\boxed{7}<answer>7</answer>", 0),
        ("<think>a</think><answer>\\boxed{7}</answer> and more", 0),
        ("<think>a</think><answer>\\boxed{7}", 0),
        ("<think>a</think>text<answer>\\boxed{7}</answer>", 0),
        ("<answer>\\boxed{7}</answer><think>a</think>", 0),
        ("<think>a</think><answer>1</answer><answer>\\boxed{7}</answer>", 0),
        ("<think><think>a</think>\\boxed{7}", 0),
        ("<think>a</think></think>\\boxed{7}", 0),
        ("<think>\\boxed{7}</think>", 0),
        ("hm <think>a</think>\\boxed{7}", 0),
        ("\\boxed{7}", 0),
        ("", 0),
    ],
)
def test_format(response, expected):
    assert score(response, "1")["format"] == expected


def test_a_long_response_is_scored_in_linear_time():
    """The format's pattern must not run away on what a looping policy writes."""
    score("<think>" * 20000, "7")
    score("<think>a</think>" * 10000 + "<answer>" * 10000, "7")
    score("\\boxed{" * 20000, "7")
    score("7" * 20000 + "\\text{", "7")
    score("\\boxed{" + "7 " * 20000 + "}", "7")
