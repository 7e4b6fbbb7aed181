"""Backend `cpu`: C++ over threads (kernels/csrc), loaded without torch."""

from __future__ import annotations

import numpy as np

from mmr1_kernels.records import NgramCounts


def is_available() -> bool:
    """Whether the extension was built with the installation."""
    return False


def count_ngrams(token_ids: np.ndarray, offsets: np.ndarray, group_offsets: np.ndarray, max_order: int) -> NgramCounts:
    """As `reference.count_ngrams`. Raises: RuntimeError where the extension was not built."""
    raise RuntimeError("backend cpu is not built here; install with a C++ compiler, or use backend reference")
