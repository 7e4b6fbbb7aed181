"""The full refresh of the curriculum: roll the whole data set out and renew the weights (the paper's Algorithm 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmr1_ds.cluster.preemption import Preemption, SamplingAbandoned
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import DataConfig, RewardConfig, RolloutConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.data.dataset import PromptDataset
from mmr1_ds.loop.collector import REFRESH, Collector, RequestMaker
from mmr1_ds.loop.shared_queue import SharedQueue, unread
from mmr1_ds.loop.sharing import dealt, waits_for_room
from mmr1_ds.loop.step_records import StepRecords
from mmr1_ds.loop.turns import Turns
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.records import RolloutRequest, SamplingSettings, ScoredGroup

KEPT = "refresh.safetensors"  # beside the checkpoints: what an unfinished refresh has found


@dataclass(kw_only=True, eq=False)
class CurriculumRefresh:
    """Refreshes the curriculum where that is due.

    What is found is kept after every chunk; a run that was killed meanwhile resumes the refresh where it was.
    """

    data: DataConfig
    reward: RewardConfig
    settings: SamplingSettings  # with which training samples
    rollout: RolloutConfig
    coordinator: Coordinator
    collector: Collector
    train_data: PromptDataset
    score: Callable[[Sequence[ScoredGroup]], list[PromptStatistics]]
    turns: Turns
    weights_digest: Callable[[], str]  # of the actor's weights; collective
    kept: Path  # the file that an unfinished refresh is kept in
    preemption: Preemption
    records: StepRecords
    metrics_logger: MetricsLogger
    ranks: Ranks
    queue: SharedQueue | None = None  # from which the ranks take the requests of all; None = each samples its own

    def run_if_due(self, step: int) -> dict[str, float]:
        """Refresh after `step` steps, if one is due before the next. Collective. Returns: metrics; none if not due.

        Raises: SamplingAbandoned when the run is asked to end meanwhile; ServersGone.
        """
        if not self.coordinator.refresh_due(step + 1):
            return {}
        clock, coordinator, ranks = self.records.clock(), self.coordinator, self.ranks
        key = self._key(step)
        with (
            clock("refresh"),
            self.turns.rollout(),
            self.metrics_logger.progress(len(self.train_data), f"curriculum refresh after step {step}") as advance,
        ):
            advance(coordinator.resume_refresh(self.kept, key))
            for chunk in coordinator.refresh_chunks():
                if ranks.any(self.preemption.is_asked, "ask whether to end"):
                    raise SamplingAbandoned
                requests = self._requests_of_rank(chunk, step)
                groups, _ = self.collector.collect(
                    requests, self.settings, StageClock(ranks.stage), shared=self.queue
                )
                coordinator.observe_refresh(self.score(groups))
                coordinator.save_refresh(self.kept, key)
                advance(len(chunk))
            coordinator.finish_refresh(step + 1)
        self.records.keep_of_curriculum(step)
        return self.records.stages(clock)

    def _requests_of_rank(self, chunk: np.ndarray, step: int) -> list[RolloutRequest]:
        """This rank's requests for a chunk of prompts. Collective."""
        ranks, count = self.ranks, self.data.curriculum_rollout_n
        tokens = self.coordinator.expected_tokens(chunk)
        waits = waits_for_room(len(chunk) * count, self.rollout, ranks.size)
        places = dealt(tokens, waits, ranks.rank, ranks.size)
        own = chunk[places]
        make, data = RequestMaker(self.rollout.seed), unread(self.train_data, self.queue)
        return make(data, own, count, REFRESH, step, own, tokens[places])

    def _key(self, step: int) -> str:
        """What a refresh depends on: another run, model or setting does not resume it. Collective."""
        settings = self.settings, self.rollout.seed, self.data, self.reward
        text = f"{step} {self.train_data.fingerprint} {self.weights_digest()} {settings}"
        return hashlib.sha256(text.encode()).hexdigest()
