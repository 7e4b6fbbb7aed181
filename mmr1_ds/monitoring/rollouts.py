"""All responses that training learns from, as parquet: a part a step, of which the newest are kept."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.io import in_words, write_whole
from mmr1_ds.monitoring.writers import json_number
from mmr1_ds.records import ScoredGroup

logger = logging.getLogger(__name__)

_PART = re.compile(r"step_(\d+)\.parquet")
_COLUMNS = {  # a part's schema, whatever the reward returns, so that all parts are one table
    "step": "int64",
    "index": "int64",  # of the prompt in the data set
    "prompt_id": "string",
    "policy_version": "int64",  # optimiser steps that the policy had seen when it sampled
    "prompt": "string",
    "ground_truth": "string",
    "num_images": "int64",
    "response": "string",
    "num_tokens": "int64",  # of the response
    "finished": "bool",  # not cut at the length limit
    "reward": "float32",
    "accuracy": "float32",
    "failed": "bool",
    "parts": "string",  # JSON: what else the reward returned
}


class RolloutLog:
    """Keeps `rollouts/step_N.parquet`. A disk that fails costs parts and not the run."""

    def __init__(
        self, run_dir: Path, most_bytes: float, decode: Callable[[Sequence[int]], str], resumed_step: int, ranks: Ranks
    ) -> None:
        """
        Args:
            run_dir: its parts after `resumed_step` are dropped; at 0, what an earlier run left is set aside.
            most_bytes: of all parts, above which the oldest are deleted.
            decode: token ids to text.
        """
        self._folder, self._most_bytes, self._decode, self._ranks = run_dir / "rollouts", most_bytes, decode, ranks
        if ranks.rank == 0:
            for step, path in self._parts() if resumed_step else ():
                if step > resumed_step:
                    path.unlink()
            if resumed_step == 0 and self._folder.is_dir():  # as metrics.1.jsonl
                names = (run_dir / f"rollouts.{number}" for number in itertools.count(1))
                self._folder.rename(next(name for name in names if not name.exists()))

    def keep(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write a step's part. Collective. groups: this rank's share of what the step trains on."""
        rows = [row for item in groups for row in self._rows(step, item)]
        everyone = self._ranks.all_gather_objects(rows, "gather rollouts")
        if self._ranks.rank > 0:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / f"step_{step:06d}.parquet", _parquet([row for part in everyone for row in part]))
            self._prune()
        except OSError as error:
            logger.warning("the rollouts of step %d are not written (%s)", step, in_words(error))

    def _rows(self, step: int, scored: ScoredGroup) -> list[dict[str, Any]]:
        group, rewards, prompt = scored.group, scored.rewards, scored.group.prompt
        of_prompt = {
            "step": step,
            "index": prompt.index,
            "prompt_id": prompt.prompt_id,
            "policy_version": group.policy_version,
            "prompt": self._decode(prompt.token_ids),
            "ground_truth": prompt.ground_truth,
            "num_images": len(prompt.images),
        }
        return [
            {
                **of_prompt,
                "response": self._decode(response.token_ids.tolist()),
                "num_tokens": len(response.token_ids),
                "finished": response.finished,
                "reward": float(rewards.overall[k]),
                "accuracy": float(rewards.accuracy[k]),
                "failed": bool(rewards.failed[k]),
                "parts": json.dumps({name: json_number(values[k]) for name, values in rewards.parts.items()}),
            }
            for k, response in enumerate(group.responses)
        ]

    def _parts(self) -> list[tuple[int, Path]]:
        """Steps and files, the oldest first."""
        return sorted((int(match[1]), path) for path in self._folder.glob("*") if (match := _PART.fullmatch(path.name)))

    def _prune(self) -> None:
        parts = self._parts()
        total = sum(path.stat().st_size for _, path in parts)
        for _, path in parts[:-1]:  # never the one just written
            if total <= self._most_bytes:
                return
            total -= path.stat().st_size
            path.unlink()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in _COLUMNS.items()])
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), data, compression="zstd")
    return data.getvalue()
