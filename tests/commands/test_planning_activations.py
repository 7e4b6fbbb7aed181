"""Bytes that the backward keeps, as the planner estimates them, against what autograd saves of real models."""

import pytest
import torch
import transformers
from fixtures.image_inputs import GRIDS, image_inputs
from fixtures.tiny_models import save_text_model, save_vision_model

from mmr1_ds.commands.plan import activations
from mmr1_ds.commands.plan.activations import MicroBatch
from mmr1_ds.commands.plan.shapes import policy_shape
from mmr1_ds.config import ModelConfig
from mmr1_ds.engine.model.loading import checkpoint_gradients
from mmr1_ds.engine.model.log_probs import LogProbHead

BAR = 0.15
LENGTH = 97


def saved_bytes(model, inputs):
    """Of all tensors that autograd holds after a forward, weights left out, each piece of memory once."""
    head = LogProbHead(model.get_output_embeddings(), [], 1.0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # and so alive: no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.base_model(**inputs, use_cache=False).last_hidden_state[0, torch.arange(LENGTH)]
        logprobs, _ = head(states, torch.full((LENGTH,), 7))
    assert logprobs.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_what_is_kept(tmp_path, family, checkpointed, dtype):
    has_images = family.endswith("vl")
    folder = (save_vision_model if has_images else save_text_model)(tmp_path, family=family)
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForImageTextToText if has_images else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).train()
    if checkpointed:
        checkpoint_gradients(model)
    inputs = {"input_ids": torch.full((1, LENGTH), 5)}
    patches = 0
    if has_images:
        inputs |= image_inputs(config, inputs["input_ids"], GRIDS[0])
        patches = GRIDS[0][0] * GRIDS[0][1]
    shape = policy_shape(ModelConfig(model_path=str(folder)))
    element = dtype.itemsize
    batch = MicroBatch(float(LENGTH), float(LENGTH), float(patches))
    planned = activations.training(shape, batch, element, checkpointed, "cpu").kept
    assert planned == pytest.approx(saved_bytes(model, inputs), rel=BAR)
