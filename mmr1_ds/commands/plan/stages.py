"""Seconds of a training step by stage, from peak rates and the fractions of them that are assumed to be reached.

Every rank does the same, so one rank's share is estimated. Where two things overlap the longer one counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmr1_ds.commands.plan.hardware import GB, Assumptions, Gpu
from mmr1_ds.commands.plan.memory import EXACT, cache_bytes, saved_bytes, state_bytes
from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import steps_between_saves
from mmr1_ds.engine.model import flops
from mmr1_ds.engine.model.flops import Work
from mmr1_ds.engine.model.shapes import ModelShape
from mmr1_ds.preflight.plan import BatchPlan

_CAUSAL = 0.5  # share of the attention that is computed
_GPUS_PER_NODE = 8  # reached by NVLink
_IMAGE_THREADS = 4  # of a rank (data/encoding.py)
_UNKNOWN_STEPS = 200  # of a run whose data is not there to be counted
_ADAM_BYTES = 28  # a parameter: gradient, float32 copy and moments read, all but the gradient written


@dataclass(frozen=True)
class Load:
    """The work of one rank in a step."""

    responses: float
    prompts: float
    prompt_tokens: float  # mean, images included
    response_tokens: float  # mean
    patches: float  # of a prompt's images and videos
    pieces: float = 1.0  # images, and pairs of frames, that these are

    @property
    def tokens(self) -> float:
        return self.responses * (self.prompt_tokens + self.response_tokens)


def load_of(
    config: RunConfig, plan: BatchPlan, assumed: Assumptions, patches: float, pieces: float = 1.0
) -> Load:
    """Return a rank's share of a step; lengths that no assumption gives are half of the longest."""
    prompt = assumed.prompt_tokens or config.data.max_prompt_length / 2
    response = assumed.response_tokens or config.data.max_response_length / 2
    responses, prompts = plan.responses_per_step / plan.world_size, plan.prompts_per_step / plan.world_size
    return Load(responses, prompts, prompt, response, patches, pieces)


