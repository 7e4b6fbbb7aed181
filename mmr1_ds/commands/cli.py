"""The console command `mmr1-ds`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from mmr1_ds import train
from mmr1_ds.cluster.launch import put_own_programs_on_path
from mmr1_ds.commands import export, serve
from mmr1_ds.commands import launch as submit
from mmr1_ds.commands.data import command as survey
from mmr1_ds.commands.plan import command as planning
from mmr1_ds.commands.report import command as report
from mmr1_ds.commands.score import command as score
from mmr1_ds.config import reference as config_reference
from mmr1_ds.config.loading import LOCAL_RANK
from mmr1_ds.exits import leave

_ARGUMENTS = "config=FILE (a path, or the name of one of the project's configs) and key=value, 'list=[a,b]'"
_EVAL = ("trainer.val_only=true", "trainer.save_freq=-1")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: the exit code; 2 after a user's mistake."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args([word for word in given if not word.startswith(LOCAL_RANK)])
    put_own_programs_on_path()
    if arguments.command == "score":
        return score.main(arguments)
    if arguments.command == "serve":
        return serve.main(arguments)
    if arguments.command == "launch":
        return submit.main(arguments)
    if arguments.command == "plan":
        return planning.main(arguments)
    if arguments.command == "export":
        return export.main(arguments)
    if arguments.command == "data":
        return survey.main(arguments)
    if arguments.command == "report":
        return report.main(arguments)
    if arguments.command == "keys":
        return _print_keys(arguments.part)
    settings = [*arguments.settings, *_EVAL] if arguments.command == "eval" else arguments.settings
    return train.main(settings)


def _print_keys(part: str) -> int:
    found = config_reference.plain(part)
    if not found:
        sys.stderr.write(f"mmr1-ds: error: no key has {part!r} in its name; `mmr1-ds keys` prints all\n")
        return 2
    sys.stdout.write(found)
    return 0


def console() -> NoReturn:
    """The installed command."""
    leave(main())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmr1-ds",
        description="Variance-aware GRPO on DeepSpeed ZeRO-3 and vLLM. "
        "On several GPUs start it with launch/*.sh, or: deepspeed --module mmr1_ds.train config=FILE ...",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, words in (
        ("train", "train, going on from the newest checkpoint; trainer.dry_run=true only prints the plan"),
        ("eval", "validate the model, or the newest checkpoint of the run, on data.val_files"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("settings", nargs="*", metavar="key=value", help=_ARGUMENTS)
    serve.add_arguments(
        commands.add_parser("serve", help="run a rollout server for a run that trains elsewhere"), _ARGUMENTS
    )
    words = "print the sbatch command of a run, checked; with --submit call it"
    submit.add_arguments(commands.add_parser("launch", help=words), _ARGUMENTS)
    export.add_arguments(commands.add_parser("export", help="write a checkpoint as Hugging Face safetensors"))
    planning.add_arguments(
        commands.add_parser("plan", help="reckon memory, time a step and the curriculum's cost, before queueing"),
        _ARGUMENTS,
    )
    words = "look at the data as the trainer will: what it drops and why, lengths, images, answers, prompts rendered"
    survey.add_arguments(commands.add_parser("data", help=words), _ARGUMENTS)
    words = "write the report of a run, or of several side by side, as one HTML file and pictures"
    report.add_arguments(commands.add_parser("report", help=words, description=words))
    words = "every configuration key with its default and meaning"
    keys = commands.add_parser("keys", help=words, description=words)
    keys.add_argument("part", nargs="?", default="", help="only names that contain it, as curriculum or trainer.save")
    score.add_arguments(commands.add_parser("score", help="score given responses, without a model or training"))
    return parser


if __name__ == "__main__":
    console()
