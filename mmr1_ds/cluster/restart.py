"""`python -m mmr1_ds.cluster.restart config=FILE key=value ...`: whether a run that crashed is started again.

The launch scripts ask it. Exits with 0 for yes, and has then counted the restart in the run directory; a run that got
further since the last restart has all of `trainer.max_restarts` again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mmr1_ds.cluster.exits import tell
from mmr1_ds.config.derived import checkpoint_directory, run_directory
from mmr1_ds.config.loading import load_config
from mmr1_ds.errors import UserError
from mmr1_ds.io import write_whole

COUNT = "restarts.json"


def main(argv: Sequence[str]) -> int:
    """Decide, say so in one line, and count. Returns: the exit code."""
    try:
        config = load_config(argv).config
    except UserError as error:
        return tell(error)
    trainer, folder = config.trainer, run_directory(config)
    if not trainer.resume or trainer.val_only:
        return _end("trainer.resume=false" if not trainer.resume else "it only validates")
    if not folder.is_dir():
        return _end(f"it had not begun: there is no {folder}")
    step = _saved_step(checkpoint_directory(config))
    before, at = _read(folder / COUNT)
    num_restarts = before if at == step else 0
    if num_restarts >= trainer.max_restarts:
        return _end(f"{num_restarts} restarts from step {step}, trainer.max_restarts={trainer.max_restarts}")
    try:
        write_whole(folder / COUNT, json.dumps({"restarts": num_restarts + 1, "step": step}).encode())
    except OSError as error:  # what is not counted might never end
        return _end(f"the restart cannot be counted: {error}")
    sys.stderr.write(
        f"mmr1-ds: the run crashed; restart {num_restarts + 1} of {trainer.max_restarts} from step {step}\n"
    )
    return 0


def _end(reason: str) -> int:
    sys.stderr.write(f"mmr1-ds: the run crashed and is not started again: {reason}\n")
    return 1


def _saved_step(checkpoints: Path) -> int:
    """Return the step of the newest checkpoint; 0 without one."""
    try:
        found = re.fullmatch(r"global_step_(\d+)\n?", (checkpoints / "latest").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return int(found[1]) if found else 0


def _read(path: Path) -> tuple[int, int]:
    """Return the restarts so far, and the step of the last; zeros where nothing readable says so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return int(content["restarts"]), int(content["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0, 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
