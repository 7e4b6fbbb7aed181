"""`mmr1-ds data`: its numbers against plain counts and the trainer's own loading, and what a reader sees."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from fixtures.data_fixtures import image, write_jsonl
from fixtures.doc_blocks import DOCS, blocks
from PIL import Image

from mmr1_ds.commands import cli
from mmr1_ds.commands.data import command, figures, rows
from mmr1_ds.commands.data.figures import histogram, spread
from mmr1_ds.commands.data.text import WIDTH
from mmr1_ds.config import DataConfig, ModelConfig, RewardConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.errors import UserError
from mmr1_ds.rewards.loading import load_reward_function, reward_setup

LIMITS = {"min_pixels": 2000, "max_pixels": 9000}
LIMIT_SETTINGS = [f"data.{name}={value}" for name, value in LIMITS.items()]
OWN_REWARD = "worker.reward.reward_function=own.py:score"  # of which nothing is asked: no process is started


@pytest.fixture(autouse=True, scope="module")
def cache(dataset_cache):
    """The command reads data sets."""


def run(*words):
    """The exit code of the command. Settings and options as on the command line."""
    return cli.main(["data", *map(str, words)])


@pytest.fixture
def look(tmp_path, capsys):
    """Runs the command on data.train_files; returns its exit code, what it prints and what it writes as JSON."""

    def looked(files, model, *words, reward=OWN_REWARD):
        options = [word for word in words if word.startswith("--")]
        settings = [word for word in words if not word.startswith("--")]
        path = tmp_path / "found.json"
        code = run(
            f"data.train_files={files}", f"worker.actor.model.model_path={model}", reward, *settings,
            "--json", path, *options,
        )  # fmt: skip
        printed = capsys.readouterr()
        assert printed.err == ""
        assert all(len(line) <= WIDTH for line in printed.out.splitlines())
        return code, printed.out, json.loads(path.read_text())

    return looked


def text_rows(count):
    return [{"prompt": f"what is {i}?", "answer": str(i)} for i in range(count)]


def write_images(folder, sizes):
    """A row each with one image of the size, and a text of another length each."""
    rows = []
    for place, (width, height) in enumerate(sizes):
        image(width, height, place).save(folder / f"{place}.png")
        rows.append({"prompt": "<image>" + "x" * (place % 7), "answer": str(place % 3), "images": [f"{place}.png"]})
    return write_jsonl(folder / "images.jsonl", rows)


def nearest_rank(values, share):
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# --- numbers ------------------------------------------------------------------------------------------------------


def test_lengths_and_drops_are_those_of_the_trainer(tmp_path, vision_model, look):
    draw = random.Random(3)
    path = write_images(tmp_path, [(draw.randint(15, 150), draw.randint(15, 150)) for _ in range(41)])
    limit = 20
    _, text, found = look(path, vision_model, f"data.max_prompt_length={limit}", *LIMIT_SETTINGS)
    settings = DataConfig(max_prompt_length=limit, **LIMITS)
    encoder = PromptEncoder(ModelConfig(model_path=vision_model), settings)
    trained_on = load_dataset(path, settings, encoder)
    lengths = [len(encoder.expand(prompt).input_ids) for prompt in load_all(path, encoder)]
    (data_set,) = found["data_sets"]
    assert 0 < len(trained_on) < 41
    assert data_set["num_rows"] == 41 and data_set["num_usable"] == len(trained_on)
    (dropped,) = data_set["findings"]
    assert dropped["effect"] == "dropped" and dropped["num_rows"] == trained_on.num_filtered
    assert dropped["rows_by_file"] == {path: [row for row, length in enumerate(lengths) if length > limit]}
    shown = data_set["lengths"]
    for name, share in [("minimum", 0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("maximum", 1)]:
        assert shown["spread"][name] == nearest_rank(lengths, share)
    assert shown["num_near_limit"] == sum(0.9 * limit < length <= limit for length in lengths)
    for bar in shown["histogram"]:
        assert bar["count"] == sum(bar["low"] <= length <= bar["high"] for length in lengths)
    assert sum(bar["count"] for bar in shown["histogram"]) == 41
    assert f"{dropped['num_rows']} rows ({dropped['num_rows'] / 41:.1%}) dropped: longer than " in text
    longest = max(range(41), key=lambda row: lengths[row])
    assert dropped["num_rows"] > 3 and f"in row {longest} ({lengths[longest]} tokens), row " in text

    told = re.search(r"min (\d+), median (\d+), p90 (\d+), p99 (\d+), max (\d+); (\d+) \(", text)
    assert [int(number) for number in told.groups()] == [*shown["spread"].values(), shown["num_near_limit"]]
    bars = re.findall(r"^ +(\d+)(?: to (\d+))?  (#*) +(\d+)(  over the limit)?$", text, re.MULTILINE)
    assert [(int(low), int(high or low), int(count)) for low, high, _, count, _ in bars] == [
        (bar["low"], bar["high"], bar["count"]) for bar in shown["histogram"]
    ]
    assert max(len(marks) for _, _, marks, _, _ in bars) == 40 and bars[-1][-1]


def load_all(path, encoder):
    return load_dataset(path, DataConfig(max_prompt_length=10**6, **LIMITS), encoder)


def test_images_are_told_as_the_processor_takes_them(tmp_path, vision_model, look):
    sizes = [(56, 84), (57, 83), (15, 16), (200, 150), (300, 20), (56, 84), (28, 28), (112, 56), (40, 41)]
    path = write_images(tmp_path, sizes)
    _, text, found = look(path, vision_model, *LIMIT_SETTINGS)
    images = found["data_sets"][0]["images"]
    encoder = PromptEncoder(ModelConfig(model_path=vision_model), DataConfig(**LIMITS))
    prompts = list(load_all(path, encoder))
    given = [prompt.images[0].size for prompt in prompts]
    tokens = [int(encoder.expand(prompt).image_grid_thw.prod()) // 4 for prompt in prompts]
    kinds = Counter(
        "enlarged" if w * h < 2000 else "shrunk" if w * h > 9000 else "unchanged" if (w, h) == size else "rounded"
        for (w, h), size in zip(sizes, given, strict=True)
    )
    assert kinds == {"enlarged": 3, "shrunk": 1, "unchanged": 3, "rounded": 2}
    assert {kind: images[f"num_{kind}"] for kind in kinds} == kinds
    assert images["tokens"]["maximum"] == max(tokens) and images["tokens"]["median"] == nearest_rank(tokens, 0.5)
    total = sum(len(encoder.expand(prompt).input_ids) for prompt in prompts)
    assert images["token_fraction"] == pytest.approx(sum(tokens) / total)
    assert (images["width"]["maximum"], images["height"]["minimum"]) == (300, 16)
    wide, high = given[sizes.index((200, 150))]
    assert images["strongest_shrinking"] == pytest.approx(math.sqrt(200 * 150 / (wide * high)))
    shrunk = f"1 (11.1%) shrunk, a side by up to {images['strongest_shrinking']:.1f} times; 2 (22.2%) only rounded"
    assert f"multiples of 28: 3 (33.3%) enlarged; {shrunk}" in " ".join(text.split())


def test_images_a_prompt(tmp_path, vision_model, look):
    image(28, 28).save(tmp_path / "one.png")
    counts = [0, 1, 3, 1, 0, 2, 1]
    data = [{"prompt": f"p{row}", "answer": "1", "images": ["one.png"] * count} for row, count in enumerate(counts)]
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    code, text, found = look(path, vision_model, "worker.rollout.limit_images=2")
    assert found["data_sets"][0]["images"]["num_prompts_by_images"] == {"0": 2, "1": 3, "2": 1, "3": 1}
    assert "images: 8 in 7 prompts: 2 with none, 3 with 1, 1 with 2, 1 with 3" in text
    (finding,) = found["data_sets"][0]["findings"]
    assert finding["rows_by_file"] == {path: [2]} and code == command.EXIT_STOPS
    assert "in row 2 (3 images)" in text and found["data_sets"][0]["num_usable"] == 6
    assert look(path, vision_model, "worker.rollout.limit_images=3")[0] == 0


def test_categories_and_answers(tmp_path, text_model, look):
    given = ["7", "7", "x", "7", "yy", "x", "7 "]
    names = ["a", "b", None, "a", "b", "a", "a"]
    data = [{"prompt": f"p{i}", "answer": a, "kind": k} for i, (a, k) in enumerate(zip(given, names, strict=True))]
    path = write_jsonl(tmp_path / "a.jsonl", data)
    _, text, found = look(path, text_model, "data.category_key=kind")
    data_set = found["data_sets"][0]
    assert data_set["categories"] == {"a": 4, "b": 2, "": 1} and "(none)" in text
    assert data_set["answers"] == {
        "num_distinct": 4,
        "most_frequent": [["7", 3], ["x", 2], ["yy", 1], ["7 ", 1]],
        "majority_fraction": 3 / 7,
        "longest": 2,
    }
    assert "most frequent one is right for 42.9%" in " ".join(text.split())
    assert look(path, text_model)[2]["data_sets"][0]["categories"] == {}


@pytest.mark.parametrize("limit", [1, 7, 77, 401])
def test_histograms_hold_every_value_once(limit):
    for count in (1, 2, 401):
        values = np.random.default_rng(limit).integers(1, 500, count)
        bins = histogram(values, limit)
        for bar in bins:
            assert bar.count == sum(bar.low <= value <= bar.high for value in values)
            assert (bar.high <= limit) != (bar.low > limit)
        assert sum(bar.count for bar in bins) == count and len(bins) <= 11
        assert all(before.high + 1 == after.low for before, after in itertools.pairwise(bins))
    assert spread(np.array([])) is None


# --- rows that are dropped or refused -----------------------------------------------------------------------------


def bad_rows(folder):
    """Good rows with bad ones between: place -> words of the trainer about it."""
    image(28, 56).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"nothing of the kind")
    Image.new("RGB", (801, 3)).save(folder / "thin.png")
    data = [{"prompt": f"<image>p{i}", "answer": str(i), "images": ["good.png"]} for i in range(13)]
    data[1] |= {"answer": ""}
    data[2] |= {"answer": None}
    data[4] |= {"images": ["gone.png"]}
    data[5] |= {"images": ["bad.png"]}
    data[6] |= {"images": ["good.png", "good.png"]}
    data[7] |= {"prompt": ""}
    data[9] |= {"prompt": "<image>and <|image_pad|>"}
    data[11] |= {"images": ["thin.png"]}
    return data, {
        1: "no answer in column 'answer'",
        2: "no answer in column 'answer'",
        4: "'gone.png' cannot be read as an image",
        5: "'bad.png' cannot be read as an image (of no format that Pillow knows)",
        6: "1 <image> markers and the row 2 images",
        7: "the prompt is nothing",
        9: "2 image placeholders for 1 images",
        11: "an image of 801 x 3 pixels is refused",
    }


def test_every_row_that_the_trainer_refuses_is_told_in_its_words(tmp_path, vision_model, look):
    data, wrong = bad_rows(tmp_path)
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    code, text, found = look(path, vision_model, "data.min_pixels=null")
    findings = found["data_sets"][0]["findings"]
    told = {row: finding for finding in findings for row in finding["rows_by_file"][path]}
    assert told.keys() == wrong.keys() and code == command.EXIT_STOPS
    settings = DataConfig(min_pixels=None)
    encoder = PromptEncoder(ModelConfig(model_path=vision_model), settings)
    for row, words in wrong.items():
        assert told[row]["effect"] == rows.AT_ITS_START
        alone = write_jsonl(tmp_path / "alone.jsonl", [data[row]])
        with pytest.raises(UserError) as refusal:
            load_dataset(alone, settings, encoder)
        detail = next(example["detail"] for example in told[row]["examples"] if example["row"] == f"row {row}")
        assert words in detail and str(refusal.value).endswith(f"(counted from 0): {detail}")
        assert f"row {row}" in text
    assert [finding["num_rows"] for finding in findings] == [2, 1, 1, 1, 1, 1, 1]  # rows 1 and 2 lack the same
    good = write_jsonl(tmp_path / "good.jsonl", [row for place, row in enumerate(data) if place not in wrong])
    assert found["data_sets"][0]["num_usable"] == len(load_dataset(good, settings, encoder)) == 5
    assert text.endswith("these rows would stop a run: see above\n")
    code, text, _ = look(good, vision_model, "data.min_pixels=null")
    assert code == 0 and text.endswith("no row would stop a run\n")


def test_images_that_no_one_would_see_are_told(tmp_path, vision_model, look):
    image(28, 28).save(tmp_path / "a.png")
    late = [{"prompt": f"p{i}", "answer": "1", "image": None if i < 70 else "a.png"} for i in range(72)]
    code, text, _ = look(write_jsonl(tmp_path / "late.jsonl", late), vision_model)
    assert code == 1 and "2 rows (2.8%) would stop the run at its start: column 'image' holds an image" in text
    beside = [{"prompt": f"p{i}", "answer": "1", "images": ["a.png"][i:], "image": "a.png"} for i in range(5)]
    path = write_jsonl(tmp_path / "beside.jsonl", beside)
    assert look(path, vision_model, "data.image_key=image")[0] == 0
    config = load_config([f"data.train_files={path}", f"worker.actor.model.model_path={vision_model}"]).config
    (found,) = command.look(config, [command.TRAIN], 0, False).data_sets[0].findings
    assert (found.effect, found.num_rows) == ("kept", 4)
    assert "column 'image' holds an image that the model does not see" in found.reason


def test_like_mistakes_are_told_together(tmp_path, vision_model, look):
    data = [{"prompt": "p", "answer": "1", "images": [f"gone{i}.png"]} for i in range(7)]
    _, text, found = look(write_jsonl(tmp_path / "rows.jsonl", data), vision_model)
    (finding,) = found["data_sets"][0]["findings"]
    assert finding["num_rows"] == 7 and len(finding["examples"]) == 3
    assert "row 2: 'gone2.png' cannot be read" in text and "      4 more\n" in text
    assert found["data_sets"][0]["lengths"] is None and "tokens of a prompt" not in text


def test_truncated_images(tmp_path, vision_model, look):
    """Their headers are whole: the trainer, too, finds them when it draws them."""
    buffer = io.BytesIO()
    image(84, 84).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:2000])
    image(84, 84).save(tmp_path / "good.jpg")
    data = [{"prompt": "p", "answer": "1", "images": [name]} for name in ("good.jpg", "cut.jpg", "good.jpg")]
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    code, _, found = look(path, vision_model, "--show=0")
    assert code == 0 and len(found["data_sets"][0]["findings"]) == 1  # the third row repeats the first
    code, text, found = look(path, vision_model, "--decode", "--show=0")
    assert code == command.EXIT_STOPS
    assert found["data_sets"][0]["findings"][0]["rows_by_file"] == {path: [1]}
    assert "would stop the run when drawn: 'cut.jpg' cannot be read" in " ".join(text.split())
    code, text, _ = look(path, vision_model)  # among the prompts that are shown
    assert code == command.EXIT_STOPS and "would stop the run when drawn: 'cut.jpg'" in text


def test_overlong_prompts_without_the_filter_and_a_limit_that_leaves_none(tmp_path, text_model, look):
    path = write_jsonl(tmp_path / "a.jsonl", [*text_rows(3), {"prompt": "x" * 50, "answer": "1"}])
    code, text, _ = look(path, text_model, "data.max_prompt_length=40", "data.filter_overlong_prompts=false")
    assert code == command.EXIT_STOPS and "1 row (25.0%) would stop the run when drawn: longer than" in text
    assert look(path, text_model, "data.max_prompt_length=40")[0] == 0
    code, text, found = look(path, text_model, "data.max_prompt_length=5")
    assert code == command.EXIT_STOPS and "no prompt is left: the shortest has 18 tokens" in " ".join(text.split())
    assert found["data_sets"][0]["samples"] == []


def test_rows_of_several_files_repeats_and_rows_that_training_has(tmp_path, text_model, look):
    first = write_jsonl(tmp_path / "a.jsonl", text_rows(5))
    second = write_jsonl(tmp_path / "b.jsonl", [*text_rows(2), {"prompt": "other", "answer": " "}])
    val = write_jsonl(tmp_path / "c.jsonl", [*text_rows(2), {"prompt": "what is 3?", "answer": "three"}])
    files, settings = f"[{first},{second}]", [f"data.val_files={val}", "data.rollout_batch_size=8"]
    code, text, found = look(files, text_model, *settings)
    text = " ".join(text.split())
    train, validation = found["data_sets"]
    refused, kept = train["findings"]
    assert refused["rows_by_file"] == {second: [2]} and kept["rows_by_file"] == {second: [0, 1]}
    assert kept["effect"] == "kept" and f"{second} row 0 (as {first} row 0)" in text
    assert train["num_rows_by_file"] == {first: 5, second: 3} and train["num_usable"] == 7
    assert found["num_shared"] == 2 and "2 validation rows with the prompt, answer and images of a training" in text
    assert "7 usable prompts, and a step takes data.rollout_batch_size=8: each step repeats" in text
    assert (train["key"], validation["key"], code) == ("data.train_files", "data.val_files", command.EXIT_STOPS)
    for name in ("train", "val"):
        _, text, found = look(files, text_model, *settings, f"--file={name}")
        assert [data_set["key"] for data_set in found["data_sets"]] == [f"data.{name}_files"]
        assert (f"data.{name}_files: " in text) and found["num_shared"] is None
    _, text, found = look(first, text_model, f"data.val_files={val}", "data.id_key=answer", "data.rollout_batch_size=5")
    assert found["num_shared"] is None and "each step repeats" not in text
    _, text, _ = look(first, text_model, f"data.val_files=[{first},{val}]", "data.id_key=answer")
    assert f"data.val_files: {first} is data.train_files too" in " ".join(text.split())


def test_several_processes_find_the_same(tmp_path, vision_model, look, monkeypatch):
    data, _ = bad_rows(tmp_path)
    path = write_jsonl(tmp_path / "rows.jsonl", data * 4)
    alone = look(path, vision_model, "data.min_pixels=null")
    monkeypatch.setattr(rows, "ROWS_A_PROCESS", 20)
    monkeypatch.setattr(rows, "BATCH_ROWS", 7)
    monkeypatch.setattr(rows.os, "cpu_count", lambda: 2)
    assert look(path, vision_model, "data.min_pixels=null") == alone


# --- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_are_shown_as_the_model_gets_them(tmp_path, vision_model, look):
    image(200, 150).save(tmp_path / "a.png")
    image(28, 56).save(tmp_path / "b.png")
    data = [{"prompt": "one <image> two\x1b[31m <image>", "answer": "7", "images": ["a.png", "b.png"], "kind": "k"}]
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    _, text, found = look(
        path, vision_model, "data.min_pixels=784", "data.max_pixels=9000", "data.system_prompt=Be brief.",
        "data.format_prompt={{ content }} " + "Think. " * 30, "data.category_key=kind",
    )  # fmt: skip
    (sample,) = found["data_sets"][0]["samples"]
    assert sample["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none <|vision_start|><image 84x56, 6 tokens><|vision_end|> two?[31m "  # ? is unknown
        f"<|vision_start|><image 28x56, 2 tokens><|vision_end|> {('Think. ' * 30).strip()}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert sample["ground_truth"] == "7" and sample["category"] == "k"
    encoder = PromptEncoder(ModelConfig(model_path=vision_model), DataConfig())
    without_images = re.sub(r"<image .*?>", "", sample["prompt"])
    assert sample["num_tokens"] == len(encoder.tokenize([without_images])[0]) + 6 + 2
    shown = [line[4:] for line in text.splitlines() if line.startswith(("  | ", "  : "))]
    assert " ".join(" ".join(shown).split()) == " ".join(sample["prompt"].split())
    assert "\x1b" not in text


def test_the_prompts_shown_are_a_seeded_choice(tmp_path, text_model, look):
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(23))
    chosen = []
    for words in (["--show=5"], ["--show=5"], ["--show=5", "data.seed=2"], ["--show=50"], ["--show=0"]):
        _, text, found = look(path, text_model, *words)
        chosen.append([sample["row"] for sample in found["data_sets"][0]["samples"]])
        assert all(f"data.train_files {row}: " in text for row in chosen[-1])
    assert chosen[0] == chosen[1] != chosen[2] and list(map(len, chosen)) == [5, 5, 5, 23, 0]


# --- the reward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", ["7", "-1,234.5", "\\frac{1}{2}", "(A)", "x^2 + 1", "\\{1, 2\\}", "Paris"])
def test_a_boxed_truth_is_right_in_every_reward_that_goes_by_rule(truth):
    item = {"response": figures.right_response(truth), "ground_truth": truth, "response_length": 5}
    for name in figures.BY_RULE:
        reward = load_reward_function(reward_setup(RewardConfig(reward_function=name), 100))
        assert reward.score([item])[0]["accuracy"] == 1.0
        assert reward.score([item | {"ground_truth": "8"}])[0]["accuracy"] == 0.0


def test_truths_that_no_response_can_give(tmp_path, text_model, look):
    data = [{"prompt": f"p{i}", "answer": truth} for i, truth in enumerate(["7", "a}b", "7", "{", "\\frac12"])]
    path = write_jsonl(tmp_path / "a.jsonl", data)
    code, text, found = look(path, text_model, reward="worker.reward.reward_function=math")
    assert found["data_sets"][0]["reward_check"] == {
        "reward_function": "math", "num_answers": 4, "num_refused": 2, "refused": ["a}b", "{"],
        "num_wrapped": 0, "wrapped": [], "num_prose": 0, "prose": [], "num_unclear": 0, "unclear": [],
    }  # fmt: skip
    assert code == 0 and "2 of them wrong, so that no response to their prompts can be right" in " ".join(text.split())
    assert any("asks for \\boxed" in note for note in found["notes"])


def test_the_reward_is_not_asked_where_that_says_nothing():
    for name in ("own.py:score", "openr1"):
        assert figures.check_reward(["7"], RewardConfig(reward_function=name), seed=1) is None
    assert figures.check_reward([], RewardConfig(reward_function="math"), seed=1) is None


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train_files=gone.jsonl"], "data.train_files: no such file or folder 'gone.jsonl'"),
        (["data.prompt_key=q"], "has no column 'q' (data.prompt_key); it has prompt, answer"),
        (["worker.actor.model.model_path=null"], "worker.actor.model.model_path is not set"),
        (["data.max_prompt_length=0"], "data.max_prompt_length must be 1 or more, got 0"),
        (["data.format_prompt=Think."], "neither a file nor a template"),
        (["--file", "val"], "data.val_files is empty"),
        (["--show", "-1"], "--show must be 0 or more, got -1"),
        (["--json", "gone/found.json"], "--json: no such folder 'gone'"),
        (["--json", "."], "--json: cannot write '.'"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, text_model, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", text_rows(2))
    code = run("data.train_files=a.jsonl", f"worker.actor.model.model_path={text_model}", OWN_REWARD, *words)
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert printed.err.startswith("mmr1-ds: error: ") and printed.err.count("\n") == 1 and message in printed.err


# --- the documentation --------------------------------------------------------------------------------------------

PAGE = [block for block in blocks(DOCS / "data.md") if block.language in ("bash", "text", "jsonl")]


def test_the_page_shows_what_the_command_prints_of_the_demo(tmp_path, capsys, monkeypatch):
    from mmr1_ds.commands.demo import digits
    from mmr1_ds.commands.demo.model import build_model, save_model

    monkeypatch.chdir(tmp_path)
    assets = tmp_path / "runs" / "demo_assets"
    assets.mkdir(parents=True)
    digits.write_parquet(assets / "train_a.parquet", digits.training_questions("A", 0), "train_a")
    save_model(assets / "model", build_model(0))
    (shown,) = [block for block in PAGE if block.text.startswith("model: runs/demo_assets/model")]
    words = command_before(shown)
    capsys.readouterr()
    assert run(*words) == 0
    assert capsys.readouterr().out == shown.text
    # The page's second example: the same model, rows with mistakes.
    (given,) = [block for block in PAGE if block.language == "jsonl"]
    (tmp_path / "questions.jsonl").write_text(given.text)
    image(84, 56).save(tmp_path / "apples.png")
    (findings,) = [block for block in PAGE if block.text.startswith("data.train_files: ")]
    words = [word.replace("/path/to/model", str(assets / "model")) for word in command_before(findings)]
    assert run(*words) == command.EXIT_STOPS
    assert findings.text in capsys.readouterr().out


def command_before(block) -> list[str]:
    """The arguments of the command that the page shows before a block of output."""
    before = [found for found in PAGE if found.language == "bash" and found.line < block.line]
    words = before[-1].text.replace("\\\n", " ").split()
    assert words[:2] == ["mmr1-ds", "data"]
    return words[2:]
