"""Credentials: where they may be, and how texts are written without them.

They belong into environment variables, whose names the configuration holds. One that lands elsewhere, in a value of
the configuration or quoted in an error, must not appear in a log or a file of the run.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from mmr1_ds.errors import UserError

HIDDEN = "***"
# A key of the configuration. data.prompt_key and its like name columns, max_tokens counts.
_SECRET = re.compile(
    r"(api|access|private|secret|openai)_?keys?|secret|passw|credential|(^|_)(token|authorization)$|^(key|auth|tokens)$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_remembered: set[str] = set()
_SHORTEST = 8  # a shorter value is a setting, like TOKENIZERS_PARALLELISM's
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"]+@")


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which values under names that mean a secret (api_key, password, *_token ...) read `***`.

    So do user and password inside an address, wherever it stands.
    """
    return {name: HIDDEN if _SECRET.search(str(name)) else _cleaned(value) for name, value in config.items()}


def remember(config: Mapping[str, Any]) -> None:
    """Let `redacted` know what a configuration holds under names that mean a secret, in lists too."""
    for name, value in config.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Mapping):
                remember(item)
            elif _SECRET.search(str(name)) and isinstance(item, str):
                _remembered.add(item)


def redacted(text: str) -> str:
    """Return the text with `***` for every credential of this process's environment, remembered, or inside an address.

    Cut a text after this, not before: a part of a credential is not known as one.
    """
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    for value in _credentials():
        text = text.replace(value, HIDDEN)
    return text


def shown(key: str, text: str) -> str:
    """Return the text that the user gave for a key of the configuration, as a message may show it."""
    return HIDDEN if _SECRET.search(key) or _SECRET_VARIABLE.search(text) else redacted(text)


def hide_in_tracebacks() -> None:
    """Have Python print the traceback of an error that ends this process, or a thread, without credentials."""
    sys.excepthook = _print_redacted
    threading.excepthook = _print_redacted_of_thread


def check_variable(key: str, name: str | None) -> None:
    """Raises: UserError where the configuration's `key` holds no variable's name: it may hold the secret."""
    if name and not _VARIABLE.fullmatch(name):
        raise UserError(
            f"{key} must be the name of an environment variable, in capitals, like JUDGE_KEY; the value given is not "
            "shown, it may be the key itself, which must not be in a configuration"
        )


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return type(value)(_cleaned(item) for item in value)
    return _USER_INFO.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def _credentials() -> list[str]:
    """Return the credentials, longest first: one may be a part of another. A path, as to a key's file, is left out."""
    found = _remembered | {value.strip() for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    return sorted((v for v in found if len(v) >= _SHORTEST and not os.path.exists(v)), key=len, reverse=True)


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


def _print_redacted_of_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is not None and not issubclass(found.exc_type, SystemExit):
        _print_redacted(found.exc_type, found.exc_value, found.exc_traceback)
