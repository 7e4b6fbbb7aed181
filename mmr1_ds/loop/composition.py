"""The composition root: builds the parts of a run in the order that fails cheapest first, runs, takes them down."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmr1_ds.algorithm.overlong import OverlongPenalty
from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.cluster.ranks import Ranks, initialise_gpu
from mmr1_ds.config import DataConfig, RunConfig
from mmr1_ds.config.derived import (
    checkpoint_directory,
    resolved_critic,
    run_directory,
    steps_between_saves,
    total_training_steps,
)
from mmr1_ds.config.loading import dump_config
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import PromptStatistics, score_batch
from mmr1_ds.data.dataset import PromptDataset, load_dataset
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.text_features import compress
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.critic import Critic
from mmr1_ds.engine.model.flops import peak_tflops
from mmr1_ds.engine.model.shapes import policy_shape
from mmr1_ds.engine.model.value_model import check_reads_alike
from mmr1_ds.engine.reference import AdapterlessReference, Reference
from mmr1_ds.engine.weights.weight_files import has_weights_alone
from mmr1_ds.engine.zero_engine import Sizes
from mmr1_ds.errors import UserError, first_line, remedy, require
from mmr1_ds.io import in_words
from mmr1_ds.loop.batches import BatchMaker
from mmr1_ds.loop.checkpoint import Checkpoints
from mmr1_ds.loop.collector import Collector
from mmr1_ds.loop.learners import Learners
from mmr1_ds.loop.metrics import ActorWork
from mmr1_ds.loop.own_functions import try_functions
from mmr1_ds.loop.partial_batches import PartialBatchMaker
from mmr1_ds.loop.parts import Parts
from mmr1_ds.loop.refresh import KEPT, CurriculumRefresh
from mmr1_ds.loop.run_lock import RunLock
from mmr1_ds.loop.state import RunState
from mmr1_ds.loop.step_records import StepRecords
from mmr1_ds.loop.trainer import Trainer
from mmr1_ds.loop.turns import Turns
from mmr1_ds.loop.validation import Validation
from mmr1_ds.monitoring.answers import AnswerLog
from mmr1_ds.monitoring.environment import write_environment
from mmr1_ds.monitoring.live_report import LiveReport
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.monitoring.profiles import StepProfiles
from mmr1_ds.monitoring.rollouts import RolloutLog
from mmr1_ds.monitoring.samples import TrainingSamples
from mmr1_ds.preflight.deepspeed import DeepspeedConfigs
from mmr1_ds.records import SamplingSettings, ScoredGroup
from mmr1_ds.rewards.loading import BUILT_IN, each_function, reward_weights
from mmr1_ds.rewards.pool import RewardPool
from mmr1_ds.rollout.base import RolloutEngine
from mmr1_ds.rollout.colocated.engine import VllmRollout
from mmr1_ds.rollout.hf.engine import TransformersRollout

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=BatchMaker)
T = TypeVar("T", bound=Trainer)

_LOADED_PARTS = 3  # for their bar: actor (and critic), reference, rollout engine


def run(config: RunConfig, deepspeed: DeepspeedConfigs, launch: LaunchEnvironment, preemption: Preemption) -> None:
    """Train, or validate only, as the config says. Every rank of the launch calls this.

    Raises: UserError for data, model or environment that cannot be used; Preempted when it was told to end.
    """
    _check_installed(config)
    try_functions(config.worker.actor, config.algorithm)
    with ExitStack() as stack:
        # Starts before the models take the memory.
        rewards = stack.enter_context(RewardPool(config.worker.reward, config.data.max_response_length))
        _check_gpu(deepspeed.actor, launch)  # before the data is read, which may take minutes
        encoder = PromptEncoder(config.worker.actor.model, config.data)
        if deepspeed.critic is not None and config.worker.critic.model.model_path is not None:
            check_reads_alike(config.worker.critic.model, config.data, encoder)
        train_data, val_data = _load_data(config, encoder)
        num_steps = total_training_steps(config, len(train_data))
        most_images = max(data.max_images for data in (train_data, val_data) if data is not None)

        limits = config.trainer.collective_timeout_seconds, config.trainer.silence_seconds
        ranks = stack.enter_context(Ranks(launch, *limits))
        _check_ranks(config, train_data, ranks)
        _lock(config, ranks, stack)
        checkpoints = Checkpoints(
            checkpoint_directory(config), config.trainer.save_limit, ranks, config.trainer.best_metric
        )
        start = _starting_point(config, checkpoints)
        if start is not None and start[0] >= num_steps and not config.trainer.val_only:
            logger.info(
                "the run is done: %s is of step %d of %d; for more steps raise trainer.total_episodes or max_steps",
                start[1], start[0], num_steps,
            )  # fmt: skip
            return
        if start is not None:
            _check_resumable(start[1], deepspeed.critic is not None)
        coordinator = _coordinator(config, train_data, num_steps, ranks)
        if start is not None and not config.trainer.val_only:
            coordinator.load(start[1] / "curriculum")  # refuses another data set before anything is touched
        metrics_logger = stack.enter_context(_open_run(config, start, num_steps, ranks))
        ranks.write_stacks(run_directory(config) / "stacks")
        report_freq = None if config.trainer.val_only or ranks.rank > 0 else config.trainer.report_freq
        report = stack.enter_context(LiveReport(run_directory(config), report_freq))
        _tell_start(config, start, num_steps, ranks)
        loaded = stack.enter_context(ExitStack())  # ends before the first step
        loaded.enter_context(ranks.stage("load the models"))
        advance = loaded.enter_context(metrics_logger.progress(_LOADED_PARTS, "loading the models", with_lines=False))

        rollout: RolloutEngine | None = None
        if config.worker.rollout.engine == "server":  # the servers load while the models here do
            from mmr1_ds.rollout.servers.engine import ServerRollout  # its HTTP client comes with vLLM

            rollout = ServerRollout(
                config.worker.rollout,
                config.worker.actor.model,
                config.data,
                ranks,
                encoder,
                first_device=config.trainer.n_gpus_per_node,
                most_images=most_images,
                log_folder=run_directory(config) / "servers",
                preemption=preemption,
            )
            stack.callback(rollout.close)
        work = _actor_work(config, ranks)
        # Adapters are put on what trains, and so need an optimiser.
        learns = not config.trainer.val_only or config.worker.actor.model.lora.rank > 0
        engine = deepspeed.actor if learns else deepspeed.reference
        actor = _actor(config, engine, num_steps, ranks, encoder)
        advance(1)
        critic = None
        if deepspeed.critic is not None:
            critic = _critic(config, deepspeed.critic, num_steps, ranks, encoder)
        reference = _reference(config, deepspeed.reference, actor, ranks, encoder)
        advance(1)
        if rollout is None:
            rollout = _rollout(config, actor, ranks, encoder, most_images, preemption)
            stack.callback(rollout.close)
        advance(1)

        batch_maker = BatchMaker if config.worker.rollout.partial is None else PartialBatchMaker
        algorithm, limit = config.algorithm, config.data.max_response_length
        penalty = OverlongPenalty(limit, algorithm.overlong_buffer, algorithm.overlong_penalty)
        reward_name = config.worker.reward.reward_function
        collector = Collector(
            rollout, rewards, reward_name, encoder, ranks, penalty if algorithm.overlong_buffer else None
        )
        trainer = make_trainer(
            config,
            num_steps,
            Trainer,
            ranks=ranks,
            encoder=encoder,
            train_data=train_data,
            val_data=val_data,
            coordinator=coordinator,
            batches=make_batches(config, batch_maker, ranks, encoder, train_data, coordinator, collector),
            collector=collector,
            rollout=rollout,
            actor=actor,
            reference=reference,
            critic=critic,
            checkpoints=checkpoints,
            metrics_logger=metrics_logger,
            report=report,
            preemption=preemption,
            work=work,
            resumed_step=start[0] if start else 0,
        )
        if start is not None:
            trainer.parts.state.load(*start, None if config.trainer.val_only else trainer.parts.settings)
        loaded.close()
        trainer.fit()


def make_batches(
    config: RunConfig,
    batch_maker: type[B],
    ranks: Ranks,
    encoder: PromptEncoder,
    train_data: PromptDataset,
    coordinator: Coordinator,
    collector: Collector,
) -> B:
    """Make what draws and samples the batches of a run."""
    return batch_maker(
        config.data,
        config.algorithm,
        config.worker.rollout,
        config.worker.actor.global_batch_size,
        config.trainer.max_try_make_batch,
        ranks,
        _scorer(config.data, ranks, encoder),
        train_data,
        coordinator,
        collector,
    )


def _scorer(
    data: DataConfig, ranks: Ranks, encoder: PromptEncoder
) -> Callable[[Sequence[ScoredGroup]], list[PromptStatistics]]:
    """What turns scored groups into what the curriculum observes, with the kernel of this device."""
    on_gpu = data.curriculum_kernel == "triton" or (data.curriculum_kernel == "auto" and ranks.on_gpu)
    return partial(
        score_batch,
        eos_token_ids=encoder.eos_token_ids,
        metrics=data.curriculum_metrics,
        device=ranks.device if on_gpu else None,
    )


def make_trainer(
    config: RunConfig,
    num_steps: int,
    trainer_class: type[T],
    *,
    ranks: Ranks,
    encoder: PromptEncoder,
    train_data: PromptDataset,
    val_data: PromptDataset | None,
    coordinator: Coordinator,
    batches: BatchMaker,
    collector: Collector,
    rollout: RolloutEngine,
    actor: Actor,
    reference: Reference | AdapterlessReference | None,
    critic: Critic | None,
    checkpoints: Checkpoints,
    metrics_logger: MetricsLogger,
    report: LiveReport,
    preemption: Preemption,
    work: ActorWork | None = None,
    resumed_step: int = 0,
) -> T:
    """Put the loop together from what it samples with, learns with and writes to."""
    data, worker, trainer, seed = config.data, config.worker, config.trainer, config.worker.rollout.seed
    sampling = worker.rollout
    settings = SamplingSettings(
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        data.max_response_length,
        raw_logprobs=sampling.logprobs == "raw",
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop=tuple(sampling.stop),
    )
    of_validation = sampling.val_override_config
    if of_validation.stop is None:
        of_validation = dataclasses.replace(of_validation, stop=sampling.stop)
    turns = Turns(rollout, actor, critic)
    learners = Learners(
        config.algorithm,
        trainer.critic_warmup,
        worker.ref.update_freq,
        reward_weights(worker.reward) | ({"overlong": 1.0} if config.algorithm.overlong_buffer else {}),
        actor=actor,
        reference=reference,
        critic=critic,
        ranks=ranks,
    )
    samples = TrainingSamples(
        run_directory(config), trainer.train_generations_to_log, encoder.decode, metrics_logger, ranks
    )
    rollouts = None
    if trainer.rollout_log is not None and not trainer.val_only:
        rollouts = RolloutLog(
            run_directory(config), trainer.rollout_log_gb * 1e9, encoder.decode, resumed_step, ranks
        )
    records = StepRecords(
        coordinator=coordinator,
        rollout=rollout,
        policy=actor,
        samples=samples,
        rollouts=rollouts,
        profiles=StepProfiles(run_directory(config), trainer.profile_steps, ranks),
        metrics_logger=metrics_logger,
        preemption=preemption,
        max_prompt_length=data.max_prompt_length,
        lags=sampling.engine == "server",
        work=work,
        ranks=ranks,
    )
    validation = Validation(
        val_data,
        of_validation,
        data,
        trainer,
        seed,
        num_steps,
        f"{worker.actor.model.model_path} of {run_directory(config)}",
        collector=collector,
        encoder=encoder,
        turns=turns,
        records=records,
        metrics_logger=metrics_logger,
        answer_log=AnswerLog(run_directory(config) / "eval", is_main=ranks.rank == 0),
        ranks=ranks,
    )
    kept_refresh = checkpoints.root / KEPT
    refresh = CurriculumRefresh(
        data,
        worker.reward,
        settings,
        seed,
        coordinator=coordinator,
        collector=collector,
        train_data=train_data,
        score=_scorer(data, ranks, encoder),
        turns=turns,
        weights_digest=actor.weights_digest,
        kept=kept_refresh,
        preemption=preemption,
        records=records,
        metrics_logger=metrics_logger,
        ranks=ranks,
    )
    state = RunState(
        steps_between_saves(config, num_steps),
        not trainer.val_only,
        trainer.save_model_only,
        num_steps,
        dump_config(config),
        kept_refresh,
        actor=actor,
        critic=critic,
        coordinator=coordinator,
        batches=batches,
        learners=learners,
        checkpoints=checkpoints,
        preemption=preemption,
        records=records,
        metrics_logger=metrics_logger,
        ranks=ranks,
    )
    parts = Parts(
        settings=settings,
        turns=turns,
        batches=batches,
        learners=learners,
        validation=validation,
        refresh=refresh,
        state=state,
        records=records,
        report=report,
    )
    return trainer_class(parts, 0 if trainer.val_only else num_steps)


def _coordinator(config: RunConfig, data: PromptDataset, num_steps: int, ranks: Ranks) -> Coordinator:
    sketches = data.take_sketches()
    return Coordinator(
        config.data,
        data.prompt_ids,
        data.categories,
        data.fingerprint,
        config.worker.rollout.n,
        num_steps,
        ranks,
        data.sources,
        data.source_names,
        None if sketches is None or ranks.rank > 0 else compress(sketches),
    )


def _actor_work(config: RunConfig, ranks: Ranks) -> ActorWork | None:
    """Return what the MFU is computed from, where the device's peak is known, on rank 0; before ZeRO partitions."""
    peak = config.trainer.peak_tflops
    if peak is None and ranks.on_gpu:
        peak = peak_tflops(torch.cuda.get_device_name())
    if peak is None or ranks.rank > 0:
        return None
    try:
        return ActorWork(policy_shape(config.worker.actor.model), peak, config.worker.actor.ppo_epochs)
    except (AttributeError, OSError, ValueError) as error:  # a model whose own code is needed, or of another family
        logger.warning("no perf/mfu_actor: the sizes of %s are not known (%s)", config.worker.actor.model.model_path,
                       first_line(error))  # fmt: skip
        return None


