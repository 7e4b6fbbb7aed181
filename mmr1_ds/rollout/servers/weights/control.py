"""The control routes of the rollout servers, all servers at once: weight updates, pause and caches."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPException
from typing import Any

from mmr1_ds import io
from mmr1_ds.rollout.servers.address import ServerAddress

_NUM_TRIES = 20  # of a cache that is still held, a tenth of a second apart
_MOST_WORDS = 300  # characters of a server's message
_LOAD = "v1/load_lora_adapter"  # answers in words


class ServerControl:
    """Asks the same of several servers, each in a thread of its own. One that fails is asked nothing more.

    It is what vLLM calls a VLLMWeightSyncClient, for all of them together, except that no method raises: what failed,
    and why, is in `failed`.
    """

    def __init__(
        self, servers: Sequence[ServerAddress], key: str, timeout_seconds: float = 300.0, version: str | None = None
    ) -> None:
        """timeout_seconds: for one answer; version: the label of the weights, for engines that do not give one."""
        self.servers = list(servers)
        self.failed: dict[int, str] = {}  # by number
        self._key, self._timeout_seconds, self._version = key, timeout_seconds, version

    @property
    def live(self) -> list[ServerAddress]:
        """Those that have answered so far."""
        return [server for server in self.servers if server.number not in self.failed]

    def begin(
        self,
        route: str,
        body: Mapping[str, Any] | Callable[[ServerAddress], Mapping[str, Any]] | None = None,
        only: Collection[int] | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> Callable[[], None]:
        """POST to every live server, or to `only` these, and return at once.

        Args: body: the same for all, or of each; on_failure: called, from a thread, as soon as one fails.
        Returns: what waits for the answers.
        """
        asked = [server for server in self.live if only is None or server.number in only]
        answers: dict[int, str | None] = {}  # None: it did as it was told

        def ask(server: ServerAddress) -> None:
            try:
                self._ask(server, route, body(server) if callable(body) else body)
                answers[server.number] = None
            except (OSError, HTTPException, _Refused) as error:
                answers[server.number] = str(error) or type(error).__name__
                if on_failure is not None:
                    on_failure()

        threads = [threading.Thread(target=ask, args=(server,), daemon=True) for server in asked]
        end = time.monotonic() + self._timeout_seconds
        for thread in threads:
            thread.start()

        def wait() -> None:
            for server, thread in zip(asked, threads, strict=True):
                thread.join(max(0.0, end - time.monotonic()))
                late = f"no answer within {self._timeout_seconds:g} s"
                if (reason := answers.get(server.number, late)) is not None:
                    self.failed.setdefault(server.number, f"{route.partition('?')[0]}: {reason}")

        return wait

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any], only: Collection[int] | None = None) -> None:
        """Set the transfer up. For NCCL each server's workers come after those of the servers before it."""
        first, ranks = 1, {}
        for server in self.live:
            ranks[server.number] = first
            first += server.num_workers

        def own(server: ServerAddress) -> dict[str, Any]:
            if "rank_offset" not in init_info:
                return {"init_info": dict(init_info)}
            return {"init_info": {**init_info, "rank_offset": ranks[server.number]}}

        self.begin("init_weight_transfer_engine", own, only)()

    def shutdown_weight_transfer_engine(self) -> None:
        """Let go of what `init_weight_transfer_engine` has set up."""
        self.begin("shutdown_weight_transfer_engine")()

    def start_weight_update(self) -> None:
        """From here on the servers' weights are in pieces until `finish_weight_update`."""
        self.begin("start_weight_update")()

    def update_weights(self, update_info: Any) -> None:
        """Have them load some."""
        self.begin("update_weights", {"update_info": update_info})()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The new weights are whole; responses carry their version from now on."""
        self.begin("finish_weight_update", {"weight_version": weight_version or self._version})()

    def load_adapter(self, name: str, path: str) -> None:
        """Have them load LoRA's adapter from this folder; responses carry its version from now on."""
        self.begin(_LOAD, {"lora_name": name, "lora_path": path})()
        self.begin("update_weight_version", {"new_version": self._version})()

    def fail_all(self, reason: str) -> None:
        """Note a failure that is every server's."""
        for server in self.live:
            self.failed[server.number] = reason

    def pause(self, keep: bool) -> dict[int, str]:
        """Stop sampling: after the requests that run, or (keep) in the middle of them.

        Returns: the servers that failed, with the reason, as `forget_and_resume` does.
        """
        self.begin(f"pause?mode={'keep' if keep else 'wait'}")()
        return dict(self.failed)

    def forget_and_resume(self) -> dict[int, str]:
        """Drop all that was computed with the old weights, and go on sampling.

        Requests that were paused in the middle are computed again up to where they are.
        """
        # The processor's cache must forget together with the encoder's, or the next request misses what the former
        # believes the latter to have.
        for route in ("reset_prefix_cache?reset_running_requests=true", "reset_mm_cache", "reset_encoder_cache"):
            self.begin(route)()
        self.begin("resume")()
        return dict(self.failed)

    def _ask(self, server: ServerAddress, route: str, body: Mapping[str, Any] | None) -> None:
        """Raises: OSError and HTTPException without an answer, _Refused for one that is not yes."""
        for _ in range(_NUM_TRIES):
            answer = self._post(server, route, body)
            if answer.get("success") is not False:
                return
            time.sleep(0.1)
        raise _Refused("it did not succeed")

    def _post(self, server: ServerAddress, route: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        found = io.ask("POST", f"{server.url}/{route}", self._key, body, timeout_seconds=self._timeout_seconds)
        text = found.content.decode(errors="replace")
        if found.status != HTTPStatus.OK:
            if route == _LOAD and "already been loaded" in text:  # by an attempt that failed afterwards
                return {}
            raise _Refused(f"HTTP {found.status} {_message(text)}")
        if route == _LOAD:
            return {}
        try:
            answer = json.loads(text or "{}")
        except ValueError:
            raise _Refused(f"not JSON: {text[:_MOST_WORDS]!r}") from None
        return answer if isinstance(answer, dict) else {}


class _Refused(Exception):
    """The server has answered, but has not done it."""


def _message(text: str) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(text)
        text = str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:_MOST_WORDS]
