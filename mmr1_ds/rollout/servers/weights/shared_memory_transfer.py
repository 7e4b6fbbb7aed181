"""Weights by shared memory, for machines without NCCL: the trainer's side, and the name that vLLM knows it by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from torch import Tensor

from mmr1_ds.errors import UserError
from mmr1_ds.rollout.servers.weights.control import ServerControl
from mmr1_ds.rollout.servers.weights.shared_memory import Entry, SharedBuffer, offsets_of

BACKEND = "shared_memory"


@cache
def register() -> None:
    """Runs in every vLLM process, by the entry point of the group vllm.general_plugins."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(
        BACKEND, "mmr1_ds.rollout.servers.weights.shared_memory_worker", "SharedMemoryEngine"
    )


class SharedMemoryTransfer:
    """Rank 0's: one buffer for the run, which holds a bucket at a time.

    While the servers load one bucket the next is gathered; it is copied into the memory once all have answered.
    """

    def __init__(self, buckets: Sequence[Sequence[Entry]]) -> None:
        """buckets: what will come, by the buckets that are gathered together. Raises: UserError without the memory."""
        self._buckets = [list(bucket) for bucket in buckets]
        num_bytes = max(offsets_of(bucket)[1] for bucket in self._buckets)
        try:
            self._buffer = SharedBuffer(num_bytes)
        except OSError as error:
            raise UserError(
                f"worker.rollout.weight_transfer={BACKEND} takes {num_bytes / 2**20:.0f} MiB of memory for a bucket of "
                f"weights ({error.strerror}); free as much or raise the limit of the job"
            ) from None
        self._introduced: set[tuple[int, int]] = set()  # number and generation of servers that have mapped it

    def send(self, weights: Iterable[tuple[str, Tensor]], control: ServerControl, version: str) -> None:
        """Give all of `weights` to the servers of `control`, which notes those that fail.

        It is exhausted also when none is left: on the other ranks it is.
        """
        new = [server for server in control.servers if (server.number, server.generation) not in self._introduced]
        control.init_weight_transfer_engine(asdict(self._buffer.address), only={server.number for server in new})
        self._introduced |= {(s.number, s.generation) for s in new if s.number not in control.failed}
        control.start_weight_update()
        wait = _nothing
        stream = iter(weights)
        for bucket in self._buckets:
            wait = self._send_bucket(bucket, stream, control, wait)
        rest = next(stream, None)
        assert rest is None, f"{rest} was not announced"
        wait()
        control.finish_weight_update(version)

    def _send_bucket(
        self,
        bucket: Sequence[Entry],
        stream: Iterator[tuple[str, Tensor]],
        control: ServerControl,
        wait: Callable[[], None],
    ) -> Callable[[], None]:
        """Returns: what waits for the servers to load it. Args: wait: the same of the bucket before."""
        offsets, _ = offsets_of(bucket)
        for i, (expected, offset) in enumerate(zip(bucket, offsets, strict=True)):
            name, tensor = next(stream)  # gathers, before the first of a bucket
            assert (name, tensor.dtype, tuple(tensor.shape)) == expected, f"{name} comes in place of {expected}"
            if i == 0:
                wait()
            self._buffer.write(offset, tensor)
        update: dict[str, Any] = {
            "names": [name for name, _, _ in bucket],
            "dtype_names": [str(dtype).removeprefix("torch.") for _, dtype, _ in bucket],
            "shapes": [list(shape) for _, _, shape in bucket],
        }
        return control.begin("update_weights", {"update_info": update})

    def close(self) -> None:
        """Free the memory."""
        self._buffer.close()


def _nothing() -> None:
    """Nothing has been sent yet."""
