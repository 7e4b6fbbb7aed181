"""Both kinds of error on answers.jsonl: labelled answers of many kinds, collected before they were compared.

Labels say what a careful reader would grant, not what the comparison does; docs/rewards.md has the reasons for the
right ones that are refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from mmr1_ds.rewards.answers import answers_equal

MAX_WRONG_PAID, MAX_RIGHT_REFUSED = 0, 17  # of 3,607; of the first 787 math-verify pays 76 and refuses 91
ROWS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_both_kinds_of_error_are_few():
    paid = [(row["truth"], answer) for row in ROWS for answer in row["wrong"] if answers_equal(answer, row["truth"])]
    right = [(row["truth"], answer) for row in ROWS for answer in row["right"]]
    refused = [(truth, answer) for truth, answer in right if not answers_equal(answer, truth)]
    assert len(paid) <= MAX_WRONG_PAID, paid
    assert len(refused) <= MAX_RIGHT_REFUSED, refused


def test_a_truth_equals_itself_and_its_box():
    for row in ROWS:
        assert answers_equal(row["truth"], row["truth"]) and answers_equal(f"\\boxed{{{row['truth']}}}", row["truth"])
