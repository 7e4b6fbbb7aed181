"""How vLLM inside a rank starts: a log line before and after each phase, of which some take minutes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

logger = logging.getLogger(__name__)

# Methods of vLLM's worker, in the order in which it calls them.
_PHASES = {
    "load_model": "loading weights",
    "determine_available_memory": "compiling the model and measuring what memory it leaves",
    "compile_or_warm_up_model": "capturing CUDA graphs and warming up",
}


@contextmanager
def phases_logged() -> Iterator[None]:
    """Log the phases of engines that start inside: vLLM's own lines are hidden among hundreds of others."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device

    def init_and_wrap(wrapper: Any) -> None:
        init_device(wrapper)
        for method, words in _PHASES.items():
            setattr(wrapper.worker, method, _logged(getattr(wrapper.worker, method), words))

    with mock.patch.object(WorkerWrapperBase, "init_device", init_and_wrap):
        yield


@contextmanager
def experts_returned_on_every_rank() -> Iterator[None]:
    """Let each rank of a tensor-parallel group hand out the experts that were chosen, for engines that start inside.

    vLLM's worker does so on the group's first rank alone, and here every rank has a scheduler, which waits for them.
    """
    from vllm.distributed.aux_output_connector import worker

    with mock.patch.object(worker, "get_tp_group", lambda: SimpleNamespace(is_first_rank=True)):
        yield


def _logged(function: Callable[..., Any], words: str) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        logger.info("vLLM: %s", words)
        began = time.monotonic()
        result = function(*args, **kwargs)
        logger.info("vLLM: %s took %.0f s", words, time.monotonic() - began)
        return result

    return timed
