"""Messages that end with the assistant's: the answer stays out of the prompt, a prefill begins the response."""

from __future__ import annotations

import logging

import pytest
from fixtures.data_fixtures import config, load, png, user_text, write_jsonl

from mmr1_ds.config import ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.errors import UserError

QUESTION = {"role": "user", "content": "2 + 2?"}


def decoded(dataset):
    return dataset.encoder.tokenizer.decode(dataset[0].token_ids)


def rows(*messages):
    return [{"prompt": list(messages), "answer": "4"}]


@pytest.mark.parametrize("role", ["assistant", "Assistant", "model", "gpt", "ai", "Bot"])
@pytest.mark.parametrize(
    "content", ["<think>easy</think> The answer is \\boxed{4}", "4", [{"type": "text", "text": "4"}]]
)
def test_the_answer_is_taken_off_with_a_note(tmp_path, text_model, role, content, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", rows(QUESTION, {"role": role, "content": content}))
    with caplog.at_level(logging.WARNING):
        dataset = load(path, text_model)
    assert user_text(dataset, 0) == "2 + 2?"
    assert "1 of 1 prompts end with a message of the assistant, which is taken off as the answer" in caplog.text


def test_several_answers_are_taken_off_and_earlier_turns_stay(tmp_path, text_model):
    first = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    last = [{"role": "assistant", "content": "let me see"}, {"role": "assistant", "content": "4"}]
    text = decoded(load(write_jsonl(tmp_path / "a.jsonl", rows(*first, QUESTION, *last)), text_model))
    assert text == (
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_empty_last_turn_is_no_answer(tmp_path, text_model, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", rows(QUESTION, {"role": "assistant", "content": ""}))
    assert user_text(load(path, text_model), 0) == "2 + 2?"
    assert "taken off" not in caplog.text


@pytest.mark.parametrize(
    ("content", "settings"),
    [("Let me think.", {"assistant_prefill": True}), ("<think>\n", {}), ("<think>so</think><answer>", {})],
)
def test_a_prefill_is_continued_and_not_closed(tmp_path, text_model, content, settings, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", rows(QUESTION, {"role": "assistant", "content": content}))
    dataset = load(path, text_model, **settings)
    assert decoded(dataset) == f"<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n{content}"
    assert dataset[0].num_tokens == len(dataset[0].token_ids)
    assert "taken off" not in caplog.text


@pytest.mark.parametrize("role", ["solution", "USER", "human", 7])
def test_a_role_that_no_one_knows_is_refused(tmp_path, text_model, role):
    path = write_jsonl(tmp_path / "a.jsonl", rows(QUESTION, {"role": role, "content": "4"}))
    with pytest.raises(UserError, match=rf"a.jsonl row 0 .*a message has the role '?{role}'?; known are system, "):
        load(path, text_model)


def test_an_answer_among_the_messages_is_the_assistants_for_the_template(tmp_path, text_model):
    path = write_jsonl(tmp_path / "a.jsonl", rows(QUESTION, {"role": "gpt", "content": "4"}, QUESTION))
    assert "<|im_start|>assistant\n4<|im_end|>" in decoded(load(path, text_model))


def test_a_tag_that_the_template_opens_is_not_opened_twice(text_model):
    encoder = PromptEncoder(ModelConfig(model_path=text_model), config())
    encoder.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    prompt = encoder.prompt_text([QUESTION, {"role": "assistant", "content": "<think>\nFirst"}], 0, 0, "row 0")
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\nFirst")


def test_a_prefill_with_an_image_is_refused(tmp_path, vision_model):
    chat = rows(QUESTION, {"role": "assistant", "content": "see <image>"})
    with pytest.raises(UserError, match=r"a.jsonl row 0 .*a prefill is one message of the assistant without images"):
        load(write_jsonl(tmp_path / "a.jsonl", chat), vision_model, assistant_prefill=True)


def test_images_of_the_answer_go_with_it(tmp_path, vision_model):
    (tmp_path / "a.png").write_bytes(png(28, 28))
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "4"}]
    chat = rows({"role": "user", "content": "<image>2 + 2?"}, {"role": "assistant", "content": parts})
    dataset = load(write_jsonl(tmp_path / "a.jsonl", [{**chat[0], "images": ["a.png"]}]), vision_model)
    assert len(dataset[0].images) == dataset.max_images == 1


def test_the_setting_is_part_of_what_a_run_trains_on(tmp_path, text_model):
    path = write_jsonl(tmp_path / "a.jsonl", rows(QUESTION, {"role": "assistant", "content": "4"}))
    assert load(path, text_model).fingerprint != load(path, text_model, assistant_prefill=True).fingerprint
