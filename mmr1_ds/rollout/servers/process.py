"""A vLLM server as the run sees it: started, looked after and ended here, or run by somebody else."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from mmr1_ds import io
from mmr1_ds.config import DataConfig, ModelConfig, RolloutConfig
from mmr1_ds.errors import UserError
from mmr1_ds.rollout.options import ImageBounds, engine_environment, engine_options
from mmr1_ds.rollout.servers.address import WILDCARDS, ServerPort, host_in_url
from mmr1_ds.rollout.servers.guard import KEY_VARIABLE
from mmr1_ds.rollout.servers.minder import KILL_SECONDS

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0  # that a server has to end when asked

_GUARD = "mmr1_ds.rollout.servers.guard.ServerGuard"
_CPU_THREADS = "VLLM_CPU_OMP_THREADS_BIND"
_ANSWER_SECONDS = 3.0  # for /health
_POLL_SECONDS = 0.1
_LOG_TAIL_BYTES = 2**16
_ERROR = re.compile(r"\b\w+(Error|Exception)\b: \S")
_NO_CAUSE = re.compile(r"See root cause above|\b(WARNING|INFO|DEBUG) \d\d-\d\d ")
# What a launcher tells a rank. A server is no rank; vLLM sets these for its own workers.
_ALL_DEVICES = "MMR1_DS_VISIBLE_DEVICES"  # CUDA_VISIBLE_DEVICES as the launch script found it
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_key(key: str, variable: str) -> None:
    """Raises: UserError for a key that no HTTP header can carry; its message does not hold the key."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{variable} holds a space, a line break or a character outside of ASCII; give another key")


