"""LoRA's adapters alone to the rollout servers: worker.rollout.lora_sync=adapters.

vLLM's servers load an adapter from a folder, by a name that requests then carry in place of the model's. Every version
has a name of its own: a name that is loaded again in place would be read from the disk in each of vLLM's steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mmr1_ds.rollout.adapters import write_adapter
from mmr1_ds.rollout.base import CountedWeights, Policy
from mmr1_ds.rollout.servers.address import ServerAddress
from mmr1_ds.rollout.servers.weights.control import ServerControl


class AdapterTransfer:
    """Rank 0 writes and has the servers load; every rank takes part in the gathering. One object a run."""

    def __init__(
        self,
        policy: Policy,
        *,
        rank: int,
        key: str,
        folder: Path,
        run: str,
        lora_rank: int,
        timeout_seconds: float = 300.0,
    ) -> None:
        """
        Args: folder: of the adapter's files, which the servers read by the same path; run: no other start of a run has
            it, as a server may outlive one; timeout_seconds: for a server's answer to one request.
        """
        self._policy, self._rank, self._key, self._run = policy, rank, key, run
        self._folder, self._lora_rank, self._timeout_seconds = folder.absolute(), lora_rank, timeout_seconds
        self._kept: Path | None = None  # the files of the newest version
        self.num_bytes = 0  # of the last version

    def name(self, version: int) -> str:
        """What requests for this version carry."""
        return f"policy-{self._run}-{version}"

    def send(self, servers: Sequence[ServerAddress], version: int) -> dict[int, str]:
        """See WeightTransfer. Raises: OSError, on rank 0, when the files cannot be written."""
        control = ServerControl(servers, self._key, self._timeout_seconds, str(version))
        given = CountedWeights(self._policy.adapter_weights())
        tensors = dict(given) if self._rank == 0 else {}
        for _ in given:  # the other ranks gather to the end
            pass
        self.num_bytes = given.num_bytes
        if self._rank != 0:
            return {}
        folder = self._folder / self.name(version)
        if self._kept not in (None, folder):
            self.close()
        self._kept = folder
        write_adapter(folder, tensors, self._lora_rank)
        control.load_adapter(self.name(version), str(folder))
        return control.failed

    def close(self) -> None:
        """Delete the files. Not a collective."""
        if self._kept is not None:
            shutil.rmtree(self._kept, ignore_errors=True)
