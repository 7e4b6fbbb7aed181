"""What a machine with GPUs lacks for a run, told before minutes of loading: driver, compilers, memory, limits.

DeepSpeed compiles its optimiser when it first starts, and asks for nvcc, g++ and ninja at every start.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from mmr1_ds.config import RunConfig
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.models import num_parameters

_DRIVER_OF_CUDA = {12: 525, 13: 580}  # the oldest driver (Linux) for a major version of CUDA
_GIB = 2**30
_QUERY = "index,uuid,driver_version,memory.free,memory.total"
_SECONDS = 60  # for nvidia-smi, which may wait for the driver to load
_FREED_WITHIN = 30  # seconds: the memory of a process that has ended

logger = logging.getLogger(__name__)


class MachineError(UserError):
    """This node lacks something, the others may not."""


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi lists it."""

    name: str  # its number
    uuid: str
    driver: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Machine:
    """What was found; empty or None for what was not."""

    host: str
    gpus: tuple[Gpu, ...] | None  # those that CUDA_VISIBLE_DEVICES shows; None: nvidia-smi does not say
    cuda_of_torch: str  # as "13.0"
    nvcc: str  # its version, as "13.0"
    has_ninja: bool
    has_gxx: bool
    memlock_bytes: int | None  # that a process may lock in memory; None: without limit
    memory_bytes: int  # of the whole machine


@dataclass(frozen=True)
class Needs:
    """What a run asks of the machine."""

    gpu_fraction: float  # of a GPU's memory, free; 0 when the run can do with what there is
    compiles: bool  # an optimiser for the GPU
    pins_memory: bool  # for states in host memory
    host_bytes: float = 0.0  # of one node, for the states in host memory; 0 also where the model is not here yet


def needs_of(config: RunConfig, actor: Mapping[str, Any]) -> Needs:
    """What a run needs. Args: actor: its resolved DeepSpeed config."""
    rollout, zero = config.worker.rollout, actor["zero_optimization"]
    # vLLM inside a rank refuses to start when less is free than it is told to use.
    colocated = rollout.engine == "vllm" or (rollout.engine == "auto" and find_spec("vllm") is not None)
    fraction = rollout.gpu_memory_utilization if colocated else 0.0
    pins = any(zero.get(key, {}).get("pin_memory") for key in ("offload_param", "offload_optimizer"))
    pins = pins or config.worker.actor.offload_states or config.worker.ref.offload.offload_params
    is_fused = not actor["optimizer"].get("params", {}).get("torch_adam", False)
    compiles = is_fused and config.worker.actor.optim.strategy == "adamw" and not config.trainer.val_only
    return Needs(fraction, compiles, bool(pins), _host_bytes(config, actor["zero_optimization"]))


def _host_bytes(config: RunConfig, zero: Mapping[str, Any]) -> float:
    """Return what the actor's and the reference's states take of a node's memory; docs/presets.md has the parts."""
    settings, of_parameter = config.worker.actor, 0
    if settings.model.lora.rank == 0 and zero.get("offload_optimizer", {}).get("device") == "cpu":
        of_parameter += 20  # copy and moments in fp32, gradients twice
    if settings.model.lora.rank == 0 and settings.offload_states:
        of_parameter += 18  # weights, gradients, copy and moments
    of_parameter += 2 * (zero.get("offload_param", {}).get("device") == "cpu")
    of_parameter += 2 * config.worker.ref.offload.offload_params
    return of_parameter * num_parameters(settings.model) / config.trainer.nnodes


def check_machine(config: RunConfig, actor: Mapping[str, Any]) -> tuple[str, ...]:
    """Check the machine of this process, which shows a GPU. Args: actor: its resolved DeepSpeed config.

    Returns: doubts, one line each. Raises: MachineError, one line with all that is missing.
    """
    found, needs = gather(os.environ), needs_of(config, actor)
    problems, deadline = lacking(found, needs), time.monotonic() + _FREED_WITHIN
    while problems and problems == crowded(found, needs) and time.monotonic() < deadline:
        logger.info("%s: waiting up to %d s for memory that an ended process may still hold", found.host, _FREED_WITHIN)
        time.sleep(5)
        found = gather(os.environ)
        problems = lacking(found, needs)
    if problems:
        raise MachineError(f"{found.host} cannot train: {'; '.join(problems)}")
    return doubts(found, needs)


