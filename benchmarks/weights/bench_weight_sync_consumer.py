"""What takes the weights in bench_weight_sync.py: consumers, in a process of their own."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Consumer:
    """Stands in for a vLLM server: the same routes, the same mapping of the memory, its own copy of every weight."""

    def __init__(self) -> None:
        from mmr1_ds.rollout.servers.weights.shared_memory import MappedBuffer

        self.buffer: MappedBuffer | None = None
        self.weights: dict[str, Any] = {}

    def answer(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """Do what a POST asks."""
        import torch

        from mmr1_ds.engine.weights.gathering import weights_digest
        from mmr1_ds.rollout.servers.weights.shared_memory import BufferAddress, MappedBuffer

        if route == "init_weight_transfer_engine":
            self.buffer = MappedBuffer(BufferAddress(**body["init_info"]))
        elif route == "update_weights":
            assert self.buffer is not None
            info = body["update_info"]
            dtypes = [getattr(torch, name) for name in info["dtype_names"]]
            entries = list(zip(info["names"], dtypes, map(tuple, info["shapes"]), strict=True))
            for name, tensor in self.buffer.read(entries):
                if name not in self.weights:
                    self.weights[name] = torch.empty_like(tensor)
                self.weights[name].copy_(tensor)
        elif route == "digest":
            return {"digest": weights_digest(self.weights.items())}
        elif route == "forget":
            self.weights, self.buffer = {}, None
        return {}


def serve_consumers(num_consumers: int) -> None:
    """So many consumers, on ports that the first line of the output names; ends with its standard input."""
    ports = []
    for _ in range(num_consumers):
        consumer = Consumer()

        class Handler(BaseHTTPRequestHandler):
            own = consumer

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"] or 0))
                answer = json.dumps(self.own.answer(self.path.strip("/"), json.loads(text or "{}") or {})).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: Any) -> None:
                """Nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        ports.append(server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    serve_consumers(int(sys.argv[1]))
