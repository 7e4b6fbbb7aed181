"""The prompt encoder against transformers' processor, called directly on the same text and images."""

from __future__ import annotations

import functools
import gc
import json
import weakref

import numpy as np
import pytest
import torch
from fixtures.data_fixtures import NUM_UNUSED_IDS, VOCABULARY, image, rope_index, write_text_model, write_vision_model
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.images import PixelLimits
from mmr1_ds.errors import UserError
from mmr1_ds.records import Prompt


@functools.cache
def encoder_of(model_path, **data):
    return PromptEncoder(
        ModelConfig(model_path=model_path), DataConfig(**{"min_pixels": None, "max_pixels": None, **data})
    )


def prompt_of(encoder, cell, images):
    token_ids, sized, _ = encoder.encode(cell, images)
    return Prompt(0, "id", token_ids, sized, "7")


def text_of(encoder, prompt):
    return encoder.tokenizer.decode(prompt.token_ids)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def any_vision_model(request, tmp_path_factory):
    return write_vision_model(tmp_path_factory.mktemp(request.param), family=request.param)


@pytest.mark.parametrize(
    ("cell", "sizes"),
    [
        ("<image>which?", [(112, 28)]),
        ("first <image> then <image> and <image>?", [(28, 28), (401, 7), (30, 97)]),
        ("nothing to see", []),
    ],
)
def test_expand_equals_the_processor(any_vision_model, cell, sizes):
    encoder = encoder_of(any_vision_model, system_prompt="Be brief.")
    prompt = prompt_of(encoder, cell, [image(*size, seed=i) for i, size in enumerate(sizes)])
    expected = encoder.processor(
        text=[text_of(encoder, prompt)], images=list(prompt.images) or None, return_tensors="pt"
    )

    inputs = encoder.expand(prompt)

    assert torch.equal(inputs.input_ids, expected["input_ids"][0])
    types = expected["mm_token_type_ids"][0]
    assert torch.equal(inputs.input_ids == encoder.image_token_id, types == 1)
    assert torch.equal(inputs.positions, rope_index(any_vision_model, expected))
    if sizes:
        assert torch.equal(inputs.pixel_values, expected["pixel_values"])
        assert torch.equal(inputs.image_grid_thw, expected["image_grid_thw"])
    else:
        assert inputs.pixel_values is None and inputs.image_grid_thw is None


