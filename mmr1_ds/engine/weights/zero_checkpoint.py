"""A ZeRO-3 engine's state on disk: each rank's shards, read back on as many ranks, or on another number of them.

DeepSpeed waits for all ranks several times while it saves. A rank whose disk fails must not miss one of these, so
nothing is raised while it saves: what failed is remembered, the rest is not written, and all ranks agree after it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from mmr1_ds.cluster.agreement import in_step
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.engine.weights import CONVERTED
from mmr1_ds.errors import UserError
from mmr1_ds.io import FileEntry, PendingFile, whole_folder

logger = logging.getLogger(__name__)

_TAG = "zero3"
# DeepSpeed's program; it and its workers end with the process that started them, also when that is killed.
_CONVERSION = """
import ctypes, os, signal
end_with_parent = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
end_with_parent()
os.register_at_fork(after_in_child=end_with_parent)
from deepspeed.checkpoint import ds_to_universal
ds_to_universal.main(ds_to_universal.parse_arguments())
"""
_POLL_SECONDS = 0.2
_ROUND_SECONDS = 5.0  # how long the ranks wait for rank 0 at a time; far below any deadline
_TOLD_SECONDS = 60.0
_WORKERS = 4  # of the conversion, each with a rank's shards in memory


class ZeroCheckpoint:
    """Saves and loads one engine."""

    def __init__(self, engine: Any, ranks: Ranks, bound_by: str = "") -> None:
        """Take over the writing of an engine's files.

        Args: engine: DeepSpeed's, with an optimizer; bound_by: the setting whose states no other number of ranks reads.
        """
        self._engine, self._ranks, self._bound_by = engine, ranks, bound_by
        self._writer = engine.checkpoint_engine = _Writer()
        # Rank 0 alone copies a script beside the shards, not through its checkpoint engine: where that fails, the
        # other ranks wait for it. `mmr1-ds export` does what the script does.
        engine._copy_recovery_script = lambda folder: None

    def save(
        self, folder: Path, client_state: dict[str, Any], exclude_frozen: bool = False, in_background: bool = False
    ) -> list[PendingFile]:
        """Write this rank's shards, or with in_background copy them to host memory. Collective.

        Returns: this rank's files. Raises: SaveFailed, on every rank.
        """
        self._writer.begin(in_background)
        self._engine.save_checkpoint(
            str(folder),
            tag=_TAG,
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=exclude_frozen,
        )
        in_step(self._ranks, "write the ZeRO-3 shards", self._writer.check)
        return self._writer.files

    def load(self, folder: Path, strict: bool = True) -> dict[str, Any]:
        """Read what `save` wrote, on any number of ranks. Returns: the client state. Collective.

        On another number of ranks it is converted first, into a folder beside the shards, which a second start finds.
        Args: strict: whether every parameter must be in the file.
        Raises: UserError when it cannot be converted.
        """
        tag = _TAG
        written_by = self._written_by(folder)
        if written_by != self._ranks.size and self._bound_by:
            raise UserError(
                f"{folder} was written by {written_by} ranks, and {self._bound_by} resumes on as many alone: DeepSpeed "
                f"converts the states of adamw only; start {written_by} ranks"
            )
        if written_by != self._ranks.size:
            tag = CONVERTED
            self._convert(folder)
        # As a DeepSpeed configuration would say it, but that this is known only now.
        self._engine._config.load_universal_checkpoint = tag == CONVERTED
        try:
            path, client_state = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        finally:
            self._engine._config.load_universal_checkpoint = False
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load {folder}")
        if tag == CONVERTED:
            self._part_steps()
        return client_state

    def _written_by(self, folder: Path) -> int:
        """The number of ranks that wrote the folder, as rank 0 sees it. Collective."""
        number = len(list((folder / _TAG).glob("*_optim_states.pt"))) if self._ranks.rank == 0 else 0
        return self._ranks.all_gather_objects(number, "count the checkpoint's shards")[0]

    def _convert(self, folder: Path) -> None:
        """Convert on rank 0 while the others wait in short rounds, so that no deadline runs out. Collective."""
        rounds = _to_universal(folder) if self._ranks.rank == 0 else None
        state: str | None = None
        while state != "done":
            if rounds is not None:
                state = next(rounds, "done")
            state = self._ranks.all_gather_objects(state, "convert the checkpoint")[0]
            if state not in ("", "done"):
                raise UserError(f"{folder} could not be converted to {self._ranks.size} ranks: {state}")

    def _part_steps(self) -> None:
        """Give each group of parameters its own step count: torch's AdamW counts up in place what DeepSpeed shares.

        The fused one counts on the parameters' device.
        """
        optimizer = self._engine.optimizer.optimizer
        for parameter, state in optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                device = parameter.device if optimizer.defaults.get("fused") else state["step"].device
                state["step"] = state["step"].to(device, copy=True)


class _Writer(TorchCheckpointEngine):
    """Writes as DeepSpeed's own does, and keeps what failed in place of raising it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.begin(in_background=False)

    def begin(self, in_background: bool) -> None:
        """Forget the last save. in_background: what is to be saved is copied, and written when its file is."""
        self._in_background = in_background
        self.error: OSError | None = None
        self.files: list[PendingFile] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """See CheckpointEngine."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        """See CheckpointEngine. Nothing more is written once something failed."""
        if self.error is not None:
            return
        if self._in_background:
            try:
                self.files.append(PendingFile(Path(path), partial(_write, [host_copy(state_dict)], path)))
                return
            except (RuntimeError, MemoryError) as error:
                logger.warning("no host memory for a copy of %s (%s): it is written at once", path, error)
        try:
            entry = _write([state_dict], path)
            self.files.append(PendingFile(Path(path), lambda: entry))
        except OSError as error:
            self.error = error

    def check(self) -> None:
        """Raises: OSError, the first that happened."""
        if self.error is not None:
            raise self.error


def host_copy(state: Any) -> Any:
    """Copy a state to host memory, as it is now; it is saved as the same bytes, tensors of one storage once.

    From a GPU into pinned memory, which PyTorch keeps for the next copy.
    """
    storages: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if (key := storage.data_ptr() or id(value)) not in storages:  # an empty one has no address
                source = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
                storages[key] = torch.empty(source.shape, dtype=torch.uint8, pin_memory=value.is_cuda)
                storages[key].copy_(source, non_blocking=True)
            host = torch.empty(0, dtype=value.dtype)
            host.set_(storages[key].untyped_storage(), value.storage_offset(), value.size(), value.stride())
            host.__dict__.update(vars(value))  # DeepSpeed names parameters so, and they are saved with them
            return host.requires_grad_(value.requires_grad)
        if isinstance(value, dict):
            found = copy.copy(value)
            found.update((name, copied(item)) for name, item in value.items())
            return found
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        return copy.deepcopy(value)

    copy_of_all = copied(state)
    if any(tensor.is_pinned() for tensor in storages.values()):
        torch.cuda.synchronize()  # the next update must not overtake the copies
    return copy_of_all


def _write(states: list[Any], path: str) -> FileEntry:
    """Write and sync the one state of a list, which is emptied. Raises: OSError, naming the path."""
    try:
        with open(path, "wb", buffering=0) as file:
            target: Any = _Tolerant(file)
            torch.save(states.pop(), target)
            if target.error is not None:
                raise target.error
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = path  # not known to a write
        raise
    return {"bytes": target.num_bytes, "sha256": target.sha256.hexdigest()}


class _Tolerant(io.RawIOBase):
    """A file that swallows what the disk does not take: torch answers a failed write with an error that hides why."""

    def __init__(self, file: io.RawIOBase) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None
        self.num_bytes, self.sha256 = 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        self.num_bytes += size
        self.sha256.update(left)  # of what is meant to be there: a disk that changes it is found out
        while self.error is None and len(left):
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self.error = error
        return size


def _to_universal(folder: Path) -> Iterator[str]:
    """Convert the shards with DeepSpeed's own program, in a process of its own. Made whole, or not at all.

    Yields: "" every few seconds while it lasts; what went wrong, at the end, when it did.
    """
    final = folder / CONVERTED
    if final.is_dir():
        return
    logger.info("converting %s for another number of ranks", folder)
    start = told = time.monotonic()
    try:
        with whole_folder(final) as temporary, tempfile.TemporaryFile() as log:
            process = _start_conversion(folder, temporary, log)
            try:
                while process.poll() is None:
                    end = time.monotonic() + _ROUND_SECONDS
                    while process.poll() is None and time.monotonic() < end:
                        time.sleep(_POLL_SECONDS)
                    if time.monotonic() - told > _TOLD_SECONDS:
                        told = time.monotonic()
                        logger.info("converting %s: %.0f s so far", folder, told - start)
                    yield ""
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if process.returncode != 0:
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines() or [f"exit {process.returncode}"]
                yield f"{lines[-1]}; start on as many ranks as wrote it"
            (folder / "latest_universal").unlink(missing_ok=True)  # the program's, naming the temporary folder
    except OSError as error:
        yield f"{error}; start on as many ranks as wrote it, or copy the checkpoint to where there is room to write"
    logger.info("converted %s in %.0f s", folder, time.monotonic() - start)


def _start_conversion(folder: Path, temporary: Path, log: Any) -> subprocess.Popen[bytes]:
    """Start DeepSpeed's program on relative paths: it makes patterns of them, which a user's path could break."""
    program = [sys.executable, "-P", "-c", _CONVERSION, "--input_folder", _TAG, "--output_folder", temporary.name]
    program += ["--num_extract_workers", str(_WORKERS), "--num_merge_workers", str(_WORKERS)]
    return subprocess.Popen(
        program,
        cwd=folder,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def trained_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in the shards that `ZeroCheckpoint.save` wrote, whole, one at a time, in float32.

    Needs neither an engine nor ranks. The names are those of the engine's module; tied parameters come under each of
    their names, and frozen ones where they were saved.
    """
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG, lazy_mode=True)
    for name, tensor in found.items():
        yield name, tensor.contiguous()
