"""`python -m mmr1_ds.commands.demo.summary RUN_DIR`: what a run achieved, and where its files lie."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mmr1_ds.cluster.exits import tell
from mmr1_ds.commands.report.files import LineReader, read_metrics
from mmr1_ds.errors import UserError

ACCURACY = "val/accuracy_reward"
PLACES = ("metrics.jsonl", "config.yaml", "generations.jsonl", "tensorboard", "logs", "checkpoints")
REPORT = "report.html"


def summarise(run_dir: Path) -> str:
    """Return the summary, several lines. Raises: UserError when the run has no metrics or was never validated."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: give the directory of a run")
    metrics = read_metrics(LineReader(path))
    accuracies = metrics.column(ACCURACY)
    if accuracies is None:
        raise UserError(f"{path} has no {ACCURACY}: set data.val_files and trainer.val_freq")
    first, last = np.flatnonzero(np.isfinite(accuracies))[[0, -1]]
    lines = [
        f"validation accuracy {accuracies[first]:.3f} before (step {metrics.steps[first]}), "
        f"{accuracies[last]:.3f} after (step {metrics.steps[last]})"
    ]
    effective = metrics.column("curriculum/effective_group_fraction")
    if effective is not None:
        lines.append(f"groups that taught something: {np.nanmean(effective):.0%}, mean over the steps")
    lines += [f"{part.partition('.')[0]}: {run_dir / part}" for part in PLACES if (run_dir / part).exists()]
    if (run_dir / REPORT).exists():
        lines += ["the report, for a browser:", str(run_dir / REPORT)]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mmr1_ds.commands.demo.summary RUN_DIR")
    try:
        sys.stdout.write(summarise(Path(sys.argv[1])) + "\n")
    except UserError as error:
        sys.exit(tell(error))
