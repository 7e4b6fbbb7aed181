"""The backend `cpu`: multi-threaded C++ (kernels/csrc) in a shared library, called without the GIL.

It needs neither torch nor numpy to build, and is optional: an install without a C++ compiler leaves it out.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from mmr1_kernels.records import NgramCounts

LIBRARY = "_count_ngrams"
FUNCTION = "mmr1_count_ngrams_1"  # the number rises with every change of its arguments or results
OUT_OF_MEMORY = 1
LARGEST_GROUP_TOKENS = 2**31 - 1
# Groups up to so many tokens are counted as they are: list and table take 6 MB a thread at most. Larger ones are
# divided into parts whose tables fit the second-level cache of a core.
MAX_UNDIVIDED = 131_072

_is_forked = False  # since this module was imported


def _count_on_one_thread() -> None:
    global _is_forked
    _is_forked = True


# The runtime of OpenMP is one for the process: torch may have started its threads just as well as this module. None of
# them survives a fork, and whoever asks for them in the child waits for ever.
os.register_at_fork(after_in_child=_count_on_one_thread)


def is_available() -> bool:
    """Return whether the extension was built with the installation, and loads."""
    return _library() is not None


@cache
def warn_that_it_is_missing() -> None:
    """Warn, once in a process, why scores come from the slower backend."""
    warnings.warn(
        "mmr1_kernels is installed without its C++ extension: n-grams are counted in numpy, many times slower. "
        "Install it again where g++ is found, or ask for backend='reference' by name",
        RuntimeWarning,
        stacklevel=2,
    )


def count_ngrams(
    token_ids: np.ndarray,
    offsets: np.ndarray,
    group_offsets: np.ndarray,
    max_order: int,
    *,
    num_threads: int | None = None,
    max_undivided: int = MAX_UNDIVIDED,
) -> NgramCounts:
    """Count as `reference.count_ngrams`, in O(total max_order) time.

    Extra memory: 16 bytes a token of the groups being divided at a time, and up to 6 MB a thread, kept for the next
    call. A forked child counts on one thread, whatever it asks for: those of GNU OpenMP do not survive a fork. That
    does not cover a child that imports this package only after the fork: there it may wait for ever, if the parent had
    threads of OpenMP, torch's among them. Import it in the parent, or pass num_threads=1.

    Args:
        num_threads: default OpenMP's, that is OMP_NUM_THREADS or one a core. The result does not depend on it.
        max_undivided: at least 2; small ones divide small groups, for tests.
    Raises: ValueError for a group of 2^31 tokens or more; MemoryError; RuntimeError where the extension was not built.
    """
    count = _library()
    if count is None:
        raise RuntimeError("backend cpu is not built here; install with a C++ compiler, or use backend reference")
    num_tokens = np.diff(offsets[group_offsets])
    if len(num_tokens) and num_tokens.max() > LARGEST_GROUP_TOKENS:
        group = int(num_tokens.argmax())
        raise ValueError(f"a group must have fewer than 2^31 tokens, group {group} has {num_tokens[group]}")
    if _is_forked:
        num_threads = 1
    token_ids, offsets, group_offsets = map(np.ascontiguousarray, (token_ids, offsets, group_offsets))
    matches = np.zeros((len(offsets) - 1, max_order), dtype=np.int64)
    distinct = np.zeros((len(group_offsets) - 1, max_order), dtype=np.int64)
    status = count(
        token_ids.ctypes.data, offsets.ctypes.data, group_offsets.ctypes.data, len(distinct), max_order,
        num_threads or 0, max_undivided, matches.ctypes.data, distinct.ctypes.data,
    )  # fmt: skip
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"no memory to count the n-grams of {len(token_ids)} tokens")
    return NgramCounts(matches, distinct)


@cache
def _library() -> Callable[..., int] | None:
    """The C function, None where no library that has it lies beside this module."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(LIBRARY + suffix)
        if not path.exists():
            continue
        try:
            count = getattr(ctypes.CDLL(str(path)), FUNCTION)
        except (OSError, AttributeError):  # the runtime of OpenMP is missing, or it was built from other sources
            continue
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        count.argtypes = [pointer, pointer, pointer, integer, integer, ctypes.c_int32, integer, pointer, pointer]
        count.restype = ctypes.c_int32
        return count
    return None
