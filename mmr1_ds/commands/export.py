"""`mmr1-ds export`: write a checkpoint as a model folder that transformers and vLLM load."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import ModelConfig
from mmr1_ds.config.derived import checkpoint_directory
from mmr1_ds.config.loading import load_config
from mmr1_ds.errors import UserError, require
from mmr1_ds.loop.checkpoint import Checkpoints
from mmr1_ds.monitoring.logger import configure_logging, quiet_libraries

logger = logging.getLogger(__name__)

DESCRIPTION = """Write a checkpoint's policy as Hugging Face safetensors, with configuration, tokenizer, processor and
chat template, for transformers and vLLM. Name the run by its configuration (config=FILE key=value ...: its newest
checkpoint, with --best its best) or the checkpoint's folder (then its run's config.yaml must exist; or name it too).
Needs no GPU and no other rank. Memory: the whole model on the CPU, in the type that is written and in float32."""
_CONFIG = "config.yaml"
_SECONDS = 600.0  # there is one rank: nothing waits
_FOLDER = "CHECKPOINT_FOLDER"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser."""
    parser.description = DESCRIPTION
    parser.add_argument("source", nargs="+", metavar="SOURCE", help=f"config=FILE key=value ..., or {_FOLDER}, or both")
    parser.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights; default: as in the model's config.json"
    )
    parser.add_argument(
        "--merge-lora", action="store_true", help="add the adapters to the weights; else they are written alone"
    )
    parser.add_argument("--best", action="store_true", help="the checkpoint that was best by trainer.best_metric")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest size of a file; default: 5GB")


def main(arguments: argparse.Namespace) -> int:
    """Write the model folder. Returns: the exit code. Raises: UserError."""
    configure_logging(True)
    quiet_libraries()
    os.environ["DS_ACCELERATOR"] = "cpu"
    out = Path(arguments.out)
    if out.exists() or out.is_symlink():
        raise UserError(f"OUT={out} exists already; name another folder, or delete it")
    settings = [word for word in arguments.source if "=" in word]
    folders = [Path(word) for word in arguments.source if "=" not in word]
    if len(folders) > 1:
        raise UserError(f"name one {_FOLDER}, not {len(folders)}: {' '.join(map(str, folders))}")
    if folders and arguments.best:
        raise UserError(f"--best is the best checkpoint of a run, not of {_FOLDER}={folders[0]}; name its config=FILE")
    if folders and not any(word.startswith("config=") for word in settings):
        settings.insert(0, f"config={_config_of(folders[0])}")
    config = load_config(settings).config
    require("gpu", "torch", "deepspeed", "transformers", purpose="mmr1-ds export")
    ranks = Ranks(LaunchEnvironment(0, 1, 0, "none"), _SECONDS)
    try:
        folder = _checkpoint(Checkpoints(checkpoint_directory(config), -1, ranks), folders, arguments.best)
    finally:
        ranks.close()
    logger.info("%s is undamaged; writing %s", folder, out)
    try:
        _write(folder / "actor", config.worker.actor.model, out, arguments)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    size = sum(path.stat().st_size for path in out.rglob("*"))
    logger.info("wrote %s: %.3f GB", out, size / 1e9)
    return 0


def _checkpoint(checkpoints: Checkpoints, named: list[Path], best: bool) -> Path:
    """Return the checkpoint's folder. Raises: UserError when none exists, or the named one is damaged."""
    if named or best:
        folder = checkpoints.named_best() if best else named[0]
        checkpoints.require(folder, "--best" if best else _FOLDER)
        return folder
    found = checkpoints.newest()
    if found is None:
        raise UserError(f"no undamaged checkpoint exists in {checkpoints.root}; name a {_FOLDER}")
    return found[1]


def _config_of(folder: Path) -> Path:
    """Return the resolved configuration beside a checkpoint. Raises: UserError when it is missing."""
    if not folder.is_dir():
        raise UserError(f"{_FOLDER}={folder} does not exist; name a global_step_N folder of a run")
    places = (folder / _CONFIG, folder.resolve().parent.parent / _CONFIG)
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"{_FOLDER}={folder}: its run's {_CONFIG} is missing; name the configuration, config=FILE")
    return found


def _write(source: Path, model: ModelConfig, out: Path, arguments: argparse.Namespace) -> None:
    from mmr1_ds.engine.weights import export
    from mmr1_ds.engine.weights.adapter_checkpoint import FILE

    if arguments.merge_lora and not (source / FILE).is_file():
        raise UserError(f"--merge-lora: {source} has no adapters; leave it out")
    if (source / FILE).is_file() and not arguments.merge_lora:
        if arguments.dtype is not None:
            raise UserError(f"--dtype={arguments.dtype}: adapters alone are float32; add --merge-lora or leave it out")
        export.write_adapters(source, model, out)
    else:
        export.write_policy(source, model, out, arguments.dtype, arguments.max_shard_size)
