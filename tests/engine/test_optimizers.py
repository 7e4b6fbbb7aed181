"""Optimisers beside AdamW: against torch's in float32, and a resume to the last bit; on a real ZeRO-3 engine."""

import numpy as np
import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

from mmr1_ds.config.schema import OptimConfig
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


def test_8_bit_moments_follow_torch_s_adamw(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain, ours = (torch.nn.Parameter(torch.linspace(-1, 1, 40_990)) for _ in range(2))  # no whole number of blocks
    trained(torch.optim.AdamW([plain], **SETTINGS), plain, range(100))
    resolved, optimizer = optimizers.choose_optimizer(
        {"optimizer": {"params": {"eps": 1e-8}}}, [ours], OptimConfig(1e-2, (0.9, 0.999), 0.1, "adamw_8bit")
    )
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit) and resolved["zero_allow_untested_optimizer"]
    state = trained(optimizer, ours, range(100))
    assert (state["state1"].dtype, state["state2"].dtype) == (torch.uint8, torch.uint8)
    moved = (plain - torch.linspace(-1, 1, 40_990)).abs().mean()
    assert (ours - plain).abs().mean() < 0.03 * moved


def test_muon_s_groups_have_a_rate_of_their_own():
    groups = [{"use_muon": True, "lr": 0.0}, {"use_muon": False, "lr": 0.0}]
    optimizers.set_rates(groups, 5e-7, OptimConfig(lr=1e-6, strategy="muon", muon_lr=1e-3))
    assert [group["lr"] for group in groups] == pytest.approx([5e-4, 5e-7])
    optimizers.set_rates(groups, 5e-7, OptimConfig(lr=1e-6, strategy="muon"))
    assert [group["lr"] for group in groups] == [5e-7, 5e-7]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["adamw_8bit", "muon"])
def test_a_resumed_engine_trains_on_to_the_last_bit(tmp_path, strategy, monkeypatch):
    if strategy == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed compiles Muon for each shape
    model, saved = save_text_model(tmp_path / "model"), tmp_path / "saved"
    run_ranks("optimizer_states.py", model, tmp_path / "two.npz", saved, strategy, num_ranks=2)
    two = dict(np.load(tmp_path / "two.npz"))
    assert (two["second"] != two["first"]).any()
    np.testing.assert_array_equal(two["again"], two["second"])
    run_ranks("optimizer_states.py", model, tmp_path / "one.npz", tmp_path / "another", strategy, num_ranks=1)
    one = dict(np.load(tmp_path / "one.npz"))
    np.testing.assert_allclose(one["first"], two["first"], atol=2e-5)  # of 1e-3, and of 1e-2 for Muon's matrices
    far = np.abs(one["second"] - two["second"]) > 2e-4
    assert far.mean() < (2e-3 if strategy == "adamw_8bit" else 1e-9)  # blocks of 256 begin elsewhere
    if strategy == "adamw_8bit":
        assert two["moments"] == 1  # bytes of an element
    else:  # a matrix takes a step of spectral norm about .01
        moved, shapes = two["first"] - two["start"] * (1 - 0.01 * 0.01), [tuple(shape) for shape in two["shapes"]]
        sizes = [int(np.prod(shape)) for shape in shapes]
        parts = zip(shapes, np.split(moved, np.cumsum(sizes)[:-1]), strict=True)
        norms = [
            np.linalg.norm(part.reshape(rows, columns), 2) / max(1, rows / columns) ** 0.5
            for (rows, columns), part in parts
            if columns > 1 and max(rows, columns) < 100  # without embeddings and head
        ]
        assert len(norms) > 5 and all(0.005 < norm < 0.0135 for norm in norms), norms
    with pytest.raises(AssertionError, match=r"was written by 2 ranks, and worker\.actor"):
        run_ranks("optimizer_states.py", model, tmp_path / "out.npz", saved, strategy, num_ranks=1)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "num_bytes", "close"), [("adamw_bf16", 2, 2e-4), ("fused", 4, 2e-6)])
def test_a_real_engine_saves_and_resumes_its_states_exactly(tmp_path, strategy, num_bytes, close):
    model = save_text_model(tmp_path / "model")
    run_ranks("optimizer_states.py", model, tmp_path / "out.npz", tmp_path / "saved", strategy, num_ranks=2)
    two = dict(np.load(tmp_path / "out.npz"))
    assert two["moments"] == num_bytes  # of an element
    assert two["saved_alike"]  # in the background, while the next step trained, as at once
    assert (two["first"] != two["start"]).any() and (two["second"] != two["first"]).any()
    np.testing.assert_array_equal(two["again"], two["second"])
    # On another number of ranks: the same weights and moments, and the next step but for the moments' rounding.
    run_ranks("optimizer_states.py", model, tmp_path / "one.npz", tmp_path / "saved", strategy, num_ranks=1)
    one = dict(np.load(tmp_path / "one.npz"))
    np.testing.assert_array_equal(one["first"], two["first"])
    assert one["moments"] == num_bytes
    np.testing.assert_allclose(one["again"], two["second"], atol=close)  # lr 1e-3
