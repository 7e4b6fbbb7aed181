"""Bytes of a GPU's memory, part by part, at its two peaks: while the actor learns, and when vLLM starts.

ZeRO-3 with W ranks, P parameters of e bytes, P' of them trained, and the sizes that the DeepSpeed config gives:

    weights       e P / W of shards, and e times what is kept whole (stage3_param_persistence_threshold)
    gathered      e times the larger of stage3_max_live_parameters and stage3_max_reuse_distance, at most P: what is
                  needed again within that distance stays. Without gradient checkpointing torch's linear keeps a
                  view of every weight until the backward, all e P, where memory_efficient_linear is off
    gradients     4 P' / W of the shards, summed in float32 (engine/model/policy.py, exact_types), and e times a bucket
                  (reduce_bucket_size; two with overlap_comm)
    optimiser     4 P' / W of the float32 copy, 8 P' / W of the two moments, 4 P' / W in bf16 (strategy=adamw_bf16) and
                  with Muon's one momentum, 2.03 P' / W in 8 bits;
                  with offload_optimizer in host memory
    update        4 bytes for each element of a sub_group (at most P' / W): its gradient in float32, one at a time;
                  three times that with torch's own Adam, which makes copies

vLLM claims its share once, as it starts, and refuses to start without it: by then the whole engines are on the GPU,
with worker.actor.offload_states too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmr1_ds.commands.plan import activations
from mmr1_ds.commands.plan.activations import MicroBatch
from mmr1_ds.commands.plan.hardware import GB, Assumptions, Gpu
from mmr1_ds.config import RunConfig
from mmr1_ds.engine.model.shapes import ModelShape

EXACT = 4  # bytes of float32
_MOMENTS = 2
BF16 = 2  # bytes of a weight, as it is held on a GPU
_MOMENT_BYTES = {"adamw_bf16": 2, "adamw_8bit": 1 + 4 / 256, "muon": EXACT / 2}  # muon: one for both
_SUB_GROUP = 1e9  # DeepSpeed's own sizes, in elements
_BUCKET = 5e8
_LIVE = 1e9
_PERSISTENT = 1e5


@dataclass(frozen=True)
class EngineMemory:
    """The memory of one ZeRO-3 engine on a rank, in bytes."""

    weights: float
    gathered: float  # while it computes
    gradients: float
    optimizer: float  # on the device
    update: float  # while the optimiser steps
    on_host: float


def zero_engine(
    shape: ModelShape,
    zero: Mapping[str, Any],
    ranks: int,
    element: int,
    trained: bool,
    torch_adam: bool = False,
    strategy: str = "adamw",
) -> EngineMemory:
    """Return the memory of an engine with the section `zero_optimization`.

    Args: element: bytes of a weight; trained: False = frozen; torch_adam: in place of DeepSpeed's fused one;
        strategy: the optimiser's.
    """
    whole = shape.persistent(zero.get("stage3_param_persistence_threshold", _PERSISTENT))
    shards, kept = element * shape.num_parameters / ranks, element * whole
    live = max(zero.get("stage3_max_live_parameters", _LIVE), zero.get("stage3_max_reuse_distance", _LIVE))
    live = max(live, shape.largest_layer, shape.largest_parameter)
    gathered = element * min(live, shape.num_parameters) * (ranks > 1)
    host = 0.0
    if _device(zero, "offload_param") != "none":
        host, shards = host + shards, 0.0
    if not trained:
        return EngineMemory(shards + kept, gathered, 0.0, 0.0, 0.0, host)
    own = shape.trained / ranks
    buckets = 2 if zero.get("overlap_comm", True) else 1
    gradients = EXACT * own + element * buckets * zero.get("reduce_bucket_size", _BUCKET)
    moment = _MOMENT_BYTES.get(strategy, EXACT)
    optimizer = (EXACT + moment * _MOMENTS) * own
    update = EXACT * min(own, zero.get("sub_group_size", _SUB_GROUP)) * (3 if torch_adam else 1)
    if _device(zero, "offload_optimizer") != "none":
        # The accumulated gradients go to host memory with the states; the buckets stay.
        host += optimizer + 2 * EXACT * own  # the summed gradients, and beside them those of all sub-groups
        gradients, optimizer, update = element * buckets * zero.get("reduce_bucket_size", _BUCKET), 0.0, 0.0
    return EngineMemory(shards + kept, gathered, gradients, optimizer, update, host)


def _device(zero: Mapping[str, Any], key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))


@dataclass(frozen=True)
class Plan:
    """A GPU's memory at both moments, and what follows from it for vLLM."""

    learning: dict[str, float]  # bytes of each part
    sampling: dict[str, float]
    host_per_rank: float
    cache_tokens: float | None  # of the key-value cache of one engine, tokens; None without an engine on these GPUs


