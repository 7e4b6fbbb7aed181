"""The demo's data, model, cold start, cached assets and closing words."""

import io
import json
import math
import statistics

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmr1_ds.commands.demo import assets, digits, model, summary, warmup
from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.errors import UserError
from mmr1_ds.rewards.math import compute_score

LABELS = digits.load_digits().labels
SHORT = warmup.WarmupSettings(num_steps=3, batch_size=5, first_steps=2, warmup_steps=1)


EXPECTED = {  # the answers again, by other means
    "get": lambda shown: shown[0], "max": np.max, "min": np.min, "med": statistics.median_low, "add": np.sum,
    "mul": np.prod,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    model.save_model(folder, model.build_model(seed=5))
    return folder


# --- data ---------------------------------------------------------------------------------------------------------


def test_a_question_shows_as_many_digits_as_it_names_and_its_answer_is_right():
    rng = np.random.default_rng(7)
    for kind in warmup.ALL_KINDS * 25:
        question = digits.draw_question(kind, rng)
        shown = [int(LABELS[scan]) for scan in question.scans]
        assert len(shown) == int(kind[3]) and list(question.digits) == shown
        assert int(question.answer) == EXPECTED[kind[:3]](shown)
        assert question.problem == f"<image>{kind}"
        assert not (kind.startswith("mul") and 0 in shown)


def test_the_scans_are_uci_s():
    """Its description counts the scans of each digit, from 0 to 9."""
    assert np.bincount(LABELS).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.load_digits().pixels.max() == 255


def test_held_out_scans_are_never_trained_on():
    data = digits.load_digits()
    assert len(data.train) == 1397 and len(data.held_out) == 400
    assert sorted([*data.train, *data.held_out]) == list(range(1797))
    trained = {scan for pool in digits.POOLS for q in digits.training_questions(pool, 3) for scan in q.scans}
    questions = digits.validation_questions(3)
    assert trained <= set(data.train.tolist())
    assert {scan for q in questions for scan in q.scans} <= set(data.held_out.tolist())
    assert len(questions) >= 500
    kinds = [q.kind for q in questions]
    assert {kinds.count(kind) for kind in digits.LEARNABLE} == {len(kinds) // 4}


@pytest.mark.parametrize("pool", digits.POOLS)
def test_a_pool_has_512_prompts_in_its_proportions(pool):
    questions = digits.training_questions(pool, seed=11)
    assert len(questions) == 512
    for kind, weight in digits.POOLS[pool].items():
        assert abs(sum(q.kind == kind for q in questions) - 5.12 * weight) < 1
    assert questions == digits.training_questions(pool, seed=11) != digits.training_questions(pool, seed=12)


def test_an_image_shows_its_scans_from_the_left_and_black_after_them():
    question = digits.Question("max3", (0, 0, 0), (17, 401, 1796))
    pixels = np.asarray(digits.render(question))
    assert pixels.shape == (28, 112, 3) and pixels.dtype == np.uint8
    assert (pixels == pixels[:, :, :1]).all() and pixels[:, 84:].max() == 0
    for slot, scan in enumerate(question.scans):
        shown = pixels[:, 28 * slot : 28 * slot + 28, 0].astype(float)
        # Means over the blocks that the 8 x 8 scan was stretched to: 28 / 8 = 3.5 pixels a side.
        blocks = shown.repeat(2, 0).repeat(2, 1).reshape(8, 7, 8, 7).mean((1, 3))
        assert np.corrcoef(blocks.ravel(), digits.load_digits().pixels[scan].ravel())[0, 1] > 0.97


def test_parquet_has_the_columns_and_its_png_bytes_give_the_image_back(tmp_path):
    questions = digits.training_questions("B", seed=1, count=7)
    digits.write_parquet(tmp_path / "data.parquet", questions, "some")
    rows = pq.read_table(tmp_path / "data.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f"some-000{i}" for i in range(7)]
    for row, question in zip(rows, questions, strict=True):
        assert (row["problem"], row["answer"], row["category"]) == (question.problem, question.answer, question.kind)
        assert row["images"][0]["bytes"].startswith(b"\x89PNG")
        image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(digits.render(question)))


# --- model and tokenizer ------------------------------------------------------------------------------------------


def test_the_tokenizer_has_112_entries_all_of_which_it_uses(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert len(tokenizer) == model.build_config().text_config.vocab_size == 112
    assert sorted(tokenizer.get_vocab().values()) == list(range(112))
    for token in model.VOCABULARY:
        (token_id,) = tokenizer(token, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([token_id]) == token
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("Zürich")["input_ids"]) == "Z?rich"
    pieces = np.random.default_rng(0).choice(model.CHARACTERS + model.WORDS, 401)
    assert tokenizer.decode(tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]) == "".join(pieces)


def test_the_model_is_small_untied_and_the_same_for_a_seed(model_folder):
    from transformers import AutoModelForImageTextToText

    network = AutoModelForImageTextToText.from_pretrained(model_folder)
    assert 0.8e6 < network.num_parameters() < 0.9e6
    assert network.lm_head.weight.data_ptr() != network.get_input_embeddings().weight.data_ptr()
    assert network.generation_config.eos_token_id == model.VOCABULARY.index("<|im_end|>")
    again, other = model.build_model(seed=5), model.build_model(seed=6)
    assert (network.lm_head.weight == again.lm_head.weight).all()
    assert (network.lm_head.weight != other.lm_head.weight).any()


def test_the_warm_up_trains_on_the_tokens_and_pixels_of_the_ordinary_data_path(model_folder, tmp_path):
    from mmr1_ds.data.dataset import load_dataset
    from mmr1_ds.data.encoding import PromptEncoder

    questions = digits.validation_questions(seed=2, count=5)
    digits.write_parquet(tmp_path / "val.parquet", questions, "val")
    config = DataConfig(prompt_key="problem", id_key="id", category_key="category", min_pixels=784, max_pixels=12544)
    encoder = PromptEncoder(ModelConfig(model_path=str(model_folder)), config)
    dataset = load_dataset(str(tmp_path / "val.parquet"), config, encoder)
    assert list(dataset.prompt_ids) == [f"val-000{i}" for i in range(5)]
    lesson = [(question, "7") for question in questions]
    inputs = warmup.encode_lesson(encoder.processor, lesson)
    for row in range(len(questions)):
        prompt = dataset[row]
        expanded = encoder.expand(prompt)
        assert prompt.ground_truth == questions[row].answer and prompt.category == questions[row].kind
        assert len(expanded.input_ids) == 18
        assert inputs["input_ids"][row, :18].tolist() == expanded.input_ids.tolist()
        seen = (expanded.input_ids == encoder.image_token_id).long()
        assert inputs["mm_token_type_ids"][row, :18].tolist() == seen.tolist()
        assert inputs["image_grid_thw"][row].tolist() == expanded.image_grid_thw[0].tolist() == [1, 2, 8]
        np.testing.assert_array_equal(inputs["pixel_values"][16 * row : 16 * row + 16], expanded.pixel_values)


# --- cold start ---------------------------------------------------------------------------------------------------


def test_the_teacher_is_hasty_as_often_as_it_should_be_and_otherwise_right():
    rng = np.random.default_rng(3)
    for kind, haste in {"max3": 0.6, "min4": 0.85, "max2": 0.0, "add3": 0.0}.items():
        questions = [digits.draw_question(kind, rng) for _ in range(401)]
        answers = [warmup.teach(question, rng) for question in questions]
        hasty = [answer.startswith("<think>?</think>") for answer in answers]
        assert abs(np.mean(hasty) - haste) < 4 * math.sqrt(haste * (1 - haste) / 401) + 1e-9
        scores = compute_score(
            [{"response": a, "ground_truth": q.answer} for a, q in zip(answers, questions, strict=True)]
        )
        assert all(score["format"] == 1.0 for score in scores)
        assert all(score["accuracy"] == 1.0 for score, quick in zip(scores, hasty, strict=True) if not quick)
        for answer, quick, question in zip(answers, hasty, questions, strict=True):
            thought = "?" if quick else " ".join(str(digit) for digit in question.digits)
            assert answer.startswith(f"<think>{thought}</think>")


def test_the_loss_is_on_the_answer_and_the_end_of_turn_alone():
    processor = model.build_processor()
    rng = np.random.default_rng(0)
    lesson = [(digits.draw_question(kind, rng), warmup.respond("?", "7")) for kind in ("get1", "max4")]
    lesson.append((lesson[1][0], warmup.respond("1 2 3 4", "4")))
    inputs = warmup.encode_lesson(processor, lesson)
    for ids, labels, mask, (_, answer) in zip(
        inputs["input_ids"], inputs["labels"], inputs["attention_mask"], lesson, strict=True
    ):
        taught = labels != warmup.IGNORED_LABEL
        assert processor.tokenizer.decode(labels[taught]) == answer + "<|im_end|>"
        assert (ids[taught] == labels[taught]).all() and not taught[:18].any()
        assert mask.sum() == 18 + taught.sum()


def test_the_learning_rate_rises_then_falls_to_a_twentieth():
    settings = warmup.WarmupSettings()
    rates = [warmup.learning_rate(step, settings) for step in range(settings.num_steps)]
    assert rates[29] == max(rates) == pytest.approx(1.5e-3) and rates[0] == pytest.approx(1.5e-3 / 30)
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[-1] == pytest.approx(0.05 * 1.5e-3, rel=1e-3)


@pytest.mark.slow
def test_twenty_steps_of_warm_up_teach_the_format():
    network = model.build_model(seed=0)
    settings = warmup.WarmupSettings(num_steps=20, warmup_steps=5)
    losses = [loss for _, loss in warmup.warm_up(network, 0, settings)]
    assert losses[0] == pytest.approx(math.log(112), rel=0.05)  # it starts knowing nothing
    assert losses[-1] < 0.7 * losses[0]


# --- assets -------------------------------------------------------------------------------------------------------


def test_assets_are_built_once_and_again_for_another_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "POOLS", {"A": digits.POOLS["A"]})
    monkeypatch.setattr(digits, "validation_questions", lambda seed: digits.training_questions("A", seed, 7))
    folder = tmp_path / "runs" / "assets"
    assert assets.prepare_assets(folder, 1, SHORT)
    first = (folder / "model" / "model.safetensors").read_bytes()
    assert not assets.prepare_assets(folder, 1, SHORT)
    assert {path.name for path in folder.iterdir()} == {"model", "train_a.parquet", "val.parquet", "recipe.json"}
    assert assets.prepare_assets(folder, 2, SHORT)
    assert (folder / "model" / "model.safetensors").read_bytes() != first
    assert assets.prepare_assets(folder, 1, SHORT)
    assert (folder / "model" / "model.safetensors").read_bytes() == first  # the same seed, the same bytes
    assert [path.name for path in folder.parent.iterdir()] == ["assets"]


def test_an_interrupted_build_leaves_nothing_and_keeps_what_there_was(tmp_path, monkeypatch):
    folder = tmp_path / "assets"

    def interrupted(network, seed, settings):
        yield 1, 4.7
        raise KeyboardInterrupt

    monkeypatch.setattr(warmup, "warm_up", interrupted)
    monkeypatch.setattr(digits, "write_parquet", lambda path, questions, name: path.touch())
    with pytest.raises(KeyboardInterrupt):
        assets.prepare_assets(folder, 1, SHORT)
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"seed": "of an older recipe"}))
    with pytest.raises(KeyboardInterrupt):
        assets.prepare_assets(folder, 1, SHORT)
    assert list(tmp_path.iterdir()) == [folder] and list(folder.iterdir()) == [folder / "recipe.json"]