def test_one_placeholder_an_image(vision_model):
    encoder = encoder_of(vision_model)
    prompt = prompt_of(encoder, "a<image>b<image>", [image(112, 28), image(28, 56)])
    assert prompt.token_ids.count(VOCABULARY["<|image_pad|>"]) == 2
    assert text_of(encoder, prompt) == (
        "<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>b<|vision_start|><|image_pad|><|vision_end|>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("size", [(1, 1), (7, 401), (28, 112), (97, 53), (640, 480), (4000, 3000), (3999, 20)])
@pytest.mark.parametrize(
    ("low", "high"), [(None, None), (28 * 28, 60 * 60), (4 * 28 * 28, 12 * 28 * 28), (10**6, 10**7)]
)
def test_sized_images_stay_as_they_are(vision_model, size, low, high):
    """Neither transformers' nor vLLM's arithmetic changes the number of tokens again."""
    encoder = encoder_of(vision_model, min_pixels=low, max_pixels=high)
    width, height = encoder.pixel_limits.target(*size, "row")
    assert width % 28 == 0 and height % 28 == 0
    assert encoder.processor.image_processor.get_number_of_image_patches(height, width) * 14 * 14 == width * height
    assert encoder.num_image_tokens(*size) == width * height // (28 * 28)
    if max(size) / min(size) < 5 and (low or 0) < 112 * 112:  # elongated ones cannot keep both limits
        assert (low or 28 * 28) <= width * height <= (high or 112 * 112)


def test_the_processors_limits_are_the_tighter_ones(tmp_path):
    encoder = encoder_of(write_vision_model(tmp_path, max_pixels=56 * 56), min_pixels=262144, max_pixels=4194304)
    assert encoder.pixel_limits.target(500, 500, "row") == (56, 56)


def test_pixel_values_do_not_depend_on_another_resize(vision_model):
    encoder = encoder_of(vision_model)
    prompt = prompt_of(encoder, "<image>", [image(640, 480)])
    pixels = encoder.processor.image_processor(images=list(prompt.images), return_tensors="pt", do_resize=False)
    assert torch.equal(encoder.expand(prompt).pixel_values, pixels["pixel_values"])


def test_limits_no_size_can_meet_are_refused():
    limits = PixelLimits.of(28, 1000, 1000, None, None)
    with pytest.raises(UserError, match="row 3: no size for an image of 28 x 28"):
        limits.target(28, 28, "row 3")


def test_images_are_processed_once_for_as_long_as_their_prompt_lives(vision_model, monkeypatch):
    encoder = encoder_of(vision_model)
    processor, calls = encoder.processor.image_processor, []
    monkeypatch.setattr(encoder.processor, "image_processor", lambda **given: calls.append(1) or processor(**given))
    encoder.processor.image_processor.merge_size = processor.merge_size
    prompts = [prompt_of(encoder, "<image>", [image(60, 90, seed=i)]) for i in range(3)]
    encoder.expand_ahead(prompts)
    found = [encoder.expand(prompt) for prompt in prompts for _ in range(4)]
    assert len(calls) == 3 and found[0] is found[3] is not found[4]
    direct = processor(images=list(prompts[1].images), return_tensors="pt")["pixel_values"]
    assert torch.equal(found[4].pixel_values, direct)
    kept = weakref.ref(found[0])
    found.clear()
    assert kept() is not None
    prompts.clear()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("size", [(10, 1900), (28, 3785), (28, 28), (1000, 1000)])
def test_vllm_leaves_images_alone_within_the_run_s_limits(size):
    """It is told the run's largest image, so as to keep no memory for larger ones; elongated ones exceed it."""
    limits = PixelLimits.of(28, 28 * 28, 12_845_056, None, 100_000)
    width, height = limits.target(*size, "row")
    assert smart_resize(height, width, 28, limits.processor_min_pixels, limits.max_pixels) == (height, width)
    assert smart_resize(height, width, 28, limits.processor_min_pixels, 12_845_056) == (height, width)


def test_too_narrow_an_image_names_the_row(vision_model):
    with pytest.raises(UserError, match="row 5: an image of 2010 x 10 pixels is refused"):
        encoder_of(vision_model).encode("<image>", [image(2010, 10)], "row 5")


def test_text_model_gives_input_ids_only(text_model):
    encoder = encoder_of(text_model)
    prompt = prompt_of(encoder, "1+1? <image> is only text here", [])
    inputs = encoder.expand(prompt)
    assert encoder.processor is None and not encoder.is_multimodal
    assert tuple(inputs.input_ids.tolist()) == prompt.token_ids
    assert inputs.pixel_values is inputs.image_grid_thw is inputs.positions is None
    assert "<image>" in text_of(encoder, prompt)


def test_images_for_a_text_model_are_refused(text_model):
    with pytest.raises(UserError, match="row 2: the row has 1 images but the model takes text only"):
        encoder_of(text_model).encode("what?", [image(28, 28)], "row 2")


@pytest.mark.parametrize("text", ["a <|image_pad|> b", "a <|video_pad|> b", "a <|vision_start|> b"])
@pytest.mark.parametrize("images", [0, 1])
def test_vision_tokens_spelled_in_the_text_are_refused(vision_model, text, images):
    with pytest.raises(UserError, match="row 9"):
        encoder_of(vision_model).encode("<image>" * images + text, [image(28, 28)] * images, "row 9")


def test_forbidden_are_specials_vision_and_unused_but_not_eos(vision_model):
    encoder = encoder_of(vision_model)
    names = {VOCABULARY[token] for token in VOCABULARY if token.startswith("<|")}
    unused = set(range(len(VOCABULARY), len(VOCABULARY) + NUM_UNUSED_IDS))
    eos = (VOCABULARY["<|im_end|>"], VOCABULARY["<|endoftext|>"])
    assert encoder.eos_token_ids == eos
    assert set(encoder.forbidden_token_ids) == (names | unused) - {*eos}


def test_eos_without_a_generation_config(tmp_path):
    model = write_text_model(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert encoder_of(model).eos_token_ids == (VOCABULARY["<|im_end|>"],)


def test_decode_keeps_tags_and_drops_the_end(vision_model):
    encoder = encoder_of(vision_model)
    text = "<think>6 7 5</think><answer>\\boxed{7}</answer>"
    ids = [*encoder.tokenizer(text, add_special_tokens=False)["input_ids"], VOCABULARY["<|im_end|>"]]
    assert encoder.decode(ids + [VOCABULARY["<|endoftext|>"]] * 3) == text
    assert encoder.decode(np.array(ids)) == text


def test_reasoning_tags_flagged_special_are_neither_hidden_nor_forbidden(tmp_path):
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    model = write_text_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<think>", special=True)]})
    tokenizer.save_pretrained(model)
    encoder = encoder_of(model)
    think = VOCABULARY["<think>"]
    assert encoder.decode([think, VOCABULARY["7"]]) == "<think>7"
    assert think not in encoder.forbidden_token_ids


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(), "model_path is not set"),
        (ModelConfig(model_path="/nowhere/model"), "no such folder '/nowhere/model'"),
        (ModelConfig(model_path=".", tokenizer_path="./nowhere"), "no such folder './nowhere'"),
    ],
)
def test_missing_models_are_named(model, message):
    with pytest.raises(UserError, match=message):
        PromptEncoder(model, DataConfig())


