"""vLLM's weight-transfer engine for machines without NCCL: the worker's side. Runs in vLLM's worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from mmr1_ds.rollout.packed_experts import pack_experts_anew
from mmr1_ds.rollout.servers.weights.shared_memory import BufferAddress, MappedBuffer
from mmr1_ds.rollout.tied_head import head_is_tied, pack_tied_head


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """See BufferAddress."""

    path: str
    num_bytes: int
    token: str


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: what is in the memory now."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads weights from memory that the trainer has filled. Every tensor-parallel worker maps the same memory."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._buffer: MappedBuffer | None = None
        self._head_is_tied = head_is_tied(self.model)
        # A tied weight once: while weights are loaded it stands there twice.
        self._names = {name for name, _ in self.model.named_parameters()}
        self._missing: set[str] = set()  # of these, in the update that runs

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Map the trainer's memory, in place of an earlier trainer's."""
        self._buffer = MappedBuffer(BufferAddress(init_info.path, init_info.num_bytes, init_info.token))

    def start_weight_update(self) -> None:
        """See the base class."""
        if self._buffer is None:
            raise RuntimeError("a weight update has started before init_weight_transfer_engine")
        pack_experts_anew(self.model)
        initialize_layerwise_reload(self.model)
        self._missing = self._names & {name for name, _ in self.model.named_parameters()}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket. On return the memory has been read."""
        # The base class waits for the accelerator, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """See the base class. vLLM holds weights of a layer until all are there, and the next bucket may bring them."""
        assert self._buffer is not None
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        shapes = [tuple(shape) for shape in update_info.shapes]
        entries = list(zip(update_info.names, dtypes, shapes, strict=True))
        with disable_mtp_completeness_check():
            loaded = self.model.load_weights(self._buffer.read(entries))
        self._missing -= set(loaded or self._missing)

    def finish_weight_update(self) -> None:
        """Raises: RuntimeError when parameters of the model were not among what was sent: they would be old."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self._missing:
            names = sorted(self._missing)
            raise RuntimeError(f"{len(names)} weights of the model were not sent, {', '.join(names[:3])} among them")
        if self._head_is_tied:
            pack_tied_head(self.model)

    def shutdown(self) -> None:
        """See the base class."""
        self._buffer = None
