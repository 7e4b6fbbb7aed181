"""Checks of a configuration before any model is loaded: ranges, choices, batch arithmetic, input files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmr1_ds.config.derived import checkpoint_directory, prompt_features, resolved_critic, run_directory
from mmr1_ds.config.ranges import MOST_ERROR, check_choices, check_ranges, value_at
from mmr1_ds.config.schema import DataConfig, LoraConfig, RunConfig, TrainerConfig, names_a_file
from mmr1_ds.curriculum.known_rates import read_known_rates
from mmr1_ds.curriculum.metric_names import canonical_metric, check_metrics
from mmr1_ds.curriculum.mixture import quotas
from mmr1_ds.data.sources import list_names
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.data import check_data
from mmr1_ds.preflight.families import NO_ADAPTERS_BESIDE_EXPERTS, check_family
from mmr1_ds.preflight.files import check_format_prompt, check_output_folder
from mmr1_ds.preflight.functions import check_functions, check_reward
from mmr1_ds.preflight.group_sizes import check_group_sizes
from mmr1_ds.preflight.lengths import check_lengths, check_positions
from mmr1_ds.preflight.models import check_model, check_model_path, model_has_experts, model_type
from mmr1_ds.preflight.plan import BatchPlan, batch_plan, counted
from mmr1_ds.preflight.router_replay import check_router_replay
from mmr1_ds.preflight.servers import check_servers
from mmr1_ds.rewards.loading import check_reward_config, reward_weights

_MAX_ADAPTER_RANK, _VLLM_MIN_TEMPERATURE = 512, 0.01  # vLLM's


def check_config(config: RunConfig, world_size: int) -> BatchPlan:
    """Check everything that can be checked without a model, for a launch of `world_size` ranks.

    Raises: UserError, one line, for the first thing that is wrong.
    """
    check_choices(config)
    check_ranges(config)
    _check_algorithm(config)
    _check_curriculum(config)
    check_lengths(config)
    _check_validation(config)
    _check_ranks(config, world_size)
    check_servers(config)
    check_group_sizes(config)
    _check_batches(config, world_size)
    check_model(config.worker.actor.model)
    check_positions(config)
    if (family := model_type(config.worker.actor.model)) is not None:
        check_family(config, family)
    _check_lora(config.worker.actor.model.lora)
    check_lora_sync(config)
    _check_reference(config)
    check_router_replay(config)
    _check_critic(config, world_size)
    check_functions(config)
    _check_gdpo(config)
    check_reward(config.worker.reward)
    check_reward_config(config.worker.reward)
    check_format_prompt(config.data)
    check_output_folder(run_directory(config), "trainer.run_dir")
    check_output_folder(checkpoint_directory(config), "trainer.save_checkpoint_path")
    checkpoint = config.trainer.load_checkpoint_path
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise UserError(f"trainer.load_checkpoint_path: no such folder {checkpoint!r}; give a global_step_N folder")
    if config.trainer.val_only and not config.data.val_files:
        raise UserError("trainer.val_only=true needs data.val_files, which is empty; set it")
    _check_best(config)
    if config.trainer.pass_rates is not None and not config.trainer.val_only:
        raise UserError(
            f"trainer.pass_rates={config.trainer.pass_rates} is for a validation alone; start mmr1-ds eval, or leave "
            "it out"
        )
    if config.data.curriculum_prior is not None and not config.trainer.val_only:
        is_resumed = config.trainer.resume and (checkpoint_directory(config) / "latest").is_file()
        _check_prior(config.data, config.data.curriculum_prior, is_resumed)
    train_key = "val_files" if config.trainer.val_only else "train_files"
    model, engine = config.worker.actor.model, config.worker.rollout.engine
    train_data = check_data(config.data, train_key, model, engine)
    _check_weights(config.data)
    val_data = check_data(config.data, "val_files", model, engine) if config.data.val_files else None
    plan = batch_plan(config, world_size, train_data, val_data)
    warmup = config.trainer.critic_warmup
    if plan.total_steps is not None and 0 < plan.total_steps <= warmup:
        raise UserError(f"trainer.critic_warmup={warmup} leaves the actor none of {plan.total_steps} steps; lower it")
    last = max(config.trainer.profile_steps, default=0)
    if plan.total_steps is not None and last > plan.total_steps:
        raise UserError(f"trainer.profile_steps has {last}, the run has {plan.total_steps} steps; name earlier ones")
    return plan


def _check_algorithm(config: RunConfig) -> None:
    algorithm, actor = config.algorithm, config.worker.actor
    if algorithm.kl_type == "adaptive" and not algorithm.disable_kl:
        _check_adaptive_kl(config)
    if algorithm.rollout_mask not in ("none", "k3") and algorithm.rollout_mask_low >= algorithm.rollout_mask_high:
        raise UserError(
            f"algorithm.rollout_mask_low={algorithm.rollout_mask_low:g} must be below "
            f"algorithm.rollout_mask_high={algorithm.rollout_mask_high:g}; lower it"
        )
    if algorithm.overlong_buffer > config.data.max_response_length:
        raise UserError(
            f"algorithm.overlong_buffer={algorithm.overlong_buffer} is over data.max_response_length="
            f"{config.data.max_response_length}; lower it"
        )
    sums = actor.loss_avg_mode == "seq_sum" or names_a_file(actor.loss_avg_mode)
    if actor.loss_scale_factor is not None and not sums:
        raise UserError(
            f"worker.actor.loss_scale_factor={actor.loss_scale_factor:g} needs "
            f"worker.actor.loss_avg_mode=seq_sum, got {actor.loss_avg_mode}; set the mode or leave the factor out"
        )
    is_one_step = actor.ppo_epochs == 1 and config.data.rollout_batch_size == actor.global_batch_size
    if actor.loss_type == "kl_cov" and is_one_step:
        raise UserError(
            "worker.actor.loss_type=kl_cov holds tokens to the policy before the update, which the only optimiser step "
            "of a batch starts from; set worker.actor.global_batch_size below data.rollout_batch_size"
        )
    if not config.data.shuffle and config.data.sampling_strategy == "shuffle":
        raise UserError(
            "data.shuffle=false contradicts data.sampling_strategy=shuffle; set data.sampling_strategy=sequential"
        )
    if not config.trainer.experiment_name:
        raise UserError("trainer.experiment_name is empty, but names the run directory; set it")


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
        raise UserError(f"algorithm.filter_low={low} must be below algorithm.filter_high={high}; lower it")
    if data.curriculum_draw == "posterior" and data.curriculum_refresh == "full":
        raise UserError(
            "data.curriculum_draw=posterior draws from beliefs, which data.curriculum_refresh=full has none of; "
            "set data.curriculum_refresh=online, or data.curriculum_draw=candidates"
        )
    if data.curriculum_momentum == 1 and data.curriculum_refresh == "full":
        raise UserError("data.curriculum_momentum must be in [0, 1), got 1: no weight would ever change; lower it")
    if prompt_features(config) == "model" and config.worker.actor.ulysses_size > 1:
        raise UserError(
            f"data.curriculum_features=model reads whole prompts, which worker.actor.ulysses_size="
            f"{config.worker.actor.ulysses_size} cuts; set it to 1, or data.curriculum_features=text"
        )
    check_metrics(data.curriculum_metrics, data.curriculum_metric_weights)
    names = [canonical_metric(name) for name in data.curriculum_metrics]
    if len(set(names)) < len(names):
        raise UserError(
            f"data.curriculum_metrics lists {next(name for name in names if names.count(name) > 1)} twice, "
            f"got {data.curriculum_metrics}; give each metric once, with one weight"
        )


def _check_prior(data: DataConfig, path: str, is_resumed: bool) -> None:
    if data.sampling_strategy != "curriculum" or data.curriculum_refresh != "online":
        raise UserError(
            f"data.curriculum_prior={path} is for data.sampling_strategy=curriculum with "
            "data.curriculum_refresh=online; set both, or leave it out"
        )
    if not is_resumed:  # such a run has the table's in its checkpoint
        read_known_rates(Path(path))


def _check_weights(data: DataConfig) -> None:
    weights = data.train_weights
    if not weights:
        return
    names = list_names(data.train_files)
    if len(weights) != len(names):
        raise UserError(
            f"data.train_weights has {len(weights)} weights, data.train_files {len(names)} sources; give one for each"
        )
    for name, quota in zip(names, quotas(weights, data.rollout_batch_size), strict=True):
        if quota == 0:
            raise UserError(
                f"data.train_weights={weights} gives {name} none of data.rollout_batch_size={data.rollout_batch_size} "
                "prompts a step; raise its weight or the batch"
            )


def _check_lora(lora: LoraConfig) -> None:
    """Check the types of its values; whether the model has the layers shows once it is loaded."""
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


def check_lora_sync(config: RunConfig) -> None:
    """Check that vLLM can be given LoRA's adapters alone, where they are asked for. Raises: UserError."""
    rollout, rank = config.worker.rollout, config.worker.actor.model.lora.rank
    if rollout.lora_sync != "adapters":
        return
    key, merged = "worker.rollout.lora_sync=adapters", "worker.rollout.lora_sync=merged"
    if rank == 0:
        raise UserError(f"{key}: worker.actor.model.lora.rank=0 makes no adapters; set the rank, or {merged}")
    if rollout.engine == "server" and rollout.weight_swap == "in_flight":
        raise UserError(
            f"{key}: a response of a server (worker.rollout.engine=server) keeps the adapter that it began with, "
            f"worker.rollout.weight_swap=in_flight would change it; set it to boundary, or {merged}"
        )
    if rollout.engine == "hf":
        raise UserError(f"{key} needs vLLM, worker.rollout.engine=hf reads the actor's own weights; set {merged}")
    if rank > _MAX_ADAPTER_RANK:
        raise UserError(
            f"{key}: vLLM takes adapters up to rank {_MAX_ADAPTER_RANK}, got worker.actor.model.lora.rank={rank}; "
            f"lower it, or set {merged}"
        )
    # With adapters vLLM computes the experts by other kernels, which its CPU build lacks and nobody has compared.
    if model_has_experts(config.worker.actor.model):
        raise UserError(NO_ADAPTERS_BESIDE_EXPERTS)


