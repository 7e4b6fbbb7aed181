"""Memory that a trainer writes weights into and vLLM's workers on the same machine load them from."""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HEADER_BYTES = 64  # the token, then padding
_ALIGNMENT = 64  # of every tensor in it

Entry = tuple[str, torch.dtype, tuple[int, ...]]  # name, type, shape


@dataclass(frozen=True)
class BufferAddress:
    """How another process of this user finds the memory."""

    path: str
    num_bytes: int
    token: str  # hex; what the memory begins with


def offsets_of(entries: Sequence[Entry]) -> tuple[list[int], int]:
    """Where each of these tensors lies when they share the memory, and the bytes that it takes in all."""
    offsets, end = [], HEADER_BYTES
    for _, dtype, shape in entries:
        offsets.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class SharedBuffer:
    """The trainer's side.

    It has no name in the file system: none is left behind, whenever the trainer is killed, and /dev/shm's limit, 64 MB
    in most containers, is not over it. Others find it as a descriptor of this process, which only this user may open.
    It ends with the last process that has it mapped.
    """

    def __init__(self, num_bytes: int) -> None:
        """num_bytes: see `offsets_of`. Raises: OSError when there is not as much memory."""
        token = secrets.token_bytes(16)
        self._descriptor = os.memfd_create("mmr1_ds_weights", os.MFD_CLOEXEC)
        try:
            os.fchmod(self._descriptor, 0o600)
            # Taken now: without memory for a page, writing to it later would be a bus error.
            os.posix_fallocate(self._descriptor, 0, num_bytes)
            mapping = mmap.mmap(self._descriptor, num_bytes)
        except OSError:
            os.close(self._descriptor)
            raise
        mapping[: len(token)] = token
        self.address = BufferAddress(f"/proc/{os.getpid()}/fd/{self._descriptor}", num_bytes, token.hex())
        self._bytes: Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)

    def write(self, offset: int, tensor: Tensor) -> None:
        """Copy a tensor, of any device."""
        assert self._bytes is not None, "the buffer is closed"
        size = tensor.numel() * tensor.element_size()
        self._bytes[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def close(self) -> None:
        """Give the memory back, as far as no reader has it mapped. No tensor is written after this."""
        if self._bytes is not None:
            self._bytes = None  # the mapping ends with it
            os.close(self._descriptor)


class MappedBuffer:
    """A worker's side."""

    def __init__(self, address: BufferAddress) -> None:
        """Raises: RuntimeError when it cannot be opened, or is not the one that is meant."""
        try:
            descriptor = os.open(address.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(
                f"the trainer's weights at {address.path} cannot be opened ({error.strerror}): shared_memory needs the "
                "server on the trainer's machine, of the same user and in the same process namespace"
            ) from None
        try:
            size = os.fstat(descriptor).st_size
            # Read-only: no tensor-parallel worker can spoil what the others load.
            mapping = mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size >= HEADER_BYTES else None
        finally:
            os.close(descriptor)
        token = bytes.fromhex(address.token)
        if mapping is None or size != address.num_bytes or mapping[: len(token)] != token:
            raise RuntimeError(f"{address.path} is not the trainer's weights: another process has its number here")
        self._bytes = memoryview(mapping)

    def read(self, entries: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
        """The tensors in it, each copied when it is asked for: the trainer writes the next into the same memory."""
        offsets, _ = offsets_of(entries)
        for (name, dtype, shape), offset in zip(entries, offsets, strict=True):
            copied = bytearray(self._bytes[offset : offset + math.prod(shape) * dtype.itemsize])
            yield name, torch.frombuffer(copied, dtype=dtype).view(shape) if copied else torch.empty(shape, dtype=dtype)
