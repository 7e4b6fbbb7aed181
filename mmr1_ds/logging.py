"""What a run tells its users: one line and one JSON object a step, tensorboard, wandb, sampled generations, progress.

Rank 0 alone speaks; the other ranks hold a logger without writers.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from mmr1_ds.config import TrainerConfig
from mmr1_ds.errors import UserError
from mmr1_ds.redaction import hide_in_tracebacks, redacted, without_secrets

logger = logging.getLogger(__name__)

LOGGERS = ("console", "jsonl", "file", "tensorboard", "wandb")  # file: EasyR1's name of jsonl


def check_loggers(names: Sequence[str]) -> None:
    """Check `trainer.logger`. Raises: UserError that lists the known names."""
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"trainer.logger: unknown logger {name!r}; known: {', '.join(LOGGERS)}")


def configure_logging(is_main: bool, level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr with the time; warnings only from ranks other than 0.

    They, and the traceback of an error that ends the process, are free of credentials.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    hide_in_tracebacks()
    package = logging.getLogger("mmr1_ds")
    package.handlers[:] = [handler]
    package.setLevel(level if is_main else logging.WARNING)
    package.propagate = False  # libraries configure the root logger, which would print every line twice


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


# Libraries' own chatter, which would bury a run's one line a step. Anyone's own setting wins.
_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its CPU worker warns once an image
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",  # checkpoint shards; our own bars say so when they want to be seen
}


def quiet_libraries() -> None:
    """Ask the libraries for errors only. Call before they are imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|vllm|deepspeed|transformers")


class Writer(Protocol):
    """One place that metrics go to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class MetricsLogger:
    """Hands each step's metrics to the writers named in `trainer.logger`. A context manager."""

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        """Without writers it says nothing, which is what every rank but 0 wants."""
        self._writers = tuple(writers)

    @classmethod
    def open(
        cls,
        trainer: TrainerConfig,
        run_dir: Path,
        total_steps: int,
        resumed_step: int,
        run_config: Mapping[str, Any],
        is_main: bool,
    ) -> MetricsLogger:
        """The loggers of a run.

        `metrics.jsonl`, `generations.jsonl` and `draws.jsonl` are always written: the run directory holds all of a
        run.

        Args:
            run_dir: exists.
            total_steps: of the whole run, for progress.
            resumed_step: the checkpoint's step; what was logged after it is dropped. 0 for a fresh run, which
                renames what an earlier one logged to metrics.1.jsonl and so on.
            run_config: resolved; stored with wandb, values that look like secrets left out.
            is_main: False gives a logger that says nothing.
        Raises: UserError for an unknown name.
        """
        check_loggers(trainer.logger)
        if not is_main:
            return cls()
        writers: list[Writer] = [JsonLinesWriter(run_dir, resumed_step)]
        if "console" in trainer.logger:
            writers.append(ConsoleWriter(total_steps))
        if "tensorboard" in trainer.logger:
            writers.append(TensorboardWriter(run_dir, resumed_step))
        if "wandb" in trainer.logger:
            writers.append(WandbWriter(trainer, run_dir, run_config))
        return cls(writers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One flat dictionary of a step; a second one of the same step is merged into it. Steps never fall."""
        for writer in self._writers:
            writer.log(step, metrics)

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sampled responses, a mapping each (prompt, response, ground_truth, reward ...), one set of keys a call."""
        if rows:
            for writer in self._writers:
                writer.generations(step, rows)

    def drawn(self, step: int, prompts: Sequence[int]) -> None:
        """Positions in the data set of the prompts that a step learned from: what a resumed run must not change."""
        for writer in self._writers:
            if isinstance(writer, JsonLinesWriter):
                writer.drawn(step, prompts)

    @contextmanager
    def progress(self, total: int, description: str) -> Iterator[Callable[[int], None]]:
        """Show how far a long stage has come. Yields a function that takes how many more are done.

        A bar when stderr is a terminal, else a log line about every tenth of the way.
        """
        if not self._writers:
            yield lambda count: None
        elif sys.stderr.isatty():
            from tqdm.auto import tqdm  # type: ignore[import-untyped]
            from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

            with (
                logging_redirect_tqdm([logging.getLogger("mmr1_ds")]),
                tqdm(total=total, desc=description, leave=False, disable=False) as bar,
            ):
                yield lambda count: bar.update(count) and None
        else:
            yield _LineProgress(total, description).advance

    def close(self) -> None:
        """Flush and close every writer, the others too when one fails."""
        with ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
        self._writers = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LineProgress:
    """A log line whenever another tenth of the way is done."""

    def __init__(self, total: int, description: str) -> None:
        self.total, self.description = total, description
        self.done = 0
        self.started = time.monotonic()

    def advance(self, count: int) -> None:
        tenths_before = self.done * 10 // max(1, self.total)
        self.done += count
        if self.done * 10 // max(1, self.total) > tenths_before:
            elapsed = time.monotonic() - self.started
            left = elapsed / self.done * max(0, self.total - self.done)
            logger.info("%s: %d of %d, %s left", self.description, self.done, self.total, format_duration(left))


class JsonLinesWriter:
    """`metrics.jsonl`, one flat object a step, `generations.jsonl`, one a response, `draws.jsonl`, one a step."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self._metrics_path, self._generations_path = run_dir / "metrics.jsonl", run_dir / "generations.jsonl"
        self._draws_path = run_dir / "draws.jsonl"
        for path in (self._metrics_path, self._generations_path, self._draws_path):
            _drop_lines_after(path, resumed_step)
        self._last, self._last_offset = _last_line(self._metrics_path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        last_step = self._last.get("step", -1)
        assert step >= last_step, f"step {step} logged after step {last_step}"
        with self._metrics_path.open("r+b" if self._metrics_path.exists() else "wb") as file:
            if step > last_step:
                self._last = {"step": step}
                self._last_offset = file.seek(0, os.SEEK_END)
            self._last |= {name: _json_number(value) for name, value in metrics.items()}
            # Over the old line, then cut: cut first, a kill in between would lose the step.
            file.seek(self._last_offset)
            file.write(json.dumps(self._last).encode() + b"\n")
            file.truncate()

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._generations_path.open("a", encoding="utf-8") as file:
            for row in rows:
                values = {name: _json_value(value) for name, value in row.items()}
                file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")

    def drawn(self, step: int, prompts: Sequence[int]) -> None:
        with self._draws_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompts": list(prompts)}) + "\n")

    def close(self) -> None:
        pass  # nothing stays open between two steps


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a torn last line goes too. A fresh run sets the whole file aside."""
    if not path.exists():
        return
    if step == 0:
        numbers = itertools.count(1)
        path.rename(next(name for n in numbers if not (name := path.with_name(f"{path.stem}.{n}.jsonl")).exists()))
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)


