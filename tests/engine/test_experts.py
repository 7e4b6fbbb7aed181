"""Mixtures of experts: the layouts of their checkpoints, the balance of the experts, and ranks that share none."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.rank_threads import Ranks, SingleProcess
from fixtures.tiny_models import EXPERTS, make_prompt, save_text_model, save_vision_model
from safetensors.torch import load_file, save_file

from mmr1_ds.config import DataConfig, LoraConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.model.attention import PACKED
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.engine.model.experts import balance_loss, routing
from mmr1_ds.engine.model.linear_attention import keep_states_apart
from mmr1_ds.engine.model.log_probs import plain_log_probs
from mmr1_ds.engine.model.lora import adapters, add_adapters
from mmr1_ds.engine.model.packing import compute
from mmr1_ds.engine.model.policy import PolicyModel
from mmr1_ds.errors import UserError
from mmr1_ds.rollout.hf.engine import _without_weights

SAVE = {"qwen3_moe": save_text_model, "qwen3_vl_moe": save_vision_model, "qwen3_5_moe": save_vision_model}
LAYERS = {"qwen3_moe": 2, "qwen3_vl_moe": 2, "qwen3_5_moe": 3}  # with experts
each = pytest.mark.parametrize("family", SAVE)


def load(folder, **options):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForCausalLM if SAVE[folder.name] is save_text_model else AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=torch.float32, **options)
    keep_states_apart(model)
    return model


def test_the_layouts_of_published_and_of_saved_checkpoints_are_the_same_model(tmp_path):
    folder = SAVE["qwen3_vl_moe"](tmp_path / "qwen3_vl_moe", family="qwen3_vl_moe")
    weights = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.2.mlp.experts.gate_up_proj"
    assert weights[name].shape == (5, 64, 80)  # (experts, in, out), as vLLM reads it
    expected = load(folder).state_dict()
    torch.testing.assert_close(expected[name], weights[name].transpose(1, 2), rtol=0, atol=0)
    as_transformers_saves = {
        key: value.transpose(1, 2).contiguous() if ".experts." in key else value for key, value in weights.items()
    }
    save_file(as_transformers_saves, folder / "model.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(value, expected[key]) for key, value in load(folder).state_dict().items())


def pairs_of(encoder):
    prompts = [make_prompt(encoder, i, encoder.is_multimodal and i % 3 != 0) for i in range(3)]
    return [(prompts[i % 3], np.arange(20, 20 + 3 + i, dtype=np.int32)) for i in range(6)]


@each
@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_the_balance_is_transformers_own_over_the_response_tokens(tmp_path, family, attention):
    """Its value and gradients, with F of all micro-batches, whichever way they are cut."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    folder = SAVE[family](tmp_path / family, family=family)
    encoder = PromptEncoder(ModelConfig(model_path=str(folder)), DataConfig(min_pixels=28 * 28, max_pixels=112 * 112))
    pairs = pairs_of(encoder)
    whole = collate(pairs, encoder, torch.device("cpu"))
    plain = load(folder, attn_implementation="sdpa")
    computed = compute(plain, whole, output_router_logits=True)
    routed = tuple(logits[computed.places_T] for logits in computed.router_logits)
    assert len(routed) == LAYERS[family]
    expected = load_balancing_loss_func(routed, EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"])
    expected.backward()

    model = load(folder, attn_implementation=attention)
    policy = PolicyModel(model, encoder.forbidden_token_ids, 1.0, balances_experts=True)
    parts = [collate(part, encoder, torch.device("cpu")) for part in (pairs[:2], pairs[2:])]
    with torch.no_grad():
        share_E = torch.cat([policy(part)[3] for part in parts]).mean(dim=0)
    num_tokens = sum(len(response) for _, response in pairs)
    found = [balance_loss(policy(part)[2], share_E).sum() / num_tokens for part in parts]
    sum(found).backward()
    assert sum(found).item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    for name, value in plain.named_parameters():
        if value.grad is not None and value.grad.abs().max() > 0:
            torch.testing.assert_close(gradients[name], value.grad, rtol=0, atol=1e-5)
    assert gradients[next(name for name in gradients if name.endswith("gate.weight"))].abs().max() > 1e-3


def test_routing_averages_over_layers():
    logits = [torch.tensor([[0.0, 3.0, 2.0]]), torch.tensor([[4.0, 3.0, 0.0]])]
    probabilities, chosen = routing(logits, 1)
    torch.testing.assert_close(probabilities, (logits[0].softmax(1) + logits[1].softmax(1)) / 2)
    assert chosen.tolist() == [[0.5, 0.5, 0.0]]
    assert float(balance_loss(torch.full((1, 3), 1 / 3), torch.full((3,), 2 / 3))) == pytest.approx(2.0)  # even: k


@each
def test_adapters_leave_the_experts_out_and_say_so(tmp_path, family, caplog):
    folder = SAVE[family](tmp_path / family, family=family)
    config = ModelConfig(model_path=str(folder), lora=LoraConfig(rank=2))
    model = load(folder)
    add_adapters(model, config, torch.float32)
    assert f"the experts of {folder} and their routers are no linear layers; they stay frozen" in caplog.text
    adapted = list(adapters(model))
    assert not any(".experts." in name or name.endswith(".mlp.gate.base_layer.weight") for name in adapted)
    # Of attention and the dense layer; of linear attention and the experts that all tokens go to.
    expected = 4 + 2 * 5 + 3 * 3 if family == "qwen3_5_moe" else 3 * 4 + 3
    assert len([name for name in adapted if "_proj" in name]) == expected
    config.lora.target_modules = ["gate_up_proj"]
    with pytest.raises(UserError, match="gate_up_proj is no linear layer of"):
        add_adapters(load(folder), config, torch.float32)


@each
def test_the_copy_that_samples_computes_no_balance(tmp_path, family):
    model = load(SAVE[family](tmp_path / family, family=family))
    model.config.get_text_config().output_router_logits = True
    bare = _without_weights(model, torch.device("cpu"))
    assert [one.config.get_text_config().output_router_logits for one in (bare, model)] == [False, True]


def test_each_expert_has_its_own_share_of_the_tokens():
    """More than ten of them: their names are not in the order of their numbers."""
    chosen = [np.eye(12, dtype=np.float32)[[11, 2, 2]], np.eye(12, dtype=np.float32)[[0]], np.ones((2, 12), np.float32)]
    trajectories = [SimpleNamespace(pair=None, trains=trains) for trains in (True, True, False)]
    actor = SimpleNamespace(
        _evaluate=lambda pairs, num_outputs, experts: (None, None, None, chosen),
        _experts=lambda trajectories: None,
        engine=SimpleNamespace(train=lambda: None),
        _ranks=Ranks(SingleProcess()),
    )
    actor._ranks.device = "cpu"
    share_E = Actor._share_of_experts(actor, trajectories)
    assert share_E.tolist() == [0.25, 0, 0.5, *[0] * 8, 0.25]


# --- on real ranks ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_whose_tokens_share_no_expert_have_the_gradients_of_the_plain_model(tmp_path, num_ranks):
    """The sign of one number of a token's embedding sends it to experts 0 and 1, or to 2 and 3."""
    folder = save_text_model(tmp_path / "qwen3_moe", family="qwen3_moe")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][10:35, 0], weights["model.embed_tokens.weight"][35:60, 0] = 5.0, -5.0
    for layer in (0, 2):
        router = weights[f"model.layers.{layer}.mlp.gate.weight"]
        router *= 0.1
        router[:, 0] = torch.tensor([1.0, 0.9, -0.9, -1.0, 0.0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run_ranks("head_gradients.py", folder, tmp_path / "out", "apart", num_ranks=num_ranks)
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=False) for rank in range(num_ranks)]
    model = load(folder)
    chosen = []
    for rank in ranks:
        for batch, result in zip(rank["batches"], rank["results"], strict=True):
            found = model.base_model(input_ids=batch.input_ids, output_router_logits=True)
            chosen.append(set(torch.cat([logits.topk(2).indices for logits in found.router_logits]).flatten().tolist()))
            states = found.last_hidden_state[batch.rows, batch.columns]
            logprobs, _ = plain_log_probs(states, model.lm_head.weight, None, batch.targets, (2, 5, 9), 0.7)
            torch.testing.assert_close(result[0], logprobs.detach(), rtol=0, atol=1e-5)
            ((logprobs * torch.linspace(-1, 2, len(logprobs))).sum() / num_ranks).backward()
    assert chosen == [{0, 1}, {0, 1}, {2, 3}, {2, 3}][: 2 * num_ranks]
    for rank in ranks:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rank["gradients"][name], parameter.grad, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_ranks_and_micro_batches_change_neither_losses_nor_balance(tmp_path):
    folder = save_text_model(tmp_path / "qwen3_moe", family="qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    config |= {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    results = []
    for num_ranks, micro_batch in ((1, 12), (1, 4), (2, 2)):
        out = tmp_path / f"{num_ranks}-{micro_batch}.json"
        run_ranks("loss_curve.py", folder, out, micro_batch, "-", num_ranks=num_ranks)
        results.append(json.loads(out.read_text()))
    one = results[0]
    for other in results[1:]:
        for expected, actual in zip(one["curve"], other["curve"], strict=True):
            for name in ("pg_loss", "kl_loss", "entropy_loss", "grad_norm", "ppo_kl", "router_aux_loss"):
                assert actual[f"actor/{name}"] == pytest.approx(expected[f"actor/{name}"], abs=1e-4), name
        for name, value in one["weights"].items():
            assert other["weights"][name] == pytest.approx(value, abs=1e-3), name
    assert all(2.0 <= step["actor/router_aux_loss"] < 5.0 for step in one["curve"])  # even: 2, all to two: 5