def lacking(found: Machine, needs: Needs) -> list[str]:
    """What stops a run, each with its remedy."""
    problems = []
    gpus = found.gpus or ()
    if found.gpus == ():
        problems.append("nvidia-smi lists no GPU that CUDA_VISIBLE_DEVICES shows: see `nvidia-smi -L`")
    major = int(found.cuda_of_torch.partition(".")[0] or 0)
    oldest = _DRIVER_OF_CUDA.get(major, 0)
    for driver in sorted({gpu.driver for gpu in gpus}):
        if int(driver.partition(".")[0] or 0) < oldest:
            problems.append(f"its driver is {driver} and CUDA {found.cuda_of_torch} needs {oldest} or newer: update it")
    if needs.compiles and not found.nvcc:
        problems.append(
            f"nvcc is missing: install the CUDA toolkit {found.cuda_of_torch} and export CUDA_HOME, or install "
            "nvidia-cuda-nvcc of requirements/gpu.lock"
        )
    elif needs.compiles and found.cuda_of_torch and found.nvcc.partition(".")[0] != str(major):
        problems.append(
            f"nvcc is of CUDA {found.nvcc} and torch of {found.cuda_of_torch}: export CUDA_HOME of a {major}.x"
        )
    if not found.has_gxx:
        problems.append("g++ is missing: install it (package g++)")
    if needs.compiles and not found.has_ninja:
        problems.append("ninja is missing: pip install ninja")
    problems += crowded(found, needs)
    if needs.host_bytes > found.memory_bytes:
        problems.append(
            f"offloaded states take {needs.host_bytes / _GIB:.0f} GiB of host memory and it has "
            f"{found.memory_bytes / _GIB:.0f}: take more nodes, or offload less"
        )
    return problems


def crowded(found: Machine, needs: Needs) -> list[str]:
    """The GPUs with too little free memory. A run that crashed, and is started again, finds its own still held."""
    return [
        f"GPU {gpu.name} has {gpu.free_bytes / _GIB:.0f} of {gpu.total_bytes / _GIB:.0f} GiB free, and vLLM takes "
        f"{needs.gpu_fraction:g} (worker.rollout.gpu_memory_utilization): end what else runs there (nvidia-smi), or "
        "choose others by CUDA_VISIBLE_DEVICES"
        for gpu in found.gpus or ()
        if gpu.free_bytes < needs.gpu_fraction * gpu.total_bytes
    ]


def doubts(found: Machine, needs: Needs) -> tuple[str, ...]:
    """What may stop a run, or may not."""
    lines = []
    if found.gpus is None:
        lines.append(f"{found.host}: nvidia-smi says nothing of the GPUs; driver and memory are not checked")
    if needs.pins_memory and found.memlock_bytes is not None:
        lines.append(
            f"{found.host}: only {found.memlock_bytes / _GIB:.3g} GiB may be locked in memory, and offloaded states "
            f"{f'({needs.host_bytes / _GIB:.0f} GiB) ' if needs.host_bytes else ''}are pinned; if that fails: "
            "ulimit -l unlimited"
        )
    return tuple(lines)


def gather(environ: Mapping[str, str]) -> Machine:
    """Ask nvidia-smi, nvcc and the system; a second or so."""
    home, own = _cuda_home(environ), environ.get("PATH")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    table = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    return Machine(
        host=socket.gethostname(),
        gpus=visible(_gpus(table), environ) if table else None,
        cuda_of_torch=_cuda_of_torch(),
        nvcc=_release(_output(str(home / "bin" / "nvcc"), "--version")) if home else "",
        has_ninja=shutil.which("ninja", path=own) is not None,
        has_gxx=shutil.which(environ.get("CXX") or "g++", path=own) is not None,
        memlock_bytes=None if limit == resource.RLIM_INFINITY else limit,
        memory_bytes=psutil.virtual_memory().total,
    )


