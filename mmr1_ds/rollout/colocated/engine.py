"""vLLM inside the training process: one engine a tensor-parallel group, weights synchronised in place."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmr1_ds.cluster.launch import long_imports
from mmr1_ds.cluster.preemption import Preemption, SamplingAbandoned
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import DataConfig, ModelConfig, RolloutConfig
from mmr1_ds.errors import UserError
from mmr1_ds.records import Prompt, Response, RolloutGroup, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.adapters import adapter_options, adapter_request, check_places, load_adapters, refusal
from mmr1_ds.rollout.base import (
    CountedWeights,
    Enough,
    InTurn,
    Policy,
    RequestQueue,
    Submitted,
    ignore,
    longest_first,
    never,
)
from mmr1_ds.rollout.colocated.sleeping import SleepCycle
from mmr1_ds.rollout.colocated.starting import experts_returned_on_every_rank, phase_words, phases_logged
from mmr1_ds.rollout.options import (
    ImageBounds,
    engine_environment,
    engine_options,
    image_bounds,
    is_whole_after_a_sync,
    shaping,
)
from mmr1_ds.rollout.packed_experts import pack_experts_anew
from mmr1_ds.rollout.tied_head import head_is_tied, pack_tied_head

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.lora.request import LoRARequest

    from mmr1_ds.data.encoding import PromptEncoder

logger = logging.getLogger(__name__)

# Requests to add, each with the key that its group is returned under; None where another rank returns it.
Added = Sequence[tuple[int | None, RolloutRequest]]


class VllmRollout(InTurn):
    """One vLLM engine on this rank, or on the ranks of its tensor-parallel group."""

    def __init__(
        self,
        config: RolloutConfig,
        model: ModelConfig,
        data: DataConfig,
        ranks: Ranks,
        encoder: PromptEncoder,
        most_images: int,
        preemption: Preemption,
        *,
        most_videos: int = 0,
        adapted: Sequence[str] = (),
        returns_experts: bool = False,
    ) -> None:
        """Collective: start the engine. Before the first sync nothing can be sampled: its weights may be random.

        Args:
            most_images, most_videos: of the prompt that has the most; of images the run config may allow more.
            adapted: layers whose adapters every sync brings, by transformers' names; none = it brings whole weights.
            returns_experts: whether settings may ask for the experts of a mixture, which vLLM's CPU build cannot say.
        Raises: UserError for a layer that vLLM has no place for an adapter at.
        """
        self._ranks, self._encoder, self._preemption = ranks, encoder, preemption
        self._tensor_parallel_size = config.tensor_parallel_size
        self._max_num_seqs, self._max_num_batched_tokens = config.max_num_seqs, config.max_num_batched_tokens
        self._version, self._returns_experts = 0, returns_experts
        _unlink_shared_memory(ranks, config.tensor_parallel_size)  # of a run that was killed as it started
        more = adapter_options(adapted, model.lora.rank) if adapted else {}
        if returns_experts:
            more["enable_return_routed_experts"] = True
        images = image_bounds(encoder, most_images, most_videos)
        reads_weights = bool(adapted) or not is_whole_after_a_sync(model)
        self._llm: LLM = _start_engine(config, model, data, ranks, images, more, reads_weights)
        _unlink_shared_memory(ranks, config.tensor_parallel_size)
        self._head_is_tied = self._llm.collective_rpc(_head_is_tied)[0]
        # vLLM's raw log-probabilities are those before temperature: dividing the logits by the training's puts it in.
        self._scale = config.temperature if config.logprobs == "raw" else 1.0
        self._llm.collective_rpc(_forbid, args=(encoder.forbidden_token_ids, self._scale))
        self._cycle = SleepCycle(self._llm, enabled=config.sleep and ranks.on_gpu, keeps_base=bool(adapted))
        self._adapter_rank = model.lora.rank if adapted else 0
        self._adapter: LoRARequest | None = None  # of every request from the first sync on
        if adapted:
            self._llm.collective_rpc(check_places, args=(adapted,))

    def collect(
        self, submitted: Submitted, enough: Enough = never, advance: Callable[[int], None] = ignore
    ) -> list[RolloutGroup | None]:
        """See RolloutEngine. The ranks of a tensor-parallel group would have to stop together: they sample all.

        Raises: SamplingAbandoned.
        """
        requests, settings = submitted.requests, submitted.settings
        shared, first = self._requests_of_group(list(requests))
        own = range(first, first + len(requests))
        order = longest_first(shared, self._max_num_seqs)  # vLLM begins what it is asked first
        batches = [[(place - first if place in own else None, shared[place]) for place in order]]
        more: Callable[[], Added] = lambda: batches.pop() if batches else []  # noqa: E731
        groups = self._sample(more, settings, advance, enough) if shared else {}
        groups = self._unless_abandoned(groups)
        return [groups.get(position) for position in range(len(requests))]

    def collect_shared(
        self,
        queue: RequestQueue,
        settings: SamplingSettings,
        enough: Enough = never,
        advance: Callable[[int], None] = ignore,
    ) -> dict[int, RolloutGroup]:
        """See SharingEngine. The ranks of a tensor-parallel group take together, and return their groups in turn."""
        size = self._tensor_parallel_size
        neighbours = self._ranks.neighbours(size) if size > 1 else None
        # With more at once than its share, the first engine to begin would leave nothing for the last.
        most = min(self._max_num_seqs, -(-queue.num_responses * size // self._ranks.size))
        is_empty, num_taken = False, 0

        def take() -> int | None:
            if neighbours is None:
                return queue.take()
            (number,) = neighbours.gather_lists([queue.take()] if neighbours.rank == 0 else [])
            return number

        def more() -> Added:
            nonlocal is_empty, num_taken
            added: list[tuple[int | None, RolloutRequest]] = []
            engine, num_tokens = self._llm.llm_engine, 0
            room = most - engine.get_num_unfinished_requests()  # those that wait are for an engine that has room
            if self._cycle.num_waiting() > 0:
                return added
            while not is_empty and room > 0 and num_tokens < self._max_num_batched_tokens:  # what one step computes
                number = take()
                is_empty = number is None
                if number is not None:
                    request = queue.request(number)
                    room -= request.num_responses
                    num_tokens += len(request.prompt.token_ids)
                    is_own = neighbours is None or num_taken % size == neighbours.rank
                    added.append((number if is_own else None, request))
                    num_taken += 1
            return added

        return self._unless_abandoned(self._sample(more, settings, advance, enough))

    def _unless_abandoned(self, groups: dict[int, RolloutGroup] | None) -> dict[int, RolloutGroup]:
        """The groups, None where sampling was abandoned. Collective. Raises: SamplingAbandoned, on every rank."""
        if self._ranks.any(groups is None, "ask whether sampling is abandoned"):
            raise SamplingAbandoned
        assert groups is not None
        return groups

    def _sample(
        self,
        more: Callable[[], Added],
        settings: SamplingSettings,
        advance: Callable[[int], None],
        enough: Enough,
    ) -> dict[int, RolloutGroup] | None:
        """The groups by their keys. None when this rank has no time for more.

        more: is asked before every step of the engine; when nothing is sampled and nothing comes, all is there.
        """
        self._cycle.begin_sampling()
        # What an earlier call left would save little, and a resumed run, which has not made that call, would differ
        # from the straight one in rounding: a prompt's states depend on what they are computed together with.
        self._llm.reset_prefix_cache()
        engine, groups = self._llm.llm_engine, dict[int, RolloutGroup]()
        own: dict[str, tuple[str, int, Prompt]] = {}  # under the name that outputs have: id, key, prompt
        is_over = False
        try:
            # The ranks of a tensor-parallel group wait for each other in every token.
            with self._preemption.interrupting() if self._tensor_parallel_size == 1 else nullcontext():
                while True:
                    if not is_over and (added := more()):
                        own |= self._enqueue(added, settings)
                    if not engine.has_unfinished_requests():
                        break
                    outputs: list[Any] = [output for output in engine.step() if output.finished]
                    ended = [(own.pop(output.request_id), output) for output in outputs if output.request_id in own]
                    for (_, key, prompt), output in ended:
                        groups[key] = self._group(prompt, output, settings.with_experts)
                        advance(len(output.outputs))
                    if ended and enough(groups) and self._tensor_parallel_size == 1:
                        engine.abort_request([id for id, *_ in own.values()], internal=True)
                        own, is_over = {}, True  # what comes now was cut off
                if self._returns_experts:  # the next reset of the cache may not meet a batch that is still in flight
                    self._cycle.drain()
        except SamplingAbandoned:
            self._cycle.abandon()
            return None
        return groups

    def _enqueue(self, added: Added, settings: SamplingSettings) -> dict[str, tuple[str, int, Prompt]]:
        """Hand requests to vLLM. Returns: those that this rank returns, by the name that outputs have."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        inputs: list[Any] = []
        parameters = []
        for _, request in added:
            item: dict[str, Any] = {"prompt_token_ids": list(request.prompt.token_ids)}
            if request.prompt.has_vision:
                videos = [(video.frames, video.metadata) for video in request.prompt.videos]
                item["multi_modal_data"] = {"image": list(request.prompt.images), "video": videos}
            inputs.append(item)
            parameters.append(
                SamplingParams(
                    n=request.num_responses,
                    temperature=settings.temperature / self._scale,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                    max_tokens=request.max_tokens or settings.max_tokens,
                    seed=request.seed,
                    logprobs=0,  # the sampled token's only
                    flat_logprobs=True,  # lists of numbers, in place of a dictionary and an object for each token
                    stop_token_ids=list(self._encoder.eos_token_ids),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    **shaping(settings),
                )
            )
        ids = self._llm.enqueue(inputs, parameters, use_tqdm=False, lora_request=self._adapter)
        return {
            id.partition("-")[0]: (id, key, request.prompt)  # outputs name what is before it
            for id, (key, request) in zip(ids, added, strict=True)
            if key is not None
        }

    def _requests_of_group(self, own: list[RolloutRequest]) -> tuple[list[RolloutRequest], int]:
        """The requests of all ranks of the tensor-parallel group, in rank order, and where this rank's begin."""
        if self._tensor_parallel_size == 1:
            return own, 0
        everyone = self._ranks.all_gather_objects(own, "share tensor-parallel prompts")
        leader = self._ranks.rank - self._ranks.rank % self._tensor_parallel_size
        parts = everyone[leader : leader + self._tensor_parallel_size]
        before = parts[: self._ranks.rank - leader]
        return [request for part in parts for request in part], sum(len(part) for part in before)

    def _group(self, prompt: Prompt, output: RequestOutput, with_experts: bool) -> RolloutGroup:
        responses = []
        for completion in output.outputs:
            found: Any = completion.logprobs
            assert list(found.token_ids) == list(completion.token_ids)  # one entry a position
            token_ids = np.array(completion.token_ids, dtype=np.int32)
            logprobs = np.array(found.logprobs, dtype=np.float32)
            experts = completion.routed_experts if with_experts else None
            assert not with_experts or experts is not None
            finished = completion.finish_reason == "stop"
            responses.append(Response(token_ids, logprobs, finished, experts=experts))
        return RolloutGroup(prompt, tuple(responses), self._version)

    def sync_weights(self, policy: Policy) -> int:
        """See RolloutEngine."""
        self._cycle.begin_sync()
        given = CountedWeights(policy.adapter_weights() if self._adapter_rank else policy.weights())
        if self._adapter_rank:
            self._llm.collective_rpc(load_adapters, args=(dict(given), self._adapter_rank))
            self._adapter = adapter_request()
        else:
            self._llm.collective_rpc(_reload, args=(iter(given), self._head_is_tied))
        # Everything computed with the old weights: prefix KV, image embeddings, and the processor's cache, which
        # must forget together with the encoder's or the next generation misses what it believes cached.
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._cycle.end_sync()
        self._version = policy.num_updates_done
        return given.num_bytes

    def sleep(self, keep_weights: bool) -> None:
        """See RolloutEngine. With worker.rollout.sleep on GPU."""
        self._cycle.sleep(keep_weights)

    def close(self) -> None:
        """See RolloutEngine."""
        if hasattr(self, "_llm"):
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm
            gc.collect()


