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
        try:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield _group(line, number, needs_accuracies, has_tokenizer)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{name} line {number}: cannot be read: {error}") from error
        except UserError as error:
            raise UserError(f"{name} line {number}: {error}") from error


def _group(line: bytes, number: int, needs_accuracies: bool, has_tokenizer: bool) -> ResponseGroup:
    record = _parse(line)
    prompt_id = record.get("prompt_id", number)
    if type(prompt_id) not in (str, int):
        raise UserError(f"prompt_id must be a string or a whole number, got {_shown(prompt_id)}")
    responses = _list(record, "responses")
    if not responses:
        raise UserError("responses must be a list of one response at least, got []")
    texts = token_ids = None
    kinds = set(map(type, responses))
    if kinds == {str}:
        texts = responses
        if not has_tokenizer:
            raise UserError(
                "responses are text, which takes a tokenizer; add --tokenizer with a model's folder or name, or with "
                "sacrebleu:13a, which needs no model"
            )
    elif kinds == {list}:
        token_ids = [_token_ids(ids, f"responses[{index}]") for index, ids in enumerate(responses)]
    elif kinds == {str, list}:
        raise UserError("responses mixes text and token ids; a group has one kind")
    else:
        wrong = next(index for index, response in enumerate(responses) if not isinstance(response, (str, list)))
        raise UserError(f"responses[{wrong}] must be text or a list of ids, got {_shown(responses[wrong])}")

    accuracies = np.full(len(responses), np.nan, dtype=np.float32)
    if "accuracies" in record or needs_accuracies:
        accuracies = _numbers(record, "accuracies", len(responses))
        for index in np.flatnonzero((accuracies < 0) | (accuracies > 1))[:1]:
            raise UserError(f"accuracies[{index}] must be in [0, 1], got {_shown(record['accuracies'][index])}")
    rewards = accuracies
    if "rewards" in record:
        rewards = _numbers(record, "rewards", len(responses))
        for index in np.flatnonzero(np.isnan(rewards))[:1]:
            raise UserError(f"rewards[{index}] is null; give a number, or leave rewards out")
    return ResponseGroup(prompt_id, texts, token_ids, accuracies, rewards)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # not UTF-8 too
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"must be a JSON object with responses and accuracies, got {_shown(record)}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number; write null for an unknown accuracy")


def _token_ids(ids: list[Any], where: str) -> np.ndarray:
    """(T,) int32."""
    if set(map(type, ids)) - {int} or (ids and not 0 <= min(ids) <= max(ids) <= LARGEST_TOKEN_ID):
        wrong = next(k for k, token in enumerate(ids) if type(token) is not int or not 0 <= token <= LARGEST_TOKEN_ID)
        raise UserError(
            f"{where}[{wrong}] must be a token id, a whole number in 0..{LARGEST_TOKEN_ID}, got {_shown(ids[wrong])}; "
            "leave padding out"
        )
    return np.array(ids, dtype=np.int32)


def _numbers(record: dict[str, Any], key: str, num_responses: int) -> np.ndarray:
    """(N,) float32, NaN for null."""
    values = _list(record, key)
    if len(values) != num_responses:
        raise UserError(f"{key} has {len(values)} values for {num_responses} responses; give one a response")
    most = float(np.finfo(np.float32).max)
    for index, value in enumerate(values):
        if value is not None and not (isinstance(value, (int, float)) and abs(value) <= most):
            raise UserError(f"{key}[{index}] must be a number that fits 32 bits, got {_shown(value)}")
    return np.array([math.nan if value is None else value for value in values], dtype=np.float32)


def _list(record: dict[str, Any], key: str) -> list[Any]:
    if key not in record:
        raise UserError(f"key {key!r} is missing; there is {', '.join(map(_shown, record)) or 'nothing'}")
    values = record[key]
    if not isinstance(values, list):
        raise UserError(f"{key} must be a list with one entry a response, got {_shown(values)}")
    return values


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
