"""What the experiment sees of a training: parts of the trainer that also take notes, and change nothing.

The rollouts that a run spends are counted where they are made, not taken from the curriculum's own accounts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from vas_experiment_steps import StepFile, transition_counts
from vas_experiment_trials import RESPONSES, SORTS

from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.data.dataset import PromptDataset
from mmr1_ds.loop.batches import Batch, BatchMaker
from mmr1_ds.loop.collector import Collector, RequestMaker
from mmr1_ds.loop.trainer import Trainer
from mmr1_ds.loop.validation_metrics import best_of, powers_of_two
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import RolloutGroup, SamplingSettings
from mmr1_ds.rollout.base import Enough, InTurn, Policy, RolloutEngine, Submitted, ignore, never

HISTOGRAM_EVERY = 20  # steps
HISTOGRAM_BINS = 20
TRACE, ANSWERS = 4, 5  # purposes of seeds; the curriculum has none of its own for them
NUM_ANSWERS = 8  # to each held-out question after the training


class CountingRollout(InTurn):
    """The engine, with a count of the responses that were sampled for the training: validation is greedy."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self.num_responses = 0

    def collect(
        self, submitted: Submitted, enough: Enough = never, advance: Callable[[int], None] = ignore
    ) -> list[RolloutGroup | None]:
        """See RolloutEngine."""
        if submitted.settings.temperature > 0.0:
            self.num_responses += sum(request.num_responses for request in submitted.requests)
        return self._engine.collect(submitted, enough, advance)

    def sync_weights(self, policy: Policy) -> int:
        """See RolloutEngine."""
        return self._engine.sync_weights(policy)

    def close(self) -> None:
        """The engine outlives the run."""


class RecordingCoordinator(Coordinator):
    """Notes how pass rates moved from one full refresh to the next, and the weights now and then."""

    steps: StepFile
    kinds: np.ndarray  # (P,) str

    def finish_refresh(self, step: int) -> None:
        """See Coordinator."""
        before = self.table.column("pass_rate").copy()  # type: ignore[union-attr]
        super().finish_refresh(step)
        after = self.table.column("pass_rate")  # type: ignore[union-attr]
        if not np.isnan(before).any():
            self.steps.note(step - 1, {"transitions": transition_counts(before, after, RESPONSES).tolist()})

    def finish_step(self, step: int, trained: np.ndarray) -> None:
        """See Coordinator."""
        super().finish_step(step, trained)
        if self._is_curriculum and (step == 1 or step % HISTOGRAM_EVERY == 0):
            self.note_weights(step)

    def note_weights(self, step: int) -> None:
        """The histogram of the weights over the largest of them, and the part of them that each sort holds."""
        weights = self.table.sampling_weights.astype(np.float64)
        counts, _ = np.histogram(weights / weights.max(), bins=HISTOGRAM_BINS, range=(0.0, 1.0))
        sorts = np.array([SORTS[kind] for kind in self.kinds])
        shares = {sort: float(weights[sorts == sort].sum() / weights.sum()) for sort in sorted(set(SORTS.values()))}
        self.steps.note(step, {"weight_histogram": counts.tolist(), "weight_shares": shares})


class RecordingBatches(BatchMaker):
    """Notes which sorts of prompts were trained on, and how many groups taught."""

    steps: StepFile
    kinds: np.ndarray

    def make(self, step: int, settings: SamplingSettings, clock: StageClock) -> Batch:
        """See BatchMaker."""
        batch = super().make(step, settings, clock)
        sorts = [SORTS[str(self.kinds[group.group.prompt.index])] for group in batch.groups]
        effective = [bool(np.ptp(group.rewards.overall)) for group in batch.groups]
        of_learnable = [taught for sort, taught in zip(sorts, effective, strict=True) if sort == "learnable"]
        figures = {
            "effective_fraction": sum(effective) / len(effective),
            "learnable_fraction": len(of_learnable) / len(sorts),
            "learnable_effective_fraction": sum(of_learnable) / len(sorts),
        }
        self.steps.note(step, figures)
        return batch