def _start_engine(
    config: RolloutConfig,
    model: ModelConfig,
    data: DataConfig,
    ranks: Ranks,
    images: ImageBounds | None,
    more: dict[str, Any],
    reads_weights: bool,
) -> LLM:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # external_launcher runs the engine in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    decided, defaults = engine_environment(config, on_gpu=ranks.on_gpu)
    os.environ |= defaults | os.environ | decided
    with long_imports():
        if not ranks.on_gpu:
            from vllm.platforms import current_platform

            # Else the first tokens wait 2 s for a compiler: of the comparison that ranks a token's log-probability.
            current_platform.simple_compile_backend = "eager"
        from vllm import LLM

    options = engine_options(config, model, data, on_gpu=ranks.on_gpu, images=images)
    if not reads_weights:
        from mmr1_ds.rollout.colocated.unread import LOAD_FORMAT

        options["load_format"] = LOAD_FORMAT
    if config.logprobs == "raw":
        options["logprobs_mode"] = "raw_logprobs"
    if ranks.on_gpu:
        options["enable_sleep_mode"] = config.sleep
    returns_experts = "enable_return_routed_experts" in more
    words = phase_words(reads_weights, options["enforce_eager"], ranks.on_gpu)
    try:
        with phases_logged(words), experts_returned_on_every_rank() if returns_experts else nullcontext():
            return LLM(distributed_executor_backend="external_launcher", **options, **more)
    except ValueError as error:
        if "enable_lora" not in more or "LoRA" not in str(error):
            raise
        raise UserError(refusal(str(error))) from None


