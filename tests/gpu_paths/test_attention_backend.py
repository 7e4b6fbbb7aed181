"""Which attention kernels vLLM takes on a GPU: its own choice, and ours where its kernels are in no lock."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from fixtures.tiny_models import save_text_model

from mmr1_ds.config import RunConfig
from mmr1_ds.rollout import options
from mmr1_ds.rollout.servers.process import server_arguments


def engine_options(monkeypatch, capability):
    monkeypatch.setattr(options, "_compute_capability", lambda: capability)
    config = RunConfig()
    config.worker.actor.model.model_path = "model"
    return options.engine_options(
        config.worker.rollout, config.worker.actor.model, config.data, on_gpu=True, images=None
    )


@pytest.mark.parametrize("capability", ["9.0", "8.0", "12.0", ""])
def test_elsewhere_vllm_chooses(monkeypatch, capability):
    assert "attention_config" not in engine_options(monkeypatch, capability)


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
