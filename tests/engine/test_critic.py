"""The critic: values and gradients against one sequence at a time, on real ZeRO-3 ranks; and that it learns."""

import dataclasses

import numpy as np
import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import make_prompt, save_text_model, save_vision_model

from mmr1_ds.config import CriticModelConfig, DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.value_model import ValueHead, check_reads_alike
from mmr1_ds.errors import UserError

DATA = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112, max_prompt_length=96, max_response_length=24)


def test_values_are_not_rounded_to_the_model_s_precision():
    head = ValueHead(7, torch.bfloat16)
    assert not head.weight.any() and not head.bias.any()
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, 7))
        head.bias.fill_(0.25)
    hidden = torch.tensor(np.random.default_rng(1).normal(size=(5, 7))).bfloat16()
    values = head(hidden)
    assert values.dtype == torch.float32 and values.shape == (5,)
    expected = hidden.double() @ head.weight[0].double() + 0.25
    torch.testing.assert_close(values.double(), expected, atol=1e-6, rtol=0)
    assert (values != values.bfloat16().float()).any()


def test_another_model_must_read_what_the_actor_writes(tmp_path):
    text, other = save_text_model(tmp_path / "text"), save_text_model(tmp_path / "other", family="llama")
    vision = save_vision_model(tmp_path / "vision")
    coarser = save_vision_model(tmp_path / "coarser", family="qwen3_vl")
    actor = {path: PromptEncoder(ModelConfig(model_path=str(path)), DATA) for path in (text, vision)}

    def check(path, of):
        check_reads_alike(CriticModelConfig(model_path=str(path)), DATA, actor[of])

    check(other, text)  # another family with the same tokens
    check(vision, vision)
    with pytest.raises(UserError, match="one of them takes images and the other does not"):
        check(text, vision)
    with pytest.raises(UserError, match="patch_size of their image processors is 16 and 14"):
        check(coarser, vision)
    tokenizer = actor[text].tokenizer
    tokenizer.add_tokens(["another"])
    with pytest.raises(UserError, match=r"worker\.critic\.model\.model_path=.*: their tokens differ"):
        check(other, text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_vision_model(tmp_path_factory.mktemp("critic") / "model")


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """Ranks x micro-batches a rank -> what the program wrote."""
    folder = tmp_path_factory.mktemp("results")
    found = {}
    for num_ranks, micro_batch, layout in ((1, 1, "padded"), (2, 4, "by-tokens")):
        out, saved = folder / f"{layout}.npz", folder / layout
        run_ranks("critic.py", model, out, micro_batch, saved, layout, num_ranks=num_ranks)
        found[num_ranks, 8 // num_ranks // micro_batch] = dict(np.load(out))
    return found


@pytest.fixture(scope="module")
def alone(model, results):
    """Values, and the gradient of either average, by transformers and autograd, one sequence after the other."""
    from transformers import AutoModel

    one = results[1, 8]
    encoder = PromptEncoder(ModelConfig(model_path=str(model)), DATA)
    base = AutoModel.from_pretrained(model, dtype=torch.float32)
    size = base.config.get_text_config().hidden_size
    weight = torch.tensor(np.random.default_rng(5).normal(0, size**-0.5, (1, size))).float().requires_grad_()
    bias = torch.full((1,), 0.1, requires_grad=True)
    values, losses = [], []
    cuts = np.cumsum(one["lengths"])[:-1]
    columns = [np.split(one[name], cuts) for name in ("tokens", "old", "returns")]
    for place, (tokens, old, returns) in enumerate(zip(*columns, strict=True)):
        index = place // 2
        inputs = encoder.expand(make_prompt(encoder, index, with_image=index % 3 != 0))
        given = {
            field.name: getattr(inputs, field.name)
            for field in dataclasses.fields(inputs)
            if field.name not in ("input_ids", "positions") and getattr(inputs, field.name) is not None
        }
        input_ids = torch.cat([inputs.input_ids, torch.tensor(tokens)])[None]
        types = torch.zeros_like(input_ids)
        types[0, : len(inputs.input_ids)] = inputs.input_ids == encoder.image_token_id
        states = base(input_ids=input_ids, mm_token_type_ids=types, **given).last_hidden_state[0]
        before = states[len(inputs.input_ids) - 1 : -1]  # of the token before each of the response's
        value = before @ weight[0] + bias
        old, returns = torch.tensor(old), torch.tensor(returns)
        held = old + (value - old).clamp(-0.5, 0.5)
        values.append(value.detach().numpy())
        losses.append(0.5 * torch.maximum((value - returns) ** 2, (held - returns) ** 2))
    totals = {"token": torch.cat(losses).mean(), "seq": torch.stack([loss.mean() for loss in losses]).mean()}
    parameters = [*base.parameters(), weight, bias]
    gradients = {}
    for mode, total in totals.items():
        parts = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        filled = [
            (torch.zeros_like(parameter) if part is None else part).flatten()
            for parameter, part in zip(parameters, parts, strict=True)
        ]
        gradients[mode] = torch.cat(filled).numpy()
    return np.concatenate(values), totals, gradients


@pytest.mark.slow
def test_values_are_those_of_the_state_before_each_token(results, alone):
    for found in results.values():
        np.testing.assert_allclose(found["values"], alone[0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["token", "seq"])
def test_gradients_depend_on_neither_ranks_nor_micro_batches_nor_padding(results, alone, mode):
    _, totals, gradients = alone
    one = results[1, 8]
    largest = np.abs(gradients[mode]).max()
    assert largest > 1e-3
    np.testing.assert_allclose(one[mode], gradients[mode], atol=1e-4 * largest)
    figures = dict(zip(one["names"], one[f"{mode}|figures"], strict=True))
    assert figures["critic/vf_loss"] == pytest.approx(totals[mode].item(), rel=1e-5)
    assert 0.05 < figures["critic/vf_clipfrac"] < 0.95
    assert figures["critic/grad_norm"] == pytest.approx(np.linalg.norm(gradients[mode].astype(np.float64)), rel=1e-4)
    assert figures["critic/vpred_mean"] == pytest.approx(one["values"].mean(), abs=1e-5)
    other = results[2, 1]
    assert np.abs(other[mode] - one[mode]).max() < 1e-5 * largest
    for name, actual in zip(other["names"], other[f"{mode}|figures"], strict=True):
        assert actual == pytest.approx(figures[name], abs=1e-5, rel=1e-4), name


@pytest.mark.slow
def test_the_critic_learns_fixed_returns(results):
    losses = results[2, 1]["losses"]
    assert losses[-1] < 0.7 * losses[0]
    for found in results.values():
        np.testing.assert_allclose(found["losses"][:3], losses[:3], rtol=1e-3)
