"""Training as an H100's preset has it, in bf16 on the CPU, against fp32."""

import json

import numpy as np
import pytest
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model
from safetensors.torch import load_file, save_file

BAND = 0.01  # nats a token, of a loss that falls from 4.7 to 1.9 in 20 steps; found: 0.0044


@pytest.mark.slow
def test_the_loss_falls_as_in_fp32(tmp_path):
    model = save_text_model(tmp_path / "model")
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})  # both begin with the same
    run_ranks("bf16_training.py", model, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    exact, ours = np.array(found["exact"]), np.array(found["ours"])
    assert exact[0] > 4.5 and exact[-1] < 2
    assert 0 < np.abs(ours - exact).max() < BAND

    types = found["types"]
    assert types["weights"] == types["mm"] == ["torch.bfloat16"]
    assert types["masters"] == types["moments"] == types["sums"] == ["torch.float32"]
    assert types["reduced"] == ["torch.bfloat16"]  # between ranks, a micro-batch at a time: DeepSpeed's default
    # Angles and frequencies of the rotary embedding, norms, and the output layer's probabilities.
    assert types["cos"] == types["sin"] == types["rsqrt"] == types["exp"] == ["torch.float32"]
    # A step's gradient, of 16 micro-batches. What is left is the rounding of each.
    assert found["distance"] < 0.005
    assert found["distance"] < 0.95 * found["distance_summed_in_bf16"]
