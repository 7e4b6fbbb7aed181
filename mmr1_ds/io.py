"""What leaves this process: files that are whole or not there at all, and one HTTP request."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

MOST_BYTES = 1 << 20  # of an answer


class FileEntry(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


class PendingFile(NamedTuple):
    """A file whose content is settled, but which may not be on the disk yet."""

    path: Path
    write: Callable[[], FileEntry]  # writes and syncs what is left; called once, in any thread; raises OSError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; what is written there takes its place, synced to disk, or is removed on an error.

    Raises: OSError; the old file, if there is one, is then as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        _set_mode(temporary, mode)  # a library may have put a file of its own there
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as `whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which takes that name once all is synced to disk, or is removed on an error.

    Raises: OSError, also when `path` exists and is not empty.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            if part.is_file() and not part.is_symlink():
                open_as_its_folder(part)
            sync(part)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_as_its_folder(path: Path) -> None:
    """Let those read and write a file who may in its folder; safetensors lets its owner alone. Raises: OSError."""
    _set_mode(path, path.parent.stat().st_mode & 0o666)


def _set_mode(path: Path, mode: int) -> None:
    """Set who may read and write, where the disk allows it: some mounts have one mode for all files."""
    if (path.stat().st_mode ^ mode) & 0o666:
        with suppress(OSError):
            path.chmod(mode & 0o777)


def sync(path: Path) -> None:
    """Have what is in a file, or the names in a folder, reach the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises: OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_words(error: OSError) -> str:
    """Say what the disk failed with: the system's own words, the path, and on a full disk the space left there."""
    if not isinstance(error.filename, str | Path):
        return str(error)
    words = f"{error.strerror}: {error.filename}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return words
    try:
        usage = shutil.disk_usage(next(place for place in Path(error.filename).absolute().parents if place.exists()))
    except (OSError, StopIteration):
        return words
    return f"{words} ({usage.free:,} of {usage.total:,} bytes are free there)"


@dataclass(frozen=True)
class Answer:
    """What a server answers."""

    status: int
    content: bytes
    headers: Mapping[str, str]  # names in any case


class _AsAnswered(urllib.request.HTTPErrorProcessor):
    """Takes an answer of any status as it is: a redirection that was followed would carry the key to another host."""

    def http_response(self, request: urllib.request.Request, response: HTTPResponse) -> HTTPResponse:
        return response

    https_response = http_response


def ask(
    method: str,
    url: str,
    key: str | None,
    body: Mapping[str, Any] | None = None,
    *,
    timeout_seconds: float,
    most_bytes: int = MOST_BYTES,
    through_proxies: bool = False,
) -> Answer:
    """Send one request and read its answer, whatever the status.

    Args: key: sent as a bearer token; body: sent as JSON; timeout_seconds: of a connection, and between two bytes;
        most_bytes: of the answer, the rest is not read; through_proxies: whether the environment's proxies are used.
    Raises: OSError, http.client.HTTPException or ValueError (for the address) without an answer.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(_AsAnswered, urllib.request.ProxyHandler(None if through_proxies else {}))
    try:
        with opener.open(request, timeout=timeout_seconds) as response:
            return Answer(response.status, response.read(most_bytes), response.headers)
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else error from None
