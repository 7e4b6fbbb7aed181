"""The full refresh of the curriculum: roll the whole data set out and renew the weights (the paper's Algorithm 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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


class CurriculumRefresh:
    """Refreshes the curriculum where that is due.

    What is found is kept after every chunk; a run that was killed meanwhile resumes the refresh where it was.
    """

    def __init__(
        self,
        data: DataConfig,
        reward: RewardConfig,
        settings: SamplingSettings,
        rollout: RolloutConfig,
        *,
        coordinator: Coordinator,
        collector: Collector,
        train_data: PromptDataset,
        score: Callable[[Sequence[ScoredGroup]], list[PromptStatistics]],
        turns: Turns,
        weights_digest: Callable[[], str],
        kept: Path,
        preemption: Preemption,
        records: StepRecords,
        metrics_logger: MetricsLogger,
        ranks: Ranks,
        queue: SharedQueue | None = None,
    ) -> None:
        """
        Args:
            settings: with which training samples.
            weights_digest: of the actor's weights. Collective.
            kept: the file that an unfinished refresh is kept in.
            queue: from which the ranks take the requests of all; None = each samples its own.
        """
        self._data, self._settings = data, settings
        self._key_parts = (settings, rollout.seed, data, reward)
        self._rollout, self._requests = rollout, RequestMaker(rollout.seed)
        self._coordinator, self._collector, self._train_data = coordinator, collector, train_data
        self._score, self._turns, self._weights_digest, self._kept = score, turns, weights_digest, kept
        self._preemption, self._records, self._ranks, self._queue = preemption, records, ranks, queue
        self._progress: Callable[[int, str], AbstractContextManager[Callable[[int], None]]] = metrics_logger.progress

    def run_if_due(self, step: int) -> dict[str, float]:
        """Refresh after `step` steps, if one is due before the next. Collective. Returns: metrics; none if not due.

        Raises: SamplingAbandoned when the run is asked to end meanwhile; ServersGone.
        """
        if not self._coordinator.refresh_due(step + 1):
            return {}
        clock, coordinator, ranks = self._records.clock(), self._coordinator, self._ranks
        key = self._key(step)
        with (
            clock("refresh"),
            self._turns.rollout(),
            self._progress(len(self._train_data), f"curriculum refresh after step {step}") as advance,
        ):
            advance(coordinator.resume_refresh(self._kept, key))
            for chunk in coordinator.refresh_chunks():
                if ranks.any(self._preemption.is_asked, "ask whether to end"):
                    raise SamplingAbandoned
                requests = self._requests_of_rank(chunk, step)
                groups, _ = self._collector.collect(
                    requests, self._settings, StageClock(ranks.stage), shared=self._queue
                )
                coordinator.observe_refresh(self._score(groups))
                coordinator.save_refresh(self._kept, key)
                advance(len(chunk))
            coordinator.finish_refresh(step + 1)
        self._records.keep_of_curriculum(step)
        return self._records.stages(clock)

    def _requests_of_rank(self, chunk: np.ndarray, step: int) -> list[RolloutRequest]:
        """This rank's requests for a chunk of prompts. Collective."""
        ranks, count = self._ranks, self._data.curriculum_rollout_n
        tokens = self._coordinator.expected_tokens(chunk)
        waits = waits_for_room(len(chunk) * count, self._rollout, ranks.size)
        places = dealt(tokens, waits, ranks.rank, ranks.size)
        own = chunk[places]
        return self._requests(unread(self._train_data, self._queue), own, count, REFRESH, step, own, tokens[places])

    def _key(self, step: int) -> str:
        """What a refresh depends on: another run, model or setting does not resume it. Collective."""
        text = f"{step} {self._train_data.fingerprint} {self._weights_digest()} {self._key_parts}"
        return hashlib.sha256(text.encode()).hexdigest()
