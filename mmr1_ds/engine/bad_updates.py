"""Optimiser steps whose loss or gradient is not finite: left out, counted, kept for inspection, and few in a row.

ZeRO-3's own step leaves everything as it is when the norm of the gradient, summed over all ranks, is not finite: the
weights, their fp32 copies, the moments and Adam's count of steps. A loss that is not finite need not have such a
gradient (a clamp has none), so `guard` gives it one; the sum then tells every rank what one of them saw.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.errors import UserError
from mmr1_ds.io import in_words, write_whole
from mmr1_ds.records import Trajectory

logger = logging.getLogger(__name__)

KEPT = 16  # batches of a rank; the oldest go
_COLUMNS = ("token_ids", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "returns")


class BadUpdates:
    """Guards, counts and keeps the bad updates of one engine.

    An update that is left out is no optimiser step: the learning rate and the policy version stay as they were, too.
    """

    def __init__(self, name: str, max_in_a_row: int, ranks: Ranks, folder: Path | None) -> None:
        """Args: name: actor | critic; max_in_a_row: trainer.max_bad_updates; folder: of batches, None = keep none."""
        self._name, self._max_in_a_row, self._ranks, self._folder = name, max_in_a_row, ranks, folder
        self._losses: list[Tensor] = []  # of this optimiser step's micro-batches on this rank, () each
        self.num_bad = 0  # of the whole run
        self._num_in_a_row = 0

    def guard(self, loss: Tensor, outputs_T: Tensor) -> Tensor:
        """The loss to go backward from: as it is, or NaN with a gradient of NaN where it is not finite.

        Decided on the device, so that the host does not wait for it in each micro-batch.
        Args: loss: of a micro-batch, (); outputs_T: what it was computed from, (T,).
        """
        self._losses.append(loss.detach())
        is_good = self._losses[-1].isfinite()
        return torch.where(is_good, loss, outputs_T.sum()) * torch.where(is_good, 1.0, math.nan)

    def was_good(self) -> None:
        """Note that the optimiser step was taken."""
        self._losses.clear()
        self._num_in_a_row = 0

    def was_bad(self, trajectories: Sequence[Trajectory], micro_batches: Sequence[Sequence[int]]) -> None:
        """Count an optimiser step that was left out, keep its batch, and report it. Collective.

        Args: micro_batches: positions of the trajectories that were computed together.
        Raises: UserError, on every rank, after too many in a row.
        """
        self.num_bad += 1
        self._num_in_a_row += 1
        own, self._losses = [float(loss) for loss in self._losses], []
        losses = self._ranks.all_gather_objects(sum(own), f"losses of the {self._name}'s bad update")
        reason = _reason(losses)
        where = "were not kept"
        if self._folder is not None:
            where = f"are in {self._folder}"
            facts: dict[str, str | int] = {"step": self._ranks.step, "engine": self._name, "reason": reason}
            try:
                self._keep(self._folder, facts, trajectories, micro_batches, own)
            except OSError as error:  # a full disk: the run continues without
                where = f"could not be kept ({error.strerror})"
                logger.warning("a bad batch could not be kept in %s: %s", self._folder, in_words(error))
        told = f"step {self._ranks.step}: the {self._name}'s update was left out, {reason}"
        if self._num_in_a_row < self._max_in_a_row:
            if self._ranks.rank == 0:
                counts = f"{self._num_in_a_row} in a row, {self.num_bad} in all"
                logger.warning("%s: %s; its batches %s", told, counts, where)
            return
        raise UserError(
            f"{told}: {self._num_in_a_row} in a row (trainer.max_bad_updates); their batches {where}; resume from "
            f"the last checkpoint with a lower worker.{self._name}.optim.lr, or inspect the batches"
        )

    def state_dict(self) -> dict[str, int]:
        """The counts that a resumed run starts from."""
        return {"num_bad": self.num_bad, "num_in_a_row": self._num_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned; checkpoints of earlier versions have no counts."""
        self.num_bad, self._num_in_a_row = state.get("num_bad", 0), state.get("num_in_a_row", 0)

    def _keep(
        self,
        folder: Path,
        facts: Mapping[str, str | int],
        trajectories: Sequence[Trajectory],
        micro_batches: Sequence[Sequence[int]],
        losses: Sequence[float],
    ) -> None:
        """Write this rank's share: arrays end to end as safetensors, then, as a sign that they are whole, the JSON."""
        from safetensors.numpy import save

        arrays = {
            "lengths": np.array([len(item.token_ids) for item in trajectories], dtype=np.int64),
            "rewards": np.array([item.reward for item in trajectories], dtype=np.float32),
            "losses": np.array(losses, dtype=np.float64),  # of the micro-batches
        }
        for name in _COLUMNS:
            parts = [getattr(item, name) for item in trajectories]
            if parts[0] is not None:
                arrays[name] = np.concatenate(parts)
        prompts = [{"index": item.prompt.index, "prompt_id": item.prompt.prompt_id} for item in trajectories]
        described = {**facts, "rank": self._ranks.rank, "micro_batches": list(micro_batches), "prompts": prompts}
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self._name}_{self.num_bad}_step_{self._ranks.step}_rank_{self._ranks.rank}"
        for name, content in (
            (f"{stem}.safetensors", save(arrays)),
            (f"{stem}.json", json.dumps(described, indent=1).encode()),
        ):
            write_whole(folder / name, content)
        own = f"{self._name}_*_rank_{self._ranks.rank}.json"
        for path in sorted(folder.glob(own), key=lambda path: int(path.name.split("_")[1]))[:-KEPT]:
            path.unlink()
            path.with_suffix(".safetensors").unlink(missing_ok=True)


def _reason(losses: Sequence[float]) -> str:
    """What is wrong, given each rank's loss."""
    spoilt = [f"{loss} on rank {rank}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if not spoilt:
        return f"the loss is {sum(losses):g}, its gradient not finite"
    more = f" and on {len(spoilt) - 4} more" if len(spoilt) > 4 else ""
    return f"the loss is {', '.join(spoilt[:4])}{more}"
