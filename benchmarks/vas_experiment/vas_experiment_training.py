"""Trainings one after the other in one process: the reward pool and the vLLM engine start once, the rest is new."""

from __future__ import annotations

import gc
import hashlib
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow.parquet as pq
from vas_experiment_recording import (
    CountingRollout,
    RecordingBatches,
    RecordingCoordinator,
    RecordingTrainer,
    StepFile,
    TraceRecorder,
    answer_figures,
)
from vas_experiment_rivals import LoopedBatches, RecordingRival
from vas_experiment_trials import (
    BATCH,
    FILLED,
    LOOPED,
    RESPONSES,
    RIVAL_RULES,
    SIZES,
    WITH_TEXTS,
    Trial,
    prepare_model,
    prepare_pool,
    trial_config,
    trial_files,
    trial_record,
)

import mmr1_ds
from mmr1_ds.cluster.launch import launch_environment
from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import RunConfig
from mmr1_ds.data.dataset import PromptDataset, load_dataset
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.text_features import compress
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.zero_engine import Sizes
from mmr1_ds.loop.collector import Collector
from mmr1_ds.loop.composition import Opened, make_batches, make_trainer
from mmr1_ds.loop.engines import Engines
from mmr1_ds.monitoring.live_report import LiveReport
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.preflight.deepspeed import resolve_deepspeed
from mmr1_ds.rewards.pool import RewardPool
from mmr1_ds.rollout.colocated.engine import VllmRollout

logger = logging.getLogger("mmr1_ds.vas_experiment")


