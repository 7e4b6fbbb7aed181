"""Compile the Triton kernels for H100 and B200 without a GPU, and print what they need, as JSON lines.

The wrapper itself runs, over tensors that claim to lie on a GPU and hold no data; only the launches are left out. So
the kernels are compiled with the types, specialisations, constants and warps of a real call, and a wrapper that looked
at data between its launches would fail.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from mmr1_kernels import gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITIES = {"9.0 (H100)": 90, "10.0 (B200)": 100}


class NoDevice:
    """What Triton asks of its driver before it compiles. Each target poses as a device of its own."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def launched_kernels(capability: int) -> list[Any]:
    """The kernels that calls of several shapes would launch."""
    launched = []
    compile_and_run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in tensors), self.__name__
        launched.append(compile_and_run(self, *arguments, grid=grid, warmup=True, **constants))

    triton.runtime.driver.set_active(NoDevice(capability))
    JITFunction.run = compile_only
    try:
        call_wrapper(num_groups=7, group_size=3, length=5, max_order=3)  # slices are aligned in no way
        call_wrapper(num_groups=16, group_size=16, length=16, max_order=16)
        call_wrapper(num_groups=1, group_size=1, length=1, max_order=1)
    finally:
        JITFunction.run = compile_and_run
    return launched


def call_wrapper(num_groups: int, group_size: int, length: int, max_order: int) -> None:
    offsets = np.arange(num_groups * group_size + 1, dtype=np.int64) * length
    group_offsets = np.arange(num_groups + 1, dtype=np.int64) * group_size
    gpu.WORKSPACE_BYTES = 2 * gpu.TABLE_BYTES * max_order * group_size * length  # two groups a chunk
    with FakeTensorMode():
        arrays = {
            "token_ids": torch.empty(offsets[-1], dtype=torch.int32, device="cuda"),
            "offsets": torch.empty(len(offsets), dtype=torch.int64, device="cuda"),
            "group_offsets": torch.empty(len(group_offsets), dtype=torch.int64, device="cuda"),
            "rewards": torch.empty(len(offsets) - 1, device="cuda"),
            "accuracies": torch.empty(len(offsets) - 1, device="cuda"),
        }
        gpu.launch_all(arrays, offsets, group_offsets, max_order)


def resources(kernel: Any) -> dict[str, Any]:
    """A thread's registers and bytes of local memory (spills and stack), a program's bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True)
        command = [triton.knobs.nvidia.nvdisasm.path, cubin.name]
        assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout + usage.stderr))
    return {
        "warps": kernel.metadata.num_warps,
        "registers": int(found["REG"]),
        "shared_bytes": int(found["SHARED"]) + kernel.metadata.shared,
        "local_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        "fences": len(re.findall(r"\bMEMBAR\b", assembly)),
    }


def rows() -> Iterator[dict[str, Any]]:
    for name, capability in CAPABILITIES.items():
        for kernel in dict.fromkeys(launched_kernels(capability)):  # each once, in order
            yield {"capability": name, "kernel": kernel.metadata.name, **resources(kernel)}


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(json.dumps(row) + "\n")
