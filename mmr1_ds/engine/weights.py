"""ZeRO-3 shards as a stream of whole parameters, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
from torch import Tensor, nn

BUCKET_BYTES = 1 << 30  # memory for whole parameters at any moment, beside the shards


def whole_parameters(model: nn.Module, bucket_bytes: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a ZeRO-3 model once, whole, under its transformers name.

    Tied parameters come once, under the first of their names. A bucket's memory is freed when the next is asked
    for, except for tensors that the caller still holds, which stay as they were.

    Args: bucket_bytes: BUCKET_BYTES without one.
    Collective: all ranks must exhaust it, in the same order.
    """
    for bucket in _buckets(model, bucket_bytes or BUCKET_BYTES):
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
            for name, parameter in bucket:
                yield name, parameter.data


def _buckets(model: nn.Module, bucket_bytes: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Consecutive parameters of at most bucket_bytes together; a larger parameter stands alone."""
    bucket: list[tuple[str, nn.Parameter]] = []
    filled = 0
    for name, parameter in model.named_parameters():
        # numel() is 0 for a partitioned parameter.
        size = parameter.ds_numel * parameter.element_size()  # type: ignore[attr-defined]
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, parameter))
        filled += size
    if bucket:
        yield bucket
