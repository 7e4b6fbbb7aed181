"""Agreement of all ranks on what may fail on one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from safetensors import SafetensorError

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.errors import UserError
from mmr1_ds.io import in_words

T = TypeVar("T")


class SaveFailed(Exception):
    """A checkpoint could not be written. Raised on every rank alike."""


def in_step(ranks: Ranks, stage: str, action: Callable[[], T]) -> T:
    """Do an action on every rank; if the disk fails one rank, the action has failed on all. Collective.

    Otherwise the others would proceed to a collective that the failed rank never reaches.
    Args: action: has no collectives of its own, except those that end in SaveFailed.
    Raises: SaveFailed, the same on every rank, naming the path, the rank, the system's words and the space left.
    """
    failure, result = "", None
    try:
        result = action()
    except OSError as error:
        failure = f"rank {ranks.rank}: {in_words(error)}"
    except SafetensorError as error:
        if "I/O error" not in str(error):  # safetensors' words for what others raise as OSError
            raise
        failure = f"rank {ranks.rank}: {error}"
    first = next((text for text in ranks.all_gather_objects(failure, stage) if text), "")
    if first:
        raise SaveFailed(first)
    return result  # type: ignore[return-value]


def by_rank_0(ranks: Ranks, stage: str, action: Callable[[], T]) -> T:
    """Do an action on rank 0; what it returns is every rank's, and so is its mistake. Collective.

    Args: action: has no collectives of its own. Raises: UserError, the same on every rank.
    """
    result, refused = None, ""
    if ranks.rank == 0:
        try:
            result = action()
        except UserError as error:
            refused = str(error)
    result, refused = ranks.all_gather_objects((result, refused), stage)[0]
    if refused:
        raise UserError(refused)
    return result  # type: ignore[return-value]
