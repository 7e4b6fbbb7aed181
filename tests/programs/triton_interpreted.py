"""Run backend `triton` in Triton's interpreter over many calls. Arguments: file of the calls, file of the results.

Both are lists saved by torch: of each call the arrays and options of `mmr1_kernels.group_statistics`, and the fields
of what it returned, or the type and text of what it raised.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton.jit decorates, so before the kernels are imported

import mmr1_kernels
import numpy as np
import torch
from mmr1_kernels import gpu, gpu_kernels
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# The interpreter takes as long for a small block as for a large one.
WIDER = {gpu_kernels.count_kernel: gpu.Launch(512, 1)}


@contextmanager
def stale_loads() -> Iterator[None]:
    """Half of the table look-ups miss what is there, as if another program had inserted it just after the load.

    The interpreter runs one program after another, so nothing races in it otherwise. Only look-ups have this modifier.
    """
    load, random = InterpreterBuilder.create_masked_load, np.random.default_rng(0)

    def create_masked_load(
        self: InterpreterBuilder, pointers: Any, mask: Any, other: Any, cache_modifier: Any, *options: Any
    ) -> TensorHandle:
        loaded = load(self, pointers, mask, other, cache_modifier, *options)
        if "CG" in str(cache_modifier):
            missed = mask.data & (random.random(loaded.data.shape) < 0.5)
            loaded = TensorHandle(np.where(missed, 0, loaded.data), loaded.dtype)
        return loaded

    InterpreterBuilder.create_masked_load = create_masked_load
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load = load


def result_of(call: dict) -> dict | str:
    gpu.WORKSPACE_BYTES = call["workspace_bytes"]
    try:
        return vars(mmr1_kernels.group_statistics(**call["arguments"], backend="triton"))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    calls = torch.load(sys.argv[1])
    launches = dict(gpu.LAUNCHES)
    results = []
    for call in calls:
        gpu.LAUNCHES = launches | (WIDER if call["wider"] else {})
        with stale_loads() if call["stale"] else nullcontext():
            results.append(result_of(call))
    torch.save(results, sys.argv[2])
