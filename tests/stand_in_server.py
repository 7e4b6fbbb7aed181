"""What stands in for vLLM where a test is about processes: it answers /health and has a child, as vLLM has."""

import sys
from pathlib import Path
from typing import Any

from mmr1_ds.config import DataConfig, ModelConfig, RolloutConfig
from mmr1_ds.rollout.server_process import ServerProcess

KEY = "a-key-for-tests"

PROGRAM = """
import http.server, os, signal, socketserver, subprocess, sys
port, mode = int(sys.argv[1]), sys.argv[2]
if mode == "dies":
    sys.exit("ValueError: no such model\\nRuntimeError: Engine core failed. See root cause above.")
if mode == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        key = "Bearer " + os.environ["MMR1_DS_SERVER_KEY"]
        self.send_response(200 if self.headers["Authorization"] == key else 401)
        self.end_headers()
        if self.path == "/get_world_size":
            self.wfile.write(b'{"world_size": 3}')
    def log_message(self, *arguments):
        pass

class Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = True

Server(("127.0.0.1", port), Handler).serve_forever()
"""


def server_process(log: Path, *, on_gpu: bool = False, devices: tuple[int, ...] = (), **settings: Any) -> ServerProcess:
    """A server of a model that is nowhere: nothing is loaded before it starts. settings: of worker.rollout."""
    return ServerProcess(
        RolloutConfig(engine="server", **settings),
        ModelConfig(model_path="/no/such/model"),
        DataConfig(max_prompt_length=33, max_response_length=7),
        number=2,
        key=KEY,
        on_gpu=on_gpu,
        devices=devices,
        is_multimodal=True,
        most_images=3,
        log=log,
    )


def stand_in(log: Path, mode: str = "well") -> ServerProcess:
    """A server process with the program above in place of vLLM. mode: well | dies | deaf (to SIGTERM)."""
    server = server_process(log)
    server._command = [sys.executable, "-c", PROGRAM, server.url.rpartition(":")[2], mode]
    return server