def micro_batch(config: RunConfig, responses: int, image_patches: float) -> MicroBatch:
    """Return the fullest micro-batch: as long as the run allows. Ulysses cuts ulysses_size times as many."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    return MicroBatch(responses * longest, responses * config.data.max_response_length, responses * image_patches)


def plan_memory(
    config: RunConfig,
    actor: ModelShape,
    critic: ModelShape | None,
    zero: Mapping[str, Mapping[str, Any]],
    ranks: int,
    gpu: Gpu,
    assumed: Assumptions,
    image_patches: float,
) -> Plan:
    """Plan one rank's GPU. Args: zero: `zero_optimization` by engine; image_patches: those of a prompt."""
    rollout = config.worker.rollout
    engines = _engines(config, actor, critic, zero, ranks)
    held = {f"{name} weights": engine.weights for name, engine in engines.items()}
    held["gradients and buckets"] = sum(engine.gradients for engine in engines.values())
    held["optimiser states"] = sum(engine.optimizer for engine in engines.values())
    learning = held | _passes(config, actor, engines, zero["actor"], ranks, assumed, image_patches)
    host = _on_host(config, actor, critic, engines, ranks)
    if rollout.engine == "server":
        return Plan(learning, {}, host, None)
    engine_size = rollout.gpu_memory_utilization * gpu.memory_gb * GB
    asleep = assumed.vllm_overhead_gb * GB
    learning |= {"vLLM asleep": asleep} if rollout.sleep else {"vLLM": engine_size}
    sampling = {"context": assumed.context_gb * GB, "vLLM": engine_size, **held}
    room = engine_size - BF16 * actor.num_parameters / rollout.tensor_parallel_size - asleep
    room -= rollout.max_num_seqs * state_bytes(actor) / rollout.tensor_parallel_size
    return Plan(learning, sampling, host, room * rollout.tensor_parallel_size / cache_bytes(actor, BF16))


def _engines(
    config: RunConfig, actor: ModelShape, critic: ModelShape | None, zero: Mapping[str, Mapping[str, Any]], ranks: int
) -> dict[str, EngineMemory]:
    """Return the memory of each engine that the run has."""
    strategy = config.worker.actor.optim.strategy
    engines = {"actor": zero_engine(actor, zero["actor"], ranks, BF16, trained=True, strategy=strategy)}
    if not config.algorithm.disable_kl and config.worker.actor.model.lora.rank == 0:
        engines["reference"] = zero_engine(actor, zero["reference"], ranks, BF16, trained=False)
    if critic is not None:
        strategy = config.worker.critic.optim.strategy
        engines["critic"] = zero_engine(critic, zero["critic"], ranks, BF16, trained=True, strategy=strategy)
    return engines


def _passes(
    config: RunConfig,
    actor: ModelShape,
    engines: Mapping[str, EngineMemory],
    zero: Mapping[str, Any],
    ranks: int,
    assumed: Assumptions,
    image_patches: float,
) -> dict[str, float]:
    """Return what forward, backward and optimiser step take beside what the engines hold. zero: the actor's."""
    settings = config.worker.actor
    checkpointed = settings.model.enable_gradient_checkpointing
    update = micro_batch(config, settings.micro_batch_size_per_device_for_update, image_patches)
    scoring = micro_batch(config, settings.micro_batch_size_per_device_for_experience, image_patches)
    backward = activations.training(actor, update, BF16, checkpointed, "cuda")
    working = max(backward.peak, activations.scoring(actor, scoring, BF16, "cuda").peak)
    gathered = max(engine.gathered for engine in engines.values())
    if actor.experts is not None and ranks > 1 and not checkpointed:  # the backward holds views of them
        gathered += BF16 * actor.experts.num_parameters
    if ranks > 1 and not checkpointed and not zero.get("memory_efficient_linear", True):
        gathered = float(BF16 * actor.num_parameters)
    # The optimiser steps when the activations are gone.
    stepping = max(engine.update for engine in engines.values())
    return {
        "gathered weights": gathered,
        "largest gradient": BF16 * actor.largest_parameter,  # whole, until it is reduced
        "activations": max(working - forward_head(backward), 0.0),
        "log-probability blocks": forward_head(backward),
        "float32 gradients of a sub-group": max(0.0, stepping - gathered - working),
        "context": assumed.context_gb * GB,
        "fragmentation": assumed.fragmentation * working,
    }


def _on_host(
    config: RunConfig, actor: ModelShape, critic: ModelShape | None, engines: Mapping[str, EngineMemory], ranks: int
) -> float:
    """Return the bytes of host memory of a rank."""
    trainer, rollout, own = config.trainer, config.worker.rollout, engines["actor"]
    host = sum(engine.on_host for engine in engines.values())
    if trainer.async_save and not trainer.save_model_only:
        host += sum(saved_bytes(shape) for shape in (actor, critic) if shape is not None) / ranks
    if config.worker.actor.offload_states:
        host += own.weights + own.gradients + own.optimizer
    if rollout.engine != "server" and rollout.sleep and rollout.lora_sync == "adapters":  # vLLM's weights, asleep
        host += BF16 * actor.num_parameters / rollout.tensor_parallel_size
    return host


def saved_bytes(shape: ModelShape) -> float:
    """Return the bytes of a checkpoint: float32 weights and two moments of what is trained, 2 of what is frozen."""
    return EXACT * (1 + _MOMENTS) * shape.trained + 2.0 * (shape.num_parameters - shape.trained)


def forward_head(found: activations.Activations) -> float:
    """Return the log-probability head's part of the peak."""
    return found.head if found.head > found.layer else 0.0


def cache_bytes(shape: ModelShape, element: int) -> float:
    """Return the bytes a token of the key-value cache."""
    return 2.0 * shape.attention_layers * shape.key_width * element


def state_bytes(shape: ModelShape) -> float:
    """Return the bytes of a sequence's states in vLLM, of linear attention, which Qwen3.5 keeps in float32."""
    return EXACT * shape.linear.state if shape.linear is not None else 0.0
