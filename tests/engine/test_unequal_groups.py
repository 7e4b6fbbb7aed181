"""Groups of different sizes: the same gradient on one rank and on two, and as plain autograd has it."""

import numpy as np
import pytest
import torch
from fixtures.groups import SIZES, fixed_group
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model):
    """By one forward a response: log-probabilities, and the gradient of each of two steps, by average."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    encoder = PromptEncoder(ModelConfig(model_path=str(model)), DataConfig())
    groups = [fixed_group(encoder, index) for index in range(len(SIZES))]

    def log_probs(prompt, tokens):
        ids = torch.tensor([[*prompt.token_ids, *tokens.tolist()]])
        logits = policy(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1]
        logits[:, list(encoder.forbidden_token_ids)] = -torch.inf
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])[:, 0]

    found = {"token": [], "seq": []}
    everything = []
    for step in (groups[:2], groups[2:]):
        responses = [(prompt, *item) for prompt, *both in step for item in zip(*both, strict=True)]
        num_tokens = sum(len(tokens) for _, tokens, _ in responses)
        for mode, grads in found.items():
            policy.zero_grad()
            for prompt, tokens, advantage in responses:
                logprobs_T = log_probs(prompt, tokens)
                weight = 1 / num_tokens if mode == "token" else 1 / len(tokens) / len(responses)
                (-np.float32(advantage) * logprobs_T * weight).sum().backward()
                if mode == "token":
                    everything.append(logprobs_T.detach().numpy())
            grads.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]).numpy())
    return {mode: np.stack(grads) for mode, grads in found.items()} | {"log_probs": np.concatenate(everything)}


@pytest.mark.parametrize("layout", ["padded", "packed", "by-tokens"])
def test_neither_ranks_nor_micro_batches_change_the_gradient(model, expected, layout, tmp_path):
    found = []
    for num_ranks in (1, 2):
        out = tmp_path / f"{num_ranks}.npz"
        run_ranks("unequal_groups.py", model, out, layout, num_ranks=num_ranks)
        found.append(np.load(out))
    for one in found:
        np.testing.assert_allclose(one["log_probs"], expected["log_probs"], atol=2e-5)
        for mode in ("token", "seq"):
            scale = np.abs(expected[mode]).max()
            assert scale > 1e-3
            np.testing.assert_allclose(one[mode], expected[mode], atol=2e-5 * scale + 1e-7)
        assert len(set(one["coefficients"])) == 1
    np.testing.assert_allclose(found[1]["figures"], found[0]["figures"], rtol=1e-4)
    assert found[1]["coefficients"][0] == pytest.approx(found[0]["coefficients"][0], rel=1e-6)
    assert found[1]["counted"] == 6  # the rank with 5 responses makes what the one with 11 needs
