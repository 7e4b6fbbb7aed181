"""What verl and TRL computed on inputs of our own (tests/golden), and the inputs as this project packs them."""

import json
from pathlib import Path

import numpy as np
import torch

from mmr1_ds.engine.segments import Segments

GOLDEN = Path(__file__).parent / "golden"
VERL = json.loads((GOLDEN / "verl_core_algos.json").read_text())["cases"]
TRL = json.loads((GOLDEN / "trl_grpo_loss.json").read_text())["cases"]
CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 0.2, 0.28, 3.0  # actor_config of verl's file; the first two are TRL's epsilons
CASES = ["base", "edge"]  # edge: a mask with a hole, an empty row, groups interleaved, a constant group


class OneRank:
    """The totals of a run on one rank."""

    def sum(self, values, stage):
        return dict(values)

    def max(self, values, stage):
        return dict(values)


def mask_of(case: dict) -> np.ndarray:
    """(rows, tokens) bool."""
    return np.array(case["inputs"]["response_mask"]) > 0


def segments_of(case: dict) -> Segments:
    """The rows' response tokens."""
    return Segments.of(mask_of(case).sum(axis=1).tolist())


def pack(case: dict, table) -> torch.Tensor:
    """A (rows, tokens) table's response tokens, end to end, float64."""
    return torch.tensor(np.array(table, dtype=np.float64)[mask_of(case)])


def packed(case: dict, name: str) -> torch.Tensor:
    """A (rows, tokens) field of the inputs."""
    return pack(case, case["inputs"][name])


def unpack(case: dict, values_T: torch.Tensor) -> np.ndarray:
    """The (rows, tokens) table, 0 outside the responses."""
    table = np.zeros(mask_of(case).shape)
    table[mask_of(case)] = values_T.detach().numpy()
    return table


def in_groups(case: dict, rows) -> np.ndarray:
    """A value a row as (groups, responses)."""
    return np.array(rows)[np.argsort(case["inputs"]["index"], kind="stable")].reshape(2, 4)


def in_rows(case: dict, values_GN: np.ndarray) -> np.ndarray:
    """The inverse of `in_groups`."""
    rows = np.zeros(8)
    rows[np.argsort(case["inputs"]["index"], kind="stable")] = values_GN.reshape(-1)
    return rows
