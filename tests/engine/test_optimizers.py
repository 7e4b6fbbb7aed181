"""AdamW with bf16 moments: against torch's in float32, and a resume to the last bit; on a real ZeRO-3 engine."""

import numpy as np
import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

from mmr1_ds.engine import optimizers
from mmr1_ds.engine.optimizers import AdamWBf16, round_to_bf16

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def gradients(step, size):
    return torch.randn(size, generator=torch.Generator().manual_seed(step)) * (1 + step % 3) + 0.3


def trained(optimizer, weight, steps):
    for step in steps:
        weight.grad = gradients(step, len(weight))
        optimizer.step()
    return optimizer.state[weight]


def test_rounding_keeps_the_mean_and_what_bf16_holds():
    generator = torch.Generator().manual_seed(1)
    values = torch.full((40_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next number
    found = round_to_bf16(values.clone(), generator)
    assert found.dtype == torch.bfloat16 and set(found.tolist()) == {1.0, 1 + 2**-7}
    assert found.double().mean().item() == pytest.approx(1 + 2**-9, abs=1e-4)
    exact = torch.tensor([0.0, -0.0, 1.5, -3e38, 1e-38]).bfloat16()
    assert torch.equal(round_to_bf16(exact.float(), generator), exact)


def test_it_follows_torch_s_adamw_where_nearest_rounding_would_stand_still(monkeypatch):
    monkeypatch.setattr(optimizers, "_CHUNK", 1000)  # and a rest
    plain, ours = (torch.nn.Parameter(torch.linspace(-1, 1, 4099)) for _ in range(2))
    expected = trained(torch.optim.AdamW([plain], **SETTINGS), plain, range(400))
    state = trained(AdamWBf16([ours], **SETTINGS), ours, range(400))
    assert [state[name].dtype for name in ("exp_avg", "exp_avg_sq")] == [torch.bfloat16] * 2
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].double().mean() == pytest.approx(expected[name].double().mean().item(), rel=2e-2)
    moved = (plain - torch.linspace(-1, 1, 4099)).abs().mean()
    assert (ours - plain).abs().mean() < 0.02 * moved
    nearest = torch.zeros(())  # the second moment of a constant gradient of 1: 0 to 1, in the limit
    for _ in range(4000):
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    assert nearest < 0.6  # stuck, where 4,000 steps bring it to .98


def test_a_resumed_one_goes_on_to_the_last_bit():
    straight, resumed = (torch.nn.Parameter(torch.linspace(-1, 1, 77)) for _ in range(2))
    first = AdamWBf16([straight], **SETTINGS)
    trained(first, straight, range(3))
    resumed.data.copy_(straight.data)
    second = AdamWBf16([resumed], **SETTINGS)
    second.load_state_dict(first.state_dict())
    trained(first, straight, range(3, 6))
    trained(second, resumed, range(3, 6))
    assert torch.equal(straight, resumed)
    assert all(torch.equal(first.state[straight][name], second.state[resumed][name]) for name in first.state[straight])


@pytest.mark.slow
def test_a_real_engine_saves_and_resumes_its_states_exactly(tmp_path):
    model = save_text_model(tmp_path / "model")
    run_ranks("bf16_states.py", model, tmp_path / "out.npz", tmp_path / "saved", num_ranks=2)
    two = dict(np.load(tmp_path / "out.npz"))
    assert two["moments"] == 2  # bytes of an element
    assert two["saved_alike"]  # in the background, while the next step trained, as at once
    assert (two["first"] != two["start"]).any() and (two["second"] != two["first"]).any()
    np.testing.assert_array_equal(two["again"], two["second"])
    # On another number of ranks: the same weights and moments, and the next step but for the moments' rounding.
    run_ranks("bf16_states.py", model, tmp_path / "one.npz", tmp_path / "saved", num_ranks=1)
    one = dict(np.load(tmp_path / "one.npz"))
    np.testing.assert_array_equal(one["first"], two["first"])
    assert one["moments"] == 2
    np.testing.assert_allclose(one["again"], two["second"], atol=2e-4)  # lr 1e-3