def test_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(UserError, match=f"cannot load config of '{tmp_path}'"):
        PromptEncoder(ModelConfig(model_path=str(tmp_path)), DataConfig())


@pytest.mark.parametrize("write", [write_vision_model, write_text_model])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_files_that_hold_a_list_are_damaged(tmp_path, write, name):
    model = write(tmp_path)
    (tmp_path / name).write_text("[1]")
    with pytest.raises(UserError, match="damaged"):
        encoder_of(model)


def test_a_number_in_the_config_that_is_none(tmp_path):
    model = write_text_model(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": "many"}))
    with pytest.raises(UserError, match=r"cannot load config .*damaged: .*'vocab_size'"):
        encoder_of(model)


def test_a_text_model_s_tokenizer_for_a_vision_model(vision_model, text_model):
    model = ModelConfig(model_path=vision_model, tokenizer_path=text_model)
    with pytest.raises(UserError, match=r"no image processor, .*; leave worker.actor.model.tokenizer_path out"):
        PromptEncoder(model, DataConfig())


def test_tokenizer_without_a_chat_template_is_named(tmp_path):
    model = write_text_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        encoder_of(model)


def test_chat_template_error_names_the_row(tmp_path):
    model = write_text_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="row 4: the model's chat template refuses the prompt: roles must alternate"):
        encoder_of(model).encode("hello", [], "row 4")


@pytest.mark.slow  # imports vLLM
def test_vllm_counts_the_same_image_tokens(vision_model):
    """vLLM's own arithmetic for Qwen2.5-VL, without an engine: it wants sizes, a config and the processor."""
    qwen2_vl = pytest.importorskip("vllm.model_executor.models.qwen2_vl")
    from transformers import AutoConfig

    encoder = encoder_of(vision_model)

    class Info(qwen2_vl.Qwen2VLProcessingInfo):
        def __init__(self):
            pass

        def get_hf_config(self):
            return AutoConfig.from_pretrained(vision_model)

        def _merge_and_resolve_mm_processor_kwargs(self, kwargs):
            return {"images_kwargs": kwargs}

    for size in [(112, 28), (401, 7), (640, 480), (30, 97)]:
        width, height = encoder.pixel_limits.target(*size, "row")
        count = Info().get_num_image_tokens(
            image_width=width, image_height=height, image_processor=encoder.processor.image_processor, mm_kwargs={}
        )
        assert count == encoder.num_image_tokens(*size)
