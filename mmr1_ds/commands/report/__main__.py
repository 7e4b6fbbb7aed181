"""`python -m mmr1_ds.commands.report RUN [RUN ...]`: the command in a process of its own, which loads no engine."""

import sys

from mmr1_ds.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["report", *sys.argv[1:]]))
