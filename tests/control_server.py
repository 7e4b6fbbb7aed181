"""A stand-in for the control routes of vLLM servers, in threads of the test: it loads weights as a worker would."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from mmr1_ds.rollout.server_process import ServerAddress
from mmr1_ds.rollout.shared_memory import BufferAddress, MappedBuffer, tensors

KEY = "the key of this test"
Answer = tuple[int, dict]


class ControlServer:
    """Notes what it is asked. `hook(route, body, number of calls of the route so far)` may answer in its place."""

    def __init__(self, number: int, num_workers: int = 1) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.keys: list[str | None] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.version: str | None = None
        self.hook: Callable[[str, dict, int], Answer | None] = lambda route, body, count: None
        self._buffer: MappedBuffer | None = None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"] or 0))
                owner.keys.append(self.headers["Authorization"])
                status, answer = owner._answer(self.path.strip("/"), json.loads(text or "{}"))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", answer["location"])
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *arguments: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = ServerAddress(number, f"http://127.0.0.1:{self._server.server_port}", num_workers, 1)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def routes(self) -> list[str]:
        return [route for route, _ in self.calls]

    def bodies(self, route: str) -> list[dict]:
        return [body for name, body in self.calls if name == route]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, route: str, body: dict) -> Answer:
        self.calls.append((route, body))
        if (answer := self.hook(route, body, self.routes().count(route))) is not None:
            return answer
        if route == "init_weight_transfer_engine" and "path" in body["init_info"]:
            self._buffer = MappedBuffer(BufferAddress(**body["init_info"]))
        elif route == "update_weights" and "offsets" in body["update_info"]:
            info = body["update_info"]
            entries = [
                (name, getattr(torch, dtype), tuple(shape))
                for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
            ]
            assert self._buffer is not None
            loaded = tensors(self._buffer.bytes(), entries, info["offsets"])
            self.weights.update({name: tensor.clone() for name, tensor in loaded})
        elif route == "finish_weight_update":
            self.version = body["weight_version"]
        return 200, {}


@contextmanager
def control_servers(*num_workers: int):
    """Servers 0, 1, ... with so many workers each."""
    servers = [ControlServer(number, workers) for number, workers in enumerate(num_workers)]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
