"""ZeRO-3 shards as a stream of whole parameters, a bucket at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import deepspeed
import torch
from torch import Tensor, nn

from mmr1_ds.engine.lora import Adapter, adapters, base_name, merged

BUCKET_BYTES = 1 << 30  # memory for whole parameters at any moment, beside the shards

Part = tuple[str, nn.Parameter, Adapter | None]


def whole_parameters(
    model: nn.Module, bucket_bytes: int | None = None, with_adapters: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a ZeRO-3 model once, whole, under its transformers name.

    Tied parameters come once, under the first of their names. A bucket's memory is freed when the next is asked
    for, except for tensors that the caller still holds, which stay as they were.
    A weight with an adapter comes as the sum of both, computed beside it: the model's own is not touched.

    Args: bucket_bytes: BUCKET_BYTES without one; with_adapters: False for the weights as if there were none.
    Collective: all ranks must exhaust it, in the same order.
    """
    for bucket in _buckets(model, bucket_bytes or BUCKET_BYTES, with_adapters):
        with deepspeed.zero.GatheredParameters([shard for part in bucket for shard in _shards(part)]):
            for name, parameter, adapter in bucket:
                yield base_name(name), parameter.data if adapter is None else merged(parameter.data, adapter)


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Names these very weights, whatever the number of ranks."""
    digest = hashlib.sha256()
    for name, weight in weights:
        bits = weight.contiguous().view({2: torch.int16, 4: torch.int32}[weight.element_size()])
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        table = bits.reshape(len(bits), -1) if bits.ndim else bits.reshape(1, 1)
        for axis in (0, 1):  # of rows and of columns, so that their order counts too
            digest.update(table.sum(dim=axis, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _buckets(model: nn.Module, bucket_bytes: int, with_adapters: bool) -> Iterator[list[Part]]:
    """Consecutive parameters of at most bucket_bytes together, each with its adapter; a larger one stands alone."""
    beside = adapters(model)
    of_adapters = {id(parameter) for adapter in beside.values() for parameter in (adapter.a, adapter.b)}
    bucket: list[Part] = []
    filled = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in of_adapters:
            continue
        part = name, parameter, beside.get(name) if with_adapters else None
        # numel() is 0 for a partitioned parameter.
        size = sum(shard.ds_numel * shard.element_size() for shard in _shards(part))  # type: ignore[attr-defined]
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(part)
        filled += size
    if bucket:
        yield bucket


def _shards(part: Part) -> list[nn.Parameter]:
    """What has to be gathered for it."""
    _, parameter, adapter = part
    return [parameter] if adapter is None else [parameter, adapter.a, adapter.b]
