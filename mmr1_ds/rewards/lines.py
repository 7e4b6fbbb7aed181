"""The lines that go to a reward process: JSON, in which bytes keep their kind."""

from __future__ import annotations

import base64
import json
from typing import Any

_BYTES = "mmr1_ds bytes in base64"


def to_line(message: object) -> bytes:
    """Write one line; what JSON lacks, like a date, becomes its text."""
    return json.dumps(message, default=_portable).encode() + b"\n"


def from_line(line: str) -> Any:
    """Return what `to_line` was given."""
    return json.loads(line, object_hook=_restored)


def _portable(value: object) -> object:
    return {_BYTES: base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)


def _restored(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[_BYTES]) if value.keys() == {_BYTES} else value