class TraceRecorder:
    """Measures the pass rates of fixed prompts every few steps, with seeds of its own, and keeps them for a file."""

    def __init__(
        self, data: PromptDataset, kinds: np.ndarray, num_prompts: int, num_responses: int, every: int
    ) -> None:
        """The first prompts of the pool are a random part of it, since pools are shuffled."""
        self._data, self._indices = data, np.arange(min(num_prompts, len(data)))
        self._kinds = kinds[self._indices]
        self._num_responses, self._every = num_responses, every
        self._requests = RequestMaker(seed=0)
        self._steps: list[int] = []
        self._pass_rates: list[np.ndarray] = []

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step`."""
        return step % self._every == 0

    def measure(self, step: int, collector: Collector, settings: SamplingSettings) -> None:
        """Collective."""
        requests = self._requests(self._data, self._indices, self._num_responses, TRACE, step, self._indices)
        groups, _ = collector.collect(requests, settings, StageClock())
        self._steps.append(step)
        self._pass_rates.append(np.array([group.rewards.accuracy.mean() for group in groups], dtype=np.float32))

    def save(self, path: Path) -> None:
        """Write what the laboratory replays; see its `RecordedTrace`."""
        names, categories = np.unique(self._kinds, return_inverse=True)
        np.savez_compressed(
            path,
            steps=np.array(self._steps),
            pass_rates=np.stack(self._pass_rates),
            num_responses=np.array(self._num_responses),
            categories=categories.astype(np.int64),
            category_names=names.astype(np.str_),
            prompt_ids=np.array([self._data.prompt_ids[int(index)] for index in self._indices], dtype=np.str_),
            responses_per_group=np.array(RESPONSES),
        )


def answer_figures(data: PromptDataset, collector: Collector, settings: SamplingSettings) -> dict[str, float]:
    """Accuracy and pass@k of NUM_ANSWERS answers to each question, sampled as the training samples. Collective.

    Seeds are the same for all trainings, so that arms differ by their weights alone.
    """
    everyone = np.arange(len(data))
    requests = RequestMaker(seed=0)(data, everyone, NUM_ANSWERS, ANSWERS, 0, everyone)
    groups, _ = collector.collect(requests, settings, StageClock())
    accuracies = [group.rewards.accuracy for group in groups]
    passed = {f"pass_at_{k}": [best_of(of_one, k) for of_one in accuracies] for k in powers_of_two(NUM_ANSWERS)}
    return {"accuracy": float(np.mean(accuracies))} | {name: float(np.mean(of_all)) for name, of_all in passed.items()}


class RecordingTrainer(Trainer):
    """The trainer, which saves no checkpoints, ends with its budget, and measures a trace where one is asked for."""

    steps: StepFile
    counter: CountingRollout
    budget: int  # responses after which the run ends
    trace: TraceRecorder | None
    uncounted: Collector  # past the counter
    validate_rollouts: int | None  # responses between validations; None = as trainer.val_freq says

    def fit(self) -> None:
        """See Trainer."""
        self.steps.note(0, {"rollouts": 0})
        if self.trace is not None:
            self.turns.sync_weights()
            self._measure()
        super().fit()
        if not self.steps.has(self.step, "validation_accuracy"):  # none was due at its end
            self._validate()

    def train_step(self) -> dict[str, float]:
        """See Trainer."""
        before = self.counter.num_responses
        metrics = super().train_step()
        spent = self.counter.num_responses
        self.steps.note(self.step, {"rollouts": spent})  # those of a refresh after it are not in
        if self.trace is not None and self.trace.is_due(self.step):
            self._measure()
        if self.validate_rollouts and spent // self.validate_rollouts > before // self.validate_rollouts:
            self._validate()
        if spent >= self.budget:
            self.num_steps = self.step
        return metrics

    def _validate(self) -> None:
        self.state.log(self.validation.run(self.step))

    def _measure(self) -> None:
        assert self.trace is not None
        self.trace.measure(self.step, self.uncounted, self.settings)
