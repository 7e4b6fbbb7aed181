"""`python -m gpu.compared_statistics ...`: mmr1_ds.train, whose Triton statistics are computed by the C++ kernel too.

Appends the largest difference of each scored batch to the file that GPU_CHECK_STATISTICS names.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmr1_ds.cluster.exits import leave
from mmr1_ds.train import main

NAME = "curriculum/statistics_diff_max"


def largest_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Between the statistics of the same groups; infinite where one alone is not a number."""
    rows = [np.array([dataclasses.astuple(one) for one in side], dtype=np.float64) for side in (ours, theirs)]
    if np.not_equal(*map(np.isnan, rows)).any():
        return float("inf")
    return float(np.nanmax(np.abs(rows[0] - rows[1]), initial=0.0))


def compared(score: partial[list[Any]], file: Path) -> Callable[[Sequence[Any]], list[Any]]:
    """Return what scores as `score`, and notes how far the C++ kernel is from it. On the CPU it notes nothing."""

    def both(groups: Sequence[Any]) -> list[Any]:
        found = score(groups)
        if score.keywords["device"] is not None:
            with file.open("a") as out:
                out.write(json.dumps({NAME: largest_difference(found, score(groups, device=None))}) + "\n")
        return found

    return both


if __name__ == "__main__":
    from mmr1_ds.loop import composition

    plain = composition.make_scorer
    file = Path(os.environ["GPU_CHECK_STATISTICS"])
    composition.make_scorer = lambda *arguments: compared(plain(*arguments), file)
    leave(main(sys.argv[1:]))