def visible(gpus: tuple[Gpu, ...], environ: Mapping[str, str]) -> tuple[Gpu, ...] | None:
    """Those that CUDA_VISIBLE_DEVICES names, by number or by the beginning of the UUID; all when it is not set.

    None when it names a part of a GPU (MIG): nvidia-smi's table has whole ones alone.
    """
    if "CUDA_VISIBLE_DEVICES" not in environ:
        return gpus
    if "MIG-" in environ["CUDA_VISIBLE_DEVICES"]:
        return None
    names = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return tuple(
        gpu for name in names for gpu in gpus if name == gpu.name or (not name.isdigit() and gpu.uuid.startswith(name))
    )


def use_own_nvcc(environ: MutableMapping[str, str] = os.environ) -> None:
    """Export CUDA_HOME of the virtual environment where torch would find no nvcc; accept another minor version of CUDA.

    A wheel's toolkit lies where torch does not look, and its libcudart.so, which DeepSpeed's operators are linked with,
    has the version in its name alone. DeepSpeed knows no minor versions of CUDA 13 that fit one another, as all do.
    """
    home = _cuda_home(environ)
    if home is None or not (home / "bin" / "nvcc").is_file():
        home = next((path for path in _toolkits() if (path / "bin" / "nvcc").is_file()), None)
        if home is None:
            return
        environ["CUDA_HOME"] = str(home)
        if folder := _link_libcudart(home, environ):
            environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(folder), environ.get("LIBRARY_PATH")]))
    nvcc, torch = _release(_output(str(home / "bin" / "nvcc"), "--version")), _cuda_of_torch()
    if nvcc != torch and nvcc.partition(".")[0] == torch.partition(".")[0]:
        environ.setdefault("DS_SKIP_CUDA_CHECK", "1")


def _link_libcudart(home: Path, environ: Mapping[str, str]) -> Path | None:
    """A folder with libcudart.so, which leads to that of the toolkit; None when the toolkit has one itself."""
    versioned = sorted((home / "lib").glob("libcudart.so.*"))
    if not versioned or (home / "lib" / "libcudart.so").exists() or (home / "lib64").exists():
        return None
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmr1_ds" / "cuda"
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cache / f"libcudart.so.{os.getpid()}"  # ranks do this at once
    with suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(versioned[-1])
    temporary.replace(cache / "libcudart.so")
    return cache


def _cuda_home(environ: Mapping[str, str]) -> Path | None:
    """Where torch looks for it (torch.utils.cpp_extension)."""
    if given := environ.get("CUDA_HOME") or environ.get("CUDA_PATH"):
        return Path(given)
    if nvcc := shutil.which("nvcc", path=environ.get("PATH")):
        return Path(nvcc).parents[1]
    usual = Path("/usr/local/cuda")
    return usual if usual.exists() else None


def _toolkits() -> list[Path]:
    """Those that came as wheels, which share the package `nvidia`."""
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    return [path for folder in folders or () for path in sorted(Path(folder).glob("cu1[0-9]"))]


def _cuda_of_torch() -> str:
    """By the runtime that torch requires: importing torch takes seconds."""
    for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        with suppress(PackageNotFoundError):
            return ".".join(version(name).split(".")[:2])
    return ""


def _gpus(table: str) -> tuple[Gpu, ...]:
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    mib = 2**20
    return tuple(
        Gpu(name, uuid, driver, int(free) * mib, int(total) * mib)
        for name, uuid, driver, free, total in (row for row in rows if len(row) == 5)
        if free.isdigit() and total.isdigit()
    )


def _release(words: str) -> str:
    found = re.search(r"release (\d+\.\d+)", words)
    return found.group(1) if found else ""


def _output(*command: str) -> str:
    """What a program prints; nothing when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
