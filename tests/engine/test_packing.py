"""Sequences end to end in one row, against the same ones padded and against one at a time; every model family."""

import logging

import numpy as np
import pytest
import torch
from fixtures.tiny_models import make_prompt, save_text_model, save_vision_model

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.engine.model.packing import (
    PACKABLE,
    attention_implementation,
    pack,
    packed_states,
    padded_states,
    response_states,
)

CPU = torch.device("cpu")
VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
attention_implementation(True, "qwen2", torch.float32)  # makes it known to transformers


@pytest.fixture(scope="module", params=sorted(PACKABLE))
def family(request, tmp_path_factory):
    """(load, encoder): loads one tiny model of random weights with the attention of that name; its prompt encoder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    save = save_vision_model if request.param in VISION else save_text_model
    folder = str(save(tmp_path_factory.mktemp(request.param), family=request.param))
    kind = AutoModelForImageTextToText if request.param in VISION else AutoModelForCausalLM

    def load(name, **config):
        return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=name, **config).eval()

    limits = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112)
    return load, PromptEncoder(ModelConfig(model_path=folder), limits)


def pairs_of(encoder, indices):
    """Prompts with 0 to 4 images where the model sees; responses of 0 to 12 tokens."""
    found = []
    for i in indices:
        prompt = make_prompt(encoder, i, with_image=encoder.is_multimodal and i % 3 != 0, most_images=4)
        found.append((prompt, np.arange(20, 20 + 5 * i % 13, dtype=np.int32)))
    return found


def states_and_gradients(model, batch, compute):
    """(T, H), and the gradient of a sum weighted differently at each place."""
    model.zero_grad()
    states = compute(model, batch)
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return states.detach(), gradients


@pytest.mark.parametrize("indices", [range(1, 10), (3, 6, 9), (4,)], ids=["many", "text only", "one"])
def test_packed_equals_padded_forward_and_backward(family, indices):
    load, encoder = family
    model, plain = load("packed_sdpa"), load("sdpa")
    batch = collate(pairs_of(encoder, indices), encoder, CPU)
    packed, packed_gradients = states_and_gradients(model, batch, packed_states)
    padded, padded_gradients = states_and_gradients(plain, batch, padded_states)
    assert len(packed) == sum(5 * i % 13 for i in indices)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    assert packed_gradients.keys() == padded_gradients.keys()
    largest = max(gradient.abs().max() for gradient in padded_gradients.values())
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5 * float(largest), rtol=0)


@torch.no_grad()
def test_a_sequence_is_not_changed_by_its_neighbours(family):
    load, encoder = family
    model = load("packed_sdpa")
    pairs = pairs_of(encoder, range(1, 8))
    alone = [response_states(load("sdpa"), collate([pair], encoder, CPU)) for pair in pairs]
    torch.testing.assert_close(
        response_states(model, collate(pairs, encoder, CPU)), torch.cat(alone), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_without_a_response_there_is_no_state(family):
    load, encoder = family
    assert len(response_states(load("packed_sdpa"), collate(pairs_of(encoder, (0,)), encoder, CPU))) == 0


@torch.no_grad()
def test_one_row_of_all_sequences_is_computed(family):
    load, encoder = family
    model = load("packed_sdpa")
    batch = collate(pairs_of(encoder, range(1, 10)), encoder, CPU)
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape[:2])))
    response_states(model, batch)
    assert shapes == [(1, int(batch.attention_mask.sum()))]


@torch.no_grad()
def test_generation_is_that_of_plain_attention(family):
    load, encoder = family
    tokens = [prompt.token_ids for prompt, _ in pairs_of(encoder, (3, 6, 12))]
    longest = max(map(len, tokens))
    pad = encoder.eos_token_ids[0]
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in tokens])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in tokens])
    for ids, seen in ((input_ids, mask), (input_ids[:1, longest - len(tokens[0]) :], None)):
        one, other = (
            load(name).generate(ids, attention_mask=seen, max_new_tokens=9, do_sample=False, pad_token_id=pad)
            for name in ("packed_sdpa", "sdpa")
        )
        assert torch.equal(one, other)


@torch.no_grad()
def test_sliding_windows_are_kept_inside_a_sequence(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = str(save_text_model(tmp_path / "model"))
    encoder = PromptEncoder(ModelConfig(model_path=folder), DataConfig())
    name = attention_implementation(True, "qwen2", torch.float32)
    window = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
    packed, plain = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind, **window).eval()
        for kind in (name, "sdpa")
    )
    batch = collate(pairs_of(encoder, range(1, 8)), encoder, CPU)
    states = padded_states(plain, batch)
    torch.testing.assert_close(packed_states(packed, batch), states, atol=1e-5, rtol=0)
    without = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    assert (padded_states(without, batch) - states).abs().max() > 1e-3  # the window shows


@torch.no_grad()
def test_generation_with_sliding_windows_is_that_of_plain_attention(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = str(save_text_model(tmp_path / "model"))
    window = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}
    ids = torch.arange(30, 40).view(2, 5)
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name, **window)
        .eval()
        .generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False, eos_token_id=None)
        for name in ("packed_sdpa", "sdpa")
    )
    assert torch.equal(one, other)


def test_families_not_tested_packed_are_padded(caplog):
    with caplog.at_level(logging.WARNING):
        assert attention_implementation(True, "mamba", torch.float32) == "sdpa"
    assert "mamba" in caplog.text
    assert attention_implementation(False, "qwen2", torch.float32) == "sdpa"


def test_responses_that_share_a_prompt_equal_padded_forward_and_backward(family):
    """Rows of one prompt apart from each other, with none, one or several images, and empty responses among them."""
    load, encoder = family
    model, plain = load("packed_sdpa"), load("sdpa")
    prompts = {i: pairs_of(encoder, (i,))[0][0] for i in (1, 3, 7)}
    rows = [(7, 5), (1, 4), (7, 0), (3, 1), (1, 9), (7, 11), (3, 6), (1, 1), (7, 2)]
    pairs = [(prompts[i], ((31 * row + 7 * np.arange(n)) % 90).astype(np.int32)) for row, (i, n) in enumerate(rows)]
    batch = collate(pairs, encoder, CPU)
    packed, packed_gradients = states_and_gradients(model, batch, packed_states)
    padded, padded_gradients = states_and_gradients(plain, batch, padded_states)
    assert len(packed) == sum(n for _, n in rows)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    assert packed_gradients.keys() == padded_gradients.keys()
    largest = max(gradient.abs().max() for gradient in padded_gradients.values())
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5 * float(largest), rtol=0)
    inputs, _ = pack(model, batch, prompts_once=True)
    once = sum(len(encoder.expand(prompt).input_ids) for prompt in prompts.values())
    assert inputs["input_ids"].shape == (1, once + sum(n for _, n in rows))
    if encoder.is_multimodal:
        assert len(inputs["image_grid_thw"]) == sum(len(prompt.images) for prompt in prompts.values())
