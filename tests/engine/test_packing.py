"""Sequences end to end in one row, against the same ones padded; every model family."""

import inspect
import logging

import numpy as np
import pytest
import torch
from fixtures.tiny_models import make_prompt, save_text_model, save_vision_model
from fixtures.varlen import plain_varlen_attn
from torch.nn.attention import varlen

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.config.families import FAMILIES
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model import attention
from mmr1_ds.engine.model.attention import (
    PACKED,
    VARLEN,
    Row,
    attend_images_at_once,
    attention_implementation,
)
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.engine.model.linear_attention import keep_states_apart
from mmr1_ds.engine.model.packing import pack, response_states
from mmr1_ds.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
both = pytest.mark.parametrize("kind", [PACKED, VARLEN])


@pytest.fixture(autouse=True)
def varlen_calls(monkeypatch):
    """The calls of the stand-in for torch's varlen_attn, which has no kernel for the CPU: their window sizes."""
    calls = []

    def recorded(*tensors, **options):
        calls.append(options["window_size"])
        return plain_varlen_attn(*tensors, **options)

    monkeypatch.setattr(attention, "varlen_attn", recorded)
    return calls


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    """(load, encoder): loads one tiny model of random weights with the attention of that name; its prompt encoder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    save = save_vision_model if request.param in VISION else save_text_model
    folder = str(save(tmp_path_factory.mktemp(request.param), family=request.param))
    kind = AutoModelForImageTextToText if request.param in VISION else AutoModelForCausalLM

    def load(name, **config):
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=name, **config).eval()
        attend_images_at_once(model)
        keep_states_apart(model)
        return model

    limits = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112)
    return load, PromptEncoder(ModelConfig(model_path=folder), limits)


def pairs_of(encoder, indices):
    """Prompts with 0 to 4 images and 0 to 2 videos where the model sees; responses of 0 to 12 tokens."""
    found = []
    for i in indices:
        with_image = encoder.is_multimodal and i % 3 != 0
        prompt = make_prompt(encoder, i, with_image, most_images=4, with_videos=encoder.takes_videos)
        found.append((prompt, np.arange(20, 20 + 5 * i % 13, dtype=np.int32)))
    return found


def states_and_gradients(model, batch):
    """(T, H), and the gradient of a sum weighted differently at each place."""
    model.zero_grad()
    states = response_states(model, batch)
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return states.detach(), gradients


def assert_equal_states_and_gradients(model, plain, batch):
    """Check the packed model against the padded one. Returns: the states, (T, H)."""
    packed, packed_gradients = states_and_gradients(model, batch)
    padded, padded_gradients = states_and_gradients(plain, batch)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    assert packed_gradients.keys() == padded_gradients.keys()
    largest = max(gradient.abs().max() for gradient in padded_gradients.values())
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5 * float(largest), rtol=0)
    return packed


@both
@pytest.mark.parametrize("indices", [range(1, 10), (3, 6, 9), (4,)], ids=["many", "text only", "one"])
def test_packed_equals_padded_forward_and_backward(family, indices, kind):
    load, encoder = family
    model, plain = load(kind), load("sdpa")
    batch = collate(pairs_of(encoder, indices), encoder, CPU)
    assert len(assert_equal_states_and_gradients(model, plain, batch)) == sum(5 * i % 13 for i in indices)


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


@pytest.mark.slow
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


def with_windows(folder, kind, window):
    """A prompt encoder, and one model packed and padded: its first layer sees everything, its second a window."""
    from transformers import AutoModelForCausalLM

    path = str(save_text_model(folder / "model"))
    sliding = {"use_sliding_window": True, "sliding_window": window}
    sliding["layer_types"] = ["full_attention", "sliding_attention"]
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=name, **sliding).eval()
        for name in (kind, "sdpa")
    ]
    return PromptEncoder(ModelConfig(model_path=path), DataConfig()), *models


@both
@torch.no_grad()
def test_sliding_windows_are_kept_inside_a_sequence(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    encoder, packed, plain = with_windows(tmp_path, kind, 5)
    batch = collate(pairs_of(encoder, range(1, 8)), encoder, CPU)
    states = response_states(plain, batch)
    torch.testing.assert_close(response_states(packed, batch), states, atol=1e-5, rtol=0)
    without = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="sdpa")
    assert (response_states(without.eval(), batch) - states).abs().max() > 1e-3  # the window shows


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
        assert attention_implementation("auto", True, "mamba", torch.bfloat16, CUDA) == "sdpa"
    assert "mamba" in caplog.text
    assert attention_implementation("auto", False, "qwen2", torch.float32, CPU) == "sdpa"


def shared_prompts(encoder, rows):
    """Pairs of prompts by index, which have none, one or several images, and responses by length."""
    prompts = {i: pairs_of(encoder, (i,))[0][0] for i in {i for i, _ in rows}}
    return [(prompts[i], ((31 * row + 7 * np.arange(n)) % 90).astype(np.int32)) for row, (i, n) in enumerate(rows)]


@both
def test_responses_that_share_a_prompt_equal_padded_forward_and_backward(family, kind, varlen_calls):
    """Rows of one prompt apart from each other, and empty responses among them and before them."""
    load, encoder = family
    model, plain = load(kind), load("sdpa")
    rows = [(7, 0), (1, 4), (7, 5), (3, 1), (1, 9), (7, 11), (1, 0), (3, 6), (1, 1), (7, 2)]
    pairs = shared_prompts(encoder, rows)
    batch = collate(pairs, encoder, CPU)
    assert len(assert_equal_states_and_gradients(model, plain, batch)) == sum(n for _, n in rows)
    inputs, _ = pack(model, batch, prompts_once=True)
    prompts = {id(prompt): prompt for prompt, _ in pairs}
    once = sum(len(encoder.expand(prompt).input_ids) for prompt in prompts.values())
    assert inputs["input_ids"].shape == (1, once + sum(n for _, n in rows))
    if encoder.is_multimodal:
        assert len(inputs["image_grid_thw"]) == sum(len(prompt.images + prompt.videos) for prompt in prompts.values())
        assert len(batch.vision["pixel_values"]) == int(inputs["image_grid_thw"].prod(dim=1).sum())
    causal = [size for size in varlen_calls if size == (-1, 0)]
    images = [size for size in varlen_calls if size == (-1, -1)]
    if kind == VARLEN:  # one call a layer, whatever the sequences, windows and images
        text = model.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        assert len(causal) == kinds.count("full_attention")
        assert len(images) == (model.config.vision_config.depth if encoder.is_multimodal else 0)
    else:
        assert varlen_calls == []


@both
def test_sliding_windows_over_shared_prompts_equal_padded_forward_and_backward(tmp_path, kind, varlen_calls):
    """Windows that end in the prompt, at its first token and inside of the response."""
    encoder, packed, plain = with_windows(tmp_path, kind, 9)
    batch = collate(shared_prompts(encoder, [(1, 3), (1, 30), (4, 9), (1, 8), (4, 1)]), encoder, CPU)
    assert_equal_states_and_gradients(packed, plain, batch)
    assert varlen_calls == ([(-1, 0), (8, 0)] if kind == VARLEN else [])


def test_the_stand_in_has_the_signature_of_torchs_varlen_attn():
    assert inspect.signature(plain_varlen_attn) == inspect.signature(varlen.varlen_attn)


def test_a_row_joins_what_follows_directly_and_leaves_out_what_is_empty():
    row = Row.of([5, 0, 3, 2, 0, 4, 1], [0, 5, 5, 5, 5, 0, 4], CPU)
    assert (row.lengths, row.firsts) == ([8, 2, 5], [0, 5, 0])
    assert row.cuts.queries.tolist() == [0, 8, 10, 15]
    assert row.cuts.keys.tolist() == [0, 8, 15, 20]
    assert row.cuts.gathered.tolist() == [*range(8), *range(5), 8, 9, *range(10, 15)]
    assert (row.cuts.most_queries, row.cuts.most_keys) == (8, 8)
    assert Row.of([5, 3], [0, 0], CPU).cuts.gathered is None


@pytest.mark.parametrize(
    ("capability", "installed", "kernel"),
    [((9, 0), True, "FA3"), ((10, 0), True, "FA4"), ((8, 0), True, "FA2"), ((9, 0), False, "FA2"), ((12, 0), 1, "FA2")],
)
def test_a_gpu_takes_the_newest_kernel_that_is_installed(monkeypatch, caplog, capability, installed, kernel):
    activated = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if installed:
        monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append)
    attention._activate_kernel.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):  # actor, reference
            assert attention_implementation("auto", True, "qwen2", torch.bfloat16, CUDA) == VARLEN
    attention._activate_kernel.cache_clear()
    assert activated == ([] if kernel == "FA2" else [kernel])
    assert caplog.messages.count(f"attention of packed sequences: one varlen call, kernel {kernel}") == 2
    assert ("FA3, the newer kernel" in caplog.text) == (not installed)


def test_the_choice_of_attention(caplog):
    with caplog.at_level(logging.INFO):
        assert attention_implementation("auto", True, "qwen2", torch.bfloat16, CPU) == PACKED
        assert attention_implementation("auto", True, "qwen2", torch.float32, CUDA) == PACKED
        assert attention_implementation("sdpa", True, "qwen2", torch.bfloat16, CUDA) == PACKED
    assert caplog.messages == ["attention of packed sequences: torch's SDPA, sequence by sequence"] * 3
    with pytest.raises(UserError, match="attention=varlen needs a GPU and bf16, but the model is float32"):
        attention_implementation("varlen", True, "qwen2", torch.float32, CUDA)
