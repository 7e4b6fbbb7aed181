"""`mmr1-ds serve`: run a rollout server for `worker.rollout.server_urls` of a run that trains elsewhere."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from mmr1_ds.cluster.exits import EXIT_INTERRUPTED, tell
from mmr1_ds.cluster.launch import gpu_is_here
from mmr1_ds.config import RolloutConfig, RunConfig
from mmr1_ds.config.derived import run_directory
from mmr1_ds.config.loading import load_config
from mmr1_ds.config.ranges import check_choices, check_ranges
from mmr1_ds.errors import UserError, require
from mmr1_ds.monitoring.logger import configure_logging, quiet_libraries
from mmr1_ds.preflight.checks import check_lora_sync
from mmr1_ds.preflight.data import check_data
from mmr1_ds.preflight.files import check_format_prompt
from mmr1_ds.preflight.lengths import check_positions
from mmr1_ds.preflight.models import check_model
from mmr1_ds.rollout.options import image_bounds
from mmr1_ds.rollout.servers.address import ServerPort
from mmr1_ds.rollout.servers.process import ServerProcess, check_key
from mmr1_ds.rollout.servers.supervisor import Supervisor

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
DEFAULT_PORT = 8000
_POLL_SECONDS = 0.25

DESCRIPTION = """Run one rollout server in the foreground, for the worker.rollout.server_urls of a run elsewhere, with
the configuration of that run. Clients need the key in the environment variable that
worker.rollout.server_key_variable names; set it here and there. The server listens on worker.rollout.server_host: for
clients on other nodes, name the address of the cluster's own interface. A server that dies is restarted; SIGTERM and
Ctrl-C end it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser."""
    parser.description = DESCRIPTION
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"to listen on; default: {DEFAULT_PORT}")


def main(arguments: argparse.Namespace) -> int:
    """Run the server. Returns: the exit code; 0 after SIGTERM, 1 when it does not start. Raises: UserError."""
    configure_logging(is_main=True)
    stopped = _Signals()
    config = read(arguments.settings, arguments.port)
    return run(_server(config, arguments.port), config.worker.rollout.server_start_seconds, stopped)


class _Signals:
    """SIGTERM and SIGINT as an event to wait for."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._event = threading.Event()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it warns the run, which may still need the server
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Return whether one has come."""
        return self._event.wait(seconds)


def read(settings: Sequence[str], port: int) -> RunConfig:
    """Return the configuration, after all checks that need nothing heavy. Raises: UserError."""
    loaded = load_config([*settings, "worker.rollout.engine=server"])
    for line in loaded.warnings:
        logger.warning("%s", line)
    config, rollout = loaded.config, loaded.config.worker.rollout
    check_choices(config)
    check_ranges(config)
    check_model(config.worker.actor.model)
    check_positions(config)
    check_format_prompt(config.data)
    check_lora_sync(config)
    key = os.environ.get(rollout.server_key_variable, "")
    if not key:
        raise UserError(
            f"{rollout.server_key_variable} (worker.rollout.server_key_variable) is not set; export a secret of your "
            "own under that name, here and where the run trains"
        )
    check_key(key, rollout.server_key_variable)
    require("vllm", "vllm", purpose="a rollout server")
    _devices(rollout)
    if rollout.limit_images == 0:
        check_data(config.data, "train_files", config.worker.actor.model, "server")
        if config.data.val_files:
            check_data(config.data, "val_files", config.worker.actor.model, "server")
    if not 1 <= port < 2**16:
        raise UserError(f"--port={port} must be in [1, 65535]")
    ServerPort(rollout.server_host, port).release()
    return config


def _devices(rollout: RolloutConfig) -> list[int]:
    """Return the GPUs of this machine that the server takes. Raises: UserError for too few or too many."""
    devices, size = rollout.server_devices, rollout.tensor_parallel_size
    if devices and len(devices) != size:
        raise UserError(
            f"worker.rollout.server_devices={devices}: a server takes tensor_parallel_size={size} GPU(s); "
            f"list as many, or none for the first {size}"
        )
    return devices or list(range(size))


def _server(config: RunConfig, port: int) -> ServerProcess:
    """Build the server. Raises: UserError for a model or data that cannot be read."""
    quiet_libraries()
    from mmr1_ds.data.encoding import PromptEncoder

    rollout, model = config.worker.rollout, config.worker.actor.model
    encoder = PromptEncoder(model, config.data)
    return ServerProcess(
        rollout,
        model,
        config.data,
        number=0,
        key=os.environ[rollout.server_key_variable],
        on_gpu=gpu_is_here(),
        devices=_devices(rollout),
        images=image_bounds(
            encoder, _most_images(config, encoder) if encoder.is_multimodal and rollout.limit_images == 0 else 0
        ),
        # Machines may share the run directory.
        log=run_directory(config) / "servers" / f"{socket.gethostname()}_{port}.log",
        port=port,
        adapted=_adapted(config),
    )


def _adapted(config: RunConfig) -> list[str]:
    """Return the layers whose adapters the run will send, none where it sends whole weights."""
    model, rollout = config.worker.actor.model, config.worker.rollout
    if rollout.lora_sync != "adapters" or model.lora.rank == 0:
        return []
    from mmr1_ds.engine.model.lora import layers_to_adapt

    return layers_to_adapt(model)


def _most_images(config: RunConfig, encoder: PromptEncoder) -> int:
    """Return the largest number of images in a prompt, over all data of the run."""
    from mmr1_ds.data.dataset import load_dataset

    found = [load_dataset(config.data.train_files, config.data, encoder).max_images]
    if config.data.val_files:
        found.append(load_dataset(config.data.val_files, config.data, encoder, "data.val_files").max_images)
    return max(found)


def run(server: ServerProcess, start_seconds: float, stopped: _Signals) -> int:
    """Keep the server running until a signal comes. Returns: the exit code."""
    supervisor = Supervisor([server], start_seconds)
    supervisor.start()
    try:
        while not supervisor.ready():
            if failure := supervisor.failed_start():
                tell(UserError(failure))
                return EXIT_FAILED
            if stopped.wait(_POLL_SECONDS):
                break
        else:
            sys.stdout.write(f"rollout server ready: {server.url}\n")
            sys.stdout.flush()
            while not stopped.wait(60):
                pass
    finally:
        supervisor.close()
    return EXIT_INTERRUPTED if stopped.received == signal.SIGINT else 0
