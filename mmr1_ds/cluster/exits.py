"""How a program ends: exit codes, a user's mistake in one line, the end of a process."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn

from mmr1_ds.config.redaction import redacted
from mmr1_ds.errors import UserError

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, the same command goes on; launch/slurm.sbatch requeues on it
EXIT_INTERRUPTED = 130


def tell(error: UserError, rank: str = "") -> int:
    sys.stderr.write(f"mmr1-ds: error{rank}: {redacted(' '.join(str(error).split()))}\n")
    return EXIT_USER_ERROR


_UNFLUSHED = 120  # Python's own exit code when standard output could not be written


def leave(code: int) -> NoReturn:
    """End this process: exit handlers, flush, gone.

    Gloo's threads outlive `Ranks.close`, since DeepSpeed keeps groups. One that drops a tensor while Python shuts down
    asks for the interpreter lock, and Python 3.11 answers by ending the thread, which C++ answers with an abort: a run
    that had finished would report SIGABRT. So Python's shutdown is left out.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the shell
            try:
                stream.flush()
            except OSError:
                code = code or _UNFLUSHED
    os._exit(code)