def _last_line(path: Path) -> tuple[dict[str, Any], int]:
    """The last object of a JSON lines file, and where its line begins; ({}, 0) without one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if not lines:
        return {}, 0
    return json.loads(lines[-1]), sum(map(len, lines[:-1]))


def _json_number(value: float) -> float | None:
    """JSON has no NaN or infinity: null."""
    number = float(value)
    return number if math.isfinite(number) else None


def _json_value(value: Any) -> Any:
    if isinstance(value, (str, int)) or value is None:
        return value
    return _json_number(value)


class ConsoleWriter:
    """One log line a step."""

    _FIELDS = (  # label, metric, format
        ("reward", "reward/overall", ".3f"),
        ("accuracy", "reward/accuracy", ".3f"),
        ("effective", "curriculum/effective_group_fraction", ".2f"),
        ("length", "response_length/mean", ".1f"),
        ("val accuracy", "val/accuracy_reward", ".3f"),
    )

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._recent_seconds: deque[float] = deque(maxlen=20)  # a step
        self._previous: tuple[int, float] | None = None  # step logged last, and when

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"step {step}/{self._total_steps}"]
        parts += [f"{label} {metrics[name]:{form}}" for label, name, form in self._FIELDS if name in metrics]
        stages = {
            name.removeprefix("timing_s/"): seconds
            for name, seconds in metrics.items()
            if name.startswith("timing_s/") and name != "timing_s/step"
        }
        if stages:
            parts.append("seconds " + " ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items()))
        time_left = self._time_left(step, metrics)
        if time_left is not None:
            parts.append(f"{format_duration(time_left)} left")
        logger.info("%s", " | ".join(parts))

    def _time_left(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """Seconds, from the clock between recent steps, so that refreshes, validation and saving count too."""
        now = time.monotonic()
        if self._previous is None:
            # The clock has run since before the models loaded: believe the step's own timing.
            if "timing_s/step" in metrics:
                self._recent_seconds.append(metrics["timing_s/step"])
        elif step > self._previous[0]:
            self._recent_seconds.append((now - self._previous[1]) / (step - self._previous[0]))
        self._previous = (step, now)
        if not self._recent_seconds:
            return None
        return sum(self._recent_seconds) / len(self._recent_seconds) * max(0, self._total_steps - step)

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        shown = ", ".join(f"{name} {value!r}" for name, value in rows[0].items())
        logger.info("step %d, first of %d generations: %s", step, len(rows), shown)

    def close(self) -> None:
        pass


def format_duration(seconds: float) -> str:
    """42 s, 3:05 or 1:02:03."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    hours, minutes = total // 3600, total // 60 % 60
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"


class TensorboardWriter:
    """Event files in `<run_dir>/tensorboard`."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"trainer.logger has tensorboard, which does not import ({error}); install it") from error
        # Tensorboard then hides the events of steps that the resumed run repeats.
        purge_step = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass  # text of this length is unreadable there; generations.jsonl has it

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases; offline, in `<run_dir>/wandb`, for those without an account."""

    def __init__(self, trainer: TrainerConfig, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"trainer.logger has wandb, which does not import ({error}); install it") from error
        self._wandb = wandb
        mode: Literal["offline"] | None = None  # None: wandb's own rules
        if "WANDB_API_KEY" not in os.environ and "WANDB_MODE" not in os.environ:
            mode = "offline"
            logger.info(
                "wandb: WANDB_API_KEY is not set, so this run stays offline in %s; "
                "upload it with `wandb sync`, or set WANDB_API_KEY or WANDB_MODE",
                run_dir / "wandb",
            )
        self._run = wandb.init(
            project=trainer.project_name,
            name=trainer.experiment_name,
            dir=str(run_dir),
            config=without_secrets(run_config),
            mode=mode,
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        names = list(rows[0])
        table = self._wandb.Table(columns=[*names], data=[[row[name] for name in names] for row in rows])
        self._run.log({"val/generations": table}, step=step)

    def close(self) -> None:
        self._run.finish()
