"""What every op asks of its input before a backend sees it."""

from __future__ import annotations

import numpy as np


def check_packing(token_ids: np.ndarray, offsets: np.ndarray, group_size: int) -> int:
    """Check packed responses: token_ids int32 (total,), offsets int64 (B + 1,), B a multiple of group_size.

    Returns: B, the number of responses.
    Raises: TypeError for a wrong type, ValueError for a wrong shape or value; both name argument and value.
    """
    _check_array("token_ids", token_ids, np.int32)
    _check_array("offsets", offsets, np.int64)
    if isinstance(group_size, bool) or not isinstance(group_size, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {group_size!r}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if len(offsets) == 0 or offsets[0] != 0:
        raise ValueError(f"offsets must begin with 0, got {offsets[:1].tolist()}")
    if offsets[-1] != len(token_ids):
        raise ValueError(f"offsets must end with len(token_ids) = {len(token_ids)}, got {offsets[-1]}")
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if len(falls):
        raise ValueError(f"offsets must not fall, got {offsets[falls[0]]} then {offsets[falls[0] + 1]} at {falls[0]}")
    if (len(offsets) - 1) % group_size:
        raise ValueError(f"number of responses must be a multiple of group_size {group_size}, got {len(offsets) - 1}")
    if len(token_ids) and token_ids.min() < 0:
        # -100 and -1 are customary padding, which must never be scored.
        raise ValueError(f"token_ids must not be negative, got {token_ids.min()} at {int(token_ids.argmin())}")
    return len(offsets) - 1


def check_outcomes(rewards: np.ndarray, accuracies: np.ndarray, num_responses: int) -> None:
    """Check rewards (finite) and accuracies (in [0, 1] or NaN for unknown), both float32 (B,)."""
    for name, values in (("rewards", rewards), ("accuracies", accuracies)):
        _check_array(name, values, np.float32)
        if len(values) != num_responses:
            raise ValueError(f"{name} must have one value a response, {num_responses}, got {len(values)}")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise ValueError(f"rewards must be finite, got {rewards[bad[0]]} at {bad[0]}")
    bad = np.flatnonzero((accuracies < 0) | (accuracies > 1))
    if len(bad):
        raise ValueError(f"accuracies must be in [0, 1], got {accuracies[bad[0]]} at {bad[0]}")


def check_max_order(max_order: int) -> None:
    """Check the longest n-gram, an int of at least 1."""
    if isinstance(max_order, bool) or not isinstance(max_order, (int, np.integer)):
        raise TypeError(f"max_order must be an int, got {max_order!r}")
    if max_order < 1:
        raise ValueError(f"max_order must be at least 1, got {max_order}")


def _check_array(name: str, values: np.ndarray, dtype: type) -> None:
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, got {type(values).__name__}")
    if values.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype).name}, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {values.shape}")
