"""The try of a reward file in the dry run."""

from __future__ import annotations

import json

import pytest

from mmr1_ds.config import DataConfig, RewardConfig
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.reward import try_reward


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"problem": "2 + 5?", "answer": "7"}) + "\n")
    return DataConfig(train_files=str(path), prompt_key="problem", answer_key="answer")


def reward(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def score(reward_input):\n    {body}\n")
    return RewardConfig(f"{tmp_path / 'mine.py'}:score")


def test_a_reward_is_given_a_row_of_the_data(tmp_path, data):
    try_reward(reward(tmp_path, "return {'overall': float(reward_input['ground_truth'] == '7')}"), data)
    with pytest.raises(UserError, match=r"fails on a response to the first row .* error: ValueError: for 7"):
        try_reward(reward(tmp_path, "raise ValueError('for ' + reward_input['ground_truth'])"), data)


def test_what_is_told_as_a_mistake_is_not_logged_besides(tmp_path, data, caplog):
    with pytest.raises(UserError, match="for 7"):
        try_reward(reward(tmp_path, "raise ValueError('for 7')"), data)
    assert caplog.text == ""


def test_the_answer_may_lie_in_a_nested_column(tmp_path, data):
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "2 + 5?", "rm": {"gt": "007"}}) + "\n")
    data.answer_key = "rm.gt"
    with pytest.raises(UserError, match="for 007"):
        try_reward(reward(tmp_path, "raise ValueError('for ' + reward_input['ground_truth'])"), data)


def test_a_reward_that_does_not_start_ends_the_dry_run(tmp_path, data):
    config = reward(tmp_path, "pass\nimport no_such_module")
    with pytest.raises(UserError, match="does not start: ModuleNotFoundError"):
        try_reward(config, data)
