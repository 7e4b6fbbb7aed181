"""What must hold of a configuration before any model is loaded: ranges, choices, batch arithmetic, input files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr1_ds.config import CriticConfig, LoraConfig, RunConfig
from mmr1_ds.config_critic import resolved_critic
from mmr1_ds.config_ranges import check_choices, check_ranges, value_at
from mmr1_ds.config_servers import check_servers
from mmr1_ds.curriculum.scores import canonical_metric, check_metrics
from mmr1_ds.engine.kl_controller import MOST_ERROR
from mmr1_ds.errors import UserError
from mmr1_ds.input_files import (
    DataSummary,
    check_data,
    check_format_prompt,
    check_model,
    check_model_path,
    check_output_folder,
    check_reward,
)
from mmr1_ds.rewards.loading import check_reward_config


@dataclass(frozen=True)
class BatchPlan:
    """What a step is made of, in numbers that all divide."""

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
    notes: tuple[str, ...]  # what a reader of the plan should know, one line each

    @property
    def responses_per_step(self) -> int:
        return self.prompts_per_step * self.responses_per_prompt


def check_config(config: RunConfig, world_size: int) -> BatchPlan:
    """Check everything that can be checked without a model, for a launch of `world_size` ranks.

    Raises: UserError, one line, for the first thing that is wrong.
    """
    check_choices(config)
    check_ranges(config)
    _check_algorithm(config)
    _check_curriculum(config)
    _check_lengths(config)
    _check_validation(config)
    _check_ranks(config, world_size)
    check_servers(config)
    _check_batches(config, world_size)
    check_model(config.worker.actor.model)
    _check_lora(config.worker.actor.model.lora)
    _check_critic(config, world_size)
    check_reward(config.worker.reward)
    check_reward_config(config.worker.reward)
    check_format_prompt(config.data)
    check_output_folder(run_directory(config), "trainer.run_dir")
    check_output_folder(checkpoint_directory(config), "trainer.save_checkpoint_path")
    checkpoint = config.trainer.load_checkpoint_path
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise UserError(f"trainer.load_checkpoint_path: no such folder {checkpoint!r}; give a global_step_N folder")
    train_data = check_data(config.data, "train_files")
    val_data = check_data(config.data, "val_files") if config.data.val_files else None
    if config.trainer.val_only and val_data is None:
        raise UserError("trainer.val_only=true needs data.val_files; it is empty")
    plan = _plan(config, world_size, train_data, val_data)
    warmup = config.trainer.critic_warmup
    if plan.total_steps is not None and 0 < plan.total_steps <= warmup:
        raise UserError(f"trainer.critic_warmup={warmup} leaves the actor none of the run's {plan.total_steps} steps")
    return plan


def total_training_steps(config: RunConfig, num_prompts: int) -> int:
    """Steps of the whole run: trainer.max_steps, or total_episodes times P // B, but at least 1 an episode."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    return config.trainer.total_episodes * max(1, num_prompts // config.data.rollout_batch_size)


def run_directory(config: RunConfig) -> Path:
    """Where everything of the run lies: trainer.run_dir, or runs/<experiment_name>."""
    trainer = config.trainer
    return Path(trainer.run_dir) if trainer.run_dir else Path("runs") / trainer.experiment_name


def checkpoint_directory(config: RunConfig) -> Path:
    """Where the checkpoints lie: trainer.save_checkpoint_path, or checkpoints/ in the run directory."""
    path = config.trainer.save_checkpoint_path
    return Path(path) if path else run_directory(config) / "checkpoints"


def _check_algorithm(config: RunConfig) -> None:
    algorithm, actor = config.algorithm, config.worker.actor
    if algorithm.kl_type == "adaptive" and not algorithm.disable_kl:
        _check_adaptive_kl(config)
    if actor.loss_scale_factor is not None and actor.loss_avg_mode != "seq_sum":
        raise UserError(
            f"worker.actor.loss_scale_factor={actor.loss_scale_factor:g} is of worker.actor.loss_avg_mode=seq_sum, "
            f"which is {actor.loss_avg_mode}; set the mode or leave the factor out"
        )
    if not config.data.shuffle and config.data.sampling_strategy == "shuffle":
        raise UserError(
            "data.shuffle=false contradicts data.sampling_strategy=shuffle; set data.sampling_strategy=sequential"
        )
    if not config.trainer.experiment_name:
        raise UserError("trainer.experiment_name is empty; it names the run directory")