def _check_reference(config: RunConfig) -> None:
    ref, rank = config.worker.ref, config.worker.actor.model.lora.rank
    if ref.update_freq and rank > 0:
        raise UserError(
            f"worker.ref.update_freq={ref.update_freq}: with worker.actor.model.lora.rank={rank} the reference is the "
            "model without its adapters, which cannot move; set update_freq to 0"
        )
    if ref.ema_decay and not ref.update_freq:
        raise UserError(f"worker.ref.ema_decay={ref.ema_decay:g} needs worker.ref.update_freq, which is 0; set it to 1")


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _check_validation(config: RunConfig) -> None:
    rollout, sampling = config.worker.rollout, config.worker.rollout.val_override_config
    for key, texts in (("stop", rollout.stop), ("val_override_config.stop", sampling.stop or [])):
        if "" in texts:
            raise UserError(f"worker.rollout.{key}={texts} has an empty text, which ends every response; remove it")
    if rollout.stop and rollout.partial is not None:
        raise UserError(
            f"worker.rollout.stop={rollout.stop}: with worker.rollout.partial={rollout.partial} a text across two "
            "parts of a response would not end it; leave one of the two out"
        )
    for key, temperature in (("", rollout.temperature), ("val_override_config.", sampling.temperature)):
        if rollout.engine != "hf" and 0 < temperature < _VLLM_MIN_TEMPERATURE:
            raise UserError(
                f"worker.rollout.{key}temperature={temperature:g}: vLLM would sample at {_VLLM_MIN_TEMPERATURE} in its "
                "place; raise it, or set worker.rollout.engine=hf"
            )
    if sampling.temperature == 0 and sampling.n > 1:
        raise UserError(
            f"worker.rollout.val_override_config: n={sampling.n} greedy answers (temperature=0) would all be the same; "
            "set n=1 or a temperature over 0"
        )
    data = config.data
    longest = config.worker.rollout.max_model_len or data.max_prompt_length + data.max_response_length
    if sampling.max_tokens is not None and data.max_prompt_length + sampling.max_tokens > longest:
        raise UserError(
            f"worker.rollout.val_override_config.max_tokens={sampling.max_tokens} and data.max_prompt_length="
            f"{data.max_prompt_length} are over the {longest} tokens of a sequence; lower it, or set "
            f"worker.rollout.max_model_len={data.max_prompt_length + sampling.max_tokens}"
        )


