"""The parts that the loop drives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.data.dataset import PromptDataset
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.critic import Critic
from mmr1_ds.engine.reference import AdapterlessReference, Reference
from mmr1_ds.loop.batches import BatchMaker
from mmr1_ds.loop.checkpoint import Checkpoints
from mmr1_ds.loop.collector import Collector
from mmr1_ds.monitoring.live_report import LiveReport
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.monitoring.samples import TrainingSamples
from mmr1_ds.rollout.base import RolloutEngine

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


@dataclass(frozen=True)
class Parts:
    """Everything the loop drives; built by the composition root, which also closes it."""

    ranks: Ranks
    encoder: PromptEncoder
    train_data: PromptDataset
    val_data: PromptDataset | None
    coordinator: Coordinator
    batches: BatchMaker
    collector: Collector
    rollout: RolloutEngine
    actor: Actor
    reference: Reference | AdapterlessReference | None
    checkpoints: Checkpoints
    metrics_logger: MetricsLogger
    samples: TrainingSamples
    report: LiveReport
    preemption: Preemption
    critic: Critic | None = None  # gae only
