"""The actor's weights to the rollout servers, through vLLM's weight-transfer API.

shared_memory is our own engine, for servers on rank 0's machine. nccl and ipc are vLLM's: rank 0 broadcasts to all
workers of all servers in one NCCL group, or hands out handles of memory on the GPUs that ranks and workers share.
"""

from __future__ import annotations

import base64
import logging
import math
import pickle
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mmr1_ds.cluster.launch import free_port
from mmr1_ds.rollout.base import Policy
from mmr1_ds.rollout.servers.address import ServerAddress
from mmr1_ds.rollout.servers.weights.control import ServerControl
from mmr1_ds.rollout.servers.weights.shared_memory_transfer import BACKEND as SHARED_MEMORY
from mmr1_ds.rollout.servers.weights.shared_memory_transfer import SharedMemoryTransfer

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

    from mmr1_ds.rollout.servers.weights.actor_weights import ActorWeights

__all__ = ["ServerControl", "WeightTransfer"]

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 256 << 20  # of a packed broadcast: a quarter of what the gathering holds
_ANSWER_SECONDS = 300.0  # for a server's answer to one request
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class WeightTransfer:
    """Rank 0 sends; every rank takes part in the gathering. One object a run."""

    def __init__(self, policy: Policy, *, backend: str, rank: int, key: str) -> None:
        """backend: nccl | ipc | shared_memory."""
        self._policy, self._backend, self._rank, self._key = policy, backend, rank, key
        self._shared_memory: SharedMemoryTransfer | None = None
        self._built_in: BuiltInTransfer | None = None

    def send(self, servers: Sequence[ServerAddress], version: int) -> dict[int, str]:
        """Give the servers the weights, which they will call `version`.

        Collective: all ranks, with the same servers. The servers must be paused or idle.
        Returns: on rank 0, by number, the servers that do not have the weights and why: their old ones may be lost, so
        they must be started anew. All others have them whole. A server that fails does not fail the others, except
        with nccl, where all are in one group. Empty on the other ranks.
        """
        control = ServerControl(servers, self._key, _ANSWER_SECONDS, str(version))
        if self._backend != SHARED_MEMORY:
            if self._built_in is None:
                self._built_in = BuiltInTransfer(self._policy, self._backend, self._rank)
            self._built_in.send(control)
            return control.failed
        weights = self._policy.weights()
        try:
            if self._rank == 0:
                if self._shared_memory is None:
                    self._shared_memory = SharedMemoryTransfer(self._policy.weight_buckets())
                self._shared_memory.send(weights, control, str(version))
        finally:
            for _ in weights:  # the other ranks gather to the end
                pass
        return control.failed

    def close(self) -> None:
        """Let go of memory and groups. Not a collective."""
        if self._shared_memory is not None:
            self._shared_memory.close()
        if self._built_in is not None:
            self._built_in.shutdown()


