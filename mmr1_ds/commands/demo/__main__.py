"""`python -m mmr1_ds.commands.demo`: prepare the demo's data and warmed-up model, once."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from mmr1_ds.cluster.exits import EXIT_INTERRUPTED, tell
from mmr1_ds.cluster.launch import put_own_programs_on_path
from mmr1_ds.commands.demo.assets import prepare_assets
from mmr1_ds.errors import UserError, require

logger = logging.getLogger("mmr1_ds.commands.demo")


def main() -> int:
    """Returns: the exit code, 2 for a user's mistake."""
    put_own_programs_on_path()
    parser = argparse.ArgumentParser(prog="python -m mmr1_ds.commands.demo", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/demo_assets"), help="where the assets go (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the model (%(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("mmr1_ds").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _exit)
    try:
        require("gpu", "torch", "transformers", purpose="the demo")
        built = prepare_assets(arguments.folder, arguments.seed)
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    logger.info("demo assets: %s in %s", "built" if built else "found", arguments.folder)
    return 0


def _exit(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that the half-built folder is removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
