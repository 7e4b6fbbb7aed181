"""Router replay: tokens go to given experts, by weights of the actor's own; what routers choose is noted."""

import json

import numpy as np
import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import make_prompt, save_text_model, save_vision_model
from torch.nn.functional import linear

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.attention import PACKED
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.engine.model.linear_attention import keep_states_apart
from mmr1_ds.engine.model.log_probs import plain_log_probs
from mmr1_ds.engine.model.policy import PolicyModel
from mmr1_ds.engine.zero_engine import _experts_of

CPU = torch.device("cpu")
SAVE = {"qwen3_moe": save_text_model, "qwen3_vl_moe": save_vision_model, "qwen3_5_moe_text": save_text_model}
each = pytest.mark.parametrize("family", SAVE)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family: (load, encoder, pairs); load makes the model with the attention of that name."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    found = {}
    for family, save in SAVE.items():
        folder = str(save(tmp_path_factory.mktemp(family), family=family))
        kind = AutoModelForImageTextToText if family == "qwen3_vl_moe" else AutoModelForCausalLM

        def load(attention, kind=kind, folder=folder):
            model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
            keep_states_apart(model)
            return model

        limits = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112)
        encoder = PromptEncoder(ModelConfig(model_path=folder), limits)
        prompts = [make_prompt(encoder, i, encoder.is_multimodal and i % 3 != 0) for i in range(3)]
        pairs = [(prompts[i // 3], np.arange(20, 20 + 5 * i % 13, dtype=np.int32)) for i in range(8)]  # one is empty
        found[family] = load, encoder, pairs
    return found


def policy_of(model, encoder):
    return PolicyModel(model, encoder.forbidden_token_ids, 0.7, replays_experts=True)


def perturb(model):
    """Change the routers so that many tokens go elsewhere."""
    torch.manual_seed(4)
    for layer in mixed(model):
        weight = text_layers(model)[layer].mlp.gate.weight
        weight.data += 0.5 * weight.std() * torch.randn_like(weight)


def text_layers(model):
    return getattr(model.base_model, "language_model", model.base_model).layers


def mixed(model):
    """The numbers of its layers with experts."""
    return [number for number, layer in enumerate(text_layers(model)) if hasattr(layer.mlp, "experts")]


def record(policy, pairs, encoder):
    """What the routers choose, a sequence at a time: (prompt + T - 1, 3, 2) each."""
    with torch.no_grad(), policy.replay.recording():
        return _experts_of(policy(collate(pairs, encoder, CPU))[2])[: len(pairs)]


def replaying(model, experts):
    """A model whose routers send one sequence's tokens to these, written out token by token; the last is free."""
    for layer in mixed(model):
        gate = text_layers(model)[layer].mlp.gate

        def forward(states, gate=gate, layer=layer):
            logits = linear(states.reshape(-1, gate.weight.shape[1]), gate.weight)
            indices = logits.topk(2).indices
            indices[: len(experts)] = torch.from_numpy(experts[:, layer].astype(np.int64))
            kept = [row[own].exp() for row, own in zip(logits, indices, strict=True)]
            scores = torch.stack([row / row.sum() for row in kept])
            return logits, scores, indices

        gate.forward = forward
    return model


@each
@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_tokens_go_to_the_experts_of_another_router_and_its_own_learns(models, family, attention):
    """Against routers written out, one sequence at a time: log-probabilities, gradients and what differs."""
    load, encoder, pairs = models[family]
    other = policy_of(load(attention), encoder)
    experts = record(other, pairs, encoder)
    policy = policy_of(load(attention), encoder)
    perturb(policy.model)
    logprobs, _, differing = policy(collate(pairs, encoder, CPU, experts))
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    gradients = {name: value.grad for name, value in policy.model.named_parameters() if value.grad is not None}

    own = record(policy, pairs, encoder)
    expected, expected_differing = [], []
    plain = load("sdpa")
    perturb(plain)
    for pair, chosen in zip(pairs, experts, strict=True):
        batch = collate([pair], encoder, CPU)
        model = replaying(plain, chosen)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.vision}
        if batch.positions is not None:
            given["position_ids"] = batch.positions
        routed = model.base_model(**given, output_router_logits=True)
        states = routed.last_hidden_state[batch.rows, batch.columns]
        head = plain.get_output_embeddings().weight
        expected.append(plain_log_probs(states, head, None, batch.targets, encoder.forbidden_token_ids, 0.7)[0])
        length = len(pair[1])
        sorts = [logits.topk(2).indices.sort().values[batch.columns].numpy() for logits in routed.router_logits]
        given = [np.sort(chosen[len(chosen) - length :, layer]) for layer in mixed(plain)]
        expected_differing.append(np.mean([(a != b).any(1) for a, b in zip(sorts, given, strict=True)], axis=0))
    torch.testing.assert_close(logprobs.detach(), torch.cat(expected).detach(), rtol=0, atol=2e-5)
    found = differing.numpy()
    np.testing.assert_allclose(found, np.concatenate(expected_differing), rtol=0, atol=1e-6)
    assert 0.1 < found.mean() < 0.9
    assert any((a != b).any() for a, b in zip(own, experts, strict=True))

    (torch.cat(expected) * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    for name, value in plain.named_parameters():
        if value.grad is not None and value.grad.abs().max() > 0:
            torch.testing.assert_close(gradients[name], value.grad, rtol=0, atol=2e-4)
    router = next(value for name, value in gradients.items() if name.endswith("gate.weight"))
    assert router.abs().max() > 1e-3


@each
@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_experts_of_the_router_itself_change_nothing(models, family, attention):
    load, encoder, pairs = models[family]
    policy = policy_of(load(attention), encoder)
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    experts = record(policy, pairs, encoder)
    assert [len(one) for one in experts] == [
        len(encoder.expand(prompt).input_ids) + len(response) - 1 for prompt, response in pairs
    ]
    assert experts[0].dtype == np.uint8 and experts[0].shape[1:] == (3, 2)
    plain = policy(collate(pairs, encoder, CPU))[0]
    replayed, _, differing = policy(collate(pairs, encoder, CPU, experts))
    torch.testing.assert_close(replayed, plain, rtol=0, atol=1e-6)
    assert not differing.any()
    gradients = []
    for logprobs in (plain, replayed):  # the layers are computed again, with the experts of their own forward
        policy.zero_grad()
        (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
        gradients.append([value.grad.clone() for value in policy.parameters() if value.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_experts_of_another_sequence_are_refused(models):
    _, encoder, pairs = models["qwen3_moe"]
    with pytest.raises(AssertionError, match="experts of another sequence"):
        collate(pairs[:1], encoder, CPU, [np.zeros((3, 3, 2), np.uint8)])


# --- with real vLLM and real ranks --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "num_ranks", "tensor_parallel"),
    [
        ("qwen3_moe", 2, 1),
        pytest.param("qwen3_moe", 2, 2, marks=pytest.mark.nightly),
        pytest.param("qwen3_vl_moe", 1, 1, marks=pytest.mark.nightly),
        pytest.param("qwen3_5_moe_text", 1, 1, marks=pytest.mark.nightly),
    ],
)
def test_replay_takes_away_the_drift_of_routers_that_differ(tmp_path, family, num_ranks, tensor_parallel):
    """vLLM samples with the routers of the model's folder, the actor's are perturbed until an update is synchronised.

    vLLM's CPU build is made to hand out its experts by fixtures/routed_experts.py, and Qwen3.5's linear attention to be
    computed in float32 by fixtures/delta_net.py.
    """
    heads = {"num_heads": 4} if tensor_parallel == 2 else {}
    model = SAVE[family](tmp_path / "model", family=family, **heads)
    run_ranks("router_replay.py", model, tmp_path / "out.json", tensor_parallel, num_ranks=num_ranks)
    for rank in json.loads((tmp_path / "out.json").read_text()):
        equal, perturbed = rank["equal"], rank["perturbed"]
        assert equal["with"]["max"] < 1e-4 and equal["without"]["max"] < 1e-4
        assert perturbed["with"]["mean"] < 0.5 * perturbed["without"]["mean"]
        assert perturbed["with"]["max"] < perturbed["without"]["max"]
        assert rank["recorded"]  # by the actor, of the same sequences as vLLM's
        first, *others = rank["updates"]
        assert 0.01 < first["actor/rerouted_fraction"] < 0.5
        assert first["actor/grad_norm"] > 0.01
        for step in others:
            assert step["rollout/logprob_diff_max"] < 1e-4
            assert step["actor/rerouted_fraction"] == 0