class BuiltInTransfer:
    """vLLM's own trainer engine for nccl or ipc, on every rank."""

    def __init__(self, policy: Policy, backend: str, rank: int) -> None:
        from mmr1_ds.rollout.servers.weights.actor_weights import ActorWeights

        self._source: ActorWeights = ActorWeights(policy)
        self._backend, self._rank = backend, rank
        self._client = SyncClient(is_one_group=backend == "nccl")
        self._engine: TrainerWeightTransferEngine[Any] | None = None
        self._members: list[tuple[int, int]] = []  # number and generation of the servers it was made for

    def send(self, control: ServerControl) -> None:
        """Send the weights to the servers of `control`, which notes those that fail. Collective.

        Raises: whatever ipc fails with on this rank. A failure of nccl on rank 0 is noted as one of all servers.
        """
        self._client.control, self._client.outside = control, frozenset()
        members = [(server.number, server.generation) for server in control.servers]
        try:
            if self._engine is None or members != self._members:
                self._connect(control)
                self._members = members
            assert self._engine is not None
            self._engine.send_weights()
        except Exception as error:
            if self._rank != 0 or self._backend != "nccl":
                raise
            logger.warning("the NCCL group of the weights failed", exc_info=error)
            control.fail_all(f"the NCCL group failed: {next(iter(control.failed.values()), repr(error))}")
            self.shutdown()
        finally:
            self._source.exhaust()  # the other ranks gather to the end

    def shutdown(self) -> None:
        """End the connection on this rank. Not a collective."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = self._client.engine = None

    def _connect(self, control: ServerControl) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.shutdown()
        if self._rank == 0:
            # Those that were in a group leave it. One that does not answer is out before the others wait for it.
            control.shutdown_weight_transfer_engine()
            if self._backend == "nccl" and not control.live:
                raise RuntimeError("no server answers")
            self._client.outside = frozenset(control.failed)
        info = self._init_info(control.live)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)
        self._client.engine = self._engine

    def _init_info(self, servers: Sequence[ServerAddress]) -> TrainerInitInfo:
        """What vLLM's engine is made of. The chunks that it packs are small beside the bucket that is gathered."""
        chunk_bytes = _CHUNK_BYTES
        if self._backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            # One buffer, which has to take the largest weight whole.
            largest = max(math.prod(meta.shape) * meta.dtype.itemsize for meta in self._source.metadata())
            return IPCTrainerInitInfo(rank=self._rank, packed=True, packed_buffer_size_bytes=max(chunk_bytes, largest))
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = address_for(servers)
        return NCCLTrainerInitInfo(
            rank=self._rank,
            master_address=address,
            master_port=free_port(address),
            world_size=1 + sum(server.num_workers for server in servers),
            packed=True,
            packed_buffer_size_bytes=chunk_bytes,
        )


class SyncClient:
    """What vLLM's trainer engines talk to (VLLMWeightSyncClient): the servers of one `send` after the other's.

    With ipc every server is on its own, and one that fails is left out. In one group the others would wait for it.
    """

    def __init__(self, is_one_group: bool) -> None:
        self.control = ServerControl([], "")
        self.engine: Any = None
        self.outside: frozenset[int] = frozenset()  # servers that failed before the group was made: it does without
        self._is_one_group = is_one_group

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See ServerControl. Raises: RuntimeError when a group is not complete, as the next three do."""
        self.control.init_weight_transfer_engine(init_info)
        self._check()

    def start_weight_update(self) -> None:
        """See ServerControl."""
        self.control.start_weight_update()
        self._check()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See ServerControl. The broadcast runs meanwhile: it is aborted when a server fails, or it would never end."""
        body = {"update_info": _as_json(update_info)}
        self.control.begin("update_weights", body, on_failure=self._abort if self._is_one_group else None)()
        self._check()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See ServerControl. All is sent: one that fails here does not matter to the others."""
        self.control.finish_weight_update(weight_version)

    def _check(self) -> None:
        if not self._is_one_group:
            return
        for number, reason in self.control.failed.items():
            if number not in self.outside:
                raise RuntimeError(f"rollout server {number}: {reason}")

    def _abort(self) -> None:
        group = getattr(self.engine, "model_update_group", None)
        if group is not None:
            group.destroy()


def address_for(servers: Sequence[ServerAddress]) -> str:
    """This machine's address as the servers reach it."""
    hosts = [urlsplit(server.url).hostname or "" for server in servers]
    elsewhere = [host for host in hosts if host not in _LOOPBACK]
    if not elsewhere:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((elsewhere[0], 9))  # sends nothing: it only chooses the interface
        return str(probe.getsockname()[0])


def _as_json(update_info: dict[str, Any]) -> dict[str, Any]:
    """CUDA handles go as vLLM's ipc engine expects them over HTTP."""
    handles = update_info.get("ipc_handles")
    if handles is None:
        return update_info
    rest = {name: value for name, value in update_info.items() if name != "ipc_handles"}
    return {**rest, "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode()}
