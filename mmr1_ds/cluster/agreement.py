"""What may fail on one rank's disk is decided by all ranks together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from mmr1_ds.cluster.ranks import Ranks

T = TypeVar("T")


class SaveFailed(Exception):
    """A checkpoint could not be written. Raised on every rank alike."""


def in_step(ranks: Ranks, stage: str, action: Callable[[], T]) -> T:
    """Do it on every rank; where the disk fails one, it has failed all. Collective.

    Other ranks would go on to a collective that the failed one never reaches.
    Args: action: without collectives of its own, but such as end in SaveFailed.
    Raises: SaveFailed, the same on every rank, naming the path, the rank, the system's words and the space left.
    """
    failure, result = "", None
    try:
        result = action()
    except OSError as error:
        failure = f"rank {ranks.rank}: {_in_words(error)}"
    except SafetensorError as error:
        if "I/O error" not in str(error):  # its words for what others raise as OSError
            raise
        failure = f"rank {ranks.rank}: {error}"
    first = next((text for text in ranks.all_gather_objects(failure, stage) if text), "")
    if first:
        raise SaveFailed(first)
    return result  # type: ignore[return-value]


def _in_words(error: OSError) -> str:
    """The system's own words, the path, and how much room there is on its file system."""
    if not isinstance(error.filename, str | Path):
        return str(error)
    words = f"{error.strerror}: {error.filename}"
    try:
        usage = shutil.disk_usage(next(place for place in Path(error.filename).absolute().parents if place.exists()))
    except (OSError, StopIteration):
        return words
    return f"{words} ({usage.free:,} of {usage.total:,} bytes are free there)"
