"""The device for the rollout alone: a ZeRO-3 engine's states in host memory while responses are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

_OF_ANY_OPTIMIZER = [
    OffloadStateTypeEnum.lp_params,
    OffloadStateTypeEnum.lp_grads,
    OffloadStateTypeEnum.contiguous_grad_buffer,
]


@contextmanager
def states_offloaded(engine: Any, on_gpu: bool) -> Iterator[None]:
    """Inside, the weights can be neither read nor trained.

    On CPU all is in host memory; what can be moved there is, so that the calls are tried without a GPU. DeepSpeed moves
    optimiser states of its fused Adam only, which runs on GPU.
    """
    engine.offload_states(include=None if on_gpu else _OF_ANY_OPTIMIZER, pin_memory=on_gpu)
    try:
        yield
    finally:
        engine.reload_states()
