"""The address that a started server listens on."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from mmr1_ds.errors import UserError

WILDCARDS = ("0.0.0.0", "::", "")  # every interface of the machine

_LOWEST = 20000
_RANGE_OF_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_OUTGOING = 32768  # Linux's default
_TRIES = 100


class ServerPort:
    """A port of this machine that stays ours between the starts of a server.

    A bound socket that does not listen keeps others away, and lets a server that sets SO_REUSEADDR, as vLLM does,
    listen beside it.
    """

    def __init__(self, host: str, number: int | None = None) -> None:
        """number: None for a free one. Raises: UserError when the number is in use, or the host not of this machine."""
        self._host = host
        self._socket: socket.socket | None = None
        if number is not None:
            self.number = number
            self.hold()
            return
        # Not the kernel's choice, which is from the range of outgoing connections: one of them could take it meanwhile.
        candidates = range(_LOWEST, max(_LOWEST + _TRIES, _lowest_outgoing()))
        for tries_left in reversed(range(_TRIES)):
            self.number = secrets.choice(candidates)
            try:
                self.hold()
                return
            except UserError:
                if tries_left == 0:
                    raise

    def hold(self) -> None:
        """Keep others away from it. Raises: UserError when it is in use, or the host is not of this machine."""
        if self._socket is not None:
            return
        try:
            found = socket.getaddrinfo(self._host or WILDCARDS[0], self.number, type=socket.SOCK_STREAM)
        except OSError as error:
            raise UserError(
                f"worker.rollout.server_host={self._host} is unknown ({error.strerror}); name one of this machine"
            ) from None
        family, _, _, _, address = found[0]
        held = socket.socket(family, socket.SOCK_STREAM)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
        except OSError as error:
            held.close()
            raise UserError(
                f"a rollout server cannot listen on port {self.number} of worker.rollout.server_host={self._host}: "
                f"{error.strerror}; give another port, or an address of this machine"
            ) from None
        self._socket = held

    def release(self) -> None:
        """Let others have it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def host_in_url(host: str) -> str:
    """How clients name the host: this machine's name for every interface, IPv6 in brackets."""
    if host in WILDCARDS:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _lowest_outgoing() -> int:
    try:
        return int(_RANGE_OF_OUTGOING.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return _LOWEST_OUTGOING


@dataclass(frozen=True)
class ServerAddress:
    """A server at one time, as the weight transfer knows it."""

    number: int  # in the group
    url: str  # http://host:port
    num_workers: int  # vLLM workers: each is a rank of the NCCL group
    generation: int  # its starts so far; a new one has lost the weights and the transfer's set-up
