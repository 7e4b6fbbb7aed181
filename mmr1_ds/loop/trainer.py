"""The training loop: GRPO with variance-aware sampling. What each line calls is a room of its own beside this file."""

from __future__ import annotations

from dataclasses import dataclass

from mmr1_ds.loop.batches import BatchMaker
from mmr1_ds.loop.learners import Learners
from mmr1_ds.loop.refresh import CurriculumRefresh
from mmr1_ds.loop.state import RunState
from mmr1_ds.loop.step_records import StepRecords
from mmr1_ds.loop.turns import Turns
from mmr1_ds.loop.validation import Validation
from mmr1_ds.monitoring.live_report import LiveReport
from mmr1_ds.records import SamplingSettings

Metrics = dict[str, float]


@dataclass(eq=False)
class Trainer:
    """Drives its parts, each a room with one idea, step by step. Every method is a collective."""

    num_steps: int  # of the whole run, those before it was resumed included
    settings: SamplingSettings  # with which training samples
    turns: Turns  # whose devices they are
    batches: BatchMaker  # draw, sample, reward, observe
    learners: Learners  # log-probabilities, advantages, updates
    validation: Validation
    refresh: CurriculumRefresh
    state: RunState  # the step; save, resume, end in time
    records: StepRecords  # what a step leaves behind
    report: LiveReport

    @property
    def step(self) -> int:
        """Steps done; within a step, its number."""
        return self.state.step

    def fit(self) -> None:
        """Train from the current step to the last.

        Raises: ServersGone and Preempted, after what was learned was saved; RuntimeError when the last save failed.
        """
        state = self.state
        with state.saved_when_interrupted():
            self.turns.sync_weights()
            state.log(self.validation.before_training(self.step))
            while self.step < self.num_steps:
                state.end_if_asked()
                state.take_refresh(self.refresh.run_if_due(self.step))
                state.begin(self.step + 1)
                state.log(self.train_step())
                validated = self.validation.run_if_due(self.step)
                state.log(validated)
                state.save_if_due(validated)
                self.report.after_step(self.step)
        self.report.finish()

    def train_step(self) -> Metrics:
        """Take one step of the algorithm. Returns: its metrics, over all ranks."""
        step = self.step
        clock = self.records.begin_step()
        with self.turns.rollout(then_learns=True):  # the GPU is vLLM's
            batch = self.batches.make(step, self.settings, clock)  # draw, sample, reward, observe
        with clock("draw"):
            self.batches.begin_ahead(step, self.settings)  # servers sample on while the actor learns
        judged = self.learners.judge(step, batch, clock)  # old and reference log-probabilities, values
        experience = self.learners.experience(batch, judged, clock)  # rewards less the KL, advantages
        learned = self.learners.update(step, experience, clock)  # the critic if there is one, the actor
        self.records.keep(step, batch)
        self.turns.sync_weights(clock)
        return self.records.end_step(batch, experience, learned, clock)
