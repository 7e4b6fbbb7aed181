"""Pass rates that were measured before the run: what the beliefs of the online refresh begin from."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmr1_ds.errors import UserError
from mmr1_ds.io import in_words

KEY = "data.curriculum_prior"
logger = logging.getLogger(__name__)


def read_known_rates(path: Path) -> dict[str, tuple[float, int]]:
    """Read a table by `mmr1-ds eval --pass-rates`: of each prompt's id its pass rate and the answers behind it.

    Prompts of which no answer could be judged are left out. Raises: UserError for a file that is no such table.
    """
    try:
        text = path.read_bytes()
        rows = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        with contextlib.suppress(ValueError):  # a kill may have torn the last
            rows += [json.loads(line) for line in text[text.rfind(b"\n") + 1 :].splitlines()]
        found = {str(row["prompt_id"]): (row["pass_rate"], int(row["num_answers"])) for row in rows}
        rates = {name: (float(rate), count) for name, (rate, count) in found.items() if rate is not None and count > 0}
    except OSError as error:
        raise UserError(f"{KEY}={path}: {in_words(error)}; give the file of mmr1-ds eval --pass-rates") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{KEY}={path} holds no pass rates; give the file of mmr1-ds eval --pass-rates") from error
    if not all(0.0 <= rate <= 1.0 for rate, _ in rates.values()):
        raise UserError(f"{KEY}={path} has pass rates outside [0, 1]; give the file of mmr1-ds eval --pass-rates")
    return rates


def known_rates(path: Path, prompt_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the prompts of the data set in the table.

    Args: prompt_ids: (P,). Returns: of K prompts the places in the data set, the right answers (fractions where a
    reward gives them), the answers; (K,) each. Raises: as `read_known_rates`, and UserError where no prompt is found.
    """
    rates = read_known_rates(path)
    found = [(index, *rates[name]) for index, name in enumerate(prompt_ids) if name in rates]
    if not found:
        raise UserError(
            f"{KEY}={path} has none of the {len(prompt_ids):,} prompts of data.train_files; measure these, with the "
            "same data.id_key, prompt and image columns"
        )
    logger.info("%s knows the pass rates of %d of %d prompts", path, len(found), len(prompt_ids))
    indices, rate, count = (np.array(column) for column in zip(*found, strict=True))
    return indices, np.round(rate * count, 6), count