def _check_best(config: RunConfig) -> None:
    """Check that a validation may have the figure. Which figures it has shows once it is done."""
    best = config.trainer.best_metric
    if best is None or best == TrainerConfig().best_metric:
        return
    if not config.data.val_files:
        raise UserError(f"trainer.best_metric={best} is a figure of the validation: data.val_files is empty; set it")
    if not best.startswith("val"):
        raise UserError(f"trainer.best_metric={best} is no figure of the validation; name one like val/pass_at_8")


def _check_ranks(config: RunConfig, world_size: int) -> None:
    trainer = config.trainer
    asked = trainer.nnodes * trainer.n_gpus_per_node
    if asked != world_size:
        raise UserError(
            f"trainer.nnodes * trainer.n_gpus_per_node = {trainer.nnodes} * {trainer.n_gpus_per_node} = {asked}, "
            f"but {counted(world_size, 'process was', 'processes were')} started; start {asked} (deepspeed --num_gpus "
            f"{trainer.n_gpus_per_node}), or set trainer.n_gpus_per_node={max(1, world_size // trainer.nnodes)}"
        )
    _check_sequence_parallel(config, world_size)
    if config.worker.actor.offload_states and config.worker.rollout.engine == "hf":
        raise UserError(
            "worker.actor.offload_states=true moves away the weights that worker.rollout.engine=hf samples from; "
            "set it to false, or use vllm"
        )
    if config.worker.actor.model.fp32_lm_head and config.worker.rollout.engine == "hf":
        raise UserError(
            "worker.actor.model.fp32_lm_head=true: worker.rollout.engine=hf samples from rounded logits; set it to "
            "false, or use vllm"
        )
    if config.worker.rollout.logprobs == "raw" and config.worker.rollout.engine == "server":
        raise UserError(
            "worker.rollout.logprobs=raw is for engines in the ranks: a server's are not scaled by the temperature; "
            "set it to processed, or worker.rollout.engine=vllm"
        )
    parallel = config.worker.rollout.tensor_parallel_size
    if parallel > 1 and config.worker.rollout.engine == "hf":
        raise UserError(
            f"worker.rollout.tensor_parallel_size={parallel} needs vLLM, got worker.rollout.engine=hf; set it to 1"
        )
    if world_size % parallel and config.worker.rollout.engine != "server":
        raise UserError(
            f"worker.rollout.tensor_parallel_size must divide the ranks: {world_size} % {parallel} = "
            f"{world_size % parallel}; set it to {_divisors(world_size)}"
        )


