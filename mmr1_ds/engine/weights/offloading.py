"""The device for the rollout alone: a ZeRO-3 engine's states in host memory while responses are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import nn

_WEIGHTS = OffloadStateTypeEnum.lp_params
_GRADIENTS = [OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer]
_OF_THE_OPTIMIZER = [OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params]


@contextmanager
def states_offloaded(engine: Any, on_gpu: bool, with_weights: bool = True) -> Iterator[None]:
    """Move the states to host memory, and back at the end.

    Inside, the weights cannot be trained; nor read, unless they are left where they are (with_weights=False).

    On CPU all is in host memory; what can be moved there is moved, so that the calls run without a GPU. DeepSpeed moves
    optimiser states of its fused Adam only, which runs on GPU.
    """
    optimizer, module = engine.optimizer, engine.optimizer.module
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    frozen = [parameter.ds_tensor for parameter in module.parameters() if not parameter.requires_grad and with_weights]
    states = _GRADIENTS + [_WEIGHTS] * with_weights + _OF_THE_OPTIMIZER * on_gpu
    # DeepSpeed lays the shards of all the module's parameters into a buffer with room for the trained ones, and fails.
    optimizer.module = nn.ParameterList(trained)
    try:
        engine.offload_states(include=states, pin_memory=on_gpu)
    finally:
        optimizer.module = module
    for shard in frozen:
        shard.data = shard.data.to("cpu")
    try:
        yield
    finally:
        engine.reload_states()
        for shard in frozen:
            shard.data = shard.data.to(engine.device)


def drop_host_copies(optimizer: Any) -> None:
    """Before a checkpoint is written: drop the host buffers that DeepSpeed keeps in the optimiser's state.

    They would double the moments in the file, and a resumed run would load them to the device and leave its moments
    there: DeepSpeed moves them to whatever buffer it finds. Without one it makes a new one in host memory.
    Args: optimizer: the fused Adam inside of DeepSpeed's optimiser.
    """
    for state in optimizer.state.values():
        for name in [name for name in state if name.endswith("_offload_buffer")]:
            del state[name]
