"""Ranks, process groups and deadlines. No other module asks for its rank or calls a raw collective.

Two groups: the device group (NCCL on GPU, gloo on CPU), which DeepSpeed and vLLM use, and a CPU group beside it
for control traffic (indices, statistics, metrics), so that a small message never waits behind a large one.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from mmr1_ds.cluster.launch import LaunchEnvironment, device_number, free_port
from mmr1_ds.cluster.watch import GRACE_SECONDS, CollectiveError, Watch, report_fault
from mmr1_ds.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

STACKS_SIGNAL = signal.SIGUSR2  # SIGTERM and SIGUSR1 ask a run to end
_NAME_BYTES = 64  # of a collective's name, compared between the ranks
_HEADER_BYTES = 8 + _NAME_BYTES
_SHORT_BYTES = 4096  # that travel with the header: a batch of 512 indices, the figures of a stage
_PORT_SECONDS = 0.2  # between two looks whether rank 0 listens


def initialise_gpu(launch: LaunchEnvironment) -> bool:
    """Allocate a number on this rank's GPU, so that a broken driver or GPU shows at once. Not a collective.

    Returns: whether there is a GPU, as torch sees it. Raises: UserError, one line, when it cannot be used.
    """
    import torch

    if not _runs_on_gpu():
        return False
    number = device_number(launch.local_rank, torch.cuda.device_count())
    try:
        torch.zeros(1, device=torch.device("cuda", number))
    except RuntimeError as error:
        raise UserError(
            f"{socket.gethostname()}: GPU {number} cannot be used ({first_line(error)}); look at nvidia-smi and the "
            "kernel's log (dmesg), or take another by CUDA_VISIBLE_DEVICES"
        ) from error
    return True


def _runs_on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


class Ranks:
    """The process groups of a run; a context manager. Every method is a collective unless it says otherwise.

    A rank that dies, stalls or calls another collective than the others is named on every rank within
    `timeout_seconds` of the wait for it, and all end: see watch.py. The limit bounds how long the slowest rank may
    lag behind, not how long a stage may take.
    """

    def __init__(self, launch: LaunchEnvironment, timeout_seconds: float, silence_seconds: float = 120.0) -> None:
        """Meet the other ranks.

        silence_seconds: after which a rank that shows no sign of life is lost, whether it is waited for or not.
        Raises: CollectiveError naming the ranks that have not come in time; UserError for a rank without a GPU.
        """
        import torch
        import torch.distributed as dist

        self.rank, self.size, self.local_rank = launch.rank, launch.world_size, launch.local_rank
        self.timeout_seconds = timeout_seconds
        self.on_gpu = _runs_on_gpu()
        if self.on_gpu and (number := device_number(self.local_rank, torch.cuda.device_count())) != self.local_rank:
            self.local_rank = number
            # DeepSpeed compares it with LOCAL_RANK, by which it and vLLM take their device.
            os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
        self._neighbours: dict[int, Neighbours] = {}
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        self.device = torch.device("cuda", self.local_rank) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        store = _connect(self.rank, timeout_seconds, hosts=self.rank == 0)
        watched = _connect(self.rank, timeout_seconds) if self.size > 1 else None
        self.watch = Watch(self.rank, self.size, timeout_seconds, watched, silence_seconds)
        self.watch.wait_for_all()
        self._timeout = timedelta(seconds=timeout_seconds + GRACE_SECONDS)  # the watch, which names the lost, is first
        with self._deadline("make the process groups"):
            dist.init_process_group(
                "nccl" if self.on_gpu else "gloo",
                store=dist.PrefixStore("groups", store),
                rank=self.rank,
                world_size=self.size,
                timeout=self._timeout,
            )
            self._control = dist.new_group(backend="gloo", timeout=self._timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)

    @property
    def step(self) -> int:
        """The step that messages name."""
        return self.watch.step

    @step.setter
    def step(self, value: int) -> None:
        self.watch.step = value

    def write_stacks(self, folder: Path) -> None:
        """Write the stacks to `folder`/rank_N.txt on a fault and on SIGUSR2. Not a collective."""
        self.watch.stacks.write_into(folder, STACKS_SIGNAL)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name what this rank does inside, for messages. Not a collective.

        Raises: CollectiveError for a collective of DeepSpeed or torch that failed inside.
        """
        with self.watch.stage(name):
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, CollectiveError) or not _is_of_a_collective(error):
                    raise
                raise self.watch.explain(f"stage {name!r}", error) from error

    @contextmanager
    def _deadline(self, stage: str, is_of_all: bool = True) -> Iterator[None]:
        with self.watch.waiting(stage, is_of_all):
            try:
                yield
            except CollectiveError:
                raise
            except RuntimeError as error:
                raise self.watch.explain(stage, error) from error

    def _gather_frames(self, own: np.ndarray, stage: str) -> tuple[list[int], list[np.ndarray]]:
        """How many bytes each rank has, and the first `_SHORT_BYTES` of them, by rank; most have no more.

        Raises: CollectiveError if the ranks are in different collectives.
        """
        import torch
        import torch.distributed as dist

        frame = np.zeros(_HEADER_BYTES + _SHORT_BYTES, dtype=np.uint8)
        frame[:8] = np.array([len(own)], dtype=np.int64).view(np.uint8)
        text = np.frombuffer(stage.encode()[:_NAME_BYTES], dtype=np.uint8)
        frame[8 : 8 + len(text)] = text
        frame[_HEADER_BYTES:][: len(own)] = own[:_SHORT_BYTES]
        gathered = [torch.empty(len(frame), dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(gathered, torch.from_numpy(frame), group=self._control)
        frames = [each.numpy() for each in gathered]
        names = [each[8:_HEADER_BYTES].tobytes().rstrip(bytes(1)).decode(errors="replace") for each in frames]
        if len(set(names)) > 1:
            raise self.watch.astray(names)
        return [int(each[:8].view(np.int64)[0]) for each in frames], [each[_HEADER_BYTES:] for each in frames]

    def broadcast_array(self, array: np.ndarray | None, stage: str) -> np.ndarray:
        """Rank 0's int64 array of one axis, on every rank. Other ranks pass None."""
        import torch
        import torch.distributed as dist

        assert array is None or array.dtype == np.int64
        own = np.empty(0, dtype=np.uint8) if array is None or self.rank else _bytes_of(array)
        with self._deadline(stage):
            sizes, parts = self._gather_frames(own, stage)
            data = parts[0]
            if sizes[0] > _SHORT_BYTES:
                data = own if self.rank == 0 else np.empty(sizes[0], dtype=np.uint8)
                dist.broadcast(torch.from_numpy(data), 0, group=self._control)
        return data[: sizes[0]].copy().view(np.int64)

    def all_gather_array(self, array: np.ndarray, stage: str) -> list[np.ndarray]:
        """Every rank's array, by rank. First axes may differ in length, the others and the type may not."""
        import torch
        import torch.distributed as dist

        own = _bytes_of(array)
        with self._deadline(stage):
            sizes, parts = self._gather_frames(own, stage)
            if max(sizes) > _SHORT_BYTES:
                padded = np.zeros(max(sizes), dtype=np.uint8)
                padded[: len(own)] = own
                gathered = [torch.empty(len(padded), dtype=torch.uint8) for _ in range(self.size)]
                dist.all_gather(gathered, torch.from_numpy(padded), group=self._control)
                parts = [each.numpy() for each in gathered]
        row = math.prod(array.shape[1:]) * array.itemsize
        return [
            part[:size].copy().view(array.dtype).reshape(size // row if row else len(array), *array.shape[1:])
            for part, size in zip(parts, sizes, strict=True)
        ]

    def all_gather_objects(self, value: Any, stage: str) -> list[Any]:
        """Every rank's picklable value, by rank: for messages between ranks of one run, never for state."""
        own = np.frombuffer(bytearray(pickle.dumps(value)), dtype=np.uint8)
        return [pickle.loads(part.tobytes()) for part in self.all_gather_array(own, stage)]

    def exchange_arrays(self, to_ranks: Sequence[Mapping[str, np.ndarray]], stage: str) -> list[dict[str, np.ndarray]]:
        """Hand each rank its own named arrays, of one axis or more, as one buffer behind a header (safetensors).

        Args: to_ranks: one mapping a rank, which may be empty. Returns: what each rank sent to this one, by rank.
        """
        import torch
        import torch.distributed as dist
        from safetensors.numpy import load, save

        # Of a view that skips elements, safetensors would write what lies in memory.
        whole = [{name: np.ascontiguousarray(array) for name, array in arrays.items()} for arrays in to_ranks]
        parts = [np.frombuffer(save(arrays), dtype=np.uint8) for arrays in whole]
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
        return [load(part.tobytes()) for part in np.split(received.numpy(), ends)]

    def sum(self, values: Mapping[str, float], stage: str) -> dict[str, float]:
        """Sum each named number over the ranks, in float64. Raises: RuntimeError where ranks pass other names."""
        return self.sum_and_max(values, {}, stage)[0]

    def max(self, values: Mapping[str, float], stage: str) -> dict[str, float]:
        """Largest of each named number over the ranks. Raises: as `sum`."""
        return self.sum_and_max({}, values, stage)[1]

    def sum_and_max(
        self, sums: Mapping[str, float], largest: Mapping[str, float], stage: str
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Do what `sum` and `max` do, in one collective."""
        names = [*sorted(sums), *sorted(largest)]
        digest = float(zlib.crc32("\n".join(names).encode()))  # a figure that few ranks have would be added to another
        values = [*(sums[name] for name in sorted(sums)), *(largest[name] for name in sorted(largest))]
        gathered = self.all_gather_array(np.array([digest, *values], dtype=np.float64), stage)
        if any(own[0] != digest for own in gathered):
            raise RuntimeError(f"the ranks have different figures in stage {stage!r}, this one {', '.join(names)}")
        columns = np.stack(gathered)[:, 1:]
        totals, maxima = columns[:, : len(sums)].sum(axis=0), columns[:, len(sums) :].max(axis=0)
        return dict(zip(sorted(sums), totals.tolist(), strict=True)), dict(
            zip(sorted(largest), maxima.tolist(), strict=True)
        )

    def any(self, flag: bool, stage: str) -> bool:
        """Whether the flag is true on any rank, the same on every rank."""
        return self.max({"flag": float(flag)}, stage)["flag"] > 0

    def barrier(self, stage: str) -> None:
        """Wait for every rank."""
        self.all_gather_array(np.zeros(0, dtype=np.int64), stage)

    def neighbours(self, size: int) -> Neighbours:
        """The group of `size` consecutive ranks that this one belongs to; `size` divides the number of ranks."""
        import torch.distributed as dist

        if size in self._neighbours:
            return self._neighbours[size]
        members = [range(first, first + size) for first in range(0, self.size, size)]
        with self._deadline("make the groups of neighbours"):
            groups = [dist.new_group(part, timeout=self._timeout) for part in members]  # else NCCL's 10 minutes
            controls = [dist.new_group(part, backend="gloo", timeout=self._timeout) for part in members]
        number, deadline = self.rank // size, partial(self._deadline, is_of_all=False)
        self._neighbours[size] = Neighbours(groups[number], controls[number], self.rank % size, size, deadline)
        return self._neighbours[size]

    def counter(self) -> Counter:
        """A counter that the ranks share, over a connection of its own. Not a collective."""
        deadline = partial(self._deadline, "count in the store of the ranks", is_of_all=False)
        return Counter(_connect(self.rank, self.timeout_seconds), deadline)

    def close(self, error: BaseException | None = None) -> None:
        """Inform the other ranks, and take the groups down. Not a collective. error: what ended this rank, if any."""
        import torch.distributed as dist

        self.watch.close(error)
        if dist.is_initialized():
            dist.destroy_process_group()


class Counter:
    """A number that rank 0's store keeps: whoever counts it up gets a value that nobody else gets.

    One key for the whole run, so that nothing is left behind, nor taken over from a run before in a launcher's store.
    """

    _KEY = "counter"

    def __init__(self, store: Store, deadline: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """deadline: for errors."""
        self._store, self._deadline = store, deadline

    def reset(self) -> None:
        """Begin at 0 again. For one rank alone, between collectives that keep the others from counting meanwhile."""
        with self._deadline():
            self._store.set(self._KEY, "0")

    def next(self) -> int:
        """Count up. Returns: how often it had been counted up before. Not a collective."""
        with self._deadline():
            return self._store.add(self._KEY, 1) - 1


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


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _connect(rank: int, timeout_seconds: float, hosts: bool = False) -> Store:
    """A connection to the store of the process groups, which rank 0 keeps. It waits for nobody else."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_seconds)
    if hosts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps one itself
        hosts = False
    try:
        if not hosts:
            _wait_for_port(address, port, timeout_seconds)
        return TCPStore(address, port, is_master=hosts, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        late = f"has not come within {timeout_seconds:g} s (trainer.collective_timeout_seconds)"
        verdict = f"rank 0 {'cannot listen' if hosts else late} at MASTER_ADDR={address}, port {port}: {reason}"
        report_fault(rank, verdict)
        raise CollectiveError(verdict) from error


def _wait_for_port(address: str, port: int, timeout_seconds: float) -> None:
    """Wait until something listens there. Raises: OSError. Torch's own wait prints its C++ frames at each try."""
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((address, port), max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(_PORT_SECONDS)


def _is_of_a_collective(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)  # gloo raises plain ones, with its source file
