"""What the estimate takes as given: a GPU's datasheet, the share of its rates that is reached, the look of a batch.

Every number is overridable from the command line (`--assume NAME=VALUE`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mmr1_ds.engine.model.flops import PEAK_TFLOPS
from mmr1_ds.errors import UserError

GB = 1e9  # bytes, as in datasheets


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight, by its maker's datasheet. Rates count one direction and dense matrices."""

    name: str
    memory_gb: float
    bf16_tflops: float  # 1e12 FLOP a second in matrix products
    memory_tb_s: float  # TB a second between the GPU and its memory
    nvlink_gb_s: float  # GB a second out of one GPU, to the others of its node
    pcie_gb_s: float  # GB a second between the GPU and host memory
    network_gb_s: float  # GB a second out of one GPU to another node
    source: str


# PCIe generation 4 and 5 of 16 lanes: 32 and 64 GB/s a direction. InfiniBand HDR and NDR: 200 and 400 Gb/s a port, one
# port a GPU in the makers' reference nodes.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80, PEAK_TFLOPS["a100"], 2.039, 300, 32, 25, "NVIDIA A100 datasheet (SXM 80 GB)"),
        Gpu("h100", 80, PEAK_TFLOPS["h100"], 3.35, 450, 64, 50, "NVIDIA H100 datasheet (SXM 80 GB)"),
        Gpu("h200", 141, PEAK_TFLOPS["h200"], 4.8, 450, 64, 50, "NVIDIA H200 datasheet (SXM)"),
        Gpu("b200", 192, PEAK_TFLOPS["b200"], 8.0, 900, 64, 50, "NVIDIA Blackwell datasheet (B200 SXM)"),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What no datasheet says. Efficiencies are shares of the peak rate: careful guesses, not measurements."""

    # What a batch looks like. None: half of the longest that the run allows.
    prompt_tokens: float | None = None  # mean tokens of a prompt, its images included
    response_tokens: float | None = None  # mean tokens of a response
    images_per_prompt: float = 1.0  # where the model takes images and the data is not known to have none
    videos_per_prompt: float = 1.0  # where the data has a column of videos
    num_prompts: float | None = None  # of the data set; None: counted where the files are local

    # Rates reached.
    forward_efficiency: float = 0.45  # of bf16_tflops: forwards of log-probabilities
    update_efficiency: float = 0.40  # of bf16_tflops: forward and backward
    prefill_efficiency: float = 0.45  # of bf16_tflops: prompts in vLLM
    decode_efficiency: float = 0.60  # of memory_tb_s: weights and cache that a decoding step reads
    nvlink_efficiency: float = 0.70  # of nvlink_gb_s: collectives
    network_efficiency: float = 0.70  # of network_gb_s
    pcie_efficiency: float = 0.50  # of pcie_gb_s: all GPUs of a node at once
    decode_overhead_seconds: float = 0.004  # of each decoding step: scheduling, sampling, launches
    host_adam_gb_s: float = 100.0  # GB a second of a node's host memory that its ranks' CPU Adam reaches together

    image_seconds: float = 0.1  # of a host thread for a megapixel, decoded and processed: bench_host_work.py
    reward_seconds: float = 0.02  # of a reward process for a response
    sleep_seconds: float = 3.0  # of a step: vLLM to sleep and awake
    disk_gb_s: float = 2.0  # GB a second that a node writes of a checkpoint

    # Memory.
    context_gb: float = 1.5  # CUDA context, NCCL buffers, library workspaces of a training process
    vllm_overhead_gb: float = 2.0  # of an engine, while it sleeps too: context and libraries; graphs go to the host
    fragmentation: float = 0.05  # of the largest part that torch's allocator holds: lost between blocks
    host_memory_gb: float | None = None  # of a node; None: printed, not checked

    def with_settings(self, settings: Sequence[str]) -> Assumptions:
        """Return them with some replaced, each given as NAME=VALUE. Raises: UserError, one line."""
        known = {field.name for field in dataclasses.fields(self)}
        changes = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in known:
                raise UserError(f"--assume {setting}: no such assumption; known: {', '.join(sorted(known))}")
            changes[name] = _positive(text, f"--assume {name}")
        return dataclasses.replace(self, **changes)


def find_gpu(name: str, memory_gb: float | None) -> Gpu:
    """Return a GPU by its name, with other memory where that is given. Raises: UserError for an unknown name."""
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name}: unknown; known: {', '.join(GPUS)}")
    if memory_gb is None:
        return found
    if not memory_gb > 0:
        raise UserError(f"--gpu-memory-gb must be over 0, got {memory_gb:g}")
    return dataclasses.replace(found, memory_gb=memory_gb)


def _positive(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise UserError(f"{name} must be a number, 0 or more, got {text!r}")
    return value
