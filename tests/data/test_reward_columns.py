"""Columns of the row that rewards see: chosen, read by index, and handed over in each project's form."""

from __future__ import annotations

import json

import pytest
from fixtures.data_fixtures import config, encoder_of, png, write_kind
from fixtures.responses import response

from mmr1_ds.config import DataConfig, ModelConfig, RewardConfig
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.data import check_data
from mmr1_ds.preflight.reward import try_reward
from mmr1_ds.records import RolloutGroup
from mmr1_ds.rewards.pool import RewardPool
from mmr1_ds.rewards.scoring import score_groups


def rows(**more):
    return [
        {
            "prompt": "x" * (900 if i == 1 else 5) + str(i), "answer": str(i), "task": f"task {i}", "weights": [i, 2.5],
            "data_source": "openai/gsm8k", "extra_info": {"index": i, "split": "train"}, "group": f"of {i}",
            **more,
        }
        for i in range(4)
    ]  # fmt: skip


def columns_of(tmp_path, model, kind="parquet", written=None, **data):
    path = write_kind(kind, tmp_path, written or rows())
    dataset = load_dataset(path, config(max_prompt_length=100, **data), encoder_of(model, max_prompt_length=100))
    return dataset, [dict(dataset[i].columns()) for i in range(len(dataset))]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_columns_named_follow_the_prompt_past_rows_that_are_dropped(tmp_path, text_model, kind):
    _, found = columns_of(tmp_path, text_model, kind, reward_columns=["task", "weights"])
    source = {"data_source": "openai/gsm8k"}
    assert found == [{"task": f"task {i}", "weights": [i, 2.5]} | source for i in (0, 2, 3)]


def test_none_are_read_unless_asked_for_but_the_source(tmp_path, text_model):
    """A reward of verl's that dispatches by it would pay 0 throughout, and no one would know."""
    _, found = columns_of(tmp_path, text_model)
    assert found == [{"data_source": "openai/gsm8k"}] * 3
    written = [{"prompt": "a?", "answer": "1", "data_source": {"bytes": b"a", "path": None}}]
    assert columns_of(tmp_path, text_model, written=written)[1] == [{}]
    assert columns_of(tmp_path, text_model, written=[{"prompt": "a?", "answer": "1"}])[1] == [{}]


def test_all_are_those_that_nothing_else_reads_and_no_images(tmp_path, vision_model):
    image = png(28, 28, 1)
    written = [row | {"prompt": "<image>" + row["prompt"]} for row in rows(images=[{"bytes": image, "path": None}])]
    _, (found, *_) = columns_of(tmp_path, vision_model, written=written, reward_columns="all")
    assert found.keys() == {"task", "weights", "data_source", "extra_info", "group"}
    _, (found, *_) = columns_of(tmp_path, vision_model, written=written, reward_columns=["images"])
    assert found == {"images": [image], "data_source": "openai/gsm8k"}


def test_the_same_prompts_whatever_rewards_see(tmp_path, text_model):
    without, _ = columns_of(tmp_path, text_model)
    with_all, _ = columns_of(tmp_path, text_model, reward_columns="all")
    assert without.fingerprint == with_all.fingerprint and without[1] == with_all[1]


@pytest.mark.parametrize(
    ("wanted", "message"), [(["rubric"], r"no column 'rubric' \(data.reward_columns\)"), ("task", "must be all or a")]
)
def test_what_is_no_column_is_named(tmp_path, text_model, wanted, message):
    with pytest.raises(UserError, match=message):
        columns_of(tmp_path, text_model, reward_columns=wanted)
    data = DataConfig(train_files=write_kind("parquet", tmp_path, rows()), reward_columns=wanted)
    with pytest.raises(UserError, match=message):
        check_data(data, "train_files", ModelConfig(model_path=text_model))


FORMS = {
    "EasyR1, one": "def f(reward_input):\n    return {'overall': check(**reward_input)}\n",
    "EasyR1, a list": "def f(rows):\n    return [{'overall': check(**row)} for row in rows]\n",
    "EasyR1, a group": "def f(group):\n    return [{'overall': check(**row)} for row in group]\n",
    "TRL": "def f(completions, task, weights, **kwargs):\n    assert kwargs['answer'] == kwargs['solution']\n"
    "    return [check(text, t, w) for text, t, w in zip(completions, task, weights)]\n",
    "verl": "def f(data_source, solution_str, ground_truth, extra_info=None):\n"
    "    assert data_source == 'openai/gsm8k' and extra_info['split'] == 'train', (data_source, extra_info)\n"
    "    assert extra_info['response_length'] == 1\n"
    "    score = check(solution_str, extra_info['task'], extra_info['weights'])\n"
    "    return score + extra_info['index'] - int(ground_truth)\n",
}
CHECK = """
def check(response, task, weights, **rest):
    assert response == "r" and weights[1] == 2.5 and rest.get("group", "of").startswith("of"), (response, rest)
    return int(task.removeprefix("task ")) * 10 + weights[0]

"""


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gets_the_columns(tmp_path, text_model, name):
    path = tmp_path / "mine.py"
    path.write_text(CHECK + FORMS[name])
    dataset, _ = columns_of(tmp_path, text_model, reward_columns="all")
    groups = [RolloutGroup(dataset[i], (response([7]), response([7])), 0) for i in range(3)]
    with RewardPool(RewardConfig(f"{path}:f", num_workers=1)) as pool:
        scored, counts = score_groups(pool, groups, lambda ids: "r" if list(ids) == [7] else "p")
    assert [item.rewards.overall.tolist() for item in scored] == [[0, 0], [22, 22], [33, 33]], pool.first_reasons
    assert counts["reward/num_failed"] == 0


