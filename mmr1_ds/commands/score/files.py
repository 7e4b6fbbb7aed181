"""Files of groups of responses, one JSON object a line, read one line at a time: a file may be larger than memory.

And where the scores of them go: a file that appears whole, or the standard output.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from mmr1_ds.errors import UserError

LARGEST_TOKEN_ID = 2**31 - 1
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class ResponseGroup:
    """The responses to one prompt (N of them), as one line gave them."""

    prompt_id: str | int
    where: str  # names the line in errors
    texts: list[str] | None  # N, or None for responses of token ids
    token_ids: list[np.ndarray] | None  # N arrays (T,) int32, not negative; None for responses of text
    accuracies: np.ndarray  # (N,) float32 in [0, 1], NaN = unknown
    rewards: np.ndarray  # (N,) float32, NaN = unknown

    @property
    def num_responses(self) -> int:
        return len(self.accuracies)

    @property
    def size(self) -> int:
        """Tokens, or characters of text: a bound of its tokens, with few exceptions. Responses count, as they cost."""
        responses: Sequence[Any] = self.texts or self.token_ids or ()
        return sum(map(len, responses)) + len(responses)


@contextmanager
def open_responses(path: str) -> Iterator[BinaryIO]:
    """Open a file, plain or compressed with gzip; `-` is the standard input. Raises: UserError when it cannot."""
    with ExitStack() as stack:
        try:
            raw: Any = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
            is_gzip = raw.peek(2)[:2] == _GZIP_MAGIC
        except OSError as error:
            raise UserError(f"{shown_name(path)}: cannot be read: {error.strerror or error}") from error
        yield stack.enter_context(gzip.GzipFile(fileobj=raw, mode="rb")) if is_gzip else raw  # type: ignore[misc]


def shown_name(path: str) -> str:
    """What errors call a file."""
    return "stdin" if path == "-" else path


def read_groups(file: BinaryIO, name: str, needs_accuracies: bool, has_tokenizer: bool) -> Iterator[ResponseGroup]:
    """The groups of a file, in order; empty lines are passed over.

    Raises: UserError naming file, line, what is wrong and the remedy.
    """
    for number in itertools.count(1):
        where = f"{name} line {number}"
        try:
            line = file.readline()
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{where}: cannot be read: {error}") from error
        if not line:
            return
        if not line.strip():
            continue
        group = _group(_parse(line, where), where, number, needs_accuracies)
        if group.texts is not None and not has_tokenizer:
            raise UserError(
                f"{where}: responses are text, which takes a tokenizer; add --tokenizer with a model's folder or "
                f"name, or with sacrebleu:13a, which needs no model"
            )
        yield group


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object with responses and accuracies, got {_shown(record)}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; write null for an unknown accuracy")


def _group(record: dict[str, Any], where: str, number: int, needs_accuracies: bool) -> ResponseGroup:
    prompt_id = record.get("prompt_id", number)
    if isinstance(prompt_id, bool) or not isinstance(prompt_id, (str, int)):
        raise UserError(f"{where}: prompt_id must be a string or a whole number, got {_shown(prompt_id)}")
    responses = _key(record, "responses", where)
    if not isinstance(responses, list) or not responses:
        raise UserError(f"{where}: responses must be a list of one response at least, got {_shown(responses)}")
    texts = token_ids = None
    kinds = set(map(type, responses))
    if kinds == {str}:
        texts = responses
    elif kinds == {list}:
        token_ids = [_token_ids(ids, f"{where}: responses[{index}]") for index, ids in enumerate(responses)]
    elif kinds == {str, list}:
        raise UserError(f"{where}: responses mixes text and token ids; a group has one kind")
    else:
        wrong = next(index for index, response in enumerate(responses) if not isinstance(response, (str, list)))
        raise UserError(f"{where}: responses[{wrong}] must be text or a list of ids, got {_shown(responses[wrong])}")

    unknown = np.full(len(responses), np.nan, dtype=np.float32)
    accuracies = unknown
    if "accuracies" in record or needs_accuracies:
        accuracies = _numbers(record, "accuracies", len(responses), where)
        outside = np.flatnonzero((accuracies < 0) | (accuracies > 1))
        if len(outside):
            given = _shown(record["accuracies"][outside[0]])
            raise UserError(f"{where}: accuracies[{outside[0]}] must be in [0, 1], got {given}")
    rewards = accuracies
    if "rewards" in record:
        rewards = _numbers(record, "rewards", len(responses), where)
        missing = np.flatnonzero(np.isnan(rewards))
        if len(missing):
            raise UserError(f"{where}: rewards[{missing[0]}] is null; give a number, or leave rewards out")
    return ResponseGroup(prompt_id, where, texts, token_ids, accuracies, rewards)


def _token_ids(ids: list[Any], where: str) -> np.ndarray:
    """(T,) int32."""
    if set(map(type, ids)) - {int}:
        wrong = next(position for position, token in enumerate(ids) if type(token) is not int)
        raise UserError(f"{where}[{wrong}] must be a token id, a whole number, got {_shown(ids[wrong])}")
    if ids and not 0 <= min(ids) <= max(ids) <= LARGEST_TOKEN_ID:
        wrong = next(position for position, token in enumerate(ids) if not 0 <= token <= LARGEST_TOKEN_ID)
        remedy = "leave padding out" if ids[wrong] < 0 else "ids are int32"
        raise UserError(f"{where}[{wrong}] must be in 0..{LARGEST_TOKEN_ID}, got {_shown(ids[wrong])}; {remedy}")
    return np.array(ids, dtype=np.int32)


def _numbers(record: dict[str, Any], key: str, num_responses: int, where: str) -> np.ndarray:
    """(N,) float32, NaN for null."""
    values = _key(record, key, where)
    if not isinstance(values, list):
        raise UserError(f"{where}: {key} must be a list of numbers, got {_shown(values)}")
    if len(values) != num_responses:
        raise UserError(f"{where}: {key} has {len(values)} values for {num_responses} responses; give one a response")
    numbers = np.empty(num_responses, dtype=np.float32)
    for index, value in enumerate(values):
        number = math.nan if value is None else _float32(value)
        if number is None:
            raise UserError(f"{where}: {key}[{index}] must be a number that fits 32 bits, got {_shown(value)}")
        numbers[index] = number
    return numbers


def _float32(value: Any) -> float | None:
    """A JSON number, true or false; None for anything else, or past what float32 holds."""
    if not isinstance(value, (int, float)) or abs(value) > float(np.finfo(np.float32).max):
        return None
    return float(value)


def _key(record: dict[str, Any], key: str, where: str) -> Any:
    if key not in record:
        there = ", ".join(map(_shown, record)) or "nothing"
        raise UserError(f"{where}: key {key!r} is missing; there is {there}")
    return record[key]


def _shown(value: Any) -> str:
    """As JSON, cut where it is long: a response may have a million characters."""
    text = json.dumps(value[:5] if isinstance(value, (list, str)) and len(value) > 60 else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def open_output(output: str | None, read_from: str, force: bool) -> Iterator[Callable[[str], Any]]:
    """Yields what writes text to --output. A file appears when all is done, under its name, or not at all.

    Args: output: a path, gzip if it ends in .gz, `-` for the standard output, None for nowhere. read_from: the file
        that is read, which is never overwritten. force: overwrite an existing file.
    Raises: UserError when it cannot be written.
    """
    if output is None or output == "-":
        yield sys.stdout.write if output == "-" else lambda text: None
        return
    path = Path(output)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise UserError(f"--output {output}: must be a file in a folder that exists")
    if path.exists() and read_from != "-" and path.samefile(read_from):
        raise UserError(f"--output {output}: is the file that is read; give another")
    if path.exists() and not force:
        raise UserError(f"--output {output}: exists; add --force to overwrite it")
    path = path.resolve()  # a link stays, and its target is written
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with gzip.open(partial, "wt", encoding="utf-8") if path.suffix == ".gz" else partial.open("w") as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
