"""Where a run is, and how it is saved, resumed, and ended in time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmr1_ds.cluster.preemption import Preempted, Preemption, SamplingAbandoned
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.io import PendingFile
from mmr1_ds.loop.batches import BatchMaker
from mmr1_ds.loop.checkpoint import VALIDATION, Checkpoints
from mmr1_ds.loop.learners import Learners
from mmr1_ds.loop.step_records import StepRecords
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.records import SamplingSettings
from mmr1_ds.rollout.base import ServersGone

if TYPE_CHECKING:
    from mmr1_ds.engine.actor import Actor
    from mmr1_ds.engine.critic import Critic

logger = logging.getLogger(__name__)

PROMPT_IDS = "prompt_ids.safetensors"  # beside the checkpoints, which link to it
_SAVE_PARTS = 3  # of a checkpoint, for its bar: what was begun ahead, the engines, the rest


@dataclass(kw_only=True, eq=False)
class RunState:
    """The number of steps done, and the checkpoints of what they made. Every method is a collective."""

    save_freq: int  # steps between checkpoints, -1 = only after the last
    # False for a validation alone, which learns nothing: its curriculum is empty, and a save would put that in place of
    # the checkpoint that it validates.
    saves_when_interrupted: bool
    saves_in_background: bool  # whether the next steps go on while a checkpoint is written
    weights_alone: bool  # whether checkpoints hold nothing to resume from
    num_steps: int  # of the whole run
    config_yaml: str  # the resolved configuration, kept for `mmr1-ds export`
    kept_refresh: Path  # the file that an unfinished refresh is kept in; a checkpoint has it as well
    actor: Actor
    critic: Critic | None
    coordinator: Coordinator
    batches: BatchMaker
    learners: Learners
    checkpoints: Checkpoints
    preemption: Preemption
    records: StepRecords
    metrics_logger: MetricsLogger
    ranks: Ranks
    step: int = field(init=False, default=0)  # steps done; within a step, its number
    _last_saved: int | None = field(init=False, default=None)  # step of a checkpoint, which may still be written
    _began_saving: float = field(init=False, default=0.0)  # monotonic
    # When the kept refresh had changed by the last save: a later one is not in it.
    _kept_at: int | None = field(init=False, default=None)
    _validation: dict[str, float] = field(init=False, default_factory=dict)  # of the step, where it was validated

    def begin(self, step: int) -> None:
        """Take up `step`: before its work, or after it when a checkpoint of it was loaded. Not a collective."""
        self.step = self.ranks.step = step
        self._validation = {}

    def log(self, metrics: dict[str, float]) -> None:
        """Log metrics of the current step, if there are any. Not a collective."""
        if metrics:
            elapsed = {"perf/elapsed_seconds": self.metrics_logger.elapsed_seconds}
            self.metrics_logger.log(self.step, metrics | elapsed)

    @contextmanager
    def saved_when_interrupted(self) -> Iterator[None]:
        """Inside, the run may be told to end, and what was learned is saved.

        A run that is told to end in the validation after its last step is done without it, and leaves as such.
        Raises: ServersGone; Preempted; RuntimeError when the last save failed: the run must not look like one that is
            done.
        """
        self.preemption.begin_training()
        try:
            yield
        except (ServersGone, SamplingAbandoned) as stop:
            self.begin(self.learners.num_steps_done)
            self.log(self.publish())
            if self.saves_when_interrupted and self.step > 0 and self._last_saved != self.step:
                self.log(self.save(in_full=False))
            if not self._is_asked_to_end():
                raise
            if self.step < self.num_steps or not self.saves_when_interrupted:
                raise self._preempted() from stop
            logger.warning(
                "%s: all %d steps are done and saved, the last validation is not; mmr1-ds eval does it",
                self._reason(), self.num_steps,
            )  # fmt: skip
        self.log(self.publish())
        self._check_saved()

    def end_if_asked(self) -> None:
        """Raises: Preempted, on every rank, when one was told to end; all is saved."""
        is_asked = self._is_asked_to_end()
        self.log(self.publish(wait=is_asked))
        if is_asked:
            if self.step > 0 and self._last_saved != self.step:
                self.log(self.save())
            raise self._preempted()

    def take_refresh(self, metrics: dict[str, float]) -> None:
        """Log a refresh after the current step, if there was one, and save it where this step is saved anyway.

        Raises: as `end_if_asked`.
        """
        if metrics:
            self.log(metrics)
            if self.step > 0 and self.save_freq > 0 and self.step % self.save_freq == 0:
                self.log(self.save(in_background=self.saves_in_background))
            self.end_if_asked()

    def save_if_due(self, validation: dict[str, float]) -> None:
        """Save after the last step, every `save_freq` steps, before a refresh, which may take very long, and the best.

        The step's figures are logged before, so that a kill leaves no step without its line.
        Args: validation: figures of the step, empty where it was not validated.
        """
        self._validation = validation
        refreshes, is_last = self.coordinator.refresh_due(self.step + 1), self.step == self.num_steps
        is_due = self.save_freq > 0 and (self.step % self.save_freq == 0 or refreshes)
        if validation:
            self.log(self.publish())  # the best may be the one that is written
        if self.checkpoints.is_best(validation) or is_due or is_last:
            self.log(self.save(in_background=self.saves_in_background and not refreshes and not is_last))

    def save(self, in_full: bool = True, in_background: bool = False) -> dict[str, float]:
        """Write the checkpoint of this step. When the disk fails it, the run goes on, see `Checkpoints.save`.

        Args: in_full: wait for responses begun ahead and keep them; else the resumed run samples them anew;
            in_background: return once the states are copied to host memory; `publish` is still due.
        Returns: metrics.
        """
        metrics = self.publish()
        self._began_saving = time.monotonic()
        self._kept_at = _changed_at(self.kept_refresh)
        clock, title = self.records.clock(), f"checkpoint of step {self.step}"
        with (
            clock("save_checkpoint"),
            self.metrics_logger.progress(_SAVE_PARTS, title, with_lines=False) as advance,
        ):
            if in_full and not self.weights_alone:
                self.batches.finish_ahead()
            advance(1)

            def write(folder: Path) -> list[PendingFile]:
                return self._write(folder, in_background, advance)

            folders = () if self.weights_alone else ("curriculum", "rollout", "reference")
            saved = self.checkpoints.save(self.step, write, folders, in_background)
            advance(1)
        metrics |= self.records.stages(clock)
        if not saved:
            return metrics | {"checkpoint/save_failed": 1.0}
        self._last_saved = self.step
        if not in_background:
            self._is_there()
        return metrics

    def publish(self, wait: bool = True) -> dict[str, float]:
        """Finish a save in the background, if there is one: now, or without wait once every rank has written its part.

        Returns: metrics.
        """
        if not self.checkpoints.is_writing or not (wait or self.checkpoints.has_written()):
            return {}
        if not self.checkpoints.finish():
            self._last_saved = None
            return {"checkpoint/save_failed": 1.0}
        return {"perf/background_save_seconds": self._is_there()}

    def _is_there(self) -> float:
        """Note that a save has made its checkpoint. Returns: the seconds since it began."""
        # Not until now, where it was published: steps have gone by since it was written.
        self.preemption.took(to_save=self.checkpoints.written_at - self._began_saving)
        if self.ranks.rank == 0 and self._kept_at == _changed_at(self.kept_refresh):
            self.kept_refresh.unlink(missing_ok=True)
        return time.monotonic() - self._began_saving

    def load(self, step: int, folder: Path, settings: SamplingSettings | None) -> None:
        """Resume from a checkpoint of `step`; the coordinator has read its part already.

        settings: with which responses that were begun ahead are sampled; None leaves them, as a validation does.
        """
        self.actor.load(folder / "actor")
        if self.critic is not None:
            self.critic.load(folder / "critic")
        self.learners.load_reference(folder / "reference")
        if settings is not None:
            self.batches.load(folder / "rollout", settings)
        self.begin(step)
        if (folder / VALIDATION).is_file():  # a refresh that follows saves this step again
            self._validation = json.loads((folder / VALIDATION).read_text(encoding="utf-8"))
        self.learners.num_steps_done = self._last_saved = step

    def _write(self, folder: Path, in_background: bool, advance: Callable[[int], None]) -> list[PendingFile]:
        pending: list[PendingFile] = []
        if self.weights_alone:
            self.actor.save_weights(folder / "actor")
        else:
            pending += self.actor.save(folder / "actor", in_background)
            if self.critic is not None:
                pending += self.critic.save(folder / "critic", in_background)
        advance(1)
        # From here on no collectives: a disk may fail one rank alone.
        if not self.weights_alone:
            self.learners.save_reference(folder / "reference")
            self.coordinator.save(folder / "curriculum", self.checkpoints.root / PROMPT_IDS)
            self.batches.save(folder / "rollout")
        if self.ranks.rank == 0:
            (folder / "config.yaml").write_text(self.config_yaml, encoding="utf-8")
            if self._validation:
                (folder / VALIDATION).write_text(json.dumps(self._validation), encoding="utf-8")
        return pending

    def _is_asked_to_end(self) -> bool:
        return self.ranks.any(self.preemption.is_asked, "ask whether to end")

    def _reason(self) -> str:
        """Why the run ends, as the first rank that was told says: a signal need not have reached the others yet."""
        reasons = self.ranks.all_gather_objects(self.preemption.reason, "say why the run ends")
        return next(reason for reason in reasons if reason)

    def _preempted(self) -> Preempted:
        reason = self._reason()
        self._check_saved()
        where = f"saved in {self.checkpoints.root}" if self.step else "nothing was learned yet"
        if not self.saves_when_interrupted:
            where = "this validation is not finished"
        advice = "no run resumes from weights alone" if self.weights_alone else "start again to go on"
        return Preempted(f"{reason}: {self.step} of {self.num_steps} steps are done, {where}; {advice}")

    def _check_saved(self) -> None:
        if self.checkpoints.failure:
            raise RuntimeError(f"the run ends unsaved: {self.checkpoints.failure}")


def _changed_at(path: Path) -> int | None:
    """When a file last changed, ns; None without it."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
