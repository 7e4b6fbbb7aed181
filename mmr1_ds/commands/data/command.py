"""`mmr1-ds data`: what the trainer will see of a data set, what it will drop, and what would stop it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmr1_ds.commands.data.findings import SurveyedRows
from mmr1_ds.commands.data.rows import survey_rows
from mmr1_ds.commands.data.summary import TRAIN, VALIDATION, DataReport, count_shared, notes, summarise
from mmr1_ds.commands.data.text import in_words
from mmr1_ds.config import RunConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.config.ranges import check_ranges
from mmr1_ds.errors import UserError, require
from mmr1_ds.monitoring.logger import quiet_libraries
from mmr1_ds.monitoring.progress import progress
from mmr1_ds.preflight.data import check_data
from mmr1_ds.preflight.files import check_format_prompt

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

EXIT_STOPS = 1
DESCRIPTION = """Look at data.train_files and data.val_files as the trainer will see them: which rows it drops or
refuses, lengths against the limits, images, categories, answers, and some prompts as the model gets them. Needs no
GPU, and of the model its config.json, tokenizer and processor alone. Exits 1 when a row would stop a run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser."""
    parser.description = DESCRIPTION
    parser.add_argument("--file", choices=("train", "val"), help="only this one; default: both")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="prompts of each to show; default: 3")
    parser.add_argument(
        "--decode", action="store_true", help="read images and videos whole, not only headers: finds truncated ones"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def main(arguments: argparse.Namespace) -> int:
    """Print the report. Returns: the exit code; 1 when a row would stop a run. Raises: UserError."""
    quiet_libraries()
    if arguments.show < 0:
        raise UserError(f"--show must be 0 or more, got {arguments.show}")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: no such folder {str(arguments.json.parent)!r}")
    loaded = load_config(arguments.settings)
    for line in loaded.warnings:
        sys.stderr.write(f"mmr1-ds: {line}\n")
    found = look(loaded.config, _keys(arguments.file, loaded.config), arguments.show, arguments.decode)
    if arguments.json is not None:
        content = dataclasses.asdict(found) | {"stops_run": found.stops_run}
        try:
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: cannot write {str(arguments.json)!r}: {error}") from error
    sys.stdout.write(in_words(found))
    return EXIT_STOPS if found.stops_run else 0


def _keys(file: str | None, config: RunConfig) -> list[str]:
    if file is not None:
        return [{"train": TRAIN, "val": VALIDATION}[file]]
    return [TRAIN, VALIDATION] if config.data.val_files else [TRAIN]


def look(config: RunConfig, keys: Sequence[str], num_samples: int, decode_images: bool) -> DataReport:
    """Summarise the data sets `keys`, TRAIN, VALIDATION or both.

    Raises: UserError for what stops a run before it comes to the rows: settings, files, columns, the tokenizer.
    """
    require("models", "torch", "transformers", "datasets", purpose="mmr1-ds data")
    check_ranges(config)
    check_format_prompt(config.data)
    for key in keys:
        check_data(config.data, key.removeprefix("data."), config.worker.actor.model)
    from mmr1_ds.data.encoding import PromptEncoder

    encoder = PromptEncoder(config.worker.actor.model, config.data)
    surveyed = {key: _survey(key, config, encoder, decode_images) for key in keys}
    data_sets = [summarise(key, rows, config, encoder, num_samples) for key, rows in surveyed.items()]
    num_shared = None
    if len(surveyed) == 2 and config.data.id_key is None:  # ids of one's own may be alike by chance, as 0, 1, 2
        num_shared = count_shared(surveyed[TRAIN], surveyed[VALIDATION])
    return DataReport(
        model=str(config.worker.actor.model.model_path),
        takes_images=encoder.is_multimodal,
        data_sets=data_sets,
        num_shared=num_shared,
        notes=notes(data_sets, config, encoder),
    )


def _survey(key: str, config: RunConfig, encoder: PromptEncoder, decode_images: bool) -> SurveyedRows:
    from mmr1_ds.data.rows import open_readers
    from mmr1_ds.data.sources import open_sources

    files = config.data.train_files if key == TRAIN else config.data.val_files
    readers = open_readers(open_sources(files, key, config.data.answer_key), config.data, encoder.is_multimodal)
    with progress(sum(map(len, readers)), f"looking at {key}", with_lines=False) as advance:
        return SurveyedRows(survey_rows(readers, config.data, encoder, decode_images, advance), readers, config)
