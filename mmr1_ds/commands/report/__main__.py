"""`python -m mmr1_ds.commands.report RUN [RUN ...]`: the command in a process of its own, which loads no engine."""

from __future__ import annotations

import argparse
import sys

from mmr1_ds.commands.report import command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m mmr1_ds.commands.report")
    command.add_arguments(parser)
    sys.exit(command.main(parser.parse_args()))