def step_seconds(
    config: RunConfig,
    plan: BatchPlan,
    actor: ModelShape,
    critic: ModelShape | None,
    zero: Mapping[str, Mapping[str, Any]],
    gpu: Gpu,
    assumed: Assumptions,
    load: Load,
    cache_tokens: float | None,
) -> dict[str, float]:
    """Return the seconds by stage, in the names of `timing_s/*`."""
    settings = config.worker.actor
    rate = gpu.bf16_tflops * 1e12
    link = _link(plan.world_size, gpu, assumed)
    micro = _passes(config, load, settings.micro_batch_size_per_device_for_update)
    forward_passes = _passes(config, load, settings.micro_batch_size_per_device_for_experience)

    def scoring(shape: ModelShape, with_head: bool = True) -> float:
        compute = flops.forward(shape, _work(load), _CAUSAL, with_head).total / (rate * assumed.forward_efficiency)
        return max(compute, forward_passes * 2 * shape.num_parameters / link)

    def update(
        shape: ModelShape, section: Mapping[str, Any], checkpointed: bool, epochs: int, with_head: bool
    ) -> float:
        work = _work(load)
        total = flops.forward(shape, work, _CAUSAL, with_head).total
        total += flops.backward(shape, work, _CAUSAL, with_head).total
        if checkpointed:
            total += flops.recomputed(shape, work, _CAUSAL).total
        # Weights are gathered for the forward and again for the backward; gradients are reduced.
        moved = 2 * (2 * shape.num_parameters + shape.trained)
        own = shape.trained / plan.world_size
        adam = own * _ADAM_BYTES / (gpu.memory_tb_s * 1e12 * assumed.decode_efficiency)
        if (section.get("offload_optimizer") or {}).get("device", "none") != "none":
            ranks = min(plan.world_size, _GPUS_PER_NODE)
            adam = own * _ADAM_BYTES * ranks / (assumed.host_adam_gb_s * GB)
            adam += own * 2 * EXACT / (gpu.pcie_gb_s * assumed.pcie_efficiency * GB)
        steps = config.data.rollout_batch_size // config.worker.actor.global_batch_size
        computed = max(total / (rate * assumed.update_efficiency), micro * moved / link)
        return epochs * (computed + steps * adam)

    gen = generation(config, actor, gpu, assumed, load, cache_tokens)
    seconds = {"gen": gen, "tail": tail(config, actor, gpu, assumed, load)}
    seconds["images"] = max(0.0, images(actor, assumed, load) - gen)  # threads beside the sampling
    seconds["reward"] = load.responses * assumed.reward_seconds / config.worker.reward.num_workers
    if config.worker.rollout.engine != "server" and config.worker.rollout.sleep:
        seconds["sleep"] = assumed.sleep_seconds
        if config.worker.rollout.lora_sync == "adapters":  # the weights go to host memory and come back
            moved = 2 * 2 * actor.num_parameters / config.worker.rollout.tensor_parallel_size
            seconds["sleep"] += moved / (gpu.pcie_gb_s * assumed.pcie_efficiency * GB)
    steps_a_batch = config.data.rollout_batch_size // settings.global_batch_size
    if (
        settings.ppo_epochs > 1
        or steps_a_batch > 1
        or not (config.algorithm.disable_kl or config.algorithm.use_kl_loss)
    ):
        seconds["old"] = scoring(actor)
    if not config.algorithm.disable_kl:
        seconds["ref"] = scoring(actor)
    if critic is not None:
        seconds["values"] = scoring(critic, with_head=False)
        checkpointed = config.worker.critic.model.enable_gradient_checkpointing
        seconds["update_critic"] = update(critic, zero["critic"], checkpointed, 1, with_head=False)
    checkpointed = settings.model.enable_gradient_checkpointing
    seconds["update_actor"] = update(actor, zero["actor"], checkpointed, settings.ppo_epochs, with_head=True)
    sent = actor.adapters if config.worker.rollout.lora_sync == "adapters" else actor.num_parameters
    seconds["sync"] = 2 * sent / link
    every = steps_between_saves(config, plan.total_steps or _UNKNOWN_STEPS)
    if every > 0:
        engines = (actor,) if critic is None else (actor, critic)
        written = sum(map(saved_bytes, engines))
        if config.trainer.async_save and not config.trainer.save_model_only:  # what is left is the copy to host memory
            seconds["save"] = written / plan.world_size / (gpu.pcie_gb_s * assumed.pcie_efficiency * GB) / every
        else:
            seconds["save"] = written / config.trainer.nnodes / (assumed.disk_gb_s * GB) / every
    return seconds


def tail(config: RunConfig, shape: ModelShape, gpu: Gpu, assumed: Assumptions, load: Load) -> float:
    """Return the seconds in which the longest response, of the run's limit, is sampled on when the mean one has ended.

    Each of its tokens reads the weights: 2 bytes an active parameter, over the ranks of an engine.
    """
    left = max(0.0, config.data.max_response_length - load.response_tokens)
    read = 2 * shape.num_active / config.worker.rollout.tensor_parallel_size
    return left * (read / (gpu.memory_tb_s * 1e12 * assumed.decode_efficiency) + assumed.decode_overhead_seconds)


def images(shape: ModelShape, assumed: Assumptions, load: Load) -> float:
    """Return the seconds in which a rank's threads decode and process the images of its prompts."""
    if shape.vision is None:
        return 0.0
    pixels = load.patches / shape.vision.merge**2 * shape.vision.pixels_per_token
    return load.prompts * pixels / 1e6 * assumed.image_seconds / _IMAGE_THREADS


