"""Ranks, process groups and deadlines. No other module asks who it is or calls a raw collective.

Two groups: the device group (NCCL on GPU, gloo on CPU), which DeepSpeed and vLLM use, and a CPU group beside it
for control traffic (indices, statistics, metrics), so that a small message never waits behind a large one.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from mmr1_ds.launch_environment import LaunchEnvironment

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A collective failed or ran past its deadline. Names the rank, the stage and the step."""


class Ranks:
    """The process groups of a run. Every method below is a collective unless it says otherwise."""

    def __init__(self, launch: LaunchEnvironment, timeout_seconds: float) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.size, self.local_rank = launch.rank, launch.world_size, launch.local_rank
        self.timeout_seconds = timeout_seconds
        self.on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        self.step = 0  # for messages only
        self._neighbours: dict[int, Neighbours] = {}
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        self.device = torch.device("cuda", self.local_rank) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        self._timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group("nccl" if self.on_gpu else "gloo", timeout=self._timeout)
        self._control = dist.new_group(backend="gloo", timeout=self._timeout)

    @contextmanager
    def _deadline(self, stage: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {self.rank} of {self.size}: {stage} at step {self.step} failed "
                f"(deadline {self.timeout_seconds:g} s): {(str(error) or repr(error)).splitlines()[0]}"
            ) from error

    def broadcast_array(self, array: np.ndarray | None, stage: str) -> np.ndarray:
        """Rank 0's int64 array of one axis, on every rank. Other ranks pass None."""
        import torch
        import torch.distributed as dist

        with self._deadline(stage):
            length = torch.tensor([0 if array is None else len(array)])
            dist.broadcast(length, 0, group=self._control)
            data = torch.empty(int(length), dtype=torch.int64)
            if self.rank == 0:
                assert array is not None and array.dtype == np.int64
                data = torch.from_numpy(np.ascontiguousarray(array))
            dist.broadcast(data, 0, group=self._control)
        return data.numpy().copy()

    def all_gather_array(self, array: np.ndarray, stage: str) -> list[np.ndarray]:
        """Every rank's array, by rank. First axes may differ in length, the others and the type may not."""
        import torch
        import torch.distributed as dist

        with self._deadline(stage):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(array)]), group=self._control)
            longest = max(int(length) for length in lengths)
            padded = np.zeros((longest, *array.shape[1:]), dtype=array.dtype)
            padded[: len(array)] = array
            parts = [torch.empty_like(torch.from_numpy(padded)) for _ in range(self.size)]
            dist.all_gather(parts, torch.from_numpy(padded), group=self._control)
        return [part.numpy()[: int(length)] for part, length in zip(parts, lengths, strict=True)]

    def all_gather_objects(self, value: Any, stage: str) -> list[Any]:
        """Every rank's picklable value, by rank: for messages between ranks of one run, never for state."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._deadline(stage):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def exchange_objects(self, to_ranks: Sequence[Any], stage: str) -> list[Any]:
        """Hand each rank its own picklable value: for messages between ranks of one run, never for state.

        Args: to_ranks: one value a rank. Returns: what each rank sent to this one, by rank.
        """
        import torch
        import torch.distributed as dist

        parts = [np.frombuffer(pickle.dumps(value), dtype=np.uint8) for value in to_ranks]
        sizes = np.stack(self.all_gather_array(np.array([len(part) for part in parts]), stage))  # (from, to)
        received = torch.empty(int(sizes[:, self.rank].sum()), dtype=torch.uint8)
        with self._deadline(stage):
            dist.all_to_all_single(
                received,
                torch.from_numpy(np.concatenate(parts)),
                sizes[:, self.rank].tolist(),
                sizes[self.rank].tolist(),
                group=self._control,
            )
        ends = sizes[:, self.rank].cumsum()[:-1]
        return [pickle.loads(part.tobytes()) for part in np.split(received.numpy(), ends)]

    def sum(self, values: Mapping[str, float], stage: str) -> dict[str, float]:
        """Sum each named number over the ranks, in float64. All ranks pass the same names."""
        return self._reduce(values, stage, np.sum)

    def max(self, values: Mapping[str, float], stage: str) -> dict[str, float]:
        """Largest of each named number over the ranks."""
        return self._reduce(values, stage, np.max)

    def _reduce(self, values: Mapping[str, float], stage: str, operation: Any) -> dict[str, float]:
        names = sorted(values)
        local = np.array([[values[name] for name in names]], dtype=np.float64)
        gathered = np.concatenate(self.all_gather_array(local, stage))
        return dict(zip(names, operation(gathered, axis=0).tolist(), strict=True))

    def any(self, flag: bool, stage: str) -> bool:
        """True on every rank if it is true on any."""
        return self.max({"flag": float(flag)}, stage)["flag"] > 0

    def barrier(self, stage: str) -> None:
        """Wait for every rank."""
        self.all_gather_array(np.zeros(0, dtype=np.int64), stage)

    def neighbours(self, size: int) -> Neighbours:
        """The group of `size` consecutive ranks that this one is in; the number of ranks is a multiple of it."""
        import torch.distributed as dist

        if size in self._neighbours:
            return self._neighbours[size]
        members = [range(first, first + size) for first in range(0, self.size, size)]
        groups = [dist.new_group(part, timeout=self._timeout) for part in members]  # without one: NCCL's 10 minutes
        controls = [dist.new_group(part, backend="gloo", timeout=self._timeout) for part in members]
        number = self.rank // size
        self._neighbours[size] = Neighbours(groups[number], controls[number], self.rank % size, size, self._deadline)
        return self._neighbours[size]

    def close(self) -> None:
        """Take the groups down. Not a collective: also runs on the way out of an error."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Neighbours:
    """A group of consecutive ranks. Its methods are collectives of the group alone."""

    group: Any  # torch's process group on the device
    control: Any  # and on the CPU
    rank: int  # in the group
    size: int
    deadline: Callable[[str], AbstractContextManager[Any]] = nullcontext  # given the stage; for errors

    def gather_lists(self, values: Sequence[T]) -> list[T]:
        """The picklable values of all ranks of the group, rank by rank: messages, never state."""
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        with self.deadline("gather sequences of a group"):
            dist.all_gather_object(parts, list(values), group=self.control)
        return [value for part in parts for value in part]

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the group, in place."""
        import torch.distributed as dist

        with self.deadline("gather log-probabilities of a group"):
            dist.all_reduce(tensor, group=self.group)
        return tensor


_UNFLUSHED = 120  # Python's own exit code when standard output could not be written


def leave(code: int) -> NoReturn:
    """End this process: exit handlers, flush, gone.

    Gloo's threads outlive `Ranks.close`, since DeepSpeed keeps groups. One that drops a tensor while Python shuts down
    asks for the interpreter lock, and Python 3.11 answers by ending the thread, which C++ answers with an abort: a run
    that had finished would report SIGABRT. So Python's shutdown is left out.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the shell
            try:
                stream.flush()
            except OSError:
                code = code or _UNFLUSHED
    os._exit(code)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def batch_slots(batch_size: int, mini_batch_size: int, rank: int, size: int) -> np.ndarray:
    """Positions of a batch that are this rank's, mini-batch by mini-batch.

    Every mini-batch is split over the ranks on its own, so that an optimiser step sees the same prompts on any
    number of ranks. Returns: int64, batch_size / size of them.
    """
    share = mini_batch_size // size
    starts = np.arange(0, batch_size, mini_batch_size) + rank * share
    return (starts[:, None] + np.arange(share)).reshape(-1)
