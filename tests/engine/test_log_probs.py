"""Log-probabilities without logits: the same numbers and gradients as through them, in blocks of any width."""

from functools import partial

import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

from mmr1_ds.engine.model import log_probs
from mmr1_ds.engine.model.log_probs import LogProbHead, block_width, plain_log_probs, token_log_probs

VOCABULARY, HIDDEN = 37, 6
FORBIDDEN = (36, 3, 20, 21)


def inputs(num_tokens, dtype=torch.float64, bias=False, seed=1):
    """Hidden states, weight, bias or None, all requiring gradients, and targets that are not forbidden."""
    random = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([token for token in range(VOCABULARY) if token not in FORBIDDEN])
    shapes = [(num_tokens, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)]
    hidden, weight, bias_V = (torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in shapes)
    targets = allowed[torch.randint(len(allowed), (num_tokens,), generator=random)]
    leaves = [hidden, weight, bias_V] if bias else [hidden, weight]
    return [leaf.requires_grad_() for leaf in leaves] + [None] * (3 - len(leaves)), targets


def results(function, leaves, targets, **settings):
    """Log-probabilities, entropies, and the gradients of a sum that weighs each token differently."""
    logprobs, entropies = function(*leaves, targets, FORBIDDEN, 0.7, **settings)
    assert not entropies.requires_grad
    loss = (logprobs * torch.linspace(-1, 2, len(targets), dtype=logprobs.dtype)).sum()
    return [logprobs, entropies, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("width", [1, 5, 36, 37, 100, None])
def test_equals_the_plain_way(width, num_tokens, bias, dtype, tolerance):
    leaves, targets = inputs(num_tokens, dtype, bias)
    ours = results(token_log_probs, leaves, targets, width=width)
    expected = results(plain_log_probs, leaves, targets)
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance)
    assert ours[3].shape == (VOCABULARY, HIDDEN)  # without tokens it is zero, not absent: ranks reduce the same


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("width", [1, 5, 37])
def test_the_gradient_of_the_entropy_equals_the_plain_way_s(width, num_tokens, bias):
    leaves, targets = inputs(num_tokens, bias=bias)
    weights = torch.linspace(-2, 1, num_tokens, dtype=torch.float64)

    def gradients(function, **settings):
        logprobs, entropies = function(*leaves, targets, FORBIDDEN, 0.7, entropy_gradient=True, **settings)
        loss = (logprobs * weights.flip(0)).sum() + (entropies * weights).sum()
        return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])

    ours, expected = gradients(token_log_probs, width=width), gradients(plain_log_probs)
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_by_hand():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0], [9.0], [0.0]])
    logprobs, entropies = token_log_probs(hidden, weight, None, torch.tensor([1]), (2,), temperature=2.0, width=3)
    e = 2.718281828459045
    probabilities = torch.tensor([1, e, 1]) / (e + 2)
    assert logprobs.item() == pytest.approx(probabilities[1].log().item(), abs=1e-6)
    assert entropies.item() == pytest.approx(-(probabilities * probabilities.log()).sum().item(), abs=1e-6)


