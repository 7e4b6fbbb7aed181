"""The console command `mmr1-ds`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import NamedTuple, NoReturn

from mmr1_ds import train
from mmr1_ds.cluster.exits import EXIT_INTERRUPTED, leave, tell
from mmr1_ds.cluster.launch import put_own_programs_on_path
from mmr1_ds.commands import export, launch, serve
from mmr1_ds.commands.data import command as data
from mmr1_ds.commands.plan import command as plan
from mmr1_ds.commands.report import command as report
from mmr1_ds.commands.score import command as score
from mmr1_ds.config import ValidationSampling, reference
from mmr1_ds.config.loading import LOCAL_RANK, check_no_dashes
from mmr1_ds.errors import UserError

_SETTINGS = "config=FILE (a path, or the name of one of the project's configs) and key=value, 'list=[a,b]'"


class Command(NamedTuple):
    """One word after `mmr1-ds`."""

    main: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] | None
    takes_settings: bool
    help: str
    example: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: the exit code; 2 after a user's mistake, which it tells in one line on stderr."""
    given = sys.argv[1:] if argv is None else argv
    words = [word for word in given if not word.startswith(LOCAL_RANK)]
    put_own_programs_on_path()
    try:
        for word in words if words and words[0] in COMMANDS and COMMANDS[words[0]].takes_settings else ():
            check_no_dashes(word)
        arguments = parse(words)
        return COMMANDS[arguments.command].main(arguments)
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        sys.stderr.write("mmr1-ds: interrupted\n")
        return EXIT_INTERRUPTED


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command, its options and settings in any order. Exits, as argparse does, after --help or a mistake."""
    parser = argparse.ArgumentParser(
        prog="mmr1-ds",
        description="Variance-aware GRPO on DeepSpeed ZeRO-3 and vLLM. "
        "On several GPUs start it with launch/*.sh, or: deepspeed --module mmr1_ds.train config=FILE ...",
        epilog="example: mmr1-ds train config=demo",
    )
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        own = subparsers.add_parser(name, help=command.help, description=command.help, epilog="")
        own.set_defaults(command=name)
        if command.takes_settings:
            own.add_argument("settings", nargs="*", metavar="key=value", help=_SETTINGS)
        if command.add_arguments is not None:
            command.add_arguments(own)
        own.epilog = f"{own.epilog}\n\nexample: mmr1-ds {name} {command.example}".strip()
    if words and words[0] in COMMANDS:  # argparse itself does not intermix the arguments of a subparser
        return subparsers.choices[words[0]].parse_intermixed_args(words[1:])
    return parser.parse_args(words)


def console() -> NoReturn:
    """The installed command."""
    leave(main())


def _train(arguments: argparse.Namespace) -> int:
    return train.main(arguments.settings)


def _add_pass_rates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pass-rates", metavar="FILE", help="write each prompt's pass rate there, a JSON line each, and a histogram; "
        "started again it goes on",
    )  # fmt: skip
    parser.epilog = "n=16, temperature, top_p, top_k and max_tokens alone are those of the validation's sampling"


def _evaluate(arguments: argparse.Namespace) -> int:
    names = tuple(f"{field.name}=" for field in fields(ValidationSampling))
    prefix = "worker.rollout.val_override_config."
    settings = [prefix + word if word.startswith(names) else word for word in arguments.settings]
    if arguments.pass_rates is not None:
        settings.append(f"trainer.pass_rates={arguments.pass_rates}")
    return train.main([*settings, "trainer.val_only=true", "trainer.save_freq=-1"])


def _add_part(parser: argparse.ArgumentParser) -> None:
    words = "only keys whose names, or else meanings, contain it, as curriculum or 'pass rate'"
    parser.add_argument("part", nargs="?", default="", help=words)


def _print_keys(arguments: argparse.Namespace) -> int:
    found = reference.plain(arguments.part)
    if not found:
        raise UserError(f"no key has {arguments.part!r} in its name or meaning; `mmr1-ds keys` prints all")
    sys.stdout.write(found)
    return 0


COMMANDS = {
    "train": Command(
        _train, None, True, "train, from the newest checkpoint on; trainer.dry_run=true only prints the plan",
        "config=demo trainer.max_steps=4",
    ),
    "eval": Command(
        _evaluate, _add_pass_rates, True,
        "validate the model, or the newest checkpoint of the run, on data.val_files; needs no training data",
        "config=runs/my_run/config.yaml n=16 --pass-rates rates.jsonl",
    ),
    "serve": Command(
        serve.main, serve.add_arguments, True, "run a rollout server for a run that trains elsewhere",
        "config=my_run.yaml --port 8000 worker.rollout.server_host=10.0.0.7",
    ),
    "launch": Command(
        launch.main, launch.add_arguments, True, "print the sbatch command of a run, checked; with --submit call it",
        "config=my_run.yaml --time 24:00:00 --partition h100 trainer.nnodes=2",
    ),
    "export": Command(
        export.main, export.add_arguments, False, "write a checkpoint as Hugging Face safetensors",
        "runs/my_run/checkpoints/global_step_40 out/ --dtype bf16",
    ),
    "plan": Command(
        plan.main, plan.add_arguments, True, "estimate memory, seconds a step and the curriculum's cost",
        "config=mmr1_h100 --gpu h100 data.train_files=train.parquet",
    ),
    "data": Command(
        data.main, data.add_arguments, True,
        "show the data as the trainer will see it: dropped rows and why, lengths, images, answers, rendered prompts",
        "config=demo --file train --show 1",
    ),
    "report": Command(
        report.main, report.add_arguments, False,
        "write the report of a run, or of several side by side, as one HTML file and pictures", "runs/demo",
    ),
    "keys": Command(
        _print_keys, _add_part, False, "print every configuration key with its default, meaning and values",
        "curriculum",
    ),
    "score": Command(
        score.main, score.add_arguments, False, "score given responses, without a model or training",
        "responses.jsonl --tokenizer sacrebleu:13a",
    ),
}  # fmt: skip


if __name__ == "__main__":
    console()