def of_passes(config: RunConfig, shape: ModelShape, gpu: Gpu, assumed: Assumptions, load: Load) -> dict[str, float]:
    """Return the seconds of attention and of the vision tower in the actor's update, which update_actor contains."""
    work = _work(load)
    passes = (flops.forward, flops.backward, flops.recomputed)
    used = passes if config.worker.actor.model.enable_gradient_checkpointing else passes[:2]
    found = [(one(shape, work, _CAUSAL), one(shape, work, 0.0)) for one in used]
    rate = gpu.bf16_tflops * 1e12 * assumed.update_efficiency / config.worker.actor.ppo_epochs
    attention = sum(whole.text - without.text for whole, without in found)
    return {"attention": attention / rate, "vision": sum(whole.vision for whole, _ in found) / rate}


def generation(
    config: RunConfig, shape: ModelShape, gpu: Gpu, assumed: Assumptions, load: Load, cache_tokens: float | None
) -> float:
    """Return the seconds of the prompts and all tokens, as if the longest responses kept no others waiting."""
    rollout = config.worker.rollout
    size = rollout.tensor_parallel_size
    work = Work([load.prompt_tokens] * math.ceil(load.prompts), 0.0, _grids(load, load.prompts))
    rate = gpu.bf16_tflops * 1e12
    prefill = flops.forward(shape, work, _CAUSAL, with_head=False).total / (rate * assumed.prefill_efficiency)
    context = load.prompt_tokens + load.response_tokens / 2
    at_once = min(rollout.max_num_seqs, load.responses * size)
    if cache_tokens is not None:
        at_once = max(1.0, min(at_once, cache_tokens / (load.prompt_tokens + load.response_tokens)))
    tokens = load.responses * load.response_tokens * size  # of the engine's ranks together
    read = (2 * shape.num_parameters + at_once * context * cache_bytes(shape, 2)) / size
    read += at_once * 2 * state_bytes(shape) / size  # and written again
    a_step = max(
        read / (gpu.memory_tb_s * 1e12 * assumed.decode_efficiency),
        at_once * flops.decode_token(shape, context) / size / (rate * assumed.prefill_efficiency),
    )
    return prefill + tokens / at_once * (a_step + assumed.decode_overhead_seconds)


def refresh_rollouts(config: RunConfig, plan: BatchPlan, num_prompts: float | None) -> dict[str, float]:
    """Return the responses a step beside training's own: of the full refresh, and of online probes.

    Empty without a curriculum. `full` is left out while the size of the data is unknown.
    """
    data = config.data
    if data.sampling_strategy != "curriculum":
        return {}
    # Where the refresh is not online, online would come with its own draw, which needs no probes.
    fraction = data.curriculum_probe_fraction if data.curriculum_refresh == "online" else 0.0
    found = {"online": fraction * plan.responses_per_step}
    if num_prompts:
        every = data.curriculum_update_freq or max(1, num_prompts // data.rollout_batch_size)
        found["full"] = num_prompts * data.curriculum_rollout_n / every
    return found


def _work(load: Load) -> Work:
    """Return equal sequences, which leaves out what attention costs more for unequal ones."""
    count = max(1, math.ceil(load.responses))
    length = load.tokens / count
    return Work([length] * count, load.responses * load.response_tokens, _grids(load, load.responses))


def _grids(load: Load, sequences: float) -> list[tuple[int, int]]:
    """Return square images, as many for each sequence; a pair of frames is one, which sees itself alone."""
    side = round(math.sqrt(load.patches / load.pieces))
    return [(side, side)] * math.ceil(sequences * load.pieces) if side else []


def _passes(config: RunConfig, load: Load, responses_at_once: int) -> float:
    """Return the micro-batches of a step on a rank."""
    if config.worker.actor.dynamic_batching:
        longest = config.data.max_prompt_length + config.data.max_response_length
        return max(1.0, math.ceil(load.tokens / (responses_at_once * longest)))
    return max(1.0, math.ceil(load.responses / responses_at_once))


def _link(ranks: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Return the bytes a second of the slowest link that a collective over all ranks crosses."""
    if ranks == 1:
        return math.inf
    if ranks <= _GPUS_PER_NODE:
        return gpu.nvlink_gb_s * assumed.nvlink_efficiency * GB
    return gpu.network_gb_s * _GPUS_PER_NODE * assumed.network_efficiency * GB
