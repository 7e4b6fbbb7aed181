"""A policy's weights alone: safetensors in bf16, 2 bytes a parameter, for `mmr1-ds export` and for no resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmr1_ds.cluster.agreement import in_step
from mmr1_ds.cluster.ranks import Ranks

_FILE = "weights-{:05d}.safetensors"
_FILE_BYTES = 1 << 30  # after which the next file begins


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, ranks: Ranks) -> None:
    """Write whole weights into a new folder, on rank 0. Collective. Raises: SaveFailed, on every rank."""
    failure: list[OSError | SafetensorError] = []
    waiting: dict[str, Tensor] = {}
    num_files = num_bytes = 0

    def write() -> None:
        nonlocal num_files, num_bytes
        try:
            folder.mkdir(exist_ok=True)
            save_file(waiting, folder / _FILE.format(num_files))
        except (OSError, SafetensorError) as error:
            failure.append(error)
        num_files, num_bytes = num_files + 1, 0
        waiting.clear()

    for name, weight in weights:  # to its end on every rank, also when the disk fails: gathering is a collective
        if ranks.rank == 0 and not failure:
            waiting[name] = weight.detach().to("cpu", torch.bfloat16, copy=True).contiguous()
            num_bytes += 2 * weight.numel()
            if num_bytes >= _FILE_BYTES:
                write()
    if waiting:
        write()

    def check() -> None:
        if failure:
            raise failure[0]

    in_step(ranks, "write the weights", check)


def has_weights_alone(folder: Path) -> bool:
    """Return whether `write_weights` wrote this folder."""
    return (folder / _FILE.format(0)).is_file()


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield what `write_weights` wrote."""
    for path in sorted(folder.glob("weights-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
