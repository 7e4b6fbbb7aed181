"""`mmr1-ds plan`: estimate whether a run fits its GPUs and where its time goes, before anything is queued."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmr1_ds.commands.plan.hardware import GB, GPUS, Assumptions, Gpu, find_gpu
from mmr1_ds.commands.plan.memory import Plan, plan_memory
from mmr1_ds.commands.plan.stages import generation, load_of, of_passes, refresh_rollouts, step_seconds
from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import resolved_critic, trains_critic
from mmr1_ds.config.families import describe
from mmr1_ds.config.loading import load_config
from mmr1_ds.engine.model.shapes import PUBLISHED, ModelShape, critic_shape, policy_shape
from mmr1_ds.errors import require
from mmr1_ds.monitoring.logger import quiet_libraries
from mmr1_ds.preflight.checks import check_config
from mmr1_ds.preflight.deepspeed import critic_deepspeed, reference_deepspeed, resolve_deepspeed
from mmr1_ds.preflight.families import check_family, untested, untested_critic
from mmr1_ds.preflight.plan import BatchPlan

EXIT_DOES_NOT_FIT = 1
_DOUBT = 1.5  # by which each assumption is tried
DESCRIPTION = f"""Estimate a run's memory on each GPU, the seconds of a step, and what refreshing the curriculum costs,
from the model's config.json alone. Loads nothing and needs no GPU. Known without a download:
{", ".join(PUBLISHED)}. Exits 1 when something does not fit.
Everything is estimated, not measured; --assume changes what is assumed."""


@dataclass(frozen=True)
class Estimate:
    """All figures of the command."""

    gpu: Gpu
    world_size: int
    shape: ModelShape
    memory: Plan
    seconds: dict[str, float]  # of a step, by stage
    of_passes: dict[str, float]  # seconds of update_actor, by what computes
    doubt: str  # the assumption that the step's time depends on most, one line
    refresh: dict[str, float]  # responses a step beside training's, by curriculum_refresh
    responses_per_step: int
    refresh_seconds: dict[str, float]  # seconds a step of those responses
    family: str  # what the model's family was tested with
    untested: list[str]  # what the run asks of it besides
    problems: list[str]  # what does not fit, with the remedy
    warnings: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser."""
    parser.description = DESCRIPTION
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)}; default: h100")
    parser.add_argument("--gpu-memory-gb", type=float, metavar="GB", help="memory of a GPU; default: the datasheet's")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="see docs/presets.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def main(arguments: argparse.Namespace) -> int:
    """Print the estimate. Returns: the exit code; 1 when something does not fit. Raises: UserError."""
    quiet_libraries()
    gpu = find_gpu(arguments.gpu, arguments.gpu_memory_gb)
    found = estimate(arguments.settings, gpu, Assumptions().with_settings(arguments.assume))
    sys.stdout.write(in_words(found))
    if arguments.json is not None:
        figures = dataclasses.asdict(found) | {"shape": {"num_parameters": found.shape.num_parameters}}
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return EXIT_DOES_NOT_FIT if found.problems else 0


def estimate(settings: Sequence[str], gpu: Gpu, assumed: Assumptions) -> Estimate:
    """Estimate the run that `settings` describe. Raises: UserError, as training would."""
    require("models", "torch", "transformers", purpose="mmr1-ds plan")
    loaded = load_config(settings)
    for line in loaded.warnings:
        sys.stderr.write(f"mmr1-ds: {line}\n")
    config = loaded.config
    world_size = config.trainer.nnodes * config.trainer.n_gpus_per_node
    plan = check_config(config, world_size)
    actor_config = resolve_deepspeed(config, world_size, on_gpu=True)
    zero = {
        "actor": actor_config["zero_optimization"],
        "reference": reference_deepspeed(config, actor_config, on_gpu=True)["zero_optimization"],
    }
    actor, critic = policy_shape(config.worker.actor.model), None
    check_family(config, actor.family)
    if trains_critic(config):
        critic = critic_shape(resolved_critic(config).model)
        zero["critic"] = critic_deepspeed(config, actor_config, world_size, on_gpu=True)["zero_optimization"]
    patches, pieces = _patches(config, plan, actor, assumed)
    memory = plan_memory(config, actor, critic, zero, world_size, gpu, assumed, patches)
    load = load_of(config, plan, assumed, patches, pieces)

    def seconds_with(chosen: Assumptions) -> dict[str, float]:
        its = load_of(config, plan, chosen, *_patches(config, plan, actor, chosen))
        return step_seconds(config, plan, actor, critic, zero, gpu, chosen, its, memory.cache_tokens)

    seconds = seconds_with(assumed)
    known = dataclasses.replace(assumed, prompt_tokens=load.prompt_tokens, response_tokens=load.response_tokens)
    doubt = largest_doubt(known, lambda chosen: sum(seconds_with(chosen).values()))
    refresh = refresh_rollouts(config, plan, assumed.num_prompts or plan.train_data.num_rows)
    a_response = generation(config, actor, gpu, assumed, load, memory.cache_tokens) / load.responses
    problems, warnings = _judge(config, actor, memory, gpu, assumed)
    return Estimate(
        gpu, world_size, actor, memory, seconds, of_passes(config, actor, gpu, assumed, load), doubt, refresh,
        plan.responses_per_step,
        {name: count / world_size * a_response for name, count in refresh.items()},
        describe(actor.family), [*untested(config, actor.family), *untested_critic(config)], problems, warnings,
    )  # fmt: skip


