"""Every call that only a GPU run makes into vLLM, DeepSpeed and torch fits the signature that is installed."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fixtures.launching import ROOT

pytestmark = pytest.mark.slow  # imports vLLM

# Methods of objects, and names imported from the libraries, by the room that calls them.
CALLS = {
    "rollout/colocated": {
        "sleep": "vllm.entrypoints.llm:LLM.sleep",
        "wake_up": "vllm.entrypoints.llm:LLM.wake_up",
        "release_kv_cache_memory": "vllm.entrypoints.llm:LLM.release_kv_cache_memory",
        "reset_prefix_cache": "vllm.entrypoints.llm:LLM.reset_prefix_cache",
        "collective_rpc": "vllm.entrypoints.llm:LLM.collective_rpc",
        "reset_mm_cache": "vllm.v1.engine.llm_engine:LLMEngine.reset_mm_cache",
        "reset_encoder_cache": "vllm.v1.engine.llm_engine:LLMEngine.reset_encoder_cache",
        "step": "vllm.v1.engine.llm_engine:LLMEngine.step",
        "enqueue": "vllm.entrypoints.llm:LLM.enqueue",
        "abort_request": "vllm.v1.engine.llm_engine:LLMEngine.abort_request",
        "shutdown": "vllm.v1.engine.core_client:InprocClient.shutdown",
        "has_requests": "vllm.v1.core.sched.async_scheduler:AsyncScheduler.has_requests",
        "reload_weights": "vllm.v1.worker.gpu_worker:Worker.reload_weights",
        "get_model": "vllm.v1.worker.gpu_worker:Worker.get_model",
    },
    "rollout/servers/weights": {
        "trainer_init": "vllm.distributed.weight_transfer.factory:WeightTransferTrainerFactory.trainer_init",
        "send_weights": "vllm.distributed.weight_transfer.base:TrainerWeightTransferEngine.send_weights",
        "shutdown": "vllm.distributed.weight_transfer.base:TrainerWeightTransferEngine.shutdown",
        "IPCTrainerInitInfo": "vllm.distributed.weight_transfer.ipc_engine:IPCTrainerInitInfo",
        "NCCLTrainerInitInfo": "vllm.distributed.weight_transfer.nccl_engine:NCCLTrainerInitInfo",
    },
    "engine/weights/offloading.py": {
        "offload_states": "deepspeed.runtime.engine:DeepSpeedEngine.offload_states",
        "reload_states": "deepspeed.runtime.engine:DeepSpeedEngine.reload_states",
    },
}


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Each call with the text of what is called."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def files(place: str) -> list[Path]:
    path = ROOT / "mmr1_ds" / place
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def resolve(name: str) -> object:
    module, _, dotted = name.partition(":")
    found: object = importlib.import_module(module)
    for part in dotted.split("."):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    return found


def check(function: object, call: ast.Call, where: str) -> None:
    """Bind the call's arguments. A method takes its object first; a class method is bound to its class."""
    if isinstance(function, classmethod | staticmethod):
        function = function.__func__
        first = [None] if "cls" in inspect.signature(function).parameters else []
    else:
        first = [None] if inspect.isfunction(function) and "." in function.__qualname__ else []
    assert callable(function), where
    try:
        inspect.signature(function).bind(*first, *call.args, **{word.arg: word.value for word in call.keywords})
    except TypeError as error:
        raise AssertionError(f"{where}: {ast.unparse(call)}: {error}") from None


@pytest.mark.parametrize("place", CALLS)
def test_calls_into_vllm_and_deepspeed(place):
    found = set()
    for path in files(place):
        for text, call in calls(path.read_text()):
            method = text.rpartition(".")[2]
            # What a module calls of its own, the engine its cycle's.
            if method not in CALLS[place] or text in (f"self.{method}", f"self._cycle.{method}"):
                continue
            check(resolve(CALLS[place][method]), call, str(path))
            found.add(method)
    assert found == CALLS[place].keys()


def test_calls_into_torch_s_devices():
    """torch.cuda and torch.accelerator: what is there without a GPU has the signature that it has with one."""
    found = 0
    for path in files("."):
        for text, call in calls(path.read_text()):
            if text.startswith(("torch.cuda.", "torch.accelerator.")):
                function: object = torch
                for part in text.split(".")[1:]:
                    function = getattr(function, part)
                check(function, call, str(path))
                found += 1
    assert found >= 10


def test_a_call_that_does_not_fit_is_found():
    [(_, call)] = calls("llm.sleep(depth=2)")
    with pytest.raises(AssertionError, match="depth"):
        check(resolve("vllm.entrypoints.llm:LLM.sleep"), call, "here")
