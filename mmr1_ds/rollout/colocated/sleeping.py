"""When vLLM inside a rank has memory of the GPU, and when the actor has it.

    sampling done        sleep: weights and KV cache are discarded
    the actor learns
    sync                 the actor's optimiser states go to host memory, vLLM's weights wake and are loaded, its caches
                         forget
    sampling begins      the actor's states go to host memory, vLLM's KV cache wakes

vLLM's weights are not kept in host memory meanwhile (its level 2, not 1): the next sync brings them. What wakes is
memory of unknown content, so nothing is sampled before a sync that ended well. Where a sync brings LoRA's adapters
alone, the weights beside them are kept there (level 1), and the adapters' buffers with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm import LLM

_WEIGHTS, _KV_CACHE = ["weights"], ["kv_cache"]  # vLLM's names for parts of its memory
# Its levels of sleep: nothing runs, memory stays; memory is given back, the weights wait on the host; all is lost.
_PAUSED, _KEPT, _DISCARDED = 0, 1, 2


class SleepCycle:
    """Puts an engine to sleep and wakes its parts, each when it is needed."""

    def __init__(self, llm: LLM, enabled: bool, keeps_base: bool = False) -> None:
        """
        Args:
            enabled: False where vLLM cannot sleep (on CPU) or shall not; then only weights half loaded are refused.
            keeps_base: whether a sync leaves the weights of the model folder as they are.
        """
        self._llm, self._enabled = llm, enabled
        self._level = _KEPT if keeps_base else _DISCARDED
        self._weights_are_mapped = self._cache_is_mapped = True
        self._weights_are_current = True

    def sleep(self, keep_weights: bool) -> None:
        """Give the memory back. keep_weights: that of the KV cache alone, as no sync comes before the next sampling."""
        if not self._enabled:
            if self._weights_are_current:  # not after what was abandoned
                self.drain()  # else a sync would come while a batch is in flight
            return
        if not self._weights_are_mapped:
            return
        if not keep_weights:
            self.drain()
            self._weights_are_current = self._weights_are_mapped = self._cache_is_mapped = False
            self._llm.sleep(level=self._level)
        elif self._cache_is_mapped:
            self.drain()
            self._cache_is_mapped = False
            self._llm.sleep(level=_PAUSED)
            self._llm.release_kv_cache_memory()

    def abandon(self) -> None:
        """Give all memory back at once, in the middle of whatever vLLM did: nothing more is sampled.

        Its scheduler is not asked, which would have to end a batch first, and may have been broken off in a change.
        """
        self._weights_are_current = False
        if self._enabled:
            self._weights_are_mapped = self._cache_is_mapped = False
            self._llm.collective_rpc("sleep", kwargs={"level": _DISCARDED})  # waits for the GPU first

    def drain(self) -> None:
        """Step until vLLM has forgotten its requests.

        When the last response ends, vLLM still counts it as its own, and with asynchronous scheduling has one batch
        ahead in flight: it then refuses to release the cache, or would write to memory that is gone.
        """
        core = self._llm.llm_engine.engine_core.engine_core  # the client's, in this process
        while core.batch_queue or core.scheduler.has_requests():
            self._llm.llm_engine.step()

    def num_waiting(self) -> int:
        """Responses that vLLM has been asked for and does not sample yet, or no more, for want of room."""
        return self._llm.llm_engine.engine_core.engine_core.scheduler.get_request_counts()[1]

    def begin_sync(self) -> None:
        """Wake the weights; those that a sync brings are then to be loaded whole."""
        self._weights_are_current = False
        if not self._weights_are_mapped:
            self._wake(_WEIGHTS)
            if self._level == _DISCARDED:
                self._llm.collective_rpc(zero_what_no_sync_brings)
            self._weights_are_mapped = True

    def end_sync(self) -> None:
        """All weights are loaded, and what was computed with others is forgotten."""
        self._weights_are_current = True

    def begin_sampling(self) -> None:
        """Wake the KV cache. Raises: RuntimeError for weights that were discarded, or loaded in part."""
        if not self._weights_are_current:
            raise RuntimeError("vLLM was asked to sample before a sync brought the weights that it lacks")
        if not self._cache_is_mapped:
            self._wake(_KV_CACHE)
            self._cache_is_mapped = True

    def _wake(self, part: list[str]) -> None:
        # What torch keeps of freed memory is not there for vLLM, which takes its own from the driver.
        torch.cuda.empty_cache()
        self._llm.wake_up(tags=part)


def zero_what_no_sync_brings(worker: Any) -> None:
    """Zero tensors that vLLM made beside the weights, where they wake with unknown content. Runs in vLLM's worker.

    They are neither parameters, which a sync brings, nor buffers, which vLLM keeps. Rows of a batch that stand for no
    token read them: positions by which it looks a table up, inputs, what Qwen3-VL adds to its first layers.
    """
    state = getattr(worker.model_runner, "model_state", None)  # of the V2 model runner
    of_state = [("rope_state", "positions"), ("encoder_runner", "inputs_embeds")]
    found = [getattr(getattr(state, part, None), name, None) for part, name in of_state]
    for tensor in [*found, *getattr(worker.get_model(), "deepstack_input_embeds", ())]:
        if tensor is not None:
            tensor.zero_()
