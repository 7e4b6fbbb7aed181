import itertools
import json
import math

import numpy as np
import pytest

from mmr1_ds.loop.validation_metrics import (
    MOST_PARTS,
    Answered,
    best_of,
    majority,
    part_name,
    powers_of_two,
    validation_metrics,
)
from mmr1_ds.monitoring.answers import AnswerLog
from mmr1_ds.rewards.answers import final_answer

NAN = float("nan")


def answered(accuracy, parts=(), votes=None, index=0):
    accuracy = np.array(accuracy, dtype=np.float32)
    return Answered(index, str(index), tuple(parts), accuracy, accuracy, tuple(votes or map(str, accuracy)))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_choices(n):
    rng = np.random.default_rng(n)
    for accuracy in (*map(np.array, itertools.product((0.0, 1.0), repeat=n)), rng.random(n)):
        for k in range(1, n + 1):
            of_choices = [max(chosen) for chosen in itertools.combinations(accuracy, k)]
            assert best_of(accuracy, k) == pytest.approx(np.mean(of_choices), abs=1e-12)


def test_pass_at_k_of_many_answers_is_the_published_formula():
    accuracy = np.zeros(200)
    accuracy[:3] = 1.0
    assert best_of(accuracy, 64) == pytest.approx(1 - math.comb(197, 64) / math.comb(200, 64), abs=1e-12)


def test_ks():
    assert [powers_of_two(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_majority():
    right = np.array([1, 0, 1, 0, 0], dtype=np.float32)
    assert majority(["7", "8", "7", "9", "5"], right) == 1.0
    assert majority(["7", "8", "7", "8", "5"], right) == 0.5  # a tie
    assert majority(["", "8", "", "", ""], right) == 0.0  # no answer is no vote
    assert majority(["", ""], right[:2]) == 0.0
    assert majority(["7"], np.array([NAN])) is None


def test_figures_of_all_and_by_part():
    prompts = [
        answered([1, 1, 0, 0], ["sums"], ["3", "3", "4", "5"]),
        answered([0, 0, 0, 0], ["sums"], ["1", "1", "2", "2"]),
        answered([1, 0, NAN, NAN], ["words"], ["a", "b", "", ""]),
    ]
    found = validation_metrics(prompts, 4)
    assert found["val/pass_at_1"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert found["val/pass_at_2"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert found["val/pass_at_4"] == pytest.approx((1 + 0) / 2)  # two answers are too few for pass@4
    assert found["val/maj_at_4"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["val/accuracy_std_over_prompts"] == pytest.approx(np.std([0.5, 0, 0.5]))
    assert found["val/accuracy_standard_error"] == pytest.approx(np.std([0.5, 0, 0.5], ddof=1) / math.sqrt(3))
    assert found["val/sums/accuracy_reward"] == 0.25 and found["val/words/accuracy_reward"] == 0.5
    assert found["val/sums/pass_at_4"] == 0.5 and "val/words/pass_at_4" not in found


def test_one_answer_has_no_pass_at_k_and_one_part_no_figures_of_its_own():
    assert validation_metrics([answered([1], ["a"]), answered([0], ["a"])], 1) == {
        "val/accuracy_std_over_prompts": 0.5,
        "val/accuracy_standard_error": pytest.approx(0.5),
    }
    assert validation_metrics([answered([NAN])], 1) == {}
    many = [answered([1], [f"part {i}"]) for i in range(MOST_PARTS + 1)]
    assert not [name for name in validation_metrics(many, 1) if name.startswith("val/part")]


def test_names_that_every_tracker_takes():
    assert part_name("number theory/hard (2)") == "number_theory_hard_2"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{ 12 }", "12"),
        ("<think>3</think><answer>Yes</answer>", "Yes"),
        ("work\n#### 1,200", "1,200"),
        ("first 3\nThe answer is 1,200.", "1200"),
        ("Answer: Blue", "blue"),
        ("", ""),
    ],
)
def test_what_an_answer_votes_for(response, answer):
    assert final_answer(response) == answer


def test_answers_take_the_place_of_an_earlier_run_and_a_full_disk_costs_them_alone(tmp_path, caplog):
    log = AnswerLog(tmp_path / "eval", is_main=True)
    for text in ("old", "neu ä"):
        with log.of_step(3) as write:
            write([{"response": text}])
            write([{"response": text}])
    lines = (tmp_path / "eval" / "step_3" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"response": "neu ä"}] * 2
    (tmp_path / "eval" / "step_4").write_text("a file where a folder must be")
    with log.of_step(4) as write:
        write([{"response": "lost"}])
    assert "its answers are lost, the run goes on" in caplog.text
    with AnswerLog(tmp_path / "other", is_main=False).of_step(1) as write:
        write([{"response": "not this rank's"}])
    assert not (tmp_path / "other").exists()