def _divisors(number: int) -> str:
    found = [str(size) for size in range(1, number + 1) if number % size == 0]
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


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


def _check_gdpo(config: RunConfig) -> None:
    algorithm, key = config.algorithm, "algorithm.adv_estimator=gdpo"
    if algorithm.adv_estimator != "gdpo":
        return
    names = reward_weights(config.worker.reward)
    if not names:
        raise UserError(f"{key} needs several rewards; name them in worker.reward.functions, or set it to grpo")
    if taken := names.keys() & {"overall", "accuracy", "overlong"}:
        raise UserError(f"{key}: worker.reward.functions has one called {min(taken)}, a name in use; rename it")
    if not algorithm.disable_kl and not algorithm.use_kl_loss:
        raise UserError(f"{key} has no place for a KL in the reward; set algorithm.use_kl_loss=true")


def _check_critic(config: RunConfig, world_size: int) -> None:
    if config.algorithm.adv_estimator != "gae":
        if config.trainer.critic_warmup:
            raise UserError(
                f"trainer.critic_warmup={config.trainer.critic_warmup} needs a critic, which "
                f"algorithm.adv_estimator={config.algorithm.adv_estimator} lacks; set it to 0 or the estimator to gae"
            )
        return
    critic, n = resolved_critic(config), config.worker.rollout.n
    batch, micro = critic.global_batch_size, critic.micro_batch_size_per_device_for_update
    assert batch is not None and micro is not None
    prompts, of_actor = config.data.rollout_batch_size, config.worker.actor.global_batch_size
    if batch % of_actor or prompts % batch:
        raise UserError(
            f"worker.critic.global_batch_size={batch} must be a multiple of worker.actor.global_batch_size={of_actor} "
            f"and divide data.rollout_batch_size={prompts}: the ranks split the batch by the actor's steps; "
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
