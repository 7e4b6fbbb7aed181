"""Forward and backward as on a GPU, in bf16: devices, types, shapes, and every wait of the host for the device."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures.fake_cuda import CUDA, FakeCuda, backward
from fixtures.tiny_models import make_prompt, save_text_model, save_vision_model

from mmr1_ds.config import ActorConfig, AlgorithmConfig, DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine import actor, zero_engine
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.model.attention import PACKED, VARLEN, attend_images_at_once
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.engine.model.linear_attention import keep_states_apart
from mmr1_ds.engine.model.policy import PolicyModel
from mmr1_ds.engine.model.value_model import ValueModel
from mmr1_ds.engine.zero_engine import Sizes
from mmr1_ds.records import Trajectory

pytestmark = pytest.mark.slow

ROWS = [(7, 5), (1, 4), (7, 0), (3, 1), (1, 9), (7, 11)]  # prompt, response tokens
# transformers' own, once a micro-batch, whatever its size: grids, the longest image and window, a check of the inputs.
OF_A_TOWER = {
    "vision_utils.py:get_vision_position_ids": 2,
    "vision_utils.py:get_vision_cu_seqlens": 1,
    "generic.py:get_max_seqlen": 1,
    "import_utils.py:torch_compilable_check": 1,
}
WAITS = {
    ("qwen2", VARLEN): {},
    ("qwen2", PACKED): {},  # but one in find_packed_sequence_indices, left out where transformers takes it for tracing
    ("qwen3_5_text", VARLEN): {},
    ("qwen2_5_vl", VARLEN): OF_A_TOWER
    | {
        "vision_utils.py:get_vision_window_index": 2,
        "generic.py:get_max_seqlen": 2,
        "modeling_qwen2_5_vl.py:get_image_features": 1,
    },
}
COPIES = {"qwen2_5_vl": {"vision_utils.py:get_vision_position_ids": 1, "vision_utils.py:get_vision_window_index": 1}}


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """make(family, attention): a tiny bf16 model as on a GPU, and inputs that share prompts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)

    def make(family, attention):
        sees = family.endswith("vl")
        folder = str((save_vision_model if sees else save_text_model)(tmp_path, family=family))
        encoder = PromptEncoder(ModelConfig(model_path=folder), DataConfig(min_pixels=28 * 28, max_pixels=112 * 112))
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = kind.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention)
        attend_images_at_once(model)
        keep_states_apart(model)
        prompts = {i: make_prompt(encoder, i, sees and i % 3 != 0, most_images=4) for i, _ in ROWS}
        return model, encoder, [(prompts[i], np.arange(20, 20 + n, dtype=np.int32)) for i, n in ROWS]

    return make


def placed(make, model):
    """The module around a model, moved as a run does: transformers' with all of it, as ZeRO-3 loads it; then
    DeepSpeed takes the parameters of what was put around it, and leaves its buffers where they are."""
    module = make(model.to(CUDA))
    for part in module.modules():
        if any(parameter.device != CUDA for parameter in part.parameters(recurse=False)):
            part._apply(lambda item: item.to(CUDA) if isinstance(item, torch.nn.Parameter) else item, recurse=False)
    return module


def check_gradients(model):
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert (gradient.device, gradient.dtype) == (CUDA, parameter.dtype), name
        assert gradient.shape == parameter.shape, name


@pytest.mark.parametrize(("family", "attention"), WAITS)
def test_a_policy_waits_for_the_device_a_handful_of_times(on_gpu, family, attention):
    model, encoder, pairs = on_gpu(family, attention)
    with FakeCuda() as gpu:
        policy = placed(lambda model: PolicyModel(model, (3, 5), 0.7), model)
        del gpu.copies[:]
        with torch.no_grad():  # the reference
            policy(collate(pairs, encoder, CUDA))
        before = len(gpu.waits)
        assert Counter(place for place, _ in gpu.copies) == COPIES.get(family, {})
        del gpu.copies[:]
        logprobs, entropies = policy(collate(pairs, encoder, CUDA))
        for found in (logprobs, entropies):
            assert (found.device, found.dtype, found.shape) == (CUDA, torch.float32, (30,))
        assert logprobs.requires_grad and not entropies.requires_grad
        found = gpu.waits[before:]
        assert gpu.waits[:before] == found
        assert not any(in_layer for _, in_layer in found)
        assert Counter(place for place, _ in found) == WAITS[family, attention]
        del gpu.waits[:]
        assert Counter(place for place, _ in gpu.copies) == COPIES.get(family, {})
        del gpu.copies[:]
        backward(logprobs)
        assert gpu.waits == gpu.copies == []
    check_gradients(policy)


