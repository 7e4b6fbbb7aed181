"""Gradient checkpointing and frozen weights, on two ZeRO-3 ranks."""

import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_vision_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank wrote: of each kind of policy, without and with checkpointing."""
    folder = tmp_path_factory.mktemp("gradients")
    run_ranks("gradient_checkpointing.py", save_vision_model(folder / "model"), folder / "out", num_ranks=2)
    return [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]


KINDS = ["whole", "whole, frozen tower", "lora", "lora, frozen tower"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_computes_layers_again_and_the_same_gradients(results, kind):
    for result in results:
        plain, checkpointed = result[kind]
        # Two micro-batches. A layer is computed again where the backward goes through it.
        assert plain["calls"] == {"layers.0": 2, "blocks.0": 2}
        assert checkpointed["calls"] == {"layers.0": 4, "blocks.0": 2 if "frozen" in kind else 4}
        assert plain["are_released"] and checkpointed["are_released"]
        assert list(plain["gradients"]) == list(checkpointed["gradients"])
        for name, gradient in plain["gradients"].items():
            scale = float(gradient.abs().max())
            assert scale > 1e-7, name
            assert (checkpointed["gradients"][name] - gradient).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_stays_bit_for_bit(results, kind):
    for result in results:
        for found in result[kind]:
            in_tower = [name for name in (*found["changed"], *found["unchanged"]) if ".visual." in name]
            assert len(in_tower) > 10
            if kind == "whole":
                assert found["unchanged"] == [] and any(".visual." in name for name in found["gradients"])
            elif kind == "whole, frozen tower":
                assert sorted(found["unchanged"]) == sorted(in_tower) and found["changed"]
            else:
                assert found["changed"] == [] and all(".lora_" in name for name in found["gradients"])
                assert any(".visual." in name for name in found["gradients"]) == (kind == "lora")
