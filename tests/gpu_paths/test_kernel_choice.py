"""Which kernels vLLM takes on a GPU: its own choice, and ours where its kernels are in no lock."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from fixtures.tiny_models import save_text_model

from mmr1_ds.config import RunConfig
from mmr1_ds.rollout import options
from mmr1_ds.rollout.servers.process import server_arguments


def engine_options(monkeypatch, capability, dtype="auto"):
    monkeypatch.setattr(options, "_compute_capability", lambda: capability)
    config = RunConfig()
    config.worker.actor.model.model_path, config.worker.rollout.dtype = "model", dtype
    return options.engine_options(
        config.worker.rollout, config.worker.actor.model, config.data, on_gpu=True, images=None
    )


@pytest.mark.parametrize("capability", ["9.0", "8.0", "12.0", ""])
def test_elsewhere_vllm_chooses(monkeypatch, capability):
    assert "attention_config" not in engine_options(monkeypatch, capability)
    assert "attention_config" not in engine_options(monkeypatch, "10.0", "fp32")


@pytest.mark.parametrize(("said", "on_gpu", "eager"), [(None, True, False), (None, False, True), (False, False, False)])
def test_a_cpu_compiles_no_model_unless_told(said, on_gpu, eager):
    config = RunConfig()
    config.worker.rollout.enforce_eager = said
    chosen = options.engine_options(
        config.worker.rollout, config.worker.actor.model, config.data, on_gpu=on_gpu, images=None
    )
    assert chosen["enforce_eager"] is eager


@pytest.mark.parametrize(("family", "chunked", "off"), [
    ("qwen3_5_text", True, False), ("qwen3_5_text", False, True), ("qwen3", False, False)
])  # fmt: skip
def test_prompts_that_are_not_cut_leave_no_states_to_cache(monkeypatch, tmp_path, family, chunked, off):
    """vLLM refuses the two together, in an assertion."""
    monkeypatch.setattr(options, "_compute_capability", lambda: "9.0")
    config = RunConfig()
    config.worker.actor.model.model_path = str(save_text_model(tmp_path / "model", family=family))
    config.worker.rollout.enable_chunked_prefill = chunked
    chosen = options.engine_options(
        config.worker.rollout, config.worker.actor.model, config.data, on_gpu=True, images=None
    )
    assert chosen.get("enable_prefix_caching", True) is not off


@pytest.mark.parametrize(("says", "found"), [("10.0\\n10.0\\n", "10.0"), (" 9.0\\n", "9.0"), ("", "")])
def test_the_first_gpu_s_answer_counts(monkeypatch, tmp_path, says, found):
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] && printf \'{says}\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert options._compute_capability() == found


def test_a_server_on_a_b200_is_told_on_its_command_line(monkeypatch):
    words = server_arguments(engine_options(monkeypatch, "10.0"))
    told = json.loads(words[words.index("--attention-config") + 1])
    assert told == {"backend_per_kind": {"full_attention": "FLASH_ATTN", "sliding_window": "FLASH_ATTN"}}


@pytest.mark.slow
def test_vllm_reads_the_choice_for_every_kind_of_layer_that_would_take_flashinfer(monkeypatch):
    for name in ("vllm._C_stable_libtorch", "vllm._C"):  # what the GPU build has compiled
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    cuda = pytest.importorskip("vllm.platforms.cuda")
    from vllm.config import AttentionConfig
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.kv_cache_interface import KVCacheSpecKind

    first = {major: cuda._get_backend_priorities(False, DeviceCapability(major, 0))[0] for major in (9, 10)}
    assert first == {9: AttentionBackendEnum.FLASH_ATTN, 10: AttentionBackendEnum.FLASHINFER}
    config = AttentionConfig(**engine_options(monkeypatch, "10.0")["attention_config"])
    ours = {KVCacheSpecKind.FULL_ATTENTION.value, KVCacheSpecKind.SLIDING_WINDOW.value}
    assert config.backend_per_kind == dict.fromkeys(ours, AttentionBackendEnum.FLASH_ATTN)
    assert config.backend is None


@pytest.mark.slow
def test_vllm_takes_flashinfer_s_kernels_nowhere(monkeypatch, tmp_path):
    """Its own decisions, on a GPU of which it is told, with what it would take left alone and with what we say."""
    from vllm.config.vllm import OPTIMIZATION_LEVEL_02
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe.oracle import unquantized
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as linear_attention

    model = str(save_text_model(tmp_path / "model"))
    words = engine_options(monkeypatch, "10.0")
    ours = {name: words[name] for name in ("kernel_config", "compilation_config", "gdn_prefill_backend")}
    config = EngineArgs(model, **ours).create_engine_config()
    assert config.kernel_config.enable_flashinfer_autotune is False
    assert OPTIMIZATION_LEVEL_02["kernel_config"] == {"enable_flashinfer_autotune": True}
    assert config.compilation_config.pass_config.fuse_allreduce_rms is False
    assert callable(OPTIMIZATION_LEVEL_02["compilation_config"]["pass_config"]["fuse_allreduce_rms"])

    gpu = SimpleNamespace(
        is_cuda=lambda: True,
        is_rocm=lambda: False,
        is_device_capability=lambda capability: capability == 90,
        is_device_capability_family=lambda family: False,
    )
    monkeypatch.setattr(linear_attention, "current_platform", gpu)
    plain = EngineArgs(model).create_engine_config()
    for given, found in ((plain, ("auto", "flashinfer")), (config, ("triton", "triton"))):
        given.model_config = SimpleNamespace(
            dtype=given.model_config.dtype,
            hf_config=SimpleNamespace(),
            hf_text_config=SimpleNamespace(linear_key_head_dim=128, linear_value_head_dim=128),
        )
        assert linear_attention._resolve_gdn_prefill_backend(given) == found
    assert unquantized.map_unquantized_backend(config.kernel_config.moe_backend).value == "TRITON"
