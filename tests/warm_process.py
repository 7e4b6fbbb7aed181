"""A process that has imported what the programs of tests/programs import, and forks itself for each of them.

Most of what a small program takes is its imports. One such process serves one rank: ranks are then still unlike each
other in the order of sets and in all else that differs between processes from their start.

Usage: warm_process.py, with a JSON line for each program on its standard input: arguments (the program's path first),
environment, log. It answers with the program's process id, and, when that has ended, with its exit code.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

# What a program leaves in a module that is imported here is gone with its fork. Not vLLM, which reads the environment.
import deepspeed  # noqa: F401
import peft  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

import mmr1_ds.engine.critic
import mmr1_ds.rollout.colocated
import mmr1_ds.rollout.transformers_engine  # noqa: F401


def run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """In the fork: be the program. Does not return."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in ((0, nothing), (1, out), (2, out)):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    # A thread would not be there in a fork, nor let go of its locks. pyarrow's allocator knows forks and frees its own.
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert len([name for name in names if name != "jemalloc_bg_thd"]) == 1, names
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            run(**job)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


main()
