"""ZeRO-3 shards as a stream of whole parameters, a bucket at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from mmr1_ds.engine.model.lora import Adapter, adapted_layers, adapters, base_name, merged
from mmr1_ds.records import WeightInfo

# Memory for whole parameters at any moment, beside the shards. The parameters of a bucket take half of it: while one
# collective brings them, what it received and the parameters made of that stand side by side.
BUCKET_BYTES = 1 << 30
# At most this on CPU, where what is gathered has no faster memory of its own and a smaller bucket overlaps more of the
# gathering with the servers' loading. See benchmarks/weights/bench_weight_sync.py.
CPU_BUCKET_BYTES = 64 << 20

T = TypeVar("T")


class Part(NamedTuple):
    """A parameter and what stands beside it."""

    name: str
    parameter: nn.Parameter
    adapter: Adapter | None

    def shards(self) -> list[nn.Parameter]:
        """The parameters that have to be gathered for it."""
        return [self.parameter] if self.adapter is None else [self.parameter, self.adapter.a, self.adapter.b]

    def num_bytes(self) -> int:
        """The bytes of all its shards when whole."""
        return _num_bytes(self.shards())


def whole_parameters(
    model: nn.Module, bucket_bytes: int | None = None, with_adapters: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a ZeRO-3 model once, whole, under its transformers name.

    Tied parameters come once, under the first of their names. A bucket's memory is freed when the next is asked
    for, except for tensors that the caller still holds, which stay as they were.
    A weight with an adapter comes as the sum of both, computed beside it: the model's own is not touched.

    Args: bucket_bytes: without one BUCKET_BYTES, on CPU at most CPU_BUCKET_BYTES;
        with_adapters: False for the weights as if there were none.
    Collective: all ranks must exhaust it, in the same order. One all-gather a bucket and data type.
    """
    for bucket in _buckets(model, bucket_bytes, with_adapters):
        with _gathered([shard for part in bucket for shard in part.shards()]):
            for name, parameter, adapter in bucket:
                yield base_name(name), parameter.data if adapter is None else merged(parameter.data, adapter)


def adapter_weights(model: nn.Module, bucket_bytes: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield both factors of every adapter once, whole, as `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.

    LAYER is the layer's name in the model without adapters. B comes times the scale, so that the adapter's part is
    B (A x); it is rounded once. Memory: see `whole_parameters`.

    Collective: all ranks must exhaust it, in the same order. One all-gather a bucket and data type.
    """
    beside = adapters(model).values()
    sized = [[(item, _num_bytes([item[1].a, item[1].b]))] for item in zip(adapted_layers(model), beside, strict=True)]
    limit = _bucket_bytes([adapter.a for adapter in beside], bucket_bytes) // 2
    for bucket in fill_buckets(sized, limit):
        with _gathered([factor for _, adapter in bucket for factor in (adapter.a, adapter.b)]):
            for layer, (a, b, scale) in bucket:
                yield f"{layer}.lora_A.weight", a.data
                yield f"{layer}.lora_B.weight", b.data if scale == 1 else (b.data.float() * scale).to(b.dtype)


def weight_buckets(model: nn.Module, bucket_bytes: int | None = None) -> list[list[WeightInfo]]:
    """What `whole_parameters` will yield, bucket by bucket, without gathering anything. Not a collective."""
    return [
        [WeightInfo(base_name(part.name), part.parameter.dtype, tuple(part.parameter.ds_shape)) for part in bucket]  # type: ignore[attr-defined]
        for bucket in _buckets(model, bucket_bytes, with_adapters=True)
    ]


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A name for these very weights, whatever the number of ranks."""
    digest = hashlib.sha256()
    for name, weight in weights:
        bits = weight.contiguous().view({2: torch.int16, 4: torch.int32}[weight.element_size()])
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        table = bits.reshape(len(bits), -1) if bits.ndim else bits.reshape(1, 1)
        for axis in (0, 1):  # of rows and of columns, so that their order counts too
            digest.update(table.sum(dim=axis, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def layer_groups(names: Sequence[str]) -> list[list[int]]:
    """Positions of the parameters of one layer together: neighbours with the same name up to the first number.

    A parameter outside the numbered layers, like an embedding, is a group of its own.
    """
    groups: list[list[int]] = []
    last = None
    for position, name in enumerate(names):
        numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        layer = numbered.group() if numbered else None
        if layer is None or layer != last:
            groups.append([])
        groups[-1].append(position)
        last = layer
    return groups


def fill_buckets(groups: Iterable[Sequence[tuple[T, int]]], limit: int) -> list[list[T]]:
    """Items of at most `limit` bytes together, in their order; each comes with its size.

    A group is cut only when it is larger than the limit by itself; an item larger than that stands alone.
    """
    buckets: list[list[T]] = []
    filled = limit + 1  # there is no bucket yet
    for group in groups:
        whole = sum(size for _, size in group)
        if filled + whole > limit >= whole:
            filled = limit + 1
        for item, size in group:
            if filled + size > limit:
                buckets.append([])
                filled = 0
            buckets[-1].append(item)
            filled += size
    return buckets


def _buckets(model: nn.Module, bucket_bytes: int | None, with_adapters: bool) -> list[list[Part]]:
    beside = adapters(model)
    of_adapters = {id(parameter) for adapter in beside.values() for parameter in (adapter.a, adapter.b)}
    parts = [
        Part(name, parameter, beside.get(name) if with_adapters else None)
        for name, parameter in model.named_parameters()
        if id(parameter) not in of_adapters
    ]
    groups = layer_groups([part.name for part in parts])
    sized = [[(parts[i], parts[i].num_bytes()) for i in group] for group in groups]
    return fill_buckets(sized, _bucket_bytes([part.parameter for part in parts], bucket_bytes) // 2)


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    # numel() is 0 for a partitioned parameter.
    return sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)  # type: ignore[attr-defined]


def _bucket_bytes(parameters: Iterable[nn.Parameter], asked: int | None) -> int:
    if asked is not None:
        return asked
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return min(BUCKET_BYTES, CPU_BUCKET_BYTES) if on_cpu else BUCKET_BYTES


@contextmanager
def _gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters whole inside, partitioned again after."""
    waiting = [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]  # type: ignore[attr-defined]
    if waiting:
        # GatheredParameters would call a collective for each of them. It finds them here already, and sees to the rest.
        waiting[0].all_gather_coalesced(waiting).wait()  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield
