"""What the base installation leaves out: packages that an extra of pyproject.toml brings."""

from __future__ import annotations

import importlib.util

from mmr1_ds.errors import UserError


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


def remedy(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'mmr1_ds[{extra}]'"
