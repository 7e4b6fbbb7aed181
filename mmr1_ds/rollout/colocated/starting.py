"""How vLLM inside a rank starts: a log line before and after each phase, of which some take minutes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

logger = logging.getLogger(__name__)


def phase_words(reads_weights: bool, is_eager: bool, on_gpu: bool) -> dict[str, str]:
    """Return methods of vLLM's worker, in the order in which it calls them, and what each does here.

    Args: is_eager: nothing is compiled, no CUDA graphs are captured.
    """
    return {
        "load_model": "loading weights" if reads_weights else "building the model",
        "determine_available_memory": (
            "measuring what memory the model leaves"
            if is_eager
            else "compiling the model and measuring what memory it leaves"
        ),
        "compile_or_warm_up_model": "warming up" if is_eager or not on_gpu else "capturing CUDA graphs and warming up",
    }


@contextmanager
def phases_logged(words: Mapping[str, str]) -> Iterator[None]:
    """Log the phases of engines that start inside: vLLM's own lines are hidden among hundreds of others.

    Args: words: what `phase_words` returns.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device

    def init_and_wrap(wrapper: Any) -> None:
        init_device(wrapper)
        for method, doing in words.items():
            setattr(wrapper.worker, method, _logged(getattr(wrapper.worker, method), doing))

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
