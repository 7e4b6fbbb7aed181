"""Checkpoints that are whole or not there at all.

`root/global_step_N/` is written under a temporary name, synced to disk, described by a manifest of sizes and
digests, and only then renamed; `root/latest` follows last. A kill at any moment leaves the previous one loadable.
The folder must be one that all ranks see.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmr1_ds.distributed import Ranks
from mmr1_ds.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"global_step_(\d+)")


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, root: Path, save_limit: int, ranks: Ranks) -> None:
        """save_limit: how many to keep, -1 for all."""
        self.root, self._save_limit, self._ranks = root, save_limit, ranks
        self._own: set[int] = set()  # steps that this run saved

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Call `write(folder)` on every rank, then make its files the checkpoint of `step`. Collective.

        The step may be saved again, and the old one goes when the new one is there. Checkpoints of later steps are of
        a run that this one has replaced: they are set aside, as `stale_...`, or the next start would take them for
        the newest.
        """
        final = self.root / f"global_step_{step}"
        temporary, replaced = self.root / f".global_step_{step}.tmp", self.root / f".global_step_{step}.replaced"
        if self._ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted save
            temporary.mkdir(parents=True)
        self._ranks.barrier("make the checkpoint folder")
        write(temporary)
        self._ranks.barrier("write the checkpoint")
        manifest = self._describe(temporary)
        if self._ranks.rank == 0:
            _write_synced(
                temporary / MANIFEST, json.dumps({"step": step, "ranks": self._ranks.size, "files": manifest}, indent=1)
            )
            for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
                _sync_folder(folder)
            for old in self._steps():
                if old > step or (old == step and step not in self._own):
                    _set_aside(self.root / f"global_step_{old}")
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            _sync_folder(self.root)
            _write_synced(self.root / "latest.tmp", f"{final.name}\n")
            (self.root / "latest.tmp").rename(self.root / "latest")
            self._prune(step)
            self._own.add(step)
        self._ranks.barrier("publish the checkpoint")
        return final

    def newest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest undamaged checkpoint; damaged ones are named and passed over. Collective."""
        for step, folder in sorted(self._list(), reverse=True):
            damage = self.damage(folder)
            if not damage:
                self._own.add(step)
                return step, folder
            if self._ranks.rank == 0:
                logger.warning("checkpoint %s is damaged (%s); going back to the one before", folder, damage)
        return None

    def require(self, folder: Path) -> int:
        """Step of the checkpoint that the user named. Collective.

        Raises: UserError when it is not one, or is damaged.
        """
        match = _FOLDER.fullmatch(folder.name)
        if match is None or not (folder / MANIFEST).is_file():
            raise UserError(
                f"trainer.load_checkpoint_path={folder} is not a checkpoint; name a global_step_N folder of a run"
            )
        if damage := self.damage(folder):
            raise UserError(f"trainer.load_checkpoint_path={folder} is damaged ({damage}); name an earlier one")
        return int(match[1])

    def check_ranks(self, folder: Path) -> None:
        """Raises: UserError when the sharded state is of another number of ranks. Not a collective."""
        written_by = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["ranks"]
        if written_by != self._ranks.size:
            raise UserError(
                f"checkpoint {folder} was written by {written_by} ranks and this run has {self._ranks.size}; "
                f"start it on {written_by} ranks, or elsewhere with trainer.resume=false"
            )

    def damage(self, folder: Path) -> str:
        """What is wrong with a checkpoint, empty when nothing is. Ranks share the reading. Collective."""
        found = ""
        try:
            expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError) as error:
            expected, found = {}, f"{MANIFEST}: {error}"
        for name in sorted(expected)[self._ranks.rank :: self._ranks.size]:
            if found := _difference(folder / name, expected[name]):
                break
        return next((text for text in self._ranks.all_gather_objects(found, "verify the checkpoint") if text), "")

    def _describe(self, folder: Path) -> dict[str, dict[str, str | int]]:
        """Size and digest of every file, synced to disk. The ranks share the reading. Collective."""
        names = []
        if self._ranks.rank == 0:  # one listing for all: a network file system may show each rank another
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        names = self._ranks.all_gather_objects(names, "list the checkpoint's files")[0]
        own = {}
        for name in names[self._ranks.rank :: self._ranks.size]:
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
                own[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": _digest(folder / name)}
        parts = self._ranks.all_gather_objects(own, "digest the checkpoint")
        return {name: entry for part in parts for name, entry in sorted(part.items())}

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
        """Delete the oldest over the limit, never the one just written."""
        if self._save_limit > 0:
            others = [step for step in self._steps() if step != newest]
            for step in others[: len(others) - (self._save_limit - 1)]:
                shutil.rmtree(self.root / f"global_step_{step}")


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint out of the way, without overwriting one that was renamed before."""
    number = 1
    while (aside := folder.with_name(f"stale_{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.warning("checkpoint %s is of a run that this one replaces; it is kept as %s", folder, aside.name)


def _difference(path: Path, expected: dict[str, str | int]) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {expected['bytes']}"
    return "" if _digest(path) == expected["sha256"] else f"{path.name} has another content than was written"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