def _check_adaptive_kl(config: RunConfig) -> None:
    algorithm = config.algorithm
    for key in ("kl_coef", "kl_target", "kl_horizon"):
        if value_at(config, f"algorithm.{key}") == 0:
            raise UserError(f"algorithm.{key} must be over 0 with algorithm.kl_type=adaptive, got 0; or set fixed")
    responses = config.data.rollout_batch_size * config.worker.rollout.n
    if algorithm.kl_horizon <= MOST_ERROR * responses:
        raise UserError(
            f"algorithm.kl_horizon={algorithm.kl_horizon:g} is too short for {responses} responses a step: one step "
            f"may change kl_coef by {MOST_ERROR:g} * {responses} / {algorithm.kl_horizon:g}, its sign with it; "
            f"set it to {10 * responses} or more"
        )


def _check_curriculum(config: RunConfig) -> None:
    data, algorithm = config.data, config.algorithm
    low, high = algorithm.filter_low, algorithm.filter_high
    if low is not None and high is not None and not low < high:
        raise UserError(f"algorithm.filter_low={low} must be below algorithm.filter_high={high}")
    check_metrics(data.curriculum_metrics, data.curriculum_metric_weights)
    names = [canonical_metric(name) for name in data.curriculum_metrics]
    if len(set(names)) < len(names):
        raise UserError(
            f"data.curriculum_metrics lists {next(name for name in names if names.count(name) > 1)} twice, "
            f"got {data.curriculum_metrics}; give each metric once, with one weight"
        )
    for name, weight in zip(data.curriculum_metrics, data.curriculum_metric_weights, strict=True):
        if weight < 0:
            raise UserError(
                f"data.curriculum_metric_weights must be >= 0, got {weight} for {name}: "
                "every metric here is higher for prompts to sample more (self-bleu counts as 1 - self-BLEU)"
            )


def _unused(config: RunConfig) -> list[str]:
    """A note for each key that was set and that the run's algorithm does not read."""
    algorithm, actor = config.algorithm, config.worker.actor
    estimator, loss = algorithm.adv_estimator, actor.loss_type
    read_by = {
        "algorithm.gamma": (estimator in ("reinforce_plus_plus", "gae"), f"algorithm.adv_estimator={estimator}"),
        "algorithm.lam": (estimator == "gae", f"algorithm.adv_estimator={estimator}"),
        "algorithm.filter_low": (algorithm.online_filtering, "algorithm.online_filtering=false"),
        "algorithm.filter_high": (algorithm.online_filtering, "algorithm.online_filtering=false"),
        "worker.actor.tau_positive": (loss == "sapo", f"worker.actor.loss_type={loss}"),
        "worker.actor.tau_negative": (loss == "sapo", f"worker.actor.loss_type={loss}"),
        "worker.ref.offload.offload_optimizer": (False, "a reference, which has no optimiser"),
    }
    default = RunConfig()
    return [
        f"{key} is not used with {reason}"
        for key, (is_read, reason) in read_by.items()
        if not is_read and value_at(config, key) != value_at(default, key)
    ]


def _check_lora(lora: LoraConfig) -> None:
    """The kinds of its values; whether the model has the layers shows once it is loaded."""
    if lora.rank == 0:
        return
    key, targets, exclude = "worker.actor.model.lora", lora.target_modules, lora.exclude_modules
    if not targets or not _is_text_or_list(targets):
        raise UserError(f"{key}.target_modules must be all-linear or a list like [q_proj,v_proj], got {targets}")
    if exclude is not None and not _is_text_or_list(exclude):
        raise UserError(f"{key}.exclude_modules must be a regex, a list like [gate_proj], or null, got {exclude}")
    if isinstance(exclude, str):
        try:
            re.compile(exclude)
        except re.error as error:
            raise UserError(f"{key}.exclude_modules={exclude} is no regex: {error}; write it like .*visual.*") from None


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _check_validation(config: RunConfig) -> None:
    sampling = config.worker.rollout.val_override_config
    if sampling.temperature == 0 and sampling.n > 1:
        raise UserError(
            f"worker.rollout.val_override_config: n={sampling.n} greedy answers (temperature=0) would all be the same; "
            "set n=1 or a temperature over 0"
        )


