"""Rewards that compare responses: all to a prompt in one call, or the whole batch of a rank."""

from __future__ import annotations

import textwrap

import pytest

from mmr1_ds.config import RewardConfig
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.functions import check_reward
from mmr1_ds.rewards.pool import RewardItem, RewardPool

# The share of the call's responses that are no shorter, and what fails on the way.
COMPARED = """
    import os, threading

    def check(texts):
        for text in texts:
            if text.startswith("raise"):
                raise RuntimeError("cannot read " + text)
            if text.startswith("exit"):
                os._exit(3)
            if text.startswith("hang"):
                threading.Event().wait()

    def shares(texts):
        check(texts)
        value = lambda text: float("nan") if text == "nan" else sum(len(text) <= len(other) for other in texts)
        return [{"overall": value(text), "accuracy": 1, "seen": len(texts)} for text in texts]

"""
GROUPS = {
    "by the argument": "def compute_score(group):\n    return shares([item['response'] for item in group])\n",
    "by the file": "REWARD_TYPE = 'group'\ndef compute_score(reward_inputs):\n"
    "    return shares([item['response'] for item in reward_inputs])\n",
    "of texts": "REWARD_TYPE = 'group'\ndef compute_score(predicts, ground_truths):\n"
    "    assert len(set(ground_truths)) == 1\n    return shares(predicts)\n",
    "async": "async def compute_score(group):\n    return shares([item['response'] for item in group])\n",
}
BATCH = "REWARD_TYPE = 'batch'\ndef compute_score(rows):\n    return shares([i['response'] for i in rows])\n"
TRL = "def compute_score(prompts, completions, answer, **kwargs):\n    assert len(prompts) == len(answer)\n" \
    "    return [None if text == 'none' else part['overall'] for text, part in zip(completions, shares(completions))]\n"


def items(*groups):
    return [
        RewardItem(text, len(text), str(number), "p", number) for number, texts in enumerate(groups) for text in texts
    ]


@pytest.fixture
def run(tmp_path):
    def run(body, items, reward_type=None, num_workers=1, timeout=20.0):
        path = tmp_path / "compared.py"
        path.write_text(textwrap.dedent(COMPARED) + body)
        config = RewardConfig(f"{path}:compute_score", {}, num_workers, timeout, reward_type)
        check_reward(config)
        with RewardPool(config) as pool:
            return pool.score(items)

    return run


def overall(results):
    return [None if result.failure else result.overall for result in results]


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_is_seen_in_one_call(run, name):
    results = run(GROUPS[name], items(["a", "bb", "ccc"], ["dd"], ["e", "ff"]), num_workers=2)
    assert overall(results) == [3, 2, 1, 1, 2, 1], results[0].reason
    assert [result.parts["seen"] for result in results] == [3, 3, 3, 1, 2, 2]


@pytest.mark.parametrize(("reward_type", "seen"), [(None, 5), ("batch", 5), ("group", 2)])
def test_easyr1s_batch_files_see_the_batch(run, reward_type, seen):
    results = run(BATCH, items(["a", "bb"], ["ccc", "a"], ["bb", "e"])[:5], reward_type)
    assert results[0].parts["seen"] == seen


def test_a_list_that_nothing_is_said_of_holds_one_response(run):
    assert overall(run(BATCH.partition("\n")[2], items(["a", "bb"]))) == [1, 1]


def test_trls_functions_see_lists(run):
    assert overall(run(TRL, items(["a", "none", "ccccc"], ["e", "ff"]), "group")) == [3, None, 1, 2, 1]
    assert overall(run(TRL, items(["a", "none"], ["e"]))) == [1, None, 1]


@pytest.mark.parametrize("reward_type", ["group", "batch"])
@pytest.mark.parametrize(("bad", "failure"), [("raise", "error"), ("exit", "crash"), ("hang", "timeout")])
def test_a_failure_costs_what_failed_and_the_others_are_compared(run, reward_type, bad, failure):
    timeout = 0.7 if bad == "hang" else 20.0
    results = run(BATCH, items(["a", bad, "ccccc"], ["e", "ff"]), reward_type, num_workers=2, timeout=timeout)
    assert [result.failure for result in results] == [None, failure, None, None, None]
    left = {"group": [2, None, 1, 2, 1], "batch": [4, None, 1, 4, 2]}[reward_type]
    assert overall(results) == left, results[1].reason


def test_a_value_that_is_none_costs_one_response_of_a_call_that_worked(run):
    assert overall(run(BATCH, items(["a", "nan", "ccccc"]), "group")) == [3, None, 1]


TOGETHER_FAILS = "def compute_score(rows):\n    if len(rows) > 1:\n        raise RuntimeError('too many')\n" \
    "    return shares([row['response'] for row in rows])\n"


def test_a_group_that_fails_together_alone_has_no_comparison(run):
    results = run(TOGETHER_FAILS, items(["a", "bb"], ["c"]), "group")
    assert [result.failure for result in results] == ["error", "error", None]
    assert results[0].reason == "RuntimeError: too many"


def test_a_batch_that_fails_together_alone_is_scored_response_by_response(run):
    assert overall(run(TOGETHER_FAILS, items(["a", "bb"], ["c"]), "batch")) == [1, 1, 1]


@pytest.mark.parametrize("returned", ["1.0", "None", "[]", "[{'overall': 1}] * 3"])
def test_what_is_no_list_of_the_groups_length(run, returned):
    results = run(f"def compute_score(group):\n    return {returned}\n", items(["a", "bb"]))
    assert [result.failure for result in results] == ["invalid"] * 2


def test_one_result_that_is_no_score_costs_one_response(run):
    body = "def compute_score(group):\n    return [{'overall': 1}, 'high', {'overall': 2}]\n"
    assert overall(run(body, items(["a", "bb", "c"]))) == [1, None, 2]


def test_thousands_of_results_fit_the_reply(run):
    body = "REWARD_TYPE = 'batch'\ndef compute_score(rows):\n" \
        "    return [{'overall': 1.0, **{f'key{i}': 0.1 for i in range(20)}} for _ in rows]\n"
    assert set(overall(run(body, items(["a"] * 4000)))) == {1.0}


def test_a_group_reward_among_several(tmp_path):
    (tmp_path / "a.py").write_text(textwrap.dedent(COMPARED) + GROUPS["by the argument"])
    (tmp_path / "b.py").write_text("def exact(completions, answer, **kwargs):\n    return [10.0 * len(completions)]\n")
    names = ("math", f"{tmp_path / 'a.py'}:compute_score", f"{tmp_path / 'b.py'}:exact")
    config = RewardConfig(functions=[{"function": name} for name in names], num_workers=1)
    with RewardPool(config) as pool:
        results = pool.score(items(["a", "bb", r"\boxed{0}"], ["\\boxed{1}"]))
    assert overall(results) == pytest.approx([13.0, 12.0, 11.9, 11.9]), results[0].reason
    assert [result.parts["compute_score"] for result in results] == [3, 2, 1, 1]


def test_a_type_that_there_is_not(tmp_path):
    (tmp_path / "a.py").write_text("def f(rows): pass\n")
    with pytest.raises(UserError, match="must be batch, sequential, group or null, got 'pair'"):
        RewardPool(RewardConfig(f"{tmp_path / 'a.py'}:f", reward_type="pair"))
