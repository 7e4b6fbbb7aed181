"""The one exception that a user's mistake raises, and the check that optional packages are installed."""

from __future__ import annotations

import importlib.util


class UserError(ValueError):
    """A mistake in what the user gave: configuration, data, model or environment.

    The message is one line that names the thing, the value and the remedy. The command line prints it
    without a traceback and exits with 2; every other exception is a defect of ours and keeps its traceback.
    """


def require(extra: str, *packages: str, purpose: str) -> None:
    """Nothing is imported. Raises: UserError with the remedy unless all packages are installed.

    Args:
        extra: that brings them.
        packages: by the names under which they are imported.
        purpose: what needs them; the line begins with it.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}, not installed here: {remedy(extra)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none: for an error of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def remedy(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'mmr1_ds[{extra}]'"
