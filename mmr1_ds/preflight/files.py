"""Checks of single files and folders that a run names."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mmr1_ds.config import DataConfig
from mmr1_ds.data.chat import load_format_prompt
from mmr1_ds.errors import UserError, first_line


def json_object(path: Path, key: str) -> dict[str, Any]:
    """Raises: UserError naming the file when it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot read {str(path)!r} as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}: {str(path)!r} must hold a JSON object")
    return content


def check_format_prompt(data: DataConfig) -> None:
    """Check data.format_prompt. Raises: UserError for a missing file, or no template."""
    load_format_prompt(data.format_prompt)


def check_output_folder(path: Path, key: str) -> None:
    """Check that files can be written in the folder, made first where it is missing. Nothing of it stays.

    Raises: UserError naming what is in the way.
    """
    nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        raise UserError(f"{key}: {str(path)!r} cannot be made, {str(nearest)!r} is not a folder; name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {str(path)!r} cannot be written, {str(nearest)!r} is not writable; name another")
    try:
        # Permissions alone do not say it: of a read-only, a full or a kernel's file system, of a name too long.
        with tempfile.TemporaryDirectory(prefix=".mmr1_ds_", dir=nearest) as folder:
            inner = Path(folder, *path.absolute().parts[len(nearest.absolute().parts) :])
            inner.mkdir(parents=True, exist_ok=True)
            (inner / "probe").write_bytes(b"written")
    except (OSError, ValueError) as error:  # the second for characters that no path has
        words = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(f"{key}: {str(path)!r} cannot be written: {words}; name another") from None