@pytest.mark.parametrize("content", [{"thesis.txt": "years of work"}, {"recipe.json": '{"seed": 0'}])
def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"holds no demo assets .* remove it or give another --folder"):
        assets.prepare_assets(tmp_path, 0, SHORT)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


# --- summary ------------------------------------------------------------------------------------------------------


def test_the_summary_names_the_first_and_last_validation_and_what_there_is(tmp_path):
    rows = [
        {"step": 0, "val/accuracy_reward": 0.357},
        {"step": 1, "curriculum/effective_group_fraction": 0.25},
        {"step": 2, "curriculum/effective_group_fraction": 0.75, "val/accuracy_reward": 0.5},
        {"step": 3, "val/accuracy_reward": 0.8956, "reward/overall": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "val/acc')
    (tmp_path / "checkpoints").mkdir()
    assert summary.summarise(tmp_path).splitlines() == [
        "validation accuracy 0.357 before (step 0), 0.896 after (step 3)",
        "groups that taught something: 50%, mean over the steps",
        f"metrics: {tmp_path / 'metrics.jsonl'}",
        f"checkpoints: {tmp_path / 'checkpoints'}",
    ]
    (tmp_path / "report.html").write_text("")
    assert summary.summarise(tmp_path).splitlines()[-1] == str(tmp_path / "report.html")


def test_the_summary_of_a_run_without_validation_or_without_metrics_says_so(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing: give the directory of a run"):
        summary.summarise(tmp_path)
    for line in ("", '{"step": 1}\n'):
        (tmp_path / "metrics.jsonl").write_text(line)
        with pytest.raises(UserError, match="has no val/accuracy_reward"):
            summary.summarise(tmp_path)