def test_images_reach_the_reward(tmp_path, vision_model):
    image = png(28, 28, 1)
    (tmp_path / "mine.py").write_text(
        "def f(completions, images, **kwargs):\n"
        "    assert images[0][0][:4] == b'\\x89PNG', images\n    return [float(len(images[0][0]))]\n"
    )
    written = [{"prompt": "<image>a", "answer": "1", "images": [{"bytes": image, "path": None}]}]
    dataset, _ = columns_of(tmp_path, vision_model, written=written, reward_columns=["images"])
    with RewardPool(RewardConfig(f"{tmp_path / 'mine.py'}:f", num_workers=1)) as pool:
        (item,), _ = score_groups(pool, [RolloutGroup(dataset[0], (response([7]),), 0)], lambda ids: "r")
    assert item.rewards.overall.tolist() == [len(image)], pool.first_reasons


SYSTEM, ASKED = {"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 5?"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("said", "prefill", "kept"),
    [(None, False, None), ("7", False, None), ("It is", True, "It is"), ("<think>", False, "<think>")],
)
def test_messages_of_the_row_reach_the_reward_without_its_answer(tmp_path, text_model, kind, said, prefill, kept):
    turns = [SYSTEM, ASKED, *([{"role": "gpt", "content": said}] if said else [])]
    path = write_kind(kind, tmp_path, [{"prompt": turns, "answer": "7"}])
    dataset = load_dataset(path, config(max_prompt_length=100, assistant_prefill=prefill), encoder_of(text_model))
    last = [{"role": "assistant", "content": kept}] if kept else []
    assert dataset[0].messages() == [SYSTEM, ASKED, *last]
    (tmp_path / "mine.py").write_text(
        "def f(prompts, completions):\n"
        "    return [len(p) + 10 * len(c[0]['content']) for p, c in zip(prompts, completions)]\n"
    )
    with RewardPool(RewardConfig(f"{tmp_path / 'mine.py'}:f", num_workers=1)) as pool:
        (item,), _ = score_groups(pool, [RolloutGroup(dataset[0], (response([7]),), 0)], lambda ids: "r")
    assert item.rewards.overall.tolist() == [2 + 10 * len((kept or "") + "r")], pool.first_reasons


def test_a_prompt_that_is_a_text_has_no_messages(tmp_path, text_model):
    dataset = load_dataset(write_kind("parquet", tmp_path, rows()), config(), encoder_of(text_model))
    assert dataset[0].messages() == []


def test_images_in_messages_reach_the_reward(tmp_path, vision_model):
    parts = [{"type": "image", "image": {"bytes": png(28, 28, 1), "path": None}}, {"type": "text", "text": "a?"}]
    written = [{"prompt": [{"role": "user", "content": parts}], "answer": "1"}]
    dataset = load_dataset(write_kind("parquet", tmp_path, written), config(), encoder_of(vision_model))
    (turn,) = dataset[0].messages()
    assert turn["content"][0]["image"] == png(28, 28, 1) and turn["content"][1]["text"] == "a?"


@pytest.mark.parametrize(
    ("prompt", "read", "fails"),
    [
        ([SYSTEM, ASKED], "c[0]['content']", None),
        ([SYSTEM, ASKED], "c.strip()", "completions are lists of messages"),
        ("2 + 5?", "c[0]['content']", "completions are texts"),
        ("2 + 5?", "c.strip()", None),
    ],
)
def test_the_dry_run_hands_over_completions_in_the_form_of_the_data(tmp_path, prompt, read, fails):
    path, lines = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    path.write_text(f"def f(completions, **kwargs):\n    return [float('7' in {read}) for c in completions]\n")
    lines.write_text(json.dumps({"prompt": prompt, "answer": "7"}) + "\n")
    reward, data = RewardConfig(f"{path}:f"), DataConfig(train_files=str(lines))
    if fails is None:
        try_reward(reward, data)
        return
    with pytest.raises(UserError, match=fails):
        try_reward(reward, data)


@pytest.mark.parametrize(("wanted", "message"), [(["task"], None), ([], "task.*data.reward_columns hands over")])
def test_the_dry_run_tries_the_reward_with_the_columns(tmp_path, wanted, message):
    path, lines = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    path.write_text("def f(completions, task, **kwargs):\n    return [float(task[0] == 'task 0')]\n")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    data = DataConfig(train_files=str(lines), reward_columns=wanted)
    if message is None:
        try_reward(RewardConfig(f"{path}:f"), data)
        return
    with pytest.raises(UserError, match=message):
        try_reward(RewardConfig(f"{path}:f"), data)
