"""Sampling against transformers' generate and whole forwards; the distribution it draws from."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from fixtures.tiny_models import make_prompt, save_text_model, save_vision_model

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.log_probs import plain_log_probs
from mmr1_ds.records import SamplingSettings
from mmr1_ds.rollout.hf.decoding import PromptBatch, SeededDraw, Stops, sample_responses

CPU = torch.device("cpu")
FAMILIES = ["qwen2", "qwen2_5_vl"]
FAMILIES += [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("qwen3", "qwen3_5_text", "llama", "qwen2_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")
]
GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, top_k=-1, max_tokens=9)
WARM = SamplingSettings(temperature=0.8, top_p=1.0, top_k=-1, max_tokens=40)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    """A model as transformers loads it, the encoder, and five expanded prompts."""
    folder = tmp_path_factory.mktemp(request.param)
    is_vision = request.param.endswith(("vl", "qwen3_5", "qwen3_5_moe"))
    seed = 5 if request.param == "qwen3_5" else 3  # of a model that repeats tokens, or no penalty would show
    (save_vision_model if is_vision else save_text_model)(folder, family=request.param, seed=seed)
    kind = transformers.AutoModelForImageTextToText if is_vision else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = PromptEncoder(
        ModelConfig(model_path=str(folder)), DataConfig(min_pixels=28 * 28, max_pixels=112 * 112, max_prompt_length=96)
    )
    prompts = [make_prompt(encoder, i, is_vision and i % 3 != 0, most_images=3) for i in (7, 0, 100, 3, 11)]
    return model, encoder, [encoder.expand(prompt) for prompt in prompts]


def sample(loaded, rows, seeds, settings, forbidden=None, chosen=None):
    model, encoder, prompts = loaded
    prompts = prompts if chosen is None else [prompts[i] for i in chosen]
    forbidden = encoder.forbidden_token_ids if forbidden is None else forbidden
    batch = PromptBatch.of(prompts, CPU)
    return sample_responses(model, batch, rows, seeds, settings, forbidden, encoder.eos_token_ids)


def assert_alike(loaded, one, other):
    """The same, but where a convolution rounds by the place in the batch: there, the same tokens."""
    convolves = "linear_attention" in (getattr(loaded[0].config.get_text_config(), "layer_types", None) or ())
    assert one[0] == other[0]
    np.testing.assert_allclose(one[1], other[1], rtol=0, atol=1e-6 if convolves else 0)


def vision_of(vision, input_ids, encoder):
    """With what transformers finds positions by itself."""
    return {**vision, "mm_token_type_ids": (input_ids == encoder.image_token_id).long()} if vision else {}


def test_greedy_tokens_are_those_of_generate(loaded):
    plain, encoder, prompts = loaded
    found = sample(loaded, [0, 1, 2, 3, 4, 4], [0] * 6, GREEDY)
    assert_alike(loaded, found[4], found[5])
    for prompt, (tokens, _) in zip(prompts, found[:5], strict=True):  # one by one: without any padding
        batch = PromptBatch.of([prompt], CPU)
        expected = plain.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **vision_of(batch.vision, batch.input_ids, encoder),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            suppress_tokens=list(encoder.forbidden_token_ids),
            eos_token_id=list(encoder.eos_token_ids),
            pad_token_id=encoder.eos_token_ids[0],
        )
        assert expected[0, batch.input_ids.shape[1] :].tolist() == tokens


@pytest.mark.parametrize("penalty", [1.5, 4.0])
def test_repeated_tokens_are_penalised_as_by_generate(loaded, penalty):
    plain, encoder, prompts = loaded
    settings = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    batch = PromptBatch.of(prompts[:1], CPU)
    expected = plain.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        **vision_of(batch.vision, batch.input_ids, encoder),
        max_new_tokens=GREEDY.max_tokens,
        do_sample=False,
        repetition_penalty=penalty,
        suppress_tokens=list(encoder.forbidden_token_ids),
        eos_token_id=list(encoder.eos_token_ids),
        pad_token_id=encoder.eos_token_ids[0],
    )[0, batch.input_ids.shape[1] :].tolist()
    found = sample(loaded, [0, 1, 0], [0] * 3, settings)
    assert found[0][0] == found[2][0] == expected
    assert expected != sample(loaded, [0], [0], GREEDY)[0][0]
    ((tokens, raw),) = sample(loaded, [0], [0], dataclasses.replace(settings, raw_logprobs=True))
    assert tokens == expected and raw != found[0][1]


def test_a_response_ends_with_the_token_that_completes_a_stop_string(loaded):
    model, encoder, prompts = loaded
    batch = PromptBatch.of(prompts, CPU)
    whole = sample(loaded, [0, 0, 1, 2], [1, 2, 3, 4], WARM)
    longest = max(range(4), key=lambda place: len(whole[place][0]))
    end = len(whole[longest][0]) // 2 + 1
    text = encoder.tokenizer.decode(whole[longest][0][end - 2 : end], skip_special_tokens=True)
    assert text
    stops = Stops(encoder.tokenizer, ["never written", text])
    found = sample_responses(
        model, batch, [0, 0, 1, 2], [1, 2, 3, 4], WARM, encoder.forbidden_token_ids, encoder.eos_token_ids, stops
    )
    assert len(found[longest][0]) <= end and stops.end(found[longest][0])
    for (tokens, logprobs), (all_tokens, all_logprobs) in zip(found, whole, strict=True):
        assert tokens == all_tokens[: len(tokens)] and not stops.end(tokens[:-1])
        np.testing.assert_allclose(logprobs, all_logprobs[: len(tokens)], atol=2e-5)
        assert stops.end(tokens) or len(tokens) == len(all_tokens)


def test_log_probs_are_those_of_a_whole_forward(loaded):
    plain, encoder, prompts = loaded
    for prompt, (tokens, logprobs) in zip(prompts, sample(loaded, range(5), range(5), WARM), strict=True):
        batch = PromptBatch.of([prompt], CPU)
        length = batch.input_ids.shape[1]
        ids = torch.cat([batch.input_ids, torch.tensor([tokens])], dim=1)
        vision = vision_of(batch.vision, ids, encoder)
        with torch.no_grad():
            hidden = plain.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **vision).last_hidden_state
            expected, _ = plain_log_probs(
                hidden[0, length - 1 : -1], plain.get_output_embeddings().weight, None, torch.tensor(tokens),
                encoder.forbidden_token_ids, WARM.temperature,
            )  # fmt: skip
        np.testing.assert_allclose(logprobs, expected.numpy(), atol=2e-5)


def test_log_probs_after_videos_are_those_of_a_whole_forward(loaded):
    """At our positions: those of transformers are others behind a video (docs/models.md)."""
    plain, encoder, _ = loaded
    if not encoder.is_multimodal:
        return
    prompts = [encoder.expand(make_prompt(encoder, i, True, most_images=3, with_videos=True)) for i in (5, 7)]
    batch = PromptBatch.of(prompts, CPU)
    found = sample_responses(plain, batch, [0, 1], [3, 4], WARM, encoder.forbidden_token_ids, encoder.eos_token_ids)
    for prompt, (tokens, logprobs) in zip(prompts, found, strict=True):
        length = len(prompt.input_ids)
        ids = torch.cat([prompt.input_ids, torch.tensor(tokens)])[None]
        after = prompt.positions.max() + 1 + torch.arange(len(tokens))
        with torch.no_grad():
            hidden = plain.base_model(
                input_ids=ids,
                position_ids=torch.cat([prompt.positions, after.expand(3, -1)], dim=1)[:, None],
                pixel_values=prompt.pixel_values,
                image_grid_thw=prompt.image_grid_thw,
            ).last_hidden_state
            expected, _ = plain_log_probs(
                hidden[0, length - 1 : -1], plain.get_output_embeddings().weight, None, torch.tensor(tokens),
                encoder.forbidden_token_ids, WARM.temperature,
            )  # fmt: skip
        np.testing.assert_allclose(logprobs, expected.numpy(), atol=2e-5)


def test_a_response_depends_on_its_prompt_and_seed_alone(loaded):
    eos = loaded[1].eos_token_ids
    rows, seeds = [3, 0, 0, 2, 4, 1, 4, 0, 1], [5, 1, 2, 3, 4, 9, 4, 11, 12]
    # Few tokens left: responses end early, at different places, while others go on.
    forbidden = [token for token in range(112) if token % 9 and token not in eos]
    together = sample(loaded, rows, seeds, WARM, forbidden)
    assert_alike(loaded, together[4], together[6])
    lengths = [len(tokens) for tokens, _ in together]
    assert len(set(lengths)) > 3 and min(lengths) < 20
    for row, seed, (tokens, logprobs) in list(zip(rows, seeds, together, strict=True))[:6]:  # of every prompt
        ((alone, values),) = sample(loaded, [0], [seed], WARM, forbidden, chosen=[row])
        assert alone == tokens
        np.testing.assert_allclose(values, logprobs, atol=2e-5)
        assert [token in eos for token in tokens[:-1]] == [False] * (len(tokens) - 1)
        assert (tokens[-1] in eos) == (len(tokens) < WARM.max_tokens) or len(tokens) == WARM.max_tokens
        assert not set(tokens) & set(forbidden)


def drawn(probabilities, uniforms, forbidden=(), **settings):
    """Tokens drawn by these numbers from the same distribution, and their log-probabilities; `generate` takes them."""
    named = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 1, **settings}
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64)[:, None]
    draw = SeededDraw(SamplingSettings(**named), forbidden, uniforms)
    logits = torch.as_tensor(probabilities, dtype=torch.float32).log().expand(len(uniforms), -1)
    taken = draw(torch.zeros((len(uniforms), 0), dtype=torch.int64), logits)
    assert (taken > float("-inf")).sum(dim=1).tolist() == [1] * len(uniforms)
    return taken.argmax(dim=1), draw.logprobs[0]


EVENLY = (np.arange(1000) + 0.5) / 1000
PROBABILITIES = [0.1, 0.25, 0.05, 0.6]


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    assert torch.bincount(drawn(PROBABILITIES, EVENLY)[0], minlength=4).tolist() == [100, 250, 50, 600]
    assert drawn(PROBABILITIES, [0.0, 1 - 2**-53], forbidden=[0, 3])[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.5}, [0.01, 0.0625, 0.0025, 0.36]),
        ({"top_k": 2}, [0, 0.25, 0, 0.6]),
        ({"top_p": 0.9}, [0.1, 0.25, 0, 0.6]),
        ({"min_p": 0.3}, [0, 0.25, 0, 0.6]),
        ({"min_p": 0.1, "top_k": 3}, [0.1, 0.25, 0, 0.6]),
        ({"forbidden": [3]}, [0.1, 0.25, 0.05, 0]),
    ],
)
def test_the_distribution(settings, expected):
    tokens, logprobs = drawn(PROBABILITIES, EVENLY, **settings)
    expected = np.array(expected) / sum(expected)
    np.testing.assert_allclose(torch.bincount(tokens, minlength=4) / 1000, expected, atol=1.1e-3)
    np.testing.assert_allclose(logprobs.exp(), expected[tokens], atol=1e-6)


def test_the_greedy_token_is_the_likeliest_that_is_allowed():
    tokens, logprobs = drawn(PROBABILITIES, EVENLY, forbidden=[3], temperature=0.0, top_k=1, top_p=0.1, min_p=0.9)
    assert set(tokens.tolist()) == {1}
    np.testing.assert_allclose(logprobs.exp(), 0.25 / 0.4, atol=1e-6)


def test_rare_tokens_of_a_large_vocabulary_are_drawn():
    """A million tokens of 1e-9 each after one of nearly 1: summed in float32 they would not be there."""
    probabilities = torch.full((1_000_001,), 1e-9)
    probabilities[0] = 0.999
    assert drawn(probabilities, [0.9985])[0].tolist() == [0]
    assert drawn(probabilities, [0.9995])[0].item() == pytest.approx(500_500, rel=1e-3)


def test_raw_log_probabilities_are_those_before_the_cut():
    cut = {"temperature": 0.5, "top_k": 2, "top_p": 0.9, "forbidden": [0], "raw_logprobs": True}
    tokens, logprobs = drawn(PROBABILITIES, EVENLY, **cut)
    expected = np.array([0, 0.0625, 0.0025, 0.36])
    assert set(tokens.tolist()) == {1, 3}
    np.testing.assert_allclose(logprobs.exp(), (expected / expected.sum())[tokens], atol=1e-6)
