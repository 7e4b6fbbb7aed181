"""What a long run keeps of texts: a limit of bytes, within which fewer steps stay the older they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mmr1_ds.io import whole_file

_FOLDER = re.compile(r"step_(\d+)")
_STEP = re.compile(rb'\{"step": (\d+)')  # how each line of a record begins


def too_many(steps: Iterable[int]) -> set[int]:
    """Return the steps that go: every second of the older half, never the first."""
    ordered = sorted(set(steps))
    return set(ordered[1 : len(ordered) // 2 : 2])


def thin_lines(path: Path, most_bytes: int) -> int:
    """Drop old steps of a file of records until it has at most `most_bytes`, or nothing more can go.

    Returns: its bytes. Raises: OSError; the file is then whole, as it was or after a part of the work.
    """
    while (size := path.stat().st_size) > most_bytes:
        with path.open("rb") as file:
            going = too_many(map(_step, file))
            if not going:
                break
            with whole_file(path) as temporary, temporary.open("wb") as kept:
                file.seek(0)
                kept.writelines(line for line in file if _step(line) not in going)
    return size


def _step(line: bytes) -> int:
    found = _STEP.match(line)
    return int(found[1]) if found else -1


def thin_folders(root: Path, name: str, most_bytes: int, keep: int) -> None:
    """Delete the file `name` of old steps from `root/step_N/` until all of them have at most `most_bytes` together.

    Args: keep: a step that stays whatever its age. Raises: OSError.
    """
    folders = {path: _FOLDER.fullmatch(path.parent.name) for path in root.glob(f"*/{name}")}
    files = {int(found[1]): path for path, found in folders.items() if found is not None}
    while sum(path.stat().st_size for path in files.values()) > most_bytes and (going := too_many(files) - {keep}):
        for step in going:
            files.pop(step).unlink()