def _check_lengths(config: RunConfig) -> None:
    data, rollout = config.data, config.worker.rollout
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        raise UserError(f"data.min_pixels={data.min_pixels} is over data.max_pixels={data.max_pixels}")
    length = data.max_prompt_length + data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < length:
        raise UserError(
            f"worker.rollout.max_model_len={rollout.max_model_len} is under data.max_prompt_length + "
            f"data.max_response_length = {data.max_prompt_length} + {data.max_response_length} = {length}; "
            "raise it or leave it out"
        )
    longest = rollout.max_model_len or length
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < longest:
        raise UserError(
            f"worker.rollout.max_num_batched_tokens={rollout.max_num_batched_tokens} is under the longest sequence "
            f"({longest} tokens), which worker.rollout.enable_chunked_prefill=false does not allow; "
            "raise it or allow chunked prefill"
        )


def _check_ranks(config: RunConfig, world_size: int) -> None:
    trainer = config.trainer
    asked = trainer.nnodes * trainer.n_gpus_per_node
    if asked != world_size:
        raise UserError(
            f"trainer.nnodes * trainer.n_gpus_per_node = {trainer.nnodes} * {trainer.n_gpus_per_node} = {asked}, "
            f"but {_count(world_size, 'process was', 'processes were')} started; start {asked} (deepspeed --num_gpus "
            f"{trainer.n_gpus_per_node}), or set trainer.n_gpus_per_node={max(1, world_size // trainer.nnodes)}"
        )
    _check_sequence_parallel(config, world_size)
    if config.worker.actor.offload_states and config.worker.rollout.engine == "hf":
        raise UserError(
            "worker.actor.offload_states=true moves the weights away that worker.rollout.engine=hf samples from; "
            "set it to false, or use vllm"
        )
    parallel = config.worker.rollout.tensor_parallel_size
    if parallel > 1 and config.worker.rollout.engine == "hf":
        raise UserError(
            f"worker.rollout.tensor_parallel_size={parallel} is vLLM's, worker.rollout.engine=hf has none; set it to 1"
        )
    if world_size % parallel and config.worker.rollout.engine != "server":
        raise UserError(
            f"worker.rollout.tensor_parallel_size must divide the ranks: {world_size} % {parallel} = "
            f"{world_size % parallel}; set it to 1"
        )


def _check_sequence_parallel(config: RunConfig, world_size: int) -> None:
    size = config.worker.actor.ulysses_size
    if size == 1:
        return
    key = f"worker.actor.ulysses_size={size}"
    if world_size % size:
        raise UserError(f"{key} must divide the ranks: {world_size} % {size} = {world_size % size}; set it to 1")
    if not config.worker.actor.padding_free:
        raise UserError(f"{key} needs packed sequences; set worker.actor.padding_free=true")
    if config.worker.rollout.engine == "hf":
        raise UserError(f"{key}: transformers cannot generate with cut sequences; set worker.rollout.engine=vllm")
    if config.algorithm.adv_estimator == "gae":
        raise UserError(f"{key}: the critic of algorithm.adv_estimator=gae does not cut sequences; set it to 1")


def _check_batches(config: RunConfig, world_size: int) -> None:
    actor = config.worker.actor
    prompts, batch, n = config.data.rollout_batch_size, actor.global_batch_size, config.worker.rollout.n
    micro = actor.micro_batch_size_per_device_for_update
    if prompts % batch:
        raise UserError(
            "data.rollout_batch_size must be a multiple of worker.actor.global_batch_size: "
            f"{prompts} % {batch} = {prompts % batch}; set data.rollout_batch_size to {_multiples(prompts, batch)}"
        )
    if batch % world_size:
        raise UserError(
            "worker.actor.global_batch_size must be a multiple of the ranks: "
            f"{batch} % {world_size} = {batch % world_size}; set it to {_multiples(batch, world_size)}"
        )
    responses = batch * n // world_size
    if responses % micro:
        raise UserError(
            "a rank's responses an optimiser step, worker.actor.global_batch_size * worker.rollout.n / ranks, must be "
            "a multiple of worker.actor.micro_batch_size_per_device_for_update: "
            f"{batch} * {n} / {world_size} = {responses}, {responses} % {micro} = {responses % micro}; "
            f"set the micro-batch to {_largest_divisor(responses, micro)}"
        )


