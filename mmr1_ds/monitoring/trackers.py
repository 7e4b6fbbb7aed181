"""Experiment trackers: wandb, swanlab, mlflow and trackio. A resumed run goes on in its own run there.

A step that is repeated after a resume is logged again; what a tracker does with the second is its own affair.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from mmr1_ds.config import TrainerConfig
from mmr1_ds.config.redaction import without_secrets
from mmr1_ds.errors import UserError, remedy, require
from mmr1_ds.io import write_whole
from mmr1_ds.monitoring.writers import Writer, histograms

logger = logging.getLogger(__name__)

_KEPT = "trackers.json"  # in the run directory: the name that each tracker knows the run by


def open_trackers(
    trainer: TrainerConfig, run_dir: Path, resumed_step: int, run_config: Mapping[str, Any]
) -> list[Writer]:
    """Open the trackers that `trainer.logger` names. Raises: UserError for one that is not installed."""
    path = run_dir / _KEPT
    kept = json.loads(path.read_text(encoding="utf-8")) if resumed_step and path.is_file() else {}
    trackers = {
        name: opened(trainer, run_dir, run_config, kept.get(name))
        for name, opened in _TRACKERS.items()
        if name in trainer.logger
    }
    if trackers:
        write_whole(path, json.dumps(kept | {name: tracker.run_id for name, tracker in trackers.items()}).encode())
    return list(trackers.values())


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers in `trainer.logger` are installed; nothing is imported. Raises: UserError."""
    for name in names:
        if name in ("tensorboard", *_TRACKERS):
            require("gpu" if name in ("tensorboard", "wandb") else "trackers", name, purpose=f"trainer.logger={name}")


def _new_id() -> str:
    return uuid.uuid4().hex[:21]  # of as many characters as swanlab wants


class WandbWriter(Writer):
    """Writes to Weights & Biases; offline, in `<run_dir>/wandb`, for users without an account."""

    def __init__(self, trainer: TrainerConfig, run_dir: Path, run_config: Mapping[str, Any], kept: str | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"trainer.logger has wandb, which does not import ({error}); {remedy('gpu')}") from error
        self._wandb = wandb
        mode: Literal["offline"] | None = None  # None leaves it to wandb's own rules
        if "WANDB_API_KEY" not in os.environ and "WANDB_MODE" not in os.environ:
            mode = "offline"
            logger.info(
                "wandb: WANDB_API_KEY is not set, so this run stays offline in %s; "
                "upload it with `wandb sync`, or set WANDB_API_KEY or WANDB_MODE",
                run_dir / "wandb",
            )
        self.run_id = kept or _new_id()
        self._run = wandb.init(
            project=trainer.project_name,
            name=trainer.experiment_name,
            dir=str(run_dir),
            config=without_secrets(run_config),
            mode=mode,
            id=self.run_id,
            resume="allow" if mode is None else None,  # offline, `wandb sync` puts runs of one id together
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        names = list(rows[0])
        table = self._wandb.Table(columns=[*names], data=[[row[name] for name in names] for row in rows])
        self._run.log({"val/generations": table}, step=step)

    def record(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        import numpy as np

        for key, counts, edges in histograms(name, row):
            histogram = self._wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
            self._run.log({key: histogram}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Tracker(Writer):
    """Writes the metrics of each step to a library that keeps one run open at a time."""

    name: str
    run_id: str
    _has_failed = False

    def __init__(self, trainer: TrainerConfig, run_dir: Path, run_config: Mapping[str, Any], kept: str | None) -> None:
        try:
            self._library: Any = import_module(self.name)
        except ImportError as error:
            raise UserError(
                f"trainer.logger has {self.name}, which does not import ({error}); {remedy('trackers')}"
            ) from error
        self._open(trainer, run_dir, without_secrets(run_config), kept)

    def _open(self, trainer: TrainerConfig, run_dir: Path, run_config: Any, kept: str | None) -> None:
        """Begin a run, or go on in the `kept` one, and set `run_id`."""
        raise NotImplementedError

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the step over. A tracker that fails costs its own curves, not the run; the first failure is logged."""
        try:
            self._send(step, {name: float(value) for name, value in metrics.items()})
        except Exception as error:  # whatever a library raises when its server is away
            if not self._has_failed:
                logger.warning("%s did not take step %d (%s); the run goes on without", self.name, step, error)
            self._has_failed = True

    def _send(self, step: int, metrics: Mapping[str, float]) -> None:
        self._library.log(dict(metrics), step=step)

    def close(self) -> None:
        self._library.finish()


class SwanlabWriter(_Tracker):
    """Writes to SwanLab; offline, in `<run_dir>/swanlog`, for users without an account."""

    name = "swanlab"

    def _open(self, trainer: TrainerConfig, run_dir: Path, run_config: Any, kept: str | None) -> None:
        offline = "SWANLAB_API_KEY" not in os.environ and "SWANLAB_MODE" not in os.environ
        if offline:
            logger.info(
                "swanlab: SWANLAB_API_KEY is not set, so this run stays offline in %s; upload it with `swanlab sync`, "
                "or set SWANLAB_API_KEY or SWANLAB_MODE",
                run_dir / "swanlog",
            )
        self.run_id = kept or _new_id()
        self._library.init(
            project=trainer.project_name,
            experiment_name=trainer.experiment_name,
            logdir=str(run_dir / "swanlog"),
            config=run_config,
            mode="offline" if offline else None,
            id=self.run_id,
            resume="allow",
        )


class MlflowWriter(_Tracker):
    """Writes to the server of MLFLOW_TRACKING_URI; without one to `<run_dir>/mlflow.db`, a file."""

    name = "mlflow"

    def _open(self, trainer: TrainerConfig, run_dir: Path, run_config: Any, kept: str | None) -> None:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._library.set_tracking_uri(f"sqlite:///{run_dir.absolute() / 'mlflow.db'}")
        self._library.set_experiment(trainer.project_name)
        run = self._library.start_run(run_id=kept, run_name=None if kept else trainer.experiment_name)
        self.run_id = run.info.run_id
        if kept is None:  # as a tag and not as a file: a file store may be another place
            for key, value in run_config.items():
                self._library.set_tag(f"config.{key}", json.dumps(value, default=str)[:5000])

    def _send(self, step: int, metrics: Mapping[str, float]) -> None:
        named = {re.sub(r"[^/\w.\- :]", "_", name): value for name, value in metrics.items()}  # it refuses other names
        self._library.log_metrics(named, step=step)

    def close(self) -> None:
        self._library.end_run()


class TrackioWriter(_Tracker):
    """Writes to trackio's own folder, for `trackio show`; with TRACKIO_SPACE_ID to a Space."""

    name = "trackio"

    def _open(self, trainer: TrainerConfig, run_dir: Path, run_config: Any, kept: str | None) -> None:
        run = self._library.init(
            project=trainer.project_name,
            name=kept or trainer.experiment_name,
            config=run_config,
            resume="allow" if kept else "never",
        )
        self.run_id = run.name  # another where the project has a run of this name


_TRACKERS: dict[str, type[WandbWriter | _Tracker]] = {
    "wandb": WandbWriter,
    "swanlab": SwanlabWriter,
    "mlflow": MlflowWriter,
    "trackio": TrackioWriter,
}
