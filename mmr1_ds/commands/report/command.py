"""`mmr1-ds report`: what runs did, as one HTML file and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmr1_ds.commands.report.page import write_report
from mmr1_ds.errors import UserError

DESCRIPTION = """Write one HTML file that opens offline in any browser, and PNGs of its figures: curves, the curriculum,
time and memory by stage, samples. Reads the runs' directories alone, also of a run that is still going. Runs that
differ in nothing but seeds and names become one curve with a band. Prints the path of the report."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser."""
    parser.description = DESCRIPTION
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, as runs/demo")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="default: report.html in the run's directory, of several runs in the current one; PNGs in report/ beside",
    )
    parser.add_argument("--no-png", action="store_true", help="write no PNGs")


def main(arguments: argparse.Namespace) -> int:
    """Write the report and print its path. Raises: UserError."""
    output = arguments.output
    if output is None:
        folder = arguments.runs[0] if len(arguments.runs) == 1 else Path()
        output = folder / "report.html"
    elif output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: expected the name of an HTML file, as report.html")
    elif output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it, as {output / 'report.html'}")
    sys.stdout.write(f"{write_report(arguments.runs, output, pngs=not arguments.no_png)}\n")
    return 0
