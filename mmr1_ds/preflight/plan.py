"""The plan of a run in words, which a dry run prints and a real one logs before it loads anything."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmr1_ds.config import LoraConfig, RunConfig
from mmr1_ds.config.derived import checkpoint_directory, resolved_critic, run_directory, total_training_steps
from mmr1_ds.config.families import FAMILIES, describe
from mmr1_ds.curriculum.estimator import EARLY_PROBING
from mmr1_ds.curriculum.sampler import PromptSampler
from mmr1_ds.preflight.data import DataSummary, FileSummary
from mmr1_ds.preflight.deepspeed import DeepspeedConfigs
from mmr1_ds.preflight.families import untested, untested_critic
from mmr1_ds.preflight.models import model_type

_FEATURES = {
    "none": "",
    "text": "; a prior of each prompt from its text",
    "model": "; a prior of each prompt from the model's hidden state of it: one forward over the data before step 1",
}
_OPTIMISERS = {
    "adamw": "AdamW", "adamw_bf16": "AdamW with bf16 moments", "adamw_8bit": "AdamW with 8-bit moments",
    "muon": "Muon for matrices, AdamW for the rest",
}  # fmt: skip


@dataclass(frozen=True)
class BatchPlan:
    """The sizes of a step, all divisible."""

    world_size: int
    prompts_per_step: int
    responses_per_prompt: int
    optimizer_steps_per_step: int  # ppo_epochs passes over the batch, one step a global batch
    responses_per_optimizer_step: int  # over all ranks
    micro_batch_size: int  # responses a rank holds at once in the update
    micro_batches_per_rank: int  # of one optimiser step: the gradient accumulation
    experience_micro_batches_per_rank: int  # of one step, a pass for log-probabilities
    train_data: DataSummary
    val_data: DataSummary | None
    total_steps: int | None  # of the run; None while the size of the data is unknown
    notes: tuple[str, ...]  # remarks for the reader of the plan, one line each

    @property
    def responses_per_step(self) -> int:
        return self.prompts_per_step * self.responses_per_prompt


def describe_plan(
    config: RunConfig,
    plan: BatchPlan,
    engines: DeepspeedConfigs,
    on_gpu: bool,
    elsewhere: DeepspeedConfigs | None = None,
) -> str:
    """Write the plan, a line a topic.

    Args: engines: the resolved DeepSpeed configs; elsewhere: those of the same run on GPUs, where none is here.
    """
    there = engines if elsewhere is None else elsewhere
    topics = {
        "model": _model(config),
        "family": _family(config),
        "ranks": _ranks(config, plan, on_gpu, elsewhere is not None),
        "train data": "" if config.trainer.val_only else _data(plan.train_data),
        "val data": "none" if plan.val_data is None else _data(plan.val_data),
        "step": "" if config.trainer.val_only else _step(config, plan),
        "update": "" if config.trainer.val_only else _update(config, plan),
        "learning": "" if config.trainer.val_only else _learning(config),
        "run": _run(config, plan),
        "sampling": _sampling(config),
        "refresh": _refresh(config, plan),
        "rollout": _rollout(config),
        "reward": _reward(config),
        "deepspeed": _deepspeed(config, engines.actor, there.actor),
        "reference": "" if config.trainer.val_only else _reference(config, engines.reference, there.reference),
        "critic": "" if engines.critic is None else _critic(config, plan, engines.critic, there.critic or {}),
        "output": _output(config),
    }
    lines = [f"  {topic:<11} {text}" for topic, text in topics.items() if text]
    lines += [f"  {'note':<11} {note}" for note in plan.notes]
    return "\n".join([f"plan of {config.trainer.experiment_name}{_first_refresh(config, plan)}", *lines])


def _model(config: RunConfig) -> str:
    model = config.worker.actor.model
    where = "local" if os.path.exists(model.model_path or "") else "from the hub"
    tower = ", vision tower frozen" if model.freeze_vision_tower else ""
    lora = f"; {_lora(model.lora)}" if model.lora.rank > 0 else ""
    alone = ", adapters alone to vLLM" if config.worker.rollout.lora_sync == "adapters" else ""
    return f"{model.model_path} ({where}){tower}{lora}{alone}"


def _family(config: RunConfig) -> str:
    found = model_type(config.worker.actor.model)
    return "a hub model that is not in the cache: looked at when the run starts" if found is None else describe(found)


def _lora(lora: LoraConfig) -> str:
    targets = lora.target_modules
    where = targets if isinstance(targets, str) else ", ".join(targets)
    without = f" without {lora.exclude_modules}" if lora.exclude_modules else ""
    return f"LoRA of rank {lora.rank} (alpha {lora.alpha:g}) on {where}{without}, all else frozen"


def _ranks(config: RunConfig, plan: BatchPlan, on_gpu: bool, is_for_gpus: bool) -> str:
    trainer = config.trainer
    cpu = "bf16" if config.worker.actor.dtype == "bf16" else "fp32"
    device = "GPU, bf16" if on_gpu else f"CPU, {cpu} (no GPU here{'; bf16 on a GPU' if is_for_gpus else ''})"
    return f"{plan.world_size} = {trainer.nnodes} node(s) x {trainer.n_gpus_per_node}, {device}"


def _data(data: DataSummary) -> str:
    parts = "; ".join(_file(file) for file in data.files)
    total = f", {data.num_rows:,} prompts in all" if len(data.files) > 1 and data.num_rows is not None else ""
    return parts + total


def _file(file: FileSummary) -> str:
    if not file.is_local:
        return f"{file.name} (no such local path, so a hub data set: not looked at)"
    count = "not counted" if file.num_rows is None else f"{file.num_rows:,} prompts"
    seen = [kind for kind, there in (("images", file.has_images), ("videos", file.has_videos)) if there]
    shown = ", with " + " and ".join(seen) if seen else ", text only" if file.has_images is False else ""
    return f"{file.name} ({count}{shown})"


def _step(config: RunConfig, plan: BatchPlan) -> str:
    rollout = config.worker.rollout
    sizes = "" if rollout.n_min is None else f" on average ({rollout.n_min} to {rollout.n_max})"
    return (
        f"{plan.prompts_per_step} prompts x {plan.responses_per_prompt} responses{sizes} = "
        f"{plan.responses_per_step:,}; "
        f"{plan.optimizer_steps_per_step} optimiser step(s) of {config.worker.actor.global_batch_size} x "
        f"{plan.responses_per_prompt} = {plan.responses_per_optimizer_step:,} responses"
    )


def _update(config: RunConfig, plan: BatchPlan) -> str:
    actor, optim = config.worker.actor, config.worker.actor.optim
    experience = actor.micro_batch_size_per_device_for_experience
    responses = plan.responses_per_optimizer_step // plan.world_size
    found = model_type(actor.model)
    layout = "packed" if actor.padding_free and (found is None or found in FAMILIES) else "padded"
    if actor.dynamic_batching:
        longest = (config.data.max_prompt_length + config.data.max_response_length) * actor.ulysses_size
        batches = f"{responses} responses in {layout} micro-batches of up to {plan.micro_batch_size * longest:,} tokens"
        log_probs = f"up to {experience * longest:,}"
    else:
        number, size = plan.micro_batches_per_rank, plan.micro_batch_size
        batches = f"{responses} responses = {number} {layout} micro-batches of {size}"
        log_probs = f"{plan.experience_micro_batches_per_rank} of {experience} a step"
    if actor.ulysses_size > 1:
        batches += f", each computed by {actor.ulysses_size} ranks"
    return (
        f"a rank's optimiser step: {batches}; log-probabilities: {log_probs}; "
        f"{_OPTIMISERS[optim.strategy]}, lr {optim.lr:g} {optim.lr_scheduler_type}"
    )


def _learning(config: RunConfig) -> str:
    algorithm, actor = config.algorithm, config.worker.actor
    loss = "clipped PPO" if actor.loss_type == "default" else actor.loss_type
    mean = {"token": "mean over tokens", "seq": "mean over responses", "seq_sum": "sum over a constant"}
    estimator = algorithm.adv_estimator
    if estimator == "gae":
        estimator += f" (gamma {algorithm.gamma:g}, lambda {algorithm.lam:g})"
    text = f"{estimator} advantages; {loss} loss, {mean.get(actor.loss_avg_mode, actor.loss_avg_mode)}"
    if algorithm.rollout_is == "none":
        return text
    return f"{text}; importance weights by {algorithm.rollout_is}, up to {algorithm.rollout_is_threshold:g}"


def _run(config: RunConfig, plan: BatchPlan) -> str:
    trainer = config.trainer
    if trainer.val_only:
        return "validation only"
    if trainer.max_steps is not None:
        return f"{counted(trainer.max_steps, 'step')} (trainer.max_steps)"
    if plan.total_steps is None:
        return f"{counted(trainer.total_episodes, 'episode')}; steps are known once the data is read"
    steps = counted(plan.total_steps, "step")
    return f"{counted(trainer.total_episodes, 'episode')} = {steps} (before over-long prompts are dropped)"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number and its noun: 1 step, 1,000 steps."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _sampling(config: RunConfig) -> str:
    data = config.data
    if config.trainer.val_only:
        return ""
    if data.sampling_strategy != "curriculum":
        return data.sampling_strategy
    sampler = PromptSampler(1, data.rollout_batch_size, data.seed, "curriculum", data.curriculum_mixture_ratio)
    score = " + ".join(
        f"{weight:g} {name}"
        for name, weight in zip(data.curriculum_metrics, data.curriculum_metric_weights, strict=True)
    )
    rule = {
        "proportional": "",
        "candidates": f", the best of {data.curriculum_candidates} times as many",
        "posterior": ", the best by a draw from each belief",
    }[data.curriculum_draw]
    others = data.rollout_batch_size - sampler.num_weighted
    return (
        f"curriculum: {sampler.num_weighted} of {data.rollout_batch_size} prompts a step by score ({score}){rule}"
        + (f"; the other {others} in turn" if others else "")
        + (f"; momentum {data.curriculum_momentum:g}" if data.curriculum_refresh == "full" else "")
    )


def _refresh(config: RunConfig, plan: BatchPlan) -> str:
    data = config.data
    if data.sampling_strategy != "curriculum" or config.trainer.val_only:
        return ""
    if data.curriculum_refresh == "online":
        fraction = data.curriculum_probe_fraction
        early = f"{EARLY_PROBING * fraction:.0%} early on"
        probes = f", and {fraction:.0%} more over the run ({early}) on prompts long unseen"
        features = _FEATURES[data.curriculum_features]
        if data.curriculum_prior is not None:
            features += f"; begins from the pass rates in {data.curriculum_prior}"
        return f"online: from the training responses{probes if fraction > 0 else ''}{features}"
    size = plan.train_data.num_rows
    every = f"every {counted(data.curriculum_update_freq, 'step')}" if data.curriculum_update_freq else "every epoch"
    if size is None:
        return f"{every}: each prompt of the data x {data.curriculum_rollout_n} responses"
    steps = data.curriculum_update_freq or max(1, size // data.rollout_batch_size)
    extra, training = size * data.curriculum_rollout_n, steps * plan.responses_per_step
    return (
        f"{every}: {size:,} prompts x {data.curriculum_rollout_n} = {extra:,} responses, "
        f"{extra / training:.0%} of the {training:,} that training takes meanwhile"
    )


def _first_refresh(config: RunConfig, plan: BatchPlan) -> str:
    """What a full refresh rolls out before the first step, which may take longer than a day of training."""
    data = config.data
    if data.sampling_strategy != "curriculum" or config.trainer.val_only or data.curriculum_refresh != "full":
        return ""
    size, n = plan.train_data.num_rows, data.curriculum_rollout_n
    number = f"each prompt of the data x {n}" if size is None else f"{size * n:,}"
    share = "" if size is None else f", as many as {size * n / plan.responses_per_step:.1f} steps of training"
    return f": before step 1 a full refresh of {number} responses{share}; data.curriculum_refresh=online needs none"


def _rollout(config: RunConfig) -> str:
    rollout, data = config.worker.rollout, config.data
    temperature, most_tokens, answers = rollout.temperature, data.max_response_length, ""
    if config.trainer.val_only:
        sampling = rollout.val_override_config
        temperature, most_tokens = sampling.temperature, sampling.max_tokens or most_tokens
        answers = f"{sampling.n} answer(s) a prompt, "
    text = (
        f"engine {rollout.engine}, {answers}temperature {temperature:g}, up to {data.max_prompt_length} + "
        f"{most_tokens} tokens, tensor parallel {rollout.tensor_parallel_size}"
    )
    if rollout.engine != "server":
        return text + (", prompts from one queue" if rollout.shared_queue and rollout.engine != "hf" else "")
    servers = f"{rollout.num_servers} started on {rollout.server_host}"
    if rollout.server_urls:
        servers = f"{len(rollout.server_urls)} already running"
    swap = "between requests" if rollout.weight_swap == "boundary" else "in the middle of responses"
    ahead = f"up to {rollout.max_staleness_steps} step(s) ahead, new weights {swap}"
    return f"{text}; servers: {servers}, {ahead if rollout.max_staleness_steps else 'in turn with training'}"


def _reward(config: RunConfig) -> str:
    reward = config.worker.reward
    workers = counted(reward.num_workers, "process", "processes")
    return f"{reward.reward_function}, {workers} a rank, {reward.timeout_seconds:g} s a response"


def _deepspeed(config: RunConfig, actor: Mapping[str, Any], on_gpu: Mapping[str, Any]) -> str:
    here, there = ("on" if one["bf16"]["enabled"] else "off" for one in (actor, on_gpu))
    types = f"ZeRO-{actor['zero_optimization']['stage']}, bf16 {here}{'' if here == there else ' here'}"
    if config.trainer.val_only and config.worker.actor.model.lora.rank == 0:
        return f"{types}, no optimiser"
    return (
        f"{types}, {_offload(actor, on_gpu)}; "
        f"train_batch_size {actor['train_batch_size']:,} = {actor['train_micro_batch_size_per_gpu']} x "
        f"{actor['gradient_accumulation_steps']} x ranks"
    )


def _offload(engine: Mapping[str, Any], on_gpu: Mapping[str, Any]) -> str:
    """What is offloaded, or would be by the same run on GPUs, where there is host memory beside the device's."""
    zero, there = engine["zero_optimization"], on_gpu["zero_optimization"]
    offloaded = _offloaded(there)
    return f"offload: {offloaded}" + ("" if offloaded == _offloaded(zero) else " (on a GPU)")


