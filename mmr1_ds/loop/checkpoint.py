"""Checkpoints that are whole or not there at all.

`root/global_step_N/` is written under a temporary name, synced to disk, described by a manifest of sizes and
digests, and only then renamed; `latest` and `best` beside it follow. A kill at any moment leaves the previous one
loadable. In the background a thread of each rank writes what was copied
to host memory, while training goes on.
A save that fails for want of space, or of the disk itself, fails on all ranks together and leaves the run and what was
saved before as they were. The folder must be one that all ranks see.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmr1_ds.cluster.agreement import SaveFailed, in_step
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.engine.weights import CONVERTED
from mmr1_ds.errors import UserError
from mmr1_ds.io import FileEntry, PendingFile, digest, in_words, open_as_its_folder, sync, write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
VALIDATION = "validation.json"  # a checkpoint's figures on the validation data, where its step was validated
_LATEST, _BEST = "latest", "best"
_FOLDER = re.compile(r"global_step_(\d+)")


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, root: Path, save_limit: int, ranks: Ranks, best_metric: str | None = None) -> None:
        """save_limit: how many to keep beside the best, -1 for all; best_metric: by which one is best, None = none."""
        self.root, self._save_limit, self._ranks, self._best_metric = root, save_limit, ranks, best_metric
        self._own: set[int] = set()  # steps that this run saved, or that it goes on from
        self._damaged: set[int] = set()  # steps that were found damaged
        self._writing: _Writing | None = None  # at most one
        self.written_at = 0.0  # monotonic: when this rank had written its part of the last save
        self.failure = ""  # why the last save failed; empty when it did not

    def save(
        self,
        step: int,
        write: Callable[[Path], list[PendingFile] | None],
        folders: Sequence[str] = (),
        in_background: bool = False,
    ) -> bool:
        """Call `write(folder)` on every rank, then make its files the checkpoint of `step`. Collective.

        The step may be saved again, and the old one goes when the new one is there. Checkpoints of later steps are of
        a run that this one has replaced: they are set aside, as `stale_...`, or the next start would take them for
        the newest.

        Args: write: where it has collectives, a rank that the disk fails must stay in step with the others, see
            `in_step`; it returns the files that are still to be written; folders: names of those that it finds made;
            in_background: return as soon as `write` does, before the checkpoint is there; `finish` is still due.
        Returns: False when the disk failed a rank. It is told, kept as `failure`, and what was saved before is there.
        """
        temporary = self.root / f".global_step_{step}.tmp"
        try:
            self._on_main("make the checkpoint folder", lambda: self._make_anew(temporary, folders))
            pending = in_step(self._ranks, "write the checkpoint", lambda: write(temporary)) or []
            described = self._share_of_files(temporary, [str(file.path.relative_to(temporary)) for file in pending])
        except SaveFailed as failure:
            return self._failed(step, failure)
        self._writing = _Writing(step, temporary, pending, described)
        return in_background or self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether a save in the background is to be finished."""
        return self._writing is not None

    def has_written(self) -> bool:
        """Return whether `finish` would not wait for any rank's disk. Collective."""
        is_busy = self._writing is not None and self._writing.is_busy
        return not self._ranks.any(is_busy, "ask whether the checkpoint is written")

    def finish(self) -> bool:
        """Wait for the save in the background, and give it its name. Collective. Returns: as `save`."""
        assert self._writing is not None
        writing, self._writing = self._writing, None
        try:
            own = in_step(self._ranks, "write the checkpoint's files", writing.entries)
            parts = self._ranks.all_gather_objects(own, "share the checkpoint's digests")
            self.written_at = writing.ended
            files = {name: entry for part in parts for name, entry in sorted(part.items())}
            content = {"step": writing.step, "ranks": self._ranks.size, "files": files}
            self._on_main("publish the checkpoint", lambda: self._publish(writing.step, writing.folder, content))
        except SaveFailed as failure:
            return self._failed(writing.step, failure)
        self.failure = ""
        self._own.add(writing.step)
        self._damaged.discard(writing.step)
        if self._ranks.rank == 0:
            self._prune(writing.step)
        return True

    def _make_anew(self, folder: Path, inside: Sequence[str]) -> None:
        for left in self.root.glob(".global_step_*.tmp"):  # of a save that was killed
            shutil.rmtree(left)
        folder.mkdir(parents=True)
        for name in inside:
            (folder / name).mkdir()

    def _failed(self, step: int, failure: SaveFailed) -> bool:
        self.failure = f"the checkpoint of step {step} was not saved in {self.root}: {failure}"
        if self._ranks.rank == 0:
            shutil.rmtree(self.root / f".global_step_{step}.tmp", ignore_errors=True)
            logger.error("%s; the run goes on, earlier checkpoints are as they were", self.failure)
        return False

    def _publish(self, step: int, temporary: Path, content: dict[str, Any]) -> None:
        """Describe it, sync it and give it its name; `latest` follows."""
        final, replaced = self.root / f"global_step_{step}", self.root / f".global_step_{step}.replaced"
        write_whole(temporary / MANIFEST, json.dumps(content | {"sha256": _seal(content)}, indent=1).encode())
        for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
            sync(folder)
        for old in self._steps():
            if old > step or (old == step and step not in self._own):
                _set_aside(self.root / f"global_step_{old}")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        sync(self.root)
        self._name(step)

    def _name(self, newest: int) -> None:
        """Write `latest` and `best`."""
        write_whole(self.root / _LATEST, f"global_step_{newest}\n".encode())
        best = self._best(and_step=newest)
        if best is not None:
            write_whole(self.root / _BEST, f"global_step_{best}\n".encode())
        else:  # the named one was set aside
            (self.root / _BEST).unlink(missing_ok=True)

    def name_again(self, newest: int) -> None:
        """Write `latest` and `best` for a run that goes on from `newest`: a kill may have come before them. Rank 0."""
        if self._ranks.rank == 0:
            with suppress(OSError):  # a folder that can only be read: no save will work either, and says so
                self._name(newest)

    def is_best(self, validation: Mapping[str, float]) -> bool:
        """Return whether a validation is better than that of every checkpoint. Collective: the figures of all ranks."""
        if self._best_metric is None or not validation:
            return False
        score, is_better = validation.get(self._best_metric, math.nan), False
        if not math.isfinite(score):
            names = ", ".join(name for name in sorted(validation) if name.startswith("val/"))
            logger.warning("no best checkpoint: the validation has no trainer.best_metric=%s, but %s",
                           self._best_metric, names)  # fmt: skip
        elif self._ranks.rank == 0:
            best = self._best()
            is_better = best is None or score > self._score(best)
        return self._ranks.any(is_better, "compare with the best checkpoint")

    def named_best(self) -> Path:
        """Return the folder that `best` names. Raises: UserError without one."""
        try:
            return self.root / (self.root / _BEST).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            raise UserError(
                f"{self.root} has no best checkpoint; a run keeps one with data.val_files, trainer.val_freq and "
                "trainer.best_metric"
            ) from None

    def _best(self, and_step: int | None = None) -> int | None:
        """Return the step of this run's best checkpoint, the earliest of equals; None without one.

        and_step: counts as this run's too.
        """
        own = [step for step in self._steps() if step in self._own or step == and_step]
        return max((step for step in own if math.isfinite(self._score(step))), key=self._score, default=None)

    def _score(self, step: int) -> float:
        """The best_metric of a checkpoint; NaN without it."""
        try:
            text = (self.root / f"global_step_{step}" / VALIDATION).read_text(encoding="utf-8")
            return float(json.loads(text).get(self._best_metric, math.nan))
        except (OSError, ValueError):
            return math.nan

    def _on_main(self, stage: str, action: Callable[[], None]) -> None:
        """Do it on rank 0; see `in_step`."""
        in_step(self._ranks, stage, action if self._ranks.rank == 0 else lambda: None)

    def newest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest undamaged checkpoint; damaged ones are named and passed over. Collective."""
        self._check_latest()
        listed = self._list()
        for step, folder in sorted(listed, reverse=True):
            damage = self.damage(folder)
            if not damage:
                self._own.update(earlier for earlier, _ in listed if earlier <= step)
                return step, folder
            self._damaged.add(step)
            if self._ranks.rank == 0:
                logger.warning("checkpoint %s is damaged (%s); going back to the one before", folder, damage)
        return None

    def _check_latest(self) -> None:
        """Tell when `latest` is not as it was written. Loading does not need it: it is there for people and scripts."""
        if self._ranks.rank > 0 or not (steps := self._steps()):
            return
        try:
            named = (self.root / _LATEST).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            named = str(error)
        if named not in [f"global_step_{step}" for step in steps]:
            logger.warning("%s is damaged (%r); the newest checkpoint is found without it", self.root / _LATEST, named)

    def require(self, folder: Path, name: str = "trainer.load_checkpoint_path") -> int:
        """Step of the checkpoint that the user named. Collective.

        Args: name: of the setting, for errors. Raises: UserError when it is not one, or is damaged.
        """
        match = _FOLDER.fullmatch(folder.resolve().name)
        if match is None or not (folder / MANIFEST).is_file():
            raise UserError(f"{name}={folder} is not a checkpoint; name a global_step_N folder of a run")
        if damage := self.damage(folder):
            raise UserError(f"{name}={folder} is damaged ({damage}); name an earlier one")
        return int(match[1])

    def check_ranks(self, folder: Path) -> None:
        """Tell when the sharded state is of another number of ranks: loading it converts it. Not a collective."""
        written_by = _read_manifest(folder)["ranks"]
        if written_by != self._ranks.size and self._ranks.rank == 0:
            logger.info("checkpoint %s was written by %d ranks, this run has %d", folder, written_by, self._ranks.size)

    def damage(self, folder: Path) -> str:
        """What is wrong with a checkpoint, empty when nothing is. Ranks share the reading. Collective."""
        found = ""
        try:
            expected = _read_manifest(folder)["files"]
        except (OSError, ValueError) as error:
            expected, found = {}, f"{MANIFEST}: {error}"
        for name in sorted(expected)[self._ranks.rank :: self._ranks.size]:
            if found := _difference(folder, name, expected[name]):
                break
        return next((text for text in self._ranks.all_gather_objects(found, "verify the checkpoint") if text), "")

    def _share_of_files(self, folder: Path, pending: Sequence[str]) -> list[Path]:
        """The files of all ranks, less those that are pending, which this rank is to describe. Collective."""
        found: list[str] = []

        def list_files() -> None:  # one listing for all: a network file system may show each rank another
            found.extend(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))

        self._on_main("list the checkpoint's files", list_files)
        parts = self._ranks.all_gather_objects((found, pending), "share the checkpoint's files")
        described = {name for _, names in parts for name in names}
        others = [name for name in parts[0][0] if name not in described]
        return [folder / name for name in others[self._ranks.rank :: self._ranks.size]]

    def _list(self) -> list[tuple[int, Path]]:
        """Checkpoints as rank 0 sees them. Collective."""
        found = self._steps() if self._ranks.rank == 0 else []
        steps = self._ranks.broadcast_array(np.array(found, dtype=np.int64), "list checkpoints")
        return [(int(step), self.root / f"global_step_{step}") for step in steps]

    def _steps(self) -> list[int]:
        if not self.root.is_dir():
            return []
        for path in self.root.glob(".global_step_*.replaced"):  # a kill came between two renames
            final = self.root / path.stem.removeprefix(".")
            if not final.exists():
                path.rename(final)
        return sorted(int(match[1]) for path in self.root.iterdir() if (match := _FOLDER.fullmatch(path.name)))

    def _prune(self, newest: int) -> None:
        """Delete what is over the limit: damaged ones first, then the oldest, never the one just written or the best.

        What was converted for another number of ranks goes with it: the next start has this one.
        """
        try:
            for converted in self.root.glob(f"global_step_*/*/{CONVERTED}"):
                shutil.rmtree(converted)
            if self._save_limit > 0:
                others = [step for step in self._steps() if step not in (newest, self._best())]
                others.sort(key=lambda step: (not self._looks_damaged(step), step))
                for step in others[: max(0, len(others) - (self._save_limit - 1))]:
                    shutil.rmtree(self.root / f"global_step_{step}")
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", in_words(error))

    def _looks_damaged(self, step: int) -> bool:
        """Without reading more than the manifest."""
        folder = self.root / f"global_step_{step}"
        try:
            files = _read_manifest(folder)["files"]
            return step in self._damaged or any(
                (folder / name).stat().st_size != files[name]["bytes"] for name in files
            )
        except (OSError, ValueError):
            return True


class _Writing:
    """A thread that writes this rank's part of a checkpoint. It holds up no end of the process: a disk may hang."""

    def __init__(self, step: int, folder: Path, pending: list[PendingFile], written: Sequence[Path]) -> None:
        """Start it. written: files that are there, to be synced and digested."""
        self.step, self.folder = step, folder
        self._files = pending + [PendingFile(path, partial(_synced_entry, path)) for path in written]
        self._entries: dict[str, FileEntry] = {}
        self._error: BaseException | None = None
        self.ended = 0.0  # monotonic
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        return self._thread.is_alive()

    def entries(self) -> dict[str, FileEntry]:
        """Wait for the files. Returns: what the manifest says of them. Raises: what the thread met, OSError mostly."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._entries

    def _run(self) -> None:
        try:
            while self._files:  # a copy in memory goes with its file
                file = self._files.pop(0)
                self._entries[str(file.path.relative_to(self.folder))] = file.write()
        except BaseException as error:
            self._error = error
        self.ended = time.monotonic()


def _synced_entry(path: Path) -> FileEntry:
    open_as_its_folder(path)
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def _seal(content: dict[str, Any]) -> str:
    """Digest of what a manifest says."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: OSError, or ValueError when it is not as it was written."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    keys = ["files", "ranks", "step"]
    if not isinstance(content, dict) or sorted(content) not in (keys, sorted([*keys, "sha256"])):
        raise ValueError("has other keys than were written")
    if content.pop("sha256", None) not in (None, _seal(content)):  # earlier versions wrote none
        raise ValueError("has another content than was written")
    return content


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint out of the way, without overwriting one that was renamed before."""
    number = 1
    while (aside := folder.with_name(f"stale_{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.warning("checkpoint %s is of a run that this one replaces; it is kept as %s", folder, aside.name)


def _difference(folder: Path, name: str, expected: dict[str, str | int]) -> str:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
        return "" if digest(path) == expected["sha256"] else f"{name} has another content than was written"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
