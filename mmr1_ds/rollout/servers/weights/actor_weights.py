"""The actor's weights as vLLM's trainer engines read them. Imports vLLM: only the nccl and ipc transfers need it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from mmr1_ds.rollout.base import Policy


class ActorWeights(WeightSource):
    """ZeRO-3 parameters, bucket by bucket. Iterating is a collective; `metadata` is not."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._pass: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[ParamMeta]:
        """See WeightSource."""
        return [ParamMeta(*info) for bucket in self._policy.weight_buckets() for info in bucket]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = self._synchronised()
        return self._pass

    def exhaust(self) -> None:
        """Go to the end of this pass, or through all of one when there was none: the other ranks do."""
        for _ in self._pass if self._pass is not None else self:
            pass
        self._pass = None

    def _synchronised(self) -> Iterator[tuple[str, Tensor]]:
        """vLLM packs chunks on several streams in turn, and a bucket may lie across two of them.

        So it is there for all streams before the first reads it, and stays until the last has.
        """
        weights = self._policy.weights()
        for bucket in self._policy.weight_buckets():
            for position in range(len(bucket)):
                if position == 0:
                    _synchronize()  # the next lets go of the bucket before
                found = next(weights)
                if position == 0:
                    _synchronize()
                yield found
        _synchronize()
        for name, _ in weights:
            raise AssertionError(f"{name} was not announced")


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