def _unlink_shared_memory(ranks: Ranks, tensor_parallel_size: int) -> None:
    """Remove the name of this rank's shared memory, if there is one: what is mapped ends with the processes.

    vLLM's CPU build names it by the ranks alone when the launcher is not its own, and unlinks it only in Python's
    shutdown. A name left behind stops the next tensor-parallel run on the machine (errno 17). Once the engine has
    started, every rank of the group has the memory mapped.
    """
    if ranks.on_gpu or tensor_parallel_size == 1:
        return
    place = ranks.rank % tensor_parallel_size
    group = "-".join(str(ranks.rank - place + i) for i in range(tensor_parallel_size))
    for path in Path("/dev/shm").glob(f"*-[[]{group}[]]-cpushm_{place}"):
        path.unlink(missing_ok=True)


def _forbid(worker: Any, token_ids: Sequence[int], scale: float = 1.0) -> None:
    """Make vLLM's output layer give these tokens no chance, in every request. Runs in vLLM's worker.

    As biases of each request they would be limited to 1,024 on a GPU (V2 model runner), where one more ends the engine,
    and copied for every request. The logits come masked to all that follows: sampling, and the log-probabilities.
    The same place divides them by `scale`, so that it is in the raw log-probabilities too.
    """
    model = worker.get_model()
    compute_logits, columns = model.compute_logits, torch.tensor(token_ids, dtype=torch.int64, device=worker.device)

    def without_forbidden(*args: Any, **kwargs: Any) -> Any:
        logits = compute_logits(*args, **kwargs)
        if logits is None:  # of a tensor-parallel worker that does not sample
            return None
        logits = logits if scale == 1.0 else logits.float() / scale
        return logits.index_fill_(-1, columns, float("-inf"))

    model.compute_logits = without_forbidden


def _reload(worker: Any, weights: Any, tied: bool) -> None:
    """Runs in vLLM's worker, which is this process."""
    pack_experts_anew(worker.get_model())
    worker.reload_weights(weights_iterator=weights)
    if tied:
        pack_tied_head(worker.get_model())


def _head_is_tied(worker: Any) -> bool:
    return head_is_tied(worker.get_model())
