"""The checks of every op's input, made before a backend sees it."""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST_ORDER = 64  # of n-grams; more says nothing of diversity, and every order costs time and memory
TENSOR_DTYPES = {"token_ids": "int32", "rewards": "float32", "accuracies": "float32"}  # the others are int64


def check_tokens(token_ids: np.ndarray) -> None:
    """Check packed tokens: int32 (total,), not negative."""
    check_array("token_ids", token_ids, np.int32)
    if len(token_ids):
        check_smallest_token(int(token_ids.min()))


def check_smallest_token(smallest: int) -> None:
    """Check the smallest of all tokens. -100 and -1 are customary padding, which must never be scored."""
    if smallest < 0:
        raise ValueError(f"token_ids must not be negative, got {smallest}")


def check_packing(
    num_tokens: int, offsets: np.ndarray, group_size: int | None, group_offsets: np.ndarray | None
) -> np.ndarray:
    """Check how tokens are split into responses, by offsets (B + 1,) int64, and responses into groups.

    Returns: group_offsets, (G + 1,) int64, the first response of each group and B.
    Raises: TypeError for a wrong type, ValueError for a wrong shape or value; both name argument and value.
    """
    check_array("offsets", offsets, np.int64)
    _check_rising("offsets", offsets, num_tokens, "len(token_ids)")
    num_responses = len(offsets) - 1
    if group_offsets is None:
        return _equal_groups(group_size, num_responses)
    if group_size is not None:
        raise ValueError(f"group_size must be None beside group_offsets, got {group_size}")
    check_array("group_offsets", group_offsets, np.int64)
    _check_rising("group_offsets", group_offsets, num_responses, "the number of responses")
    empty = np.flatnonzero(np.diff(group_offsets) == 0)
    if len(empty):
        raise ValueError(f"group_offsets must rise: a group has a response at least, group {empty[0]} has none")
    return group_offsets


def _equal_groups(group_size: int | None, num_responses: int) -> np.ndarray:
    if isinstance(group_size, bool) or not isinstance(group_size, (int, np.integer)):
        raise TypeError(f"group_size must be an int, got {group_size!r}")
    group_size = int(group_size)  # np.uint8(4) would make the arithmetic below overflow
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if num_responses % group_size:
        raise ValueError(f"number of responses must be a multiple of group_size {group_size}, got {num_responses}")
    return np.arange(0, num_responses + 1, group_size, dtype=np.int64)


def check_outcomes(rewards: np.ndarray, accuracies: np.ndarray, num_responses: int) -> None:
    """Check rewards (finite) and accuracies (in [0, 1] or NaN for unknown), both float32 (B,)."""
    for name, values in (("rewards", rewards), ("accuracies", accuracies)):
        check_array(name, values, np.float32)
        if len(values) != num_responses:
            raise ValueError(f"{name} must have one value a response, {num_responses}, got {len(values)}")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise ValueError(f"rewards must be finite, got {rewards[bad[0]]} at {bad[0]}")
    bad = np.flatnonzero((accuracies < 0) | (accuracies > 1))
    if len(bad):
        raise ValueError(f"accuracies must be in [0, 1], got {accuracies[bad[0]]} at {bad[0]}")


def check_max_order(max_order: int) -> None:
    """Check the longest n-gram, an int in 1..LARGEST_ORDER."""
    if isinstance(max_order, bool) or not isinstance(max_order, (int, np.integer)):
        raise TypeError(f"max_order must be an int, got {max_order!r}")
    if max_order < 1:
        raise ValueError(f"max_order must be at least 1, got {max_order}")
    if max_order > LARGEST_ORDER:
        raise ValueError(f"max_order must be at most {LARGEST_ORDER}, got {max_order}")


def checked_tensor(name: str, tensor: Any) -> Any:
    """Return a tensor without its gradient, after a check of its dtype (by the argument's name), layout and axes.

    Types are compared by the names that torch prints, so that this module needs no torch.
    """
    dtype = TENSOR_DTYPES.get(name, "int64")
    if str(tensor.dtype) != f"torch.{dtype}":
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
    if tensor.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {tuple(tensor.shape)}")
    return tensor.detach()


def check_array(name: str, values: np.ndarray, dtype: type) -> None:
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a torch tensor, got {type(values).__name__}")
    if values.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype).name}, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {values.shape}")


def _check_rising(name: str, values: np.ndarray, last: int, what: str) -> None:
    if len(values) == 0 or values[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {values[:1].tolist()}")
    if values[-1] != last:
        raise ValueError(f"{name} must end with {what} = {last}, got {values[-1]}")
    falls = np.flatnonzero(values[1:] < values[:-1])  # not their difference, which wraps around in int64
    if len(falls):
        raise ValueError(f"{name} must not fall, got {values[falls[0]]} then {values[falls[0] + 1]} at {falls[0]}")
