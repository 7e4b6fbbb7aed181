"""`python -m mmr1_ds.commands.demo`: prepare the demo's data and warmed-up model, once."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

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
    start = time.perf_counter()
    try:
        require("gpu", "torch", "transformers", "sklearn", purpose="the demo")
        built = prepare_assets(arguments.folder, arguments.seed)
    except UserError as error:
        sys.stderr.write(f"mmr1-ds: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    if built:
        logger.info("demo assets: built in %s in %.0f s", arguments.folder, time.perf_counter() - start)
    else:
        logger.info("demo assets: found in %s", arguments.folder)
    return 0


def _exit(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that the half-built folder is removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