def largest_doubt(assumed: Assumptions, step: Callable[[Assumptions], float]) -> str:
    """Name the assumption that, half as large again or smaller by as much, changes the seconds of a step most."""
    now, changes = step(assumed), []
    for field in dataclasses.fields(assumed):
        value = getattr(assumed, field.name)
        for factor in (_DOUBT, 1 / _DOUBT) if value else ():
            there = step(dataclasses.replace(assumed, **{field.name: value * factor}))
            changes.append((abs(there - now), field.name, value, value * factor, there))
    _, name, value, other, there = max(changes)
    return f"{name}={value:g} is assumed; {other:.4g} would make a step {there:.0f} s and not {now:.0f} (--assume)"


def _patches(config: RunConfig, plan: BatchPlan, shape: ModelShape, assumed: Assumptions) -> tuple[float, float]:
    """Return the patches of a prompt's images and videos, and the images and pairs of frames that these are.

    They are as large as the run and the prompt's length allow. Of a video all frames that the run takes at most.
    """
    if shape.vision is None:
        return 0.0, 1.0
    data, files, tokens, pieces = config.data, plan.train_data.files, 0.0, 1.0
    if not all(file.has_images is False for file in files):
        tokens = assumed.images_per_prompt * (data.max_pixels or math.inf) / shape.vision.pixels_per_token
    if any(file.has_videos for file in files):
        pairs = assumed.videos_per_prompt * data.video_max_frames / 2
        tokens += pairs * data.video_max_pixels / shape.vision.pixels_per_token
        pieces = max(1.0, pairs)
    return min(tokens, data.max_prompt_length) * shape.vision.merge**2, pieces


def _judge(
    config: RunConfig, shape: ModelShape, memory: Plan, gpu: Gpu, assumed: Assumptions
) -> tuple[list[str], list[str]]:
    """Return what does not fit and what is tight, a line each with the remedy."""
    problems, warnings = [], []
    size = gpu.memory_gb * GB
    remedies = {
        "learning": "fewer responses a micro-batch (worker.actor.micro_batch_size_per_device_*), "
        "worker.actor.offload.offload_optimizer=true, worker.rollout.sleep=true, or more GPUs",
        "sampling": "a smaller worker.rollout.gpu_memory_utilization, "
        "worker.actor.offload.offload_optimizer=true, or more GPUs",
    }
    for moment, parts in (("learning", memory.learning), ("sampling", memory.sampling)):
        total = sum(parts.values())
        if total > size:
            problems.append(f"{moment} takes {total / GB:.1f} of {gpu.memory_gb:g} GB: {remedies[moment]}")
        elif total > 0.92 * size:
            warnings.append(f"{moment} leaves {(size - total) / GB:.1f} GB: {remedies[moment]}")
    longest = config.data.max_prompt_length + config.data.max_response_length
    if memory.cache_tokens is not None:
        if memory.cache_tokens < longest:
            problems.append(
                f"vLLM's cache holds {max(0, int(memory.cache_tokens)):,} tokens, the longest response needs "
                f"{longest:,}: a larger worker.rollout.gpu_memory_utilization or tensor_parallel_size"
            )
        elif memory.cache_tokens < longest * min(config.worker.rollout.max_num_seqs, 32):
            warnings.append(
                f"vLLM's cache holds {memory.cache_tokens / longest:.0f} of the longest responses at once: "
                "a larger worker.rollout.gpu_memory_utilization or tensor_parallel_size samples faster"
            )
    host = memory.host_per_rank * config.trainer.n_gpus_per_node
    if assumed.host_memory_gb is not None and host > assumed.host_memory_gb * GB:
        problems.append(
            f"offloading and the copy for checkpoints take {host / GB:.0f} of {assumed.host_memory_gb:g} GB of a "
            "node's host memory: switch it off, or set trainer.async_save=false"
        )
    return problems, warnings


def in_words(found: Estimate) -> str:
    """Write the tables."""
    shape, memory = found.shape, found.memory
    active = f"{shape.num_active / 1e9:.2f} active a token, " if shape.experts is not None else ""
    lines = [
        f"estimated, not measured: {shape.name}, {shape.num_parameters / 1e9:.2f} billion parameters, {active}"
        f"{found.world_size} x {found.gpu.name} of {found.gpu.memory_gb:g} GB ({found.gpu.source})",
        f"family: {found.family}",
        "",
    ]
    for moment, parts in (("while the actor learns", memory.learning), ("when vLLM starts", memory.sampling)):
        if parts:
            lines += _table(f"GB of a GPU {moment}", {name: size / GB for name, size in parts.items()}, ".2f")
    if memory.host_per_rank:
        lines += [f"host memory: {memory.host_per_rank / GB:.1f} GB a rank", ""]
    if memory.cache_tokens is not None:
        lines += [f"vLLM's cache: {max(0, int(memory.cache_tokens)):,} tokens an engine", ""]
    lines += _table("seconds of a step", found.seconds, ".1f")
    shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.of_passes.items())
    lines += [f"of update_actor: {shares}", f"largest doubt: {found.doubt}", ""]
    for name, count in found.refresh.items():
        lines.append(
            f"curriculum_refresh={name}: {count:,.0f} responses a step beside training's {found.responses_per_step:,} "
            f"({count / found.responses_per_step:.0%}), {found.refresh_seconds[name]:.1f} s"
        )
    lines += [f"note: {line}" for line in found.untested]
    lines += [f"does not fit: {problem}" for problem in found.problems]
    lines += [f"tight: {warning}" for warning in found.warnings]
    if not found.problems:
        lines.append("fits")
    return "\n".join(lines) + "\n"


def _table(title: str, rows: dict[str, float], form: str) -> list[str]:
    width = max(len(name) for name in (*rows, "together"))
    shown = [f"  {name:<{width}}  {value:>9{form}}" for name, value in rows.items() if value]
    return [title, *shown, f"  {'together':<{width}}  {sum(rows.values()):>9{form}}", ""]