def server_arguments(options: Mapping[str, Any]) -> list[str]:
    """vLLM's command line for options of its Python interface. A flag that is false is said too, a mapping as JSON."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            arguments += [f"--{flag}", json.dumps(value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


def transfer_backend(config: RolloutConfig, *, on_gpu: bool) -> str:
    """How the servers get new weights: `worker.rollout.weight_transfer` with auto decided."""
    if config.weight_transfer != "auto":
        return config.weight_transfer
    return "nccl" if on_gpu else "shared_memory"


class ServerProcess:
    """A vLLM server that this process started; it ends with this process, also when that is killed."""

    def __init__(
        self,
        config: RolloutConfig,
        model: ModelConfig,
        data: DataConfig,
        *,
        number: int,
        key: str,
        on_gpu: bool,
        devices: Sequence[int],
        images: ImageBounds | None,
        log: Path,
        port: int | None = None,
    ) -> None:
        """Choose the address; nothing is started.

        Args: number: among the run's servers; key: what every request must carry; devices: numbers of its GPUs, unused
            on the CPU; images: None for a model that takes none; log: file that its output is appended to; port:
            None for a free one.
        Raises: UserError for an address that cannot be listened on.
        """
        assert key, "a server without a key would be open"
        self.num_workers = config.tensor_parallel_size
        self._number, self._log = number, log
        self._port = ServerPort(config.server_host, port)
        self.url = f"http://{host_in_url(config.server_host)}:{self._port.number}"
        if config.server_host in WILDCARDS:
            logger.warning(
                "worker.rollout.server_host=%s: the rollout server can be reached from every network of this machine, "
                "guarded by its key alone; name the address of the cluster's own interface instead",
                config.server_host or "''",
            )
        options = engine_options(config, model, data, on_gpu=on_gpu, images=images)
        options |= {
            "host": config.server_host,
            "port": self._port.number,
            "middleware": _GUARD,
            "enable_scale_out": True,  # token ids in, token ids out
            "scheduling_policy": "priority",
            "weight_transfer_config": {"backend": transfer_backend(config, on_gpu=on_gpu)},
            "disable_fastapi_docs": True,
            "disable_uvicorn_access_log": True,
        }
        self.environment = _environment(config, key, on_gpu=on_gpu, devices=devices)
        if not on_gpu and config.tensor_parallel_size == 1 and self.environment[_CPU_THREADS] == "nobind":
            # One process and 1 GB less. vLLM's CPU build wants a worker's own process only to place its threads.
            options["distributed_executor_backend"] = "uni"
            self.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *server_arguments(options)]
        self._key = key
        self._log_start = 0  # size of the log when this start began
        self._minder: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Spawn the server; returns at once. Raises: UserError when the port was taken since an earlier `stop`."""
        assert self._minder is None, "stop it first"
        self._port.hold()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        minder = [sys.executable, "-m", "mmr1_ds.rollout.servers.minder", str(os.getpid()), str(STOP_SECONDS)]
        with self._log.open("ab") as output:
            self._log_start = output.seek(0, os.SEEK_END)
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} starting {self.url}\n".encode())
            output.flush()
            self._minder = subprocess.Popen(
                [*minder, *self.command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # one group to kill; Ctrl-C is for the trainer, which ends the server in turn
            )

    @property
    def process_group(self) -> int:
        """The number of the group of all of its processes, once it was started."""
        assert self._minder is not None, "start it first"
        return self._minder.pid

    def is_running(self) -> bool:
        """Whether the process lives; it may be loading, or hang."""
        # Looked at without being reaped, so that no other process can get the number of the group to kill.
        return self._minder is not None and _is_alive(self._minder.pid)

    def is_ready(self) -> bool:
        """Whether it answers with the key; takes a few seconds at most."""
        return self.is_running() and _health(self.url, self._key) == ""

    def complaint(self) -> str:
        """What it says is wrong with it; empty when nothing is, and when it says nothing."""
        return _complaint(self.url, self._key)

    def last_words(self) -> str:
        """Where its log is and how it ends, for messages."""
        line = _last_line(self._log, self._log_start)
        return f"its log {self._log} ends with: {line}" if line else f"its log {self._log} is empty"

    def stop(self) -> None:
        """End it: SIGINT, then SIGKILL, for all of its processes. Returns when they are gone; the port is free."""
        self._end()
        self._port.release()

    def restart(self) -> None:
        """End it and spawn it again at the same address; returns when the old one is gone."""
        self._end()
        self.start()

    def _end(self) -> None:
        minder, self._minder = self._minder, None
        if minder is None:
            return
        if _is_alive(minder.pid):
            os.kill(minder.pid, signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS + 2 * KILL_SECONDS + 1
        while _is_alive(minder.pid) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 2)
        # The minder has seen to the rest, unless it was killed itself.
        if _group_exists(minder.pid):
            os.killpg(minder.pid, signal.SIGKILL)
        minder.wait()
        deadline = time.monotonic() + KILL_SECONDS
        while _group_exists(minder.pid):
            if time.monotonic() > deadline:
                logger.error(
                    "rollout server %d (%s): killed, but its processes are still there", self._number, self.url
                )
                return
            time.sleep(_POLL_SECONDS / 2)


class ExternalServer:
    """A server that somebody else runs, with `mmr1-ds serve`. It cannot be restarted from here, only waited for."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self.num_workers = 0  # until it has answered
        self._key = key
        self._answer = "it was not asked yet"

    def start(self) -> None:
        """Nothing: it runs."""

    def restart(self) -> None:
        """Nothing: whoever runs it does that."""

    def is_running(self) -> bool:
        """True: its process is not ours to see."""
        return True

    def is_ready(self) -> bool:
        """Whether it answers with the key; takes a few seconds at most."""
        self._answer = _health(self.url, self._key)
        if self._answer == "":
            self._answer = self._count_workers()
        return self._answer == ""

    def complaint(self) -> str:
        """What it says is wrong with it; empty when nothing is, and when it says nothing."""
        return _complaint(self.url, self._key)

    def _count_workers(self) -> str:
        """Empty, or why they cannot be counted."""
        status, found = _get(self.url, "/get_world_size", self._key)
        if status is None:
            return found
        if status != HTTPStatus.OK:
            return f"it answers {status} to /get_world_size; start it with `mmr1-ds serve`"
        self.num_workers = int(json.loads(found)["world_size"])
        return ""

    def last_words(self) -> str:
        """What it last said, for messages."""
        return f"{self.url}: {self._answer or 'it answers'}"

    def stop(self) -> None:
        """Nothing: it is not ours to end."""


Server = ServerProcess | ExternalServer


def _environment(config: RolloutConfig, key: str, *, on_gpu: bool, devices: Sequence[int]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    inherited.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # an engine inside a rank sets it
    if inherited.get("VLLM_LOGGING_LEVEL") == "ERROR":  # what a run sets for its own output; a server has its own file
        del inherited["VLLM_LOGGING_LEVEL"]
    decided, defaults = engine_environment(config, on_gpu=on_gpu)
    decided |= {
        KEY_VARIABLE: key,
        "VLLM_API_KEY": key,  # vLLM's own check of a part of the routes; the user's would refuse ours
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that replace the weights
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",  # over a client's: who closes an idle connection first loses no request
        "PYTHONUNBUFFERED": "1",  # the log's last line is there when the process is not
    }
    if on_gpu:
        visible = inherited.get(_ALL_DEVICES) or inherited.get("CUDA_VISIBLE_DEVICES", "")
        decided["CUDA_VISIBLE_DEVICES"] = ",".join(_device_names(devices, visible))
    if transfer_backend(config, on_gpu=on_gpu) == "ipc":
        decided["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # its handles are pickled; never without need
    return defaults | inherited | decided


def _device_names(devices: Sequence[int], visible: str) -> list[str]:
    """What CUDA calls the devices: the entry of that number in CUDA_VISIBLE_DEVICES, where the list is that long.

    The deepspeed launcher shows a rank the GPUs of the ranks alone; those after them go by their own numbers, unless
    launch/train.sh or deepspeed.sh handed on the list that it was started with.
    """
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [names[device] if device < len(names) else str(device) for device in devices]


def _complaint(url: str, key: str) -> str:
    """The front end outlives an engine that died, and may never end by itself."""
    status, _ = _get(url, "/health", key)
    return "" if status in (None, HTTPStatus.OK) else f"it answers {status} to /health"


def _health(url: str, key: str) -> str:
    """Empty when /health says yes, else what is wrong."""
    status, found = _get(url, "/health", key)
    if status is None:
        return found
    if status == HTTPStatus.UNAUTHORIZED:
        return "it refuses the key; give the run and the server the same"
    return "" if status == HTTPStatus.OK else f"it answers {status} to /health"


def _get(url: str, path: str, key: str) -> tuple[int | None, str]:
    """Status and content of the answer; without one, None and why."""
    try:
        answer = io.ask("GET", url + path, key, timeout_seconds=_ANSWER_SECONDS)
    except (OSError, HTTPException) as error:
        return None, f"no answer to {path}: {error or type(error).__name__}"
    return answer.status, answer.content.decode(errors="replace")


def _last_line(log: Path, start: int) -> str:
    """The last line after `start` that names an error with its cause, else the last one at all."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if _ERROR.search(line) and not _NO_CAUSE.search(line)]
    return (errors or lines or [""])[-1]


def _is_alive(pid: int) -> bool:
    """Whether our child runs; leaves a dead one for `wait`."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    except ChildProcessError:  # the launcher left SIGCHLD ignored: the kernel reaps what ends
        return False


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
