"""What a step leaves behind: metrics, the prompts it learned from, what the curriculum saw, samples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass(kw_only=True, eq=False)
class StepRecords:
    """Keeps the records of a step and makes its metrics."""

    coordinator: Coordinator
    rollout: RolloutEngine
    policy: Policy
    samples: TrainingSamples
    rollouts: RolloutLog | None
    profiles: StepProfiles
    metrics_logger: MetricsLogger
    preemption: Preemption
    max_prompt_length: int
    lags: bool  # whether responses may be sampled by an older policy than the one that learns from them
    work: ActorWork | None  # from which the MFU is computed, None = there is none
    ranks: Ranks
    _began: float = field(init=False, default=0.0)
    _version: int = field(init=False, default=0)
    _of_rollout: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._memory = StageMemory(self.ranks.on_gpu)

    def clock(self) -> StageClock:
        """A clock that names each stage to the other ranks and measures its memory."""
        return StageClock(self._stage, self._memory)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with self.ranks.stage(name), self.profiles.stage(name):
            yield

    def stages(self, clock: StageClock) -> dict[str, float]:
        """`timing_s/*` of the slowest rank, and `memory_gb/*` of the one that held most. Collective."""
        return stage_metrics(clock, self.ranks)

    def begin_step(self) -> StageClock:
        """Start the clock of a step, and its profile."""
        self.profiles.begin(self.ranks.step)
        self._began, self._version = time.perf_counter(), self.policy.num_updates_done
        return self.clock()

    def keep(self, step: int, batch: Batch) -> None:
        """Write down what a step drew, saw and learned from, before the next weights are sent. Collective."""
        self._of_rollout = self.rollout.metrics()
        if self.lags:
            groups = [item.group for item in batch.groups]
            self._of_rollout |= policy_lag_metrics(groups, self._version, self.ranks)
        self.metrics_logger.record("draws", step, {"prompts": batch.prompts.tolist()})
        observed = self.keep_of_curriculum(step).get("observations")
        self.samples.keep(step, batch.groups, batch.prompts, observed)
        if self.rollouts is not None:
            self.rollouts.keep(step, batch.groups)

    def keep_of_curriculum(self, step: int) -> dict[str, dict[str, Any]]:
        """Write down what the curriculum has to say of its last step or refresh. Returns: the same, on rank 0."""
        records = self.coordinator.take_records()
        for name, row in records.items():
            self.metrics_logger.record(name, step, row)
        return records

    def end_step(
        self, batch: Batch, experience: Experience, learned: dict[str, float], clock: StageClock
    ) -> dict[str, float]:
        """Stop the clock. Collective. Returns: all metrics of the step, of all ranks."""
        clock.seconds["step"] = time.perf_counter() - self._began
        self.profiles.end()
        self.preemption.took(after_sampling=clock.seconds["step"] - clock.seconds.get("gen", 0.0))
        metrics = step_metrics(
            batch.groups,
            experience.trajectories,
            experience.rewards_B,
            clock,
            self.max_prompt_length,
            self.work,
            self.ranks,
        )
        # A critic's returns, among what was learned, take the place of the others.
        return batch.metrics | self._of_rollout | metrics | learned | self.coordinator.metrics()
