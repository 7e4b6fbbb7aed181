"""A reward worker process: `python -m mmr1_ds.rewards.worker REPLY_FD GUARD_FD`.

It reads JSON lines from its standard input, answers on REPLY_FD, and ends when the input does. The first line is
what `loading.reward_setup` returns, answered by {"ready": one of TOGETHER, "takes": [names in ON_REQUEST]} or
{"failed": reason}; every further line is a list of items, answered by {"results": [...]}, one a response, each
{"score": {key: number, or null for what does not apply}} or a failure, or by one failure for all:
{"kind": "error" | "invalid" | "unscored", "reason": text}.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from mmr1_ds.config.redaction import redacted, remember
from mmr1_ds.rewards.lines import from_line
from mmr1_ds.rewards.loading import RewardFunction, load_reward_function
from mmr1_ds.rewards.unscored import Unscored

F_SETSIG = 10  # linux/fcntl.h


def main(reply_fd: int, guard_fd: int) -> None:
    # The terminal's and the job manager's signals are the parent's business; it kills us when it is done.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent(guard_fd)
    requests, replies = _take_channel(reply_fd)
    setup = json.loads(requests.readline() or "null")
    if setup is None:
        return
    remember(setup["kwargs"])
    try:
        reward = load_reward_function(setup)
        reward.warm_up()  # before it is ready: the first response has its own seconds
    except (Exception, SystemExit) as error:  # a user's module may raise anything; the parent reports it
        _reply(replies, {"failed": _describe(error)})
        return
    _reply(replies, {"ready": reward.together, "takes": reward.takes})
    for line in requests:
        try:
            _reply(replies, _answer(reward.score, from_line(line)))
        except BrokenPipeError:
            break
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the parent has ended: children of the user's code go too


def _die_with_parent(guard_fd: int) -> None:
    """Have the kernel kill this process and what the user's code starts when the parent ends, in whatever way.

    guard_fd: a pipe into which only the parent could write. When it is closed, the kernel sends SIGKILL to the group:
    a reward that hangs in native code would run no handler. PR_SET_PDEATHSIG would leave the children.
    """
    os.set_inheritable(guard_fd, False)
    if sys.platform == "linux":
        fcntl.fcntl(guard_fd, F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(guard_fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(guard_fd, fcntl.F_SETFL, fcntl.fcntl(guard_fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([guard_fd], [], [], 0)[0]:  # it ended before the calls above
        os._exit(0)


def _take_channel(reply_fd: int) -> tuple[TextIO, TextIO]:
    """The request and reply streams, moved out of the user's way: prints go to stderr, input() finds nothing."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.set_inheritable(reply_fd, False)  # a child of the user's code must not hold the pipe open
    replies = os.fdopen(reply_fd, "w", encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _answer(function: RewardFunction, items: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        scores = function(items)
        if not isinstance(scores, (list, tuple)) or len(scores) != len(items):
            return _not_understood(scores, len(items))
        return {"results": [_result(score, scores) for score in scores]}
    except (Exception, SystemExit) as error:  # so may the function: it costs this call alone
        return _failure(error)


def _result(score: Any, scores: Sequence[Any]) -> dict[str, Any]:
    if isinstance(score, Unscored):
        return _failure(score)
    if _is_number(score):  # EasyR1's first rewards returned the sum alone
        score = {"overall": score}
    if not isinstance(score, Mapping):
        return _not_understood(scores if len(scores) == 1 else score, len(scores))
    try:
        numbers = {str(key): float(value) for key, value in score.items() if _is_number(value)}
        return {"score": numbers | {key: None for key, value in score.items() if isinstance(value, Unscored)}}
    except Exception as error:  # what has __float__ need not become a number
        return _failure(error)


def _not_understood(found: object, num_items: int) -> dict[str, Any]:
    want = "one dictionary" if num_items == 1 else f"one dictionary a response, {num_items}"
    return {"kind": "invalid", "reason": f"returned {redacted(repr(found))[:200]}; want a list with {want}"}


def _failure(error: BaseException) -> dict[str, Any]:
    if isinstance(error, Unscored):
        return {"kind": "unscored", "reason": redacted(" ".join(str(error).split()))[:500]}
    return {"kind": "error", "reason": _describe(error)}


def _is_number(value: object) -> bool:
    """Numbers and what converts to one (numpy scalars, 0-d tensors); text a reward returns beside them is dropped."""
    return hasattr(value, "__float__")


def _describe(error: BaseException) -> str:
    text = redacted(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