def test_logits_that_stay_in_float32_have_float32_sums_and_bf16_gradients(on_gpu):
    """torch.mm(out_dtype=), which has no kernel for the CPU."""
    model, encoder, pairs = on_gpu("qwen2", VARLEN)
    with FakeCuda() as gpu:
        policy = placed(lambda model: PolicyModel(model, (3, 5), 0.7, fp32_logits=True), model)
        logprobs, _ = policy(collate(pairs, encoder, CUDA))
        assert (logprobs.device, logprobs.dtype, logprobs.shape) == (CUDA, torch.float32, (30,))
        del gpu.copies[:]
        backward(logprobs)
        assert gpu.waits == gpu.copies == []
    check_gradients(policy)


def test_a_critic_waits_for_nothing(on_gpu):
    model, encoder, pairs = on_gpu("qwen2", VARLEN)
    with FakeCuda() as gpu:
        critic = placed(lambda model: ValueModel(model, torch.bfloat16), model.base_model)
        values = critic(collate(pairs, encoder, CUDA))
        assert (values.device, values.dtype, values.shape) == (CUDA, torch.float32, (30,))
        backward(values)
        assert gpu.waits == []
    check_gradients(critic)


class Engine:
    """Calls that the update makes of DeepSpeed's engine."""

    def __init__(self, model):
        self._model = model
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])

    def __call__(self, batch):
        return self._model(batch)

    def train(self):
        pass

    def set_gradient_accumulation_boundary(self, is_last):
        pass

    def backward(self, loss, scale_wrt_gas):
        backward(loss)

    def step(self):
        pass

    def was_step_applied(self):
        return True

    def get_global_grad_norm(self):
        return 1.0


@pytest.mark.parametrize("loss_type", ["default", "gspo"])
def test_an_optimiser_step_waits_once_for_its_figures(on_gpu, monkeypatch, loss_type):
    """Three micro-batches with a reference and an old policy."""
    model, encoder, pairs = on_gpu("qwen2", VARLEN)
    ranks = SimpleNamespace(device=CUDA, rank=0, size=1, sum_and_max=lambda sums, most, stage: (sums, most))
    monkeypatch.setattr(actor, "start_deepspeed", lambda ranks: None)
    monkeypatch.setattr(zero_engine.deepspeed, "initialize", lambda model, **options: (Engine(model),))
    settings = ActorConfig(
        global_batch_size=3,
        micro_batch_size_per_device_for_update=2,
        dynamic_batching=False,
        loss_type=loss_type,
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
    )
    ones = [np.ones(len(tokens), np.float32) for _, tokens in pairs]
    trajectories = [
        Trajectory(*pair, values, values, old_logprobs=values, ref_logprobs=values)
        for pair, values in zip(pairs, ones, strict=True)
    ]
    with FakeCuda(0.25) as gpu:
        policy = placed(lambda model: PolicyModel(model, (3, 5), 0.7), model)
        monkeypatch.setattr(actor, "load_policy", lambda *settings, **options: policy)
        learner = actor.Actor(
            settings, AlgorithmConfig(), Sizes(2, 16, 16), 0.7, {"bf16": {"enabled": True}}, ranks, encoder, 10,
            BadUpdates("actor", 3, ranks, None),
        )  # fmt: skip
        del gpu.copies[:]
        metrics = learner.update(trajectories)
        assert [place for place, _ in gpu.waits] == ["zero_engine.py:_optimiser_step"]
        assert gpu.copies == []
    assert metrics["actor/pg_loss"] == metrics["rollout/logprob_diff_max"] == 0.25
    check_gradients(policy)


def test_what_reads_the_device_is_counted():
    with FakeCuda() as gpu:
        numbers = torch.arange(6).to(CUDA)
        assert numbers.view(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert int((numbers * 2).sum()) == 30
        assert numbers[numbers > 2].shape == (3,)
        assert numbers.cpu().tolist() == [0, 1, 2, 3, 4, 5]
        torch.tensor([1, 2], device=CUDA)
        torch.tensor([1, 2]).pin_memory().to(CUDA, non_blocking=True)
        with pytest.raises(AssertionError, match="reads what only the device knows"):
            torch.rand(3, device=CUDA).sum().item()
    assert len(gpu.waits) == 5 and len(gpu.copies) == 2