def _actor(
    config: RunConfig, deepspeed: Mapping[str, Any], num_steps: int, ranks: Ranks, encoder: PromptEncoder
) -> Actor:
    updates = (num_steps - config.trainer.critic_warmup) * config.worker.actor.ppo_epochs
    updates *= config.data.rollout_batch_size // config.worker.actor.global_batch_size
    return Actor(
        config.worker.actor,
        config.algorithm,
        _sizes(config),
        config.worker.rollout.temperature,
        deepspeed,
        ranks,
        encoder,
        updates,
        _bad_updates("actor", config, ranks),
    )


def _critic(
    config: RunConfig, deepspeed: Mapping[str, Any], num_steps: int, ranks: Ranks, encoder: PromptEncoder
) -> Critic:
    settings = resolved_critic(config)
    assert settings.global_batch_size is not None  # resolved
    updates = num_steps * (config.data.rollout_batch_size // settings.global_batch_size * settings.ppo_epochs)
    bad_updates = _bad_updates("critic", config, ranks)
    offload = config.worker.actor.offload_states
    return Critic(settings, _sizes(config), deepspeed, ranks, encoder, updates, bad_updates, offload)


def _sizes(config: RunConfig) -> Sizes:
    return Sizes(config.worker.rollout.n, config.data.max_prompt_length, config.data.max_response_length)


def _bad_updates(engine: str, config: RunConfig, ranks: Ranks) -> BadUpdates:
    return BadUpdates(engine, config.trainer.max_bad_updates, ranks, run_directory(config) / "bad_batches")


def _lock(config: RunConfig, ranks: Ranks, stack: ExitStack) -> None:
    """Keep other runs out of the run's folders until `stack` is closed. Collective. Raises: UserError on every rank."""
    if config.trainer.val_only:  # beside a run that trains
        folders = {run_directory(config) / "eval": "trainer.run_dir"}
    else:  # another run may be told to keep its checkpoints in this one's directory
        folders = {run_directory(config): "trainer.run_dir"}
        if checkpoint_directory(config).resolve() != run_directory(config).resolve():
            folders[checkpoint_directory(config)] = "trainer.save_checkpoint_path"
    refused = ""
    if ranks.rank == 0:
        try:
            for folder, key in folders.items():
                stack.enter_context(RunLock(folder, key))
            if config.trainer.run_dir_mode is not None:
                _set_mode({run_directory(config), *folders}, config.trainer.run_dir_mode)
        except UserError as error:
            refused = str(error)
        except OSError as error:
            # Checkpoints that cannot be written are for the saves to report: the run goes on without them.
            refused = f"trainer.run_dir: {in_words(error)}; name another" if key == "trainer.run_dir" else ""
    if refused := ranks.all_gather_objects(refused, "lock the run directory")[0]:
        raise UserError(refused)


def _set_mode(folders: set[Path], mode: str) -> None:
    """Let in whom `trainer.run_dir_mode` admits. Raises: UserError where that is not ours to say."""
    for folder in folders:
        try:
            folder.chmod(int(mode, 8))
        except OSError as error:
            raise UserError(f"trainer.run_dir_mode={mode}: {in_words(error)}; name a folder of your own") from error


def _check_resumable(folder: Path, with_critic: bool) -> None:
    if has_weights_alone(folder / "actor"):
        raise UserError(
            f"{folder} has weights alone (trainer.save_model_only), no run resumes from it; begin anew with "
            "trainer.resume=false or another trainer.experiment_name, or train the model that mmr1-ds export writes"
        )
    if with_critic and not (folder / "critic").is_dir():
        raise UserError(
            f"{folder} has no critic, it is of a run without algorithm.adv_estimator=gae; start elsewhere with "
            "another trainer.experiment_name, or take the estimator of that run"
        )


def _open_run(config: RunConfig, start: tuple[int, Path] | None, num_steps: int, ranks: Ranks) -> MetricsLogger:
    """Make the run directory with the resolved config, and open its log. Collective."""
    run_dir, step = run_directory(config), start[0] if start else 0
    if config.trainer.val_only:  # beside the run's own log, which stays as it is
        run_dir, step = run_dir / "eval" / f"step_{step}", 0
    if ranks.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        write_environment(run_dir, ranks.size, ranks.on_gpu, num_steps)
    ranks.barrier("make the run directory")
    settings = dataclasses.asdict(config)
    return MetricsLogger.open(config.trainer, run_dir, num_steps, step, settings, is_main=ranks.rank == 0)


def _tell_start(config: RunConfig, start: tuple[int, Path] | None, num_steps: int, ranks: Ranks) -> None:
    logger.info("loading %s on %d ranks", config.worker.actor.model.model_path, ranks.size)
    if start is not None:
        logger.info("going on from %s: %d of %d steps are done", start[1], start[0], num_steps)
    elif config.trainer.val_only:
        logger.info("no checkpoint in %s: validating the model as it is", checkpoint_directory(config))


def _reference(
    config: RunConfig, reference_config: Mapping[str, Any], actor: Actor, ranks: Ranks, encoder: PromptEncoder
) -> Reference | AdapterlessReference | None:
    if config.algorithm.disable_kl or config.trainer.val_only:
        return None
    if config.worker.actor.model.lora.rank > 0:
        return AdapterlessReference(actor)
    temperature = config.worker.rollout.temperature
    decay = config.worker.ref.ema_decay
    return Reference(config.worker.actor, decay, _sizes(config), temperature, reference_config, ranks, encoder)


def _check_installed(config: RunConfig) -> None:
    """Before anything is loaded. Raises: UserError for a package that the run needs and has not."""
    actor, engine = config.worker.actor, config.worker.rollout.engine
    if actor.model.lora.rank > 0 and importlib.util.find_spec("peft") is None:
        raise UserError(
            f"worker.actor.model.lora.rank={actor.model.lora.rank} but peft is not installed; {remedy('gpu')} "
            "or set it to 0"
        )
    # Without it every response would count as one that could not be scored.
    for name in (one.reward_function for one in each_function(config.worker.reward)):
        if name in BUILT_IN:
            require("gpu", "math_verify", purpose=f"the reward {name}")
    if engine == "server":
        require("gpu", "aiohttp", "msgspec", purpose="worker.rollout.engine=server")
    if importlib.util.find_spec("vllm") is not None:
        return
    if engine in ("vllm", "server"):
        raise UserError(f"worker.rollout.engine={engine} but vllm is not installed; {remedy('vllm')} or set engine=hf")
    if actor.offload_states or actor.ulysses_size > 1:  # engine=auto comes to hf
        raise UserError("worker.actor.offload_states and ulysses_size need vllm; it is not installed")


def _load_data(config: RunConfig, encoder: PromptEncoder) -> tuple[PromptDataset, PromptDataset | None]:
    limit = config.worker.rollout.limit_images
    data, is_curriculum = config.data, config.data.sampling_strategy == "curriculum"
    if config.trainer.val_only:  # no prompt is drawn, so the training data may be any
        val_data = load_dataset(data.val_files, data, encoder, "data.val_files", limit)
        return val_data, val_data
    with_features = is_curriculum and data.curriculum_refresh == "online" and data.curriculum_features == "text"
    train_data = load_dataset(data.train_files, data, encoder, limit_images=limit, with_sketches=with_features)
    if not data.val_files:
        return train_data, None
    return train_data, load_dataset(data.val_files, data, encoder, "data.val_files", limit)


def _check_gpu(deepspeed_config: Mapping[str, Any], launch: LaunchEnvironment) -> None:
    """Initialise CUDA. Raises: UserError for a GPU that does not work, or one that torch does not see."""
    on_gpu = initialise_gpu(launch)
    if on_gpu != bool(deepspeed_config["bf16"]["enabled"]):
        raise UserError(
            f"torch.cuda.is_available() is {on_gpu}, unlike what /dev and CUDA_VISIBLE_DEVICES show; "
            "install a CUDA build of torch, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
        )


def _check_ranks(config: RunConfig, train_data: PromptDataset, ranks: Ranks) -> None:
    """What only the started ranks can tell. Collective. Raises: UserError on every rank."""
    transfer = config.worker.rollout.weight_transfer
    if config.worker.rollout.engine == "server" and transfer in ("nccl", "ipc") and not ranks.on_gpu:
        raise UserError(f"worker.rollout.weight_transfer={transfer} needs GPUs, there is none; set it to auto")
    if config.data.curriculum_kernel == "triton" and not ranks.on_gpu:
        raise UserError("data.curriculum_kernel=triton needs a GPU, there is none; set it to auto")
    if len(set(ranks.all_gather_objects(train_data.fingerprint, "compare the data sets"))) > 1:
        raise UserError(f"data.train_files={config.data.train_files} differs between ranks; give all the same files")


def _starting_point(config: RunConfig, checkpoints: Checkpoints) -> tuple[int, Path] | None:
    """Step and folder to go on from.

    Training: the run's own newest checkpoint, else the one that the user named. Validation: the other way round.
    """
    named = config.trainer.load_checkpoint_path
    found = None
    if config.trainer.resume and not (named and config.trainer.val_only):
        found = checkpoints.newest()
    if named and found is None:
        found = checkpoints.require(Path(named)), Path(named)
    elif named and found is not None and found[1].resolve() != Path(named).resolve():
        logger.warning(
            "the run goes on from its own %s, not from trainer.load_checkpoint_path=%s; for that, set "
            "trainer.resume=false or another trainer.experiment_name", found[1], named,
        )  # fmt: skip
    if found is not None:
        checkpoints.check_ranks(found[1])
    return found


def _rollout(
    config: RunConfig,
    actor: Actor,
    ranks: Ranks,
    encoder: PromptEncoder,
    most_images: int,
    preemption: Preemption,
) -> RolloutEngine:
    settings, model = config.worker.rollout, config.worker.actor.model
    has_vllm = importlib.util.find_spec("vllm") is not None
    if settings.engine == "auto" and not has_vllm:
        logger.warning("vllm is not installed: responses are sampled by transformers, which is far slower")
    if settings.engine == "hf" or not has_vllm:
        return TransformersRollout(actor, ranks, encoder, settings.max_num_seqs)
    return VllmRollout(settings, model, config.data, ranks, encoder, most_images, preemption)
