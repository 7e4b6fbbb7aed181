"""The parts that the loop drives."""

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


@dataclass(frozen=True)
class Parts:
    """Everything the loop drives, each a room with one idea; built by the composition root."""

    settings: SamplingSettings  # with which training samples
    turns: Turns  # whose devices they are
    batches: BatchMaker  # draw, sample, reward, observe
    learners: Learners  # log-probabilities, advantages, updates
    validation: Validation
    refresh: CurriculumRefresh
    state: RunState  # the step; save, resume, end in time
    records: StepRecords  # what a step leaves behind
    report: LiveReport
