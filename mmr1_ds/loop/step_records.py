"""What a step leaves behind: metrics, the prompts it learned from, what the curriculum saw, samples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.loop.batches import Batch
from mmr1_ds.loop.metrics import ActorWork, policy_lag_metrics, stage_metrics, step_metrics
from mmr1_ds.monitoring.clock import StageClock, StageMemory
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.monitoring.profiles import StepProfiles
from mmr1_ds.monitoring.rollouts import RolloutLog
from mmr1_ds.monitoring.samples import TrainingSamples
from mmr1_ds.rollout.base import Policy, RolloutEngine

if TYPE_CHECKING:
    from mmr1_ds.algorithm.experience import Experience


class StepRecords:
    """Keeps the records of a step and makes its metrics."""

    def __init__(
        self,
        *,
        coordinator: Coordinator,
        rollout: RolloutEngine,
        policy: Policy,
        samples: TrainingSamples,
        rollouts: RolloutLog | None,
        profiles: StepProfiles,
        metrics_logger: MetricsLogger,
        preemption: Preemption,
        max_prompt_length: int,
        lags: bool,
        work: ActorWork | None,
        ranks: Ranks,
    ) -> None:
        """
        Args:
            lags: whether responses may be sampled by an older policy than the one that learns from them.
            work: from which the MFU is computed, None = there is none.
        """
        self._coordinator, self._rollout, self._policy = coordinator, rollout, policy
        self._samples, self._rollouts, self._profiles = samples, rollouts, profiles
        self._metrics_logger, self._preemption = metrics_logger, preemption
        self._max_prompt_length, self._lags, self._work, self._ranks = max_prompt_length, lags, work, ranks
        self._memory = StageMemory(ranks.on_gpu)
        self._began = 0.0
        self._version = 0
        self._of_rollout: dict[str, float] = {}

    def clock(self) -> StageClock:
        """A clock that names each stage to the other ranks and measures its memory."""
        return StageClock(self._stage, self._memory)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with self._ranks.stage(name), self._profiles.stage(name):
            yield

    def stages(self, clock: StageClock) -> dict[str, float]:
        """`timing_s/*` of the slowest rank, and `memory_gb/*` of the one that held most. Collective."""
        return stage_metrics(clock, self._ranks)

    def begin_step(self) -> StageClock:
        """Start the clock of a step, and its profile."""
        self._profiles.begin(self._ranks.step)
        self._began, self._version = time.perf_counter(), self._policy.num_updates_done
        return self.clock()

    def keep(self, step: int, batch: Batch) -> None:
        """Write down what a step drew, saw and learned from, before the next weights are sent. Collective."""
        self._of_rollout = self._rollout.metrics()
        if self._lags:
            groups = [item.group for item in batch.groups]
            self._of_rollout |= policy_lag_metrics(groups, self._version, self._ranks)
        self._metrics_logger.record("draws", step, {"prompts": batch.prompts.tolist()})
        observed = self.keep_of_curriculum(step).get("observations")
        self._samples.keep(step, batch.groups, batch.prompts, observed)
        if self._rollouts is not None:
            self._rollouts.keep(step, batch.groups)

    def keep_of_curriculum(self, step: int) -> dict[str, dict[str, Any]]:
        """Write down what the curriculum has to say of its last step or refresh. Returns: the same, on rank 0."""
        records = self._coordinator.take_records()
        for name, row in records.items():
            self._metrics_logger.record(name, step, row)
        return records

    def end_step(
        self, batch: Batch, experience: Experience, learned: dict[str, float], clock: StageClock
    ) -> dict[str, float]:
        """Stop the clock. Collective. Returns: all metrics of the step, of all ranks."""
        clock.seconds["step"] = time.perf_counter() - self._began
        self._profiles.end()
        self._preemption.took(after_sampling=clock.seconds["step"] - clock.seconds.get("gen", 0.0))
        metrics = step_metrics(
            batch.groups,
            experience.trajectories,
            experience.rewards_B,
            clock,
            self._max_prompt_length,
            self._work,
            self._ranks,
        )
        # A critic's returns, among what was learned, take the place of the others.
        return batch.metrics | self._of_rollout | metrics | learned | self._coordinator.metrics()
