"""Keys that reach into nested columns, and rows as verl writes them."""

from __future__ import annotations

import pytest
from fixtures.data_fixtures import load, png, user_text, write_kind

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.paths import at_path, column_of
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.data import check_data


def verl_rows(with_images=False):
    """Rows in verl's documented form."""
    return [
        {
            "data_source": "openai/gsm8k",
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{'<image>' * with_images}{i} + {i}?"},
            ],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"split": "train", "index": i},
            **({"images": [{"bytes": png(28, 28, i), "path": None}]} if with_images else {}),
        }
        for i in range(3)
    ]


VERL = {"answer_key": "reward_model.ground_truth", "id_key": "extra_info.index", "category_key": "data_source"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "saved"])
def test_rows_of_verl(tmp_path, text_model, kind):
    path = write_kind(kind, tmp_path, verl_rows())
    check_data(DataConfig(train_files=path, **VERL), "train_files", ModelConfig(model_path=text_model))
    dataset = load(path, text_model, **VERL)
    assert [prompt.ground_truth for prompt in dataset] == ["0", "2", "4"]
    assert list(dataset.prompt_ids) == ["0", "1", "2"]
    assert set(dataset.categories) == {"openai/gsm8k"}
    text = dataset.encoder.tokenizer.decode(dataset[1].token_ids)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_rows_of_verl_with_images(tmp_path, vision_model):
    dataset = load(write_kind("parquet", tmp_path, verl_rows(with_images=True)), vision_model, **VERL)
    assert [len(prompt.images) for prompt in dataset] == [1, 1, 1]


def test_paths_into_lists_and_prompts(tmp_path, vision_model):
    row = {"q": {"text": "<image>?", "shots": [{"bytes": png(28, 28)}]}, "answers": ["7", "8"]}
    path = write_kind("parquet", tmp_path, [row])
    dataset = load(path, vision_model, prompt_key="q.text", answer_key="answers.1", image_key="q.shots")
    assert dataset[0].ground_truth == "8" and len(dataset[0].images) == 1
    assert user_text(dataset, 0).endswith("?")


def test_a_row_without_the_part_is_named(tmp_path, text_model):
    rows = [*verl_rows(), {**verl_rows()[0], "reward_model": {"style": "rule", "ground_truth": None}}]
    with pytest.raises(UserError, match=r"row 3 .*no answer in column 'reward_model.ground_truth'"):
        load(write_kind("parquet", tmp_path, rows), text_model, **VERL)


@pytest.mark.parametrize("key", ["nothing.ground_truth", "ground_truth"])
def test_a_path_that_begins_with_no_column_is_named(tmp_path, text_model, key):
    with pytest.raises(UserError, match=rf"no column '{key}' \(data.answer_key\)"):
        load(write_kind("parquet", tmp_path, verl_rows()), text_model, answer_key=key)


def test_paths():
    row = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}]}, "x.y": {"z": 4}}
    assert [at_path(row, key) for key in ("a.b", "a.c.0.d", "x.y.z", "a.c.1", "a.q", "q", "a.c.d")] == [
        1, 3, 4, None, None, None, None,
    ]  # fmt: skip
    assert [column_of(key, row) for key in ("a.b", "a.c.0", "x.y.z", "q.r")] == ["a.b", "a", "x.y", None]
