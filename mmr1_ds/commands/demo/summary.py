"""`python -m mmr1_ds.commands.demo.summary RUN_DIR`: what a run achieved, and where its files lie."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmr1_ds.errors import UserError

ACCURACY = "val/accuracy_reward"
EFFECTIVE = "curriculum/effective_group_fraction"
PLACES = (
    ("metrics", "metrics.jsonl"),
    ("config", "config.yaml"),
    ("generations", "generations.jsonl"),
    ("tensorboard", "tensorboard"),
    ("logs", "logs"),
    ("checkpoints", "checkpoints"),
)
REPORT = "report.html"


def summarise(run_dir: Path) -> str:
    """Return the summary, several lines.

    Raises: UserError when the run has no metrics or was never validated.
    """
    rows = read_metrics(run_dir / "metrics.jsonl")
    validations = [row for row in rows if isinstance(row.get(ACCURACY), float)]
    if not validations:
        raise UserError(f"{run_dir / 'metrics.jsonl'} has no {ACCURACY}: set data.val_files and trainer.val_freq")
    first, last = validations[0], validations[-1]
    lines = [
        f"validation accuracy {first[ACCURACY]:.3f} before (step {first['step']:.0f}), "
        f"{last[ACCURACY]:.3f} after (step {last['step']:.0f})"
    ]
    fractions = [row[EFFECTIVE] for row in rows if isinstance(row.get(EFFECTIVE), float)]
    if fractions:
        lines.append(f"groups that taught something: {sum(fractions) / len(fractions):.0%} over {len(fractions)} steps")
    lines += [f"{name}: {run_dir / part}" for name, part in PLACES if (run_dir / part).exists()]
    if (run_dir / REPORT).exists():
        lines += ["the report, for a browser:", str(run_dir / REPORT)]
    return "\n".join(lines)


def read_metrics(path: Path) -> Sequence[Mapping[str, float]]:
    """Read a metrics file: one flat object a line, as long as the run wrote whole lines.

    Raises: UserError when there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the directory of a run") from error
    whole = text[: text.rfind("\n") + 1]  # a killed run may leave half a line
    return [json.loads(line) for line in whole.splitlines()]


def main(argv: Sequence[str]) -> int:
    """Returns: the exit code, 2 for a user's mistake."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m mmr1_ds.commands.demo.summary RUN_DIR\n")
        return 2
    try:
        text = summarise(Path(argv[0]))
    except UserError as error:
        sys.stderr.write(f"mmr1-ds: error: {error}\n")
        return 2
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