def test_logits_too_large_to_exponentiate_and_a_maximum_in_any_block():
    weight = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)[:, None]
    hidden = torch.tensor([[3000.0], [-3000.0], [1e-3]], dtype=torch.float64)  # rising, falling, flat
    targets = torch.tensor([35, 0, 11])
    ours = token_log_probs(hidden, weight, None, targets, FORBIDDEN, 0.7, width=5)
    for actual, wanted in zip(ours, plain_log_probs(hidden, weight, None, targets, FORBIDDEN, 0.7), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_a_forbidden_target_is_impossible_and_pulls_no_weight_of_its_own():
    leaves, _ = inputs(2)
    targets = torch.tensor([20, 8])
    ours = results(token_log_probs, leaves, targets, width=5)
    assert ours[0][0] == float("-inf")
    for actual, wanted in zip(ours[2:], results(plain_log_probs, leaves, targets)[2:], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    assert (ours[3][list(FORBIDDEN)] == 0).all()


def test_only_what_needs_a_gradient_gets_one():
    (hidden, weight, _), targets = inputs(7)
    expected = results(plain_log_probs, [hidden, weight, None], targets)
    for frozen, index in ((weight, 2), (hidden, 3)):
        leaf = hidden if frozen is weight else weight
        frozen.requires_grad_(False)
        logprobs, _ = token_log_probs(hidden, weight, None, targets, FORBIDDEN, 0.7, width=5)
        (logprobs * torch.linspace(-1, 2, 7, dtype=torch.float64)).sum().backward()
        frozen.requires_grad_(True)
        torch.testing.assert_close(leaf.grad, expected[index], rtol=0, atol=1e-12)
        assert frozen.grad is None
        leaf.grad = None
    with torch.no_grad():
        assert not token_log_probs(hidden, weight, None, targets)[0].requires_grad


def test_bf16_is_as_near_to_the_truth_as_the_plain_way():
    random = torch.Generator().manual_seed(2)
    exact = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((65, 64), (401, 64))]
    targets = torch.randint(401, (65,), generator=random)
    rounded = [tensor.bfloat16().requires_grad_() for tensor in exact]
    doubles = [tensor.detach().double().requires_grad_() for tensor in rounded]
    truth = results(plain_log_probs, [*doubles, None], targets)
    plain = results(plain_log_probs, [*rounded, None], targets)
    ours = results(token_log_probs, [*rounded, None], targets, width=64)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for actual, other, wanted in zip(ours, plain, truth, strict=True):
        assert (actual - wanted).norm() < 1.3 * (other - wanted).norm()

    unrounded = results(partial(token_log_probs, fp32_logits=True), [*rounded, None], targets, width=64)
    assert (unrounded[0] - truth[0]).abs().max() < 1e-4 < 1e-2 < (ours[0] - truth[0]).abs().max()
    for actual, other, wanted in zip(unrounded, ours, truth, strict=True):
        assert (actual - wanted).norm() < (other - wanted).norm()


def test_no_tensor_is_larger_than_a_block_and_the_weights_gradient_comes_at_once(monkeypatch):
    monkeypatch.setitem(log_probs.BLOCK_BYTES, "cpu", 64 * 128 * 4)
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
            out = operation(*arguments, **(settings or {}))
            sizes.extend(tensor.numel() for tensor in (out if isinstance(out, tuple | list) else [out])
                         if isinstance(tensor, torch.Tensor))  # fmt: skip
            return out

    hidden, weight = torch.randn(64, 3, requires_grad=True), torch.randn(2000, 3, requires_grad=True)
    arrived = []
    weight.register_hook(lambda gradient: arrived.append(gradient.shape))
    with Recorder():
        token_log_probs(hidden, weight, None, torch.arange(64))[0].sum().backward()
    assert max(sizes) <= 64 * 128  # the logits would be 64 x 2,000
    assert arrived == [(2000, 3)]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 4096, 10**6])
@pytest.mark.parametrize("vocabulary", [1, 100, 151_936])
def test_blocks_are_of_one_size_and_keep_the_budget(num_tokens, vocabulary):
    width = block_width(num_tokens, vocabulary, 4, "cpu")
    num_blocks = -(-vocabulary // width)
    assert 1 <= width <= vocabulary and num_blocks * width - vocabulary < num_blocks
    assert width <= 128 or num_tokens * width * 4 <= log_probs.BLOCK_BYTES["cpu"]
    assert num_blocks == 1 or num_tokens * (width + 1) * 4 > log_probs.BLOCK_BYTES["cpu"] / 2


def test_the_head_keeps_the_layers_parameters_and_its_logits():
    layer = torch.nn.Linear(HIDDEN, VOCABULARY)
    head = LogProbHead(layer, FORBIDDEN, 0.7)
    assert dict(head.named_parameters()).keys() == {"weight", "bias"} and head.weight is layer.weight
    hidden = torch.randn(2, 3, HIDDEN)
    assert (head(hidden) == layer(hidden)).all()
    with pytest.raises(AssertionError, match="LogProbHead"):
        LogProbHead(head, FORBIDDEN, 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_partitioned_policy_has_the_gradients_of_the_plain_model(tmp_path, tied, num_ranks):
    from transformers import AutoModelForCausalLM

    folder = save_text_model(tmp_path / "model", tied=tied)
    run_ranks("head_gradients.py", folder, tmp_path / "out", num_ranks=num_ranks)
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=False) for rank in range(num_ranks)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    close = {"rtol": 0, "atol": 1e-5}
    for rank in ranks:
        for batch, result, again, of_reference in zip(
            rank["batches"], rank["results"], rank["again"], rank["of_reference"], strict=True
        ):
            hidden = model.base_model(input_ids=batch.input_ids).last_hidden_state[batch.rows, batch.columns]
            logprobs, entropies = plain_log_probs(hidden, model.lm_head.weight, None, batch.targets, (2, 5, 9), 0.7)
            for actual in (result, again):
                torch.testing.assert_close(actual, (logprobs.detach(), entropies), **close)
            torch.testing.assert_close(of_reference, logprobs.detach(), **close)
            ((logprobs * torch.linspace(-1, 2, len(logprobs))).sum() / num_ranks).backward()
        logits = model(input_ids=rank["batches"][0].input_ids).logits
        torch.testing.assert_close(rank["logits"], logits.detach(), **close)
        assert rank["head_is_released"]
        assert (rank["moved"] - rank["results"][0][0]).abs().max() > 0.1
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for rank in ranks:
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(rank["gradients"][name], gradient, **close)