def _offloaded(zero: Mapping[str, Any]) -> str:
    parts = [
        f"{part} on {zero[key]['device']}"
        for key, part in (("offload_param", "parameters"), ("offload_optimizer", "optimiser"))
        if zero.get(key, {}).get("device", "none") != "none"
    ]
    return " and ".join(parts) or "none"


def _reference(config: RunConfig, reference: Mapping[str, Any], on_gpu: Mapping[str, Any]) -> str:
    if config.algorithm.disable_kl:
        return "none (algorithm.disable_kl)"
    algorithm = config.algorithm
    place = "in the loss" if algorithm.use_kl_loss else "off the reward"
    adaptive = f", adapted to hold {algorithm.kl_target:g}" if algorithm.kl_type == "adaptive" else ""
    model = f"ZeRO-3, {_offload(reference, on_gpu)}"
    if config.worker.actor.model.lora.rank > 0:
        model = "the actor with its adapters off, no second model"
    return f"{model}; KL ({algorithm.kl_penalty}) {algorithm.kl_coef:g} {place}{adaptive}"


def _critic(config: RunConfig, plan: BatchPlan, deepspeed: Mapping[str, Any], on_gpu: Mapping[str, Any]) -> str:
    critic, warmup = resolved_critic(config), config.trainer.critic_warmup
    micro = critic.micro_batch_size_per_device_for_update
    assert critic.global_batch_size is not None and micro is not None
    at_once = f"{micro} at once a rank"
    if critic.dynamic_batching:
        longest = config.data.max_prompt_length + config.data.max_response_length
        at_once = f"up to {micro * longest:,} tokens at once a rank"
    steps = plan.prompts_per_step // critic.global_batch_size * critic.ppo_epochs
    start = f"; alone for the first {warmup} step(s)" if warmup else ""
    return (
        f"{critic.model.model_path} with a value head; ZeRO-3, {_offload(deepspeed, on_gpu)}; "
        f"{steps} optimiser step(s) of {deepspeed['train_batch_size']:,} responses, {at_once}; "
        f"{_OPTIMISERS[critic.optim.strategy]}, lr {critic.optim.lr:g} {critic.optim.lr_scheduler_type}{start}"
    )