def _check_critic(config: RunConfig, world_size: int) -> None:
    if config.algorithm.adv_estimator != "gae":
        if config.trainer.critic_warmup:
            raise UserError(
                f"trainer.critic_warmup={config.trainer.critic_warmup} needs a critic, which "
                f"algorithm.adv_estimator={config.algorithm.adv_estimator} has not; set it to 0 or the estimator to gae"
            )
        return
    critic, n = resolved_critic(config), config.worker.rollout.n
    batch, micro = critic.global_batch_size, critic.micro_batch_size_per_device_for_update
    assert batch is not None and micro is not None
    prompts, of_actor = config.data.rollout_batch_size, config.worker.actor.global_batch_size
    if batch % of_actor or prompts % batch:
        raise UserError(
            f"worker.critic.global_batch_size={batch} must be a multiple of worker.actor.global_batch_size={of_actor} "
            f"and divide data.rollout_batch_size={prompts}: ranks share the batch out by the actor's steps; "
            "leave it out to take the actor's"
        )
    responses = batch * n // world_size
    if responses % micro:
        raise UserError(
            "a rank's responses an optimiser step of the critic, worker.critic.global_batch_size * worker.rollout.n / "
            "ranks, must be a multiple of worker.critic.micro_batch_size_per_device_for_update: "
            f"{batch} * {n} / {world_size} = {responses}, {responses} % {micro} = {responses % micro}; "
            f"set the micro-batch to {_largest_divisor(responses, micro)}"
        )
    check_model_path(critic.model.model_path, "worker.critic.model.model_path")


def _multiples(value: int, of: int) -> str:
    below = value // of * of
    return f"{below} or {below + of}" if below else str(of)


def _largest_divisor(value: int, at_most: int) -> int:
    return next(divisor for divisor in range(min(at_most, value), 0, -1) if value % divisor == 0)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _plan(config: RunConfig, world_size: int, train_data: DataSummary, val_data: DataSummary | None) -> BatchPlan:
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
    notes = []
    rollout, trainer, size = config.worker.rollout, config.trainer, train_data.num_rows
    if size is not None and size < config.data.rollout_batch_size:
        notes.append(
            f"the data has {size} prompts, a step takes data.rollout_batch_size={config.data.rollout_batch_size}: "
            "each step repeats prompts"
        )
    if rollout.top_p < 1 or rollout.top_k != -1:
        notes.append(
            f"worker.rollout.top_p={rollout.top_p:g}, top_k={rollout.top_k} cut the sampled distribution; "
            "the actor's log-probabilities are of the whole one"
        )
    algorithm = config.algorithm
    if algorithm.kl_penalty == "kl" and algorithm.use_kl_loss and not algorithm.disable_kl:
        notes.append(
            "algorithm.kl_penalty=kl in the loss: its gradient is zero on average, whatever the policy; "
            "mse has the gradient of the KL (or set algorithm.use_kl_loss=false for the KL in the reward)"
        )
    if algorithm.adv_estimator != "gae" and config.worker.critic != CriticConfig():
        notes.append(f"worker.critic is not used: algorithm.adv_estimator={algorithm.adv_estimator} has no critic")
    notes += _unused(config)
    if config.worker.actor.model.lora.rank > 0 and config.worker.ref.offload.offload_params:
        notes.append("worker.ref.offload.offload_params: LoRA's reference is the actor, there is nothing to offload")
    if val_data is None and (trainer.val_freq > 0 or trainer.val_before_train):
        notes.append("data.val_files is empty: no validation")
    return notes
