"""A few groups of every step as text and small images, so that people see what is asked, answered and learned."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.io import in_words, write_whole
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.monitoring.writers import json_number
from mmr1_ds.records import Prompt, ScoredGroup

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_MAX_CHARACTERS = 4000  # of a prompt or response
_MAX_PIXELS = 256  # of a thumbnail's longer side


class TrainingSamples:
    """Keeps `samples.jsonl`, and thumbnails in `samples/`.

    Of a step's groups it takes prompts that it has taken before, those first whose pass rate has changed most since;
    then new ones, by p(1-p), as those will change. So a prompt that moves is seen both early and late.
    """

    def __init__(
        self,
        run_dir: Path,
        num_groups: int,
        decode: Callable[[Sequence[int]], str],
        metrics_logger: MetricsLogger,
        ranks: Ranks,
    ) -> None:
        """
        Args:
            run_dir: its samples.jsonl is continued; it ends at the step that the run resumes from.
            num_groups: to keep a step; 0 = none.
            decode: token ids to text.
        """
        self._folder, self._num_groups, self._decode = run_dir / "samples", num_groups, decode
        self._metrics_logger, self._ranks = metrics_logger, ranks
        self._first_pass_rates = _first_pass_rates(run_dir / "samples.jsonl") if ranks.rank == 0 else {}

    def keep(
        self, step: int, groups: Sequence[ScoredGroup], trained: np.ndarray, observed: Mapping[str, Any] | None
    ) -> None:
        """Keep some of this step's groups. Collective.

        Args:
            groups: this rank's part of what the step trains on; trained: the prompts of all parts.
            observed: the step's record of observations, on rank 0.
        """
        if self._num_groups == 0:
            return
        own = {group.group.prompt.index: group for group in groups}
        chosen = self._choose(np.unique(trained), observed) if observed is not None else None
        chosen = self._ranks.broadcast_array(chosen, "choose prompts to show").tolist()
        rows = {index: self._row(own[index]) for index in chosen if index in own}
        found: dict[int, tuple[dict[str, Any], list[bytes]]] = {}
        for part in self._ranks.all_gather_objects(rows, "gather samples"):
            found |= part
        if self._ranks.rank == 0:
            assert observed is not None
            self._write(step, [found[index] for index in chosen], observed)

    def _choose(self, trained: np.ndarray, observed: Mapping[str, Any]) -> np.ndarray:
        """Choose prompts among `trained`, (K,) int64, K <= num_groups."""
        ranked = []
        for index, rate in _known_rates(observed).items():
            if index not in trained:
                continue
            first = self._first_pass_rates.get(index)
            is_new = first is None
            change = rate * (1.0 - rate) if first is None else abs(rate - first)
            ranked.append((is_new or change == 0.0, -change, index))
        ranked.sort()
        return np.array([index for *_, index in ranked[: self._num_groups]], dtype=np.int64)

    def _row(self, scored: ScoredGroup) -> tuple[dict[str, Any], list[bytes]]:
        group, rewards = scored.group, scored.rewards
        order = np.argsort(rewards.overall, kind="stable")
        shown = [int(order[-1])] if len(order) == 1 else [int(order[-1]), int(order[0])]
        row = {
            "index": group.prompt.index,
            "prompt_id": group.prompt.prompt_id,
            "prompt": self._decode(group.prompt.token_ids)[:_MAX_CHARACTERS],
            "ground_truth": group.prompt.ground_truth,
            "num_responses": len(group.responses),
            "responses": [
                {
                    "text": self._decode(group.responses[k].token_ids.tolist())[:_MAX_CHARACTERS],
                    "reward": float(rewards.overall[k]),
                    "accuracy": json_number(rewards.accuracy[k]),
                }
                for k in shown
            ],
        }
        return row, [_thumbnail(image) for image in _seen(group.prompt)]

    def _write(
        self, step: int, rows: Sequence[tuple[dict[str, Any], list[bytes]]], observed: Mapping[str, Any]
    ) -> None:
        predicted = dict(zip(observed["prompts"], observed["predicted"], strict=True))
        rates = _known_rates(observed)
        for row, images in rows:
            index = row["index"]
            names = [f"samples/{index}_{k}.webp" for k in range(len(images))]
            for name, data in zip(names, images, strict=True):
                self._write_image(self._folder.parent / name, data)
            figures = {"predicted": predicted[index], "pass_rate": rates[index], "images": names}
            self._metrics_logger.record("samples", step, row | figures)
            self._first_pass_rates.setdefault(index, rates[index])

    def _write_image(self, path: Path, data: bytes) -> None:
        """Write a picture; a disk that fails costs the picture and not the run."""
        if path.exists():
            return
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, data)
        except OSError as error:
            logger.warning("%s is not written (%s)", path, in_words(error))


def _known_rates(observed: Mapping[str, Any]) -> dict[int, float]:
    """Pass rates of the training groups; of a prompt that was drawn twice, the first."""
    count = len(observed["prompts"]) - observed["num_probes"]
    pairs = list(zip(observed["prompts"][:count], observed["pass_rates"][:count], strict=True))
    return {index: rate for index, rate in reversed(pairs) if rate is not None}


def _first_pass_rates(path: Path) -> dict[int, float]:
    if not path.exists():
        return {}
    rates: dict[int, float] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:  # texts of days: not all at once
            row = json.loads(line)
            rates.setdefault(row["index"], row["pass_rate"])
    return rates


def _seen(prompt: Prompt) -> list[Image]:
    """Return the images of a prompt and the first frame of each of its videos."""
    from PIL.Image import fromarray

    return [*prompt.images, *(fromarray(video.frames[0]) for video in prompt.videos)]


def _thumbnail(image: Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=80)
    return data.getvalue()