def _digest_of_code() -> str:
    """Of what decides a training, so that a reader can tell whether two runs are of the same program."""
    package = Path(mmr1_ds.__file__).parent
    digest = hashlib.blake2b(digest_size=6)
    for folder in ("algorithm", "curriculum", "engine", "loop", "rollout"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


CODE = _digest_of_code()


class NoCheckpoints:
    """Nothing is kept of a trial but its figures."""

    failure = ""
    is_writing = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def is_best(self, validation: object) -> bool:
        """See Checkpoints."""
        return False

    def save(self, step: int, write: object, folders: object, in_background: bool) -> bool:
        """See Checkpoints."""
        return False


class Session:
    """A context manager that trains any number of trials."""

    def __init__(self, folder: Path, validate_every: int) -> None:
        """folder: of the models, the pools and the runs."""
        self._folder, self._validate_every = folder, validate_every
        self._stack = ExitStack()
        self._data: dict[Path, PromptDataset] = {}
        self._is_started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _start(self, config: RunConfig) -> None:
        """The parts that do not depend on the trial, once: all models have one architecture and one tokenizer."""
        if self._is_started:
            return
        self._rewards = self._stack.enter_context(RewardPool(config.worker.reward))
        self._encoder = PromptEncoder(config.worker.actor.model, config.data)
        self._ranks = Ranks(launch_environment(), config.trainer.collective_timeout_seconds)
        self._stack.callback(self._ranks.close)
        worker = config.worker
        self._never_asked = Preemption(30.0, None)  # to end: its signals are not handled here
        self._rollout = VllmRollout(
            worker.rollout, worker.actor.model, config.data, self._ranks, self._encoder, 1, self._never_asked
        )
        self._stack.callback(self._rollout.close)
        self._is_started = True

    def train(self, trial: Trial, path: Path, trace: tuple[Path, int, int, int] | None = None) -> None:
        """Train one trial and write its figures to `path`.

        trace: file, prompts, responses a prompt, steps between measurements.
        """
        prepare_model(self._folder, trial)
        prepare_pool(self._folder, trial)
        files = trial_files(self._folder, trial)
        # Where a step samples until its batch is full, it spends several times the rollouts, and validates by these.
        config = trial_config(trial, files, -1 if trial.arm in FILLED else self._validate_every)
        self._start(config)
        started = time.monotonic()
        train_data = self._load(files.pool, config, with_sketches=trial.arm in WITH_TEXTS)
        val_data = self._load(files.validation, config)
        kinds = np.array(pq.read_table(files.pool, columns=["category"])["category"].to_pylist())
        assert len(kinds) == len(train_data)
        steps = StepFile(path, trial_record(trial) | {"code": CODE})
        actor = self._actor(config, trial.steps * trial.mini_batches)
        try:
            trainer = self._trainer(config, trial, train_data, val_data, kinds, actor, steps)
            if trace is not None:
                trainer.trace = TraceRecorder(train_data, kinds, *trace[1:])
            begun = time.monotonic()
            trainer.fit()
            if trace is not None and trainer.trace is not None:
                trainer.trace.save(trace[0])
            trained = time.monotonic()
            answers = answer_figures(val_data, trainer.uncounted, trainer.settings)
            parts = {"start": begun - started, "training": trained - begun, "answers": time.monotonic() - trained}
            steps.finish({"answers": answers, "seconds_by_part": {name: round(x, 1) for name, x in parts.items()}})
        finally:
            free(actor)
        logger.info("%s: %.0f s", trial.name, time.monotonic() - started)

    def _actor(self, config: RunConfig, num_updates: int) -> Actor:
        resolved = resolve_deepspeed(config, 1, on_gpu=self._ranks.on_gpu)
        return Actor(
            config.worker.actor,
            config.algorithm,
            Sizes(config.worker.rollout.n, config.data.max_prompt_length, config.data.max_response_length),
            config.worker.rollout.temperature,
            resolved,
            self._ranks,
            self._encoder,
            num_updates,
            BadUpdates("actor", config.trainer.max_bad_updates, self._ranks, None),
        )

    def _load(self, file: Path, config: RunConfig, with_sketches: bool = False) -> PromptDataset:
        if with_sketches:  # they are given away once
            return load_dataset(str(file), config.data, self._encoder, with_sketches=True)
        # The fingerprint and the ids follow from the file; categories depend on the trial, so the key does too.
        key = file / str(config.data.category_key)
        if key not in self._data:
            if len(self._data) > 4:
                self._data.clear()
            self._data[key] = load_dataset(str(file), config.data, self._encoder)
        return self._data[key]

    def _trainer(
        self,
        config: RunConfig,
        trial: Trial,
        train_data: PromptDataset,
        val_data: PromptDataset,
        kinds: np.ndarray,
        actor: Actor,
        steps: StepFile,
    ) -> RecordingTrainer:
        sketches = train_data.take_sketches()
        draws_as_rival = trial.arm in RIVAL_RULES and trial.arm not in LOOPED
        coordinator = (RecordingRival if draws_as_rival else RecordingCoordinator)(
            config.data, train_data.prompt_ids, train_data.categories, train_data.fingerprint, RESPONSES,
            trial.steps, self._ranks, features=None if sketches is None else compress(sketches),
            sizes=SIZES if trial.arm == "sized" else None,
        )  # fmt: skip
        if isinstance(coordinator, RecordingRival):
            coordinator.rival = RIVAL_RULES[trial.arm]
        counter = CountingRollout(self._rollout)
        reward_name = config.worker.reward.reward_function
        collector = Collector(counter, self._rewards, reward_name, self._encoder, self._ranks)
        metrics_logger, report = MetricsLogger([steps]), LiveReport(self._folder, None)
        opened = Opened(
            self._ranks, self._encoder, train_data, val_data, coordinator,
            NoCheckpoints(self._folder),  # type: ignore[arg-type]
            metrics_logger, report, self._never_asked,
        )  # fmt: skip
        batches = make_batches(config, LoopedBatches if trial.arm in LOOPED else RecordingBatches, opened, collector)
        if isinstance(batches, LoopedBatches):
            batches.rival = RIVAL_RULES[trial.arm]
        coordinator.steps = batches.steps = steps
        coordinator.kinds = batches.kinds = kinds
        engines = Engines(counter, actor)
        trainer = make_trainer(config, trial.steps, RecordingTrainer, engines, opened, batches, collector)
        trainer.steps, trainer.counter, trainer.trace = steps, counter, None
        trainer.uncounted = Collector(self._rollout, self._rewards, reward_name, self._encoder, self._ranks)
        trainer.budget = trial.budget
        by_rollouts = trial.arm in FILLED
        trainer.validate_rollouts = self._validate_every * BATCH * RESPONSES if by_rollouts else None
        return trainer


def free(actor: Actor) -> None:
    """Take an actor's ZeRO-3 engine down; without it hooks and buffers keep the model alive."""
    actor.engine.destroy()
    for name in ("engine", "module"):
        delattr(actor, name)
    gc.collect()
