"""The composition root: builds the parts of a run in the order that fails cheapest first, runs, takes them down."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from mmr1_ds.algorithm.overlong import OverlongPenalty
from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import DataConfig, RolloutConfig, RunConfig
from mmr1_ds.config.derived import (
    checkpoint_directory,
    prompt_features,
    returns_experts,
    run_directory,
    steps_between_saves,
    total_training_steps,
)
from mmr1_ds.config.loading import dump_config
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.group_sizes import SizeRange
from mmr1_ds.curriculum.statistics import PromptStatistics, score_batch
from mmr1_ds.data.dataset import PromptDataset
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.features import NUM_FEATURES
from mmr1_ds.data.text_features import compress
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.model.flops import peak_tflops
from mmr1_ds.engine.model.shapes import policy_shape
from mmr1_ds.engine.model.value_model import check_reads_alike
from mmr1_ds.errors import UserError, first_line
from mmr1_ds.loop.batches import BatchMaker
from mmr1_ds.loop.checkpoint import Checkpoints
from mmr1_ds.loop.collector import Collector
from mmr1_ds.loop.engines import LOADED_PARTS, Engines, load_engines
from mmr1_ds.loop.learners import Learners
from mmr1_ds.loop.metrics import ActorWork
from mmr1_ds.loop.own_functions import try_functions
from mmr1_ds.loop.partial_batches import PartialBatchMaker
from mmr1_ds.loop.prompt_features import describe_prompts
from mmr1_ds.loop.refresh import KEPT, CurriculumRefresh
from mmr1_ds.loop.shared_queue import SharedQueue
from mmr1_ds.loop.starting import (
    check_gpu,
    check_ranks,
    check_resumable,
    is_done,
    known_beforehand,
    load_data,
    lock_folders,
    open_run,
    starting_point,
    tell_start,
)
from mmr1_ds.loop.state import RunState
from mmr1_ds.loop.step_records import StepRecords
from mmr1_ds.loop.trainer import Trainer
from mmr1_ds.loop.turns import Turns
from mmr1_ds.loop.validation import Validation
from mmr1_ds.monitoring.answers import AnswerLog
from mmr1_ds.monitoring.live_report import LiveReport
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.monitoring.profiles import StepProfiles
from mmr1_ds.monitoring.rollouts import RolloutLog
from mmr1_ds.monitoring.samples import TrainingSamples
from mmr1_ds.preflight.deepspeed import DeepspeedConfigs
from mmr1_ds.records import SamplingSettings, ScoredGroup
from mmr1_ds.rewards.loading import reward_weights
from mmr1_ds.rewards.pool import RewardPool
from mmr1_ds.rollout.base import RolloutEngine
from mmr1_ds.rollout.colocated.engine import VllmRollout

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=BatchMaker)
T = TypeVar("T", bound=Trainer)


@dataclass(frozen=True)
class Opened:
    """What a run has before its models: the ranks, the data, and where it writes."""

    ranks: Ranks
    encoder: PromptEncoder
    train_data: PromptDataset
    val_data: PromptDataset | None
    coordinator: Coordinator
    checkpoints: Checkpoints
    metrics_logger: MetricsLogger
    report: LiveReport
    preemption: Preemption
    resumed_step: int = 0


def run(config: RunConfig, deepspeed: DeepspeedConfigs, launch: LaunchEnvironment, preemption: Preemption) -> None:
    """Train, or validate only, as the config says. Every rank of the launch calls this.

    Raises: UserError for data, model or environment that cannot be used; Preempted when it was told to end.
    """
    try_functions(config.worker.actor, config.algorithm)
    with ExitStack() as stack:
        # Starts before the models take the memory.
        rewards = stack.enter_context(RewardPool(config.worker.reward, config.data.max_response_length))
        check_gpu(launch)  # before the data is read, which may take minutes
        encoder = PromptEncoder(config.worker.actor.model, config.data)
        if deepspeed.critic is not None and config.worker.critic.model.model_path is not None:
            check_reads_alike(config.worker.critic.model, config.data, encoder)
        train_data, val_data = load_data(config, encoder)
        num_steps = total_training_steps(config, len(train_data))

        limits = config.trainer.collective_timeout_seconds, config.trainer.silence_seconds
        ranks = stack.enter_context(Ranks(launch, *limits))
        check_ranks(config, train_data, ranks)
        lock_folders(config, ranks, stack)
        checkpoints = Checkpoints(
            checkpoint_directory(config), config.trainer.save_limit, ranks, config.trainer.best_metric
        )
        start = starting_point(config, checkpoints)
        if is_done(config, start, num_steps):
            return
        if start is not None:
            in_bf16 = None if config.trainer.val_only else bool(deepspeed.actor["bf16"]["enabled"])
            check_resumable(start[1], deepspeed.critic is not None, in_bf16)
        coordinator = make_coordinator(config, train_data, num_steps, ranks)
        if start is not None and not config.trainer.val_only:
            coordinator.load(start[1] / "curriculum")  # refuses another data set before anything is touched
        begin_from_rates = known_beforehand(config, start, coordinator, train_data, ranks)
        metrics_logger = stack.enter_context(open_run(config, start, num_steps, ranks))
        ranks.write_stacks(run_directory(config) / "stacks")
        report_freq = None if config.trainer.val_only or ranks.rank > 0 else config.trainer.report_freq
        report = stack.enter_context(LiveReport(run_directory(config), report_freq))
        tell_start(config, start, ranks, num_steps)
        opened = Opened(
            ranks, encoder, train_data, val_data, coordinator, checkpoints, metrics_logger, report, preemption,
            resumed_step=start[0] if start else 0,
        )  # fmt: skip

        with (
            ranks.stage("load the models"),
            metrics_logger.progress(LOADED_PARTS, "loading the models", with_lines=False) as advance,
        ):
            work = _actor_work(config, ranks)
            data_sets = [data for data in (train_data, val_data) if data is not None]
            most_images = max(data.max_images for data in data_sets)
            most_videos = max(data.max_videos for data in data_sets)
            engines = load_engines(
                config, deepspeed, num_steps, most_images, most_videos, ranks, encoder, preemption, stack, advance,
                before_others=partial(_begin_curriculum, config, opened, begin_from_rates),
            )  # fmt: skip
            collector = _collector(config, engines.rollout, rewards, encoder, ranks)
            batch_maker = BatchMaker if config.worker.rollout.partial is None else PartialBatchMaker
            queue = _shared_queue(config, engines.rollout, opened)
            batches = make_batches(config, batch_maker, opened, collector, queue)
            trainer = make_trainer(config, num_steps, Trainer, engines, opened, batches, collector, work, queue)
            if start is not None:
                trainer.state.load(*start, None if config.trainer.val_only else trainer.settings)
        trainer.fit()


def _begin_curriculum(
    config: RunConfig, opened: Opened, begin_from_rates: Callable[[], None], actor: Actor
) -> None:
    """Give the curriculum what is known before the first step: its features by the model, pass rates. Collective."""
    if prompt_features(config) == "model":
        describe_prompts(
            actor, opened.coordinator, opened.train_data, config.data.rollout_batch_size, opened.encoder, opened.ranks,
            opened.metrics_logger.progress,
        )  # fmt: skip
    begin_from_rates()  # the features learn from them


def _collector(
    config: RunConfig, rollout: RolloutEngine, rewards: RewardPool, encoder: PromptEncoder, ranks: Ranks
) -> Collector:
    algorithm, penalty = config.algorithm, None
    if algorithm.overlong_buffer:
        limit = config.data.max_response_length
        penalty = OverlongPenalty(limit, algorithm.overlong_buffer, algorithm.overlong_penalty)
    return Collector(rollout, rewards, config.worker.reward.reward_function, encoder, ranks, penalty)


def _shared_queue(config: RunConfig, engine: RolloutEngine, opened: Opened) -> SharedQueue | None:
    if not config.worker.rollout.shared_queue or (config.trainer.val_only and not isinstance(engine, VllmRollout)):
        return None  # a training run's settings, with another engine for its validation
    if not isinstance(engine, VllmRollout):  # engine=auto where it is not installed
        raise UserError("worker.rollout.shared_queue=true needs vllm, which is not installed; set it to false")
    ranks, expand_ahead = opened.ranks, opened.encoder.expand_ahead
    return SharedQueue(engine, opened.train_data, expand_ahead, ranks, ranks.counter())


def make_batches(
    config: RunConfig, batch_maker: type[B], opened: Opened, collector: Collector, queue: SharedQueue | None = None
) -> B:
    """Make what draws and samples the batches of a run."""
    return batch_maker(
        config.data,
        config.algorithm,
        config.worker.rollout,
        config.worker.actor.global_batch_size,
        config.trainer.max_try_make_batch,
        opened.ranks,
        make_scorer(config.data, opened.ranks, opened.encoder),
        opened.train_data,
        opened.coordinator,
        collector,
        queue,
    )


def make_scorer(
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
    engines: Engines,
    opened: Opened,
    batches: BatchMaker,
    collector: Collector,
    work: ActorWork | None = None,
    queue: SharedQueue | None = None,
) -> T:
    """Put the loop together from what it samples with, learns with and writes to."""
    settings = _sampling_settings(config.worker.rollout, config.data.max_response_length)
    turns = Turns(engines.rollout, engines.actor, engines.critic)
    learners = _learners(config, engines, opened.ranks)
    records = _records(config, engines, opened, work)
    return trainer_class(
        num_steps=0 if config.trainer.val_only else num_steps,
        settings=dataclasses.replace(settings, with_experts=returns_experts(config)),
        turns=turns,
        batches=batches,
        learners=learners,
        validation=_validation(config, num_steps, opened, collector, turns, records, queue),
        refresh=_refresh(config, settings, engines, opened, collector, turns, records, queue),
        state=_state(config, num_steps, engines, opened, batches, learners, records),
        records=records,
        report=opened.report,
    )


def _learners(config: RunConfig, engines: Engines, ranks: Ranks) -> Learners:
    overlong = {"overlong": 1.0} if config.algorithm.overlong_buffer else {}
    return Learners(
        algorithm=config.algorithm,
        critic_warmup=config.trainer.critic_warmup,
        reference_update_freq=config.worker.ref.update_freq,
        reward_weights=reward_weights(config.worker.reward) | overlong,
        actor=engines.actor,
        reference=engines.reference,
        critic=engines.critic,
        ranks=ranks,
    )


def _validation(
    config: RunConfig,
    num_steps: int,
    opened: Opened,
    collector: Collector,
    turns: Turns,
    records: StepRecords,
    queue: SharedQueue | None,
) -> Validation:
    rollout, folder, most_bytes = config.worker.rollout, run_directory(config), config.trainer.samples_limit_gb * 1e9
    sampling = rollout.val_override_config
    if sampling.stop is None:
        sampling = dataclasses.replace(sampling, stop=rollout.stop)
    return Validation(
        val_data=opened.val_data,
        sampling=sampling,
        data=config.data,
        trainer=config.trainer,
        seed=rollout.seed,
        num_steps=num_steps,
        policy=f"{config.worker.actor.model.model_path} of {folder}",
        collector=collector,
        encoder=opened.encoder,
        turns=turns,
        records=records,
        metrics_logger=opened.metrics_logger,
        answer_log=AnswerLog(folder / "eval", opened.ranks.rank == 0, int(most_bytes)),
        ranks=opened.ranks,
        queue=None if queue is None or opened.val_data is None else queue.of(opened.val_data),
    )


def _refresh(
    config: RunConfig,
    settings: SamplingSettings,
    engines: Engines,
    opened: Opened,
    collector: Collector,
    turns: Turns,
    records: StepRecords,
    queue: SharedQueue | None,
) -> CurriculumRefresh:
    return CurriculumRefresh(
        data=config.data,
        reward=config.worker.reward,
        settings=settings,
        rollout=config.worker.rollout,
        coordinator=opened.coordinator,
        collector=collector,
        train_data=opened.train_data,
        score=make_scorer(config.data, opened.ranks, opened.encoder),
        turns=turns,
        weights_digest=engines.actor.weights_digest,
        kept=opened.checkpoints.root / KEPT,
        preemption=opened.preemption,
        records=records,
        metrics_logger=opened.metrics_logger,
        ranks=opened.ranks,
        queue=queue,
    )


def _state(
    config: RunConfig,
    num_steps: int,
    engines: Engines,
    opened: Opened,
    batches: BatchMaker,
    learners: Learners,
    records: StepRecords,
) -> RunState:
    return RunState(
        save_freq=steps_between_saves(config, num_steps),
        saves_when_interrupted=not config.trainer.val_only,
        saves_in_background=config.trainer.async_save,
        weights_alone=config.trainer.save_model_only,
        num_steps=num_steps,
        config_yaml=dump_config(config),
        kept_refresh=opened.checkpoints.root / KEPT,
        actor=engines.actor,
        critic=engines.critic,
        coordinator=opened.coordinator,
        batches=batches,
        learners=learners,
        checkpoints=opened.checkpoints,
        preemption=opened.preemption,
        records=records,
        metrics_logger=opened.metrics_logger,
        ranks=opened.ranks,
    )


def _sampling_settings(rollout: RolloutConfig, max_tokens: int) -> SamplingSettings:
    return SamplingSettings(
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        max_tokens,
        raw_logprobs=rollout.logprobs == "raw",
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        stop=tuple(rollout.stop),
    )


def _records(config: RunConfig, engines: Engines, opened: Opened, work: ActorWork | None) -> StepRecords:
    """What is written of each step: figures, samples, all rollouts and profiles where asked for."""
    folder, trainer, ranks, decode = run_directory(config), config.trainer, opened.ranks, opened.encoder.decode
    samples = TrainingSamples(folder, trainer.train_generations_to_log, decode, opened.metrics_logger, ranks)
    rollouts = None
    if trainer.rollout_log is not None and not trainer.val_only:
        rollouts = RolloutLog(folder, trainer.rollout_log_gb * 1e9, decode, opened.resumed_step, ranks)
    return StepRecords(
        coordinator=opened.coordinator,
        rollout=engines.rollout,
        policy=engines.actor,
        samples=samples,
        rollouts=rollouts,
        profiles=StepProfiles(folder, trainer.profile_steps, ranks),
        metrics_logger=opened.metrics_logger,
        preemption=opened.preemption,
        max_prompt_length=config.data.max_prompt_length,
        lags=config.worker.rollout.engine == "server",
        work=work,
        ranks=ranks,
    )


def make_coordinator(config: RunConfig, data: PromptDataset, num_steps: int, ranks: Ranks) -> Coordinator:
    sketches, rollout = data.take_sketches() if ranks.rank == 0 else None, config.worker.rollout
    features = None if sketches is None else compress(sketches)
    if ranks.rank == 0 and prompt_features(config) == "model":  # of a checkpoint, or they come later
        features = np.zeros((len(data), NUM_FEATURES), dtype=np.int8)
    return Coordinator(
        config.data,
        data.prompt_ids,
        data.categories,
        data.fingerprint,
        rollout.n,
        num_steps,
        ranks,
        data.sources,
        data.source_names,
        features,
        None if rollout.n_min is None or rollout.n_max is None else SizeRange(rollout.n_min, rollout.n_max),
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
