"""FLOP that the planner estimates, against torch's own counter on real models."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from fixtures.image_inputs import GRIDS, image_inputs
from fixtures.tiny_models import save_text_model, save_vision_model
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from mmr1_ds.commands.plan import flops
from mmr1_ds.commands.plan.flops import Work
from mmr1_ds.commands.plan.shapes import policy_shape
from mmr1_ds.config import ModelConfig
from mmr1_ds.engine.model.log_probs import LogProbHead

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# torch's own formulas, for what its counter does not know: the attention of the CPU, a product added in place.
FORMULAS = {
    CPU_ATTENTION: lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, out_val=None, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
    torch.ops.aten.addmm_: lambda added, a, b, out_shape=None, **__: mm_flop(a, b),
}
EXACT = 0.003  # rotations are left out


def counted(folder, lengths, responses, grids=(), checkpointed=False, freeze=False):
    """FLOP of a forward, and of a forward and backward, by torch's counter, a sequence at a time."""
    config = transformers.AutoConfig.from_pretrained(folder)
    family = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        family = transformers.AutoModelForImageTextToText
    model = family.from_pretrained(folder, attn_implementation="sdpa").train()
    head = LogProbHead(model.get_output_embeddings(), [], 1.0)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    if freeze:
        model.model.visual.requires_grad_(False)
    totals = []
    for with_backward in (False, True):
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with counter, nullcontext() if with_backward else torch.no_grad():
            for place, (length, response) in enumerate(zip(lengths, responses, strict=True)):
                inputs = {"input_ids": torch.full((1, length), 5)}
                if grids:
                    inputs |= image_inputs(config, inputs["input_ids"], grids[place])
                states = model.base_model(**inputs, use_cache=False).last_hidden_state[0, -response:]
                logprobs, _ = head(states, torch.full((response,), 7))
                if with_backward:
                    logprobs.sum().backward()
        totals.append(counter.get_total_flops())
    return totals


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_text_models(tmp_path, family, checkpointed):
    folder = save_text_model(tmp_path, family=family)
    shape = policy_shape(ModelConfig(model_path=str(folder)))
    work = Work([97, 41], 61 + 7)
    only, both = counted(folder, work.lengths, [61, 7], checkpointed=checkpointed)
    forward = flops.forward(shape, work).total
    assert forward == pytest.approx(only, rel=EXACT)
    expected = forward + flops.backward(shape, work).total
    if checkpointed:
        expected += flops.recomputed(shape, work).total
    assert expected == pytest.approx(both, rel=EXACT)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_models_with_images(tmp_path, family, checkpointed):
    folder = save_vision_model(tmp_path, family=family)
    shape = policy_shape(ModelConfig(model_path=str(folder)))
    work = Work([97, 41], 61 + 7, GRIDS)
    only, both = counted(folder, work.lengths, [61, 7], GRIDS, checkpointed)
    found = flops.forward(shape, work)
    assert found.total == pytest.approx(only, rel=EXACT)
    assert found.vision > 0.1 * only  # what is checked matters
    expected = found.total + flops.backward(shape, work).total
    if checkpointed:
        expected += flops.recomputed(shape, work).total
    assert expected == pytest.approx(both, rel=EXACT)


def test_a_frozen_vision_tower_has_no_backward(tmp_path):
    folder = save_vision_model(tmp_path)
    shape = policy_shape(ModelConfig(model_path=str(folder), freeze_vision_tower=True))
    work = Work([97, 41], 61 + 7, GRIDS)
    only, both = counted(folder, work.lengths, [61, 7], GRIDS, freeze=True)
    assert flops.forward(shape, work).total == pytest.approx(only, rel=EXACT)
    both_expected = flops.forward(shape, work).total + flops.backward(shape, work).total
    assert both_expected == pytest.approx(both, rel=EXACT)


def test_published_models_have_their_published_sizes():
    """The parameter counts that their model cards state, and what is 2 a parameter and token is nearly all FLOP."""
    sizes = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336}
    for size, number in sizes.items():
        shape = policy_shape(ModelConfig(model_path=f"Qwen/Qwen2.5-VL-{size}-Instruct"))
        assert shape.num_parameters == shape.trained == number
        work = Work([2048.0], 1024.0)
        assert shape.vision is not None
        text = number - shape.vision.num_parameters - shape.vocabulary * shape.hidden * (1 if size == "3B" else 2)
        assert flops.forward(shape, work).text == pytest.approx(2 * text * 2048, rel=0.15)