def _output(config: RunConfig) -> str:
    trainer = config.trainer
    if trainer.val_only:
        newest = f"N steps done by the newest checkpoint in {checkpoint_directory(config)}, 0 without one"
        rates = "" if trainer.pass_rates is None else f"; pass rates in {trainer.pass_rates}"
        return f"{run_directory(config) / 'eval' / 'step_N'}, {newest}{rates}"
    saves = "every tenth of the run" if trainer.save_freq is None else f"every {counted(trainer.save_freq, 'step')}"
    if trainer.save_freq == -1:
        saves = "after the last step"
    kept = "all kept" if trainer.save_limit == -1 else f"the last {trainer.save_limit} kept"
    if trainer.best_metric and config.data.val_files and trainer.val_freq > 0:
        kept += f" and the best by {trainer.best_metric}"
    return f"{run_directory(config)}; checkpoints in {checkpoint_directory(config)} {saves}, {kept}"


def batch_plan(config: RunConfig, world_size: int, train_data: DataSummary, val_data: DataSummary | None) -> BatchPlan:
    actor, n = config.worker.actor, config.worker.rollout.n
    prompts = config.data.rollout_batch_size
    responses = actor.global_batch_size * n
    known = train_data.num_rows is not None or config.trainer.max_steps is not None
    experience = actor.micro_batch_size_per_device_for_experience
    return BatchPlan(
        world_size=world_size,
        prompts_per_step=prompts,
        responses_per_prompt=n,
        optimizer_steps_per_step=prompts // actor.global_batch_size * actor.ppo_epochs,
        responses_per_optimizer_step=responses,
        micro_batch_size=actor.micro_batch_size_per_device_for_update,
        micro_batches_per_rank=responses // world_size // actor.micro_batch_size_per_device_for_update,
        experience_micro_batches_per_rank=math.ceil(prompts * n // world_size / experience),
        train_data=train_data,
        val_data=val_data,
        total_steps=total_training_steps(config, train_data.num_rows or 0) if known else None,
        notes=tuple(_notes(config, train_data, val_data)),
    )


def _notes(config: RunConfig, train_data: DataSummary, val_data: DataSummary | None) -> list[str]:
    found = model_type(config.worker.actor.model)
    notes = [*([] if found is None else untested(config, found)), *untested_critic(config)]
    rollout, trainer, size = config.worker.rollout, config.trainer, train_data.num_rows
    if size is not None and size < config.data.rollout_batch_size and not trainer.val_only:
        notes.append(
            f"the data has {size} prompts, a step takes data.rollout_batch_size="
            f"{config.data.rollout_batch_size}: each step repeats prompts"
        )
    bent = {
        "top_p": rollout.top_p < 1, "top_k": rollout.top_k != -1, "min_p": rollout.min_p > 0,
        "repetition_penalty": rollout.repetition_penalty != 1,
    }  # fmt: skip
    if any(bent.values()) and rollout.logprobs == "processed":
        keys = ", ".join(f"{key}={getattr(rollout, key):g}" for key, is_set in bent.items() if is_set)
        notes.append(
            f"worker.rollout.{keys}: the sampled distribution is not the whole one, to which the actor's "
            "log-probabilities belong, which biases importance weights: set "
            "worker.rollout.logprobs=raw (not with engine=server)"
        )
    algorithm = config.algorithm
    if algorithm.kl_penalty == "kl" and algorithm.use_kl_loss and not algorithm.disable_kl:
        notes.append(
            "algorithm.kl_penalty=kl in the loss: its gradient is zero on average, whatever the policy; "
            "mse has the gradient of the KL (or set algorithm.use_kl_loss=false for the KL in the reward)"
        )
    if config.worker.ref.offload.offload_optimizer:
        notes.append("worker.ref.offload.offload_optimizer is not used: a reference has no optimiser")
    if trainer.save_model_only:
        notes.append("trainer.save_model_only: checkpoints are weights alone, a run that is stopped begins anew")
    if config.worker.actor.model.lora.rank > 0 and config.worker.ref.offload.offload_params:
        notes.append("worker.ref.offload.offload_params: LoRA's reference is the actor: nothing to offload")
    if val_data is None and (trainer.val_freq > 0 or trainer.val_before_train):
        notes.append("data.val_files is empty: no validation")
    return notes
