"""Rollout servers as processes: options, key, life and death. One test starts a real vLLM server."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from fixtures.configs import model_folder
from fixtures.dry_runs import write_rows
from fixtures.launching import ROOT, environment, group_members, is_over, wait_until
from fixtures.stand_in_server import KEY, server_process, stand_in
from fixtures.tiny_models import save_vision_model

from mmr1_ds.commands import cli, serve
from mmr1_ds.config import DataConfig, ModelConfig, RolloutConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.errors import UserError
from mmr1_ds.rollout.options import engine_options, image_bounds
from mmr1_ds.rollout.servers import process as module
from mmr1_ds.rollout.servers.address import ServerPort
from mmr1_ds.rollout.servers.guard import ServerGuard
from mmr1_ds.rollout.servers.process import ExternalServer, server_arguments


def wait_until_ready(server) -> None:
    wait_until(server.is_ready, 30, "the server answers")


# --- the guard ----------------------------------------------------------------------------------------------------


def ask_guard(monkeypatch, kind="http", authorization=(), extensions=None, key=KEY):
    """What an application behind the guard sees of a request, and what the client gets."""
    monkeypatch.setenv("MMR1_DS_SERVER_KEY", key)
    passed, sent = [], []

    async def application(scope, receive, send):
        passed.append(scope)

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"x"), *((b"authorization", value) for value in authorization)]
    scope = {"type": kind, "method": "OPTIONS", "path": "/pause", "headers": headers, "extensions": extensions or {}}
    asyncio.run(ServerGuard(application)(scope, receive, send))
    assert key.encode() not in b"".join(repr(message).encode() for message in sent)
    return len(passed) == 1, sent


RIGHT = f"Bearer {KEY}".encode()
WRONG = [
    [],
    [b""],
    [b"Bearer"],
    [b"Bearer "],
    [KEY.encode()],
    [b"Basic " + KEY.encode()],
    [RIGHT[:-1]],
    [RIGHT + b"x"],
    [RIGHT.swapcase()],
    ["Bearer schlüssel".encode()],
    [RIGHT, RIGHT],
    [b"Bearer other", RIGHT],
]


@pytest.mark.parametrize("authorization", WRONG)
def test_the_guard_refuses(monkeypatch, authorization):
    passed, (start, body) = ask_guard(monkeypatch, authorization=authorization)
    assert not passed
    assert (start["status"], body["body"]) == (401, b'{"error":"unauthorized"}')
    passed, sent = ask_guard(monkeypatch, "websocket", authorization)
    assert not passed and [message["type"] for message in sent] == ["websocket.close"]
    passed, (start, _) = ask_guard(monkeypatch, "websocket", authorization, {"websocket.http.response": {}})
    assert not passed and start["status"] == 401


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_guard_lets_the_key_pass(monkeypatch, kind):
    assert ask_guard(monkeypatch, kind, [RIGHT]) == (True, [])
    assert ask_guard(monkeypatch, kind, [b"bearer " + KEY.encode()]) == (True, [])
    assert ask_guard(monkeypatch, "lifespan") == (True, [])  # the server's own


def test_there_is_no_guard_without_a_key(monkeypatch):
    for unset in (lambda: monkeypatch.delenv("MMR1_DS_SERVER_KEY", raising=False), lambda: None):
        monkeypatch.setenv("MMR1_DS_SERVER_KEY", "")
        unset()
        with pytest.raises(RuntimeError, match="MMR1_DS_SERVER_KEY is not set"):
            ServerGuard(None)


# --- options ------------------------------------------------------------------------------------------------------


def test_options_on_the_command_line():
    options = {"max_num_seqs": 7, "enforce_eager": True, "trust_remote_code": False, "hf_overrides": {"a": 1}}
    options |= {"lora_target_modules": ["a", "b"]}
    assert server_arguments(options) == [
        "--max-num-seqs", "7", "--enforce-eager", "--no-trust-remote-code", "--hf-overrides", '{"a": 1}',
        "--lora-target-modules", "a", "b",
    ]  # fmt: skip


def test_a_server_is_ready_for_adapters_where_syncs_bring_them_alone(tmp_path):
    plain = server_process(tmp_path / "log")
    assert "--enable-lora" not in plain.command
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in plain.environment
    server = server_process(tmp_path / "log", adapted=("layers.0.q_proj", "layers.1.q_proj", "layers.1.up_proj"))
    assert "--enable-lora" in server.command and server.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    where = server.command.index("--lora-target-modules")
    assert server.command[where + 1 : where + 3] == ["q_proj", "up_proj"]
    assert server.command[server.command.index("--max-lora-rank") + 1] == "8"  # the next that vLLM has


def test_the_key_is_in_the_environment_alone_and_the_server_is_no_rank(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_API_KEY", "of the user")
    server = server_process(tmp_path / "log")
    assert not any(KEY in word for word in server.command)
    assert server.environment["MMR1_DS_SERVER_KEY"] == server.environment["VLLM_API_KEY"] == KEY
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & set(server.environment)
    assert server.command[server.command.index("--host") + 1] == "127.0.0.1"
    assert '{"backend": "shared_memory"}' in server.command
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in server.environment


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "2,3"), ("0,1", "2,3"), ("4,5,GPU-aa,7", "GPU-aa,7"), ("", "2,3")]
)
def test_the_gpus_of_a_server(tmp_path, monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    server = server_process(tmp_path / "log", on_gpu=True, devices=(2, 3), tensor_parallel_size=2)
    assert server.environment["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.setenv("MMR1_DS_VISIBLE_DEVICES", "4,5,6,7")  # what launch/train.sh found
    server = server_process(tmp_path / "log", on_gpu=True, devices=(2, 3), tensor_parallel_size=2)
    assert server.environment["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert server.num_workers == 2
    assert '{"backend": "nccl"}' in server.command
    assert "--distributed-executor-backend" not in server.command  # vLLM's choice
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in server.environment
    server = server_process(tmp_path / "log", on_gpu=True, devices=(0,), weight_transfer="ipc")
    assert server.environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_every_interface_is_a_choice_that_is_warned_of(tmp_path, caplog):
    server = server_process(tmp_path / "log", server_host="0.0.0.0")
    assert "can be reached from every network" in caplog.text and "name the address" in caplog.text
    assert urlsplit(server.url).hostname == socket.gethostname().lower()
    caplog.clear()
    server_process(tmp_path / "log")
    assert caplog.text == ""


def test_a_host_that_is_not_here(tmp_path):
    with pytest.raises(UserError, match=r"server_host=192\.0\.2\.77: Cannot assign requested address"):
        server_process(tmp_path / "log", server_host="192.0.2.77")


def test_a_port_is_held_for_the_server_alone():
    port = ServerPort("127.0.0.1")
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 20000 <= port.number < lowest_outgoing  # no outgoing connection takes it
    with socket.socket() as stranger, pytest.raises(OSError, match="already in use"):
        stranger.bind(("127.0.0.1", port.number))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port.number))
        server.listen()
        with pytest.raises(UserError, match=f"cannot listen on port {port.number} .*already in use; give another"):
            ServerPort("127.0.0.1", port.number)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port.number))  # held, not answered
    port.release()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port.number))


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "nul\0"])
def test_a_key_that_no_header_can_carry(key):
    with pytest.raises(UserError) as caught:
        module.check_key(key, "THE_KEY")
    assert key not in str(caught.value) and "THE_KEY" in str(caught.value)
    module.check_key(KEY, "THE_KEY")


# --- life and death -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A stand-in that answers, for tests that leave it as it is."""
    server = stand_in(tmp_path_factory.mktemp("running") / "log")
    server.start()
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.stop()


def test_a_server_starts_restarts_at_its_address_and_ends(tmp_path):
    server = stand_in(tmp_path / "logs" / "server.log")
    assert not server.is_running() and not server.is_ready()
    server.start()
    try:
        url, first = server.url, server.process_group
        wait_until_ready(server)
        assert len(group_members(first)) == 3  # the minder, the server, its child
        server.restart()
        assert group_members(first) == []
        wait_until_ready(server)
        assert server.url == url and server.is_running()
        second = server.process_group
    finally:
        server.stop()
    assert group_members(second) == [] and not server.is_running() and not server.is_ready()
    log = (tmp_path / "logs" / "server.log").read_text()
    assert log.count(f"starting {url}") == 2 and KEY not in log
    server.stop()  # once more does no harm


def test_a_server_that_is_stopped_frees_its_port(tmp_path):
    server = server_process(tmp_path / "log")
    server.stop()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", urlsplit(server.url).port))


def test_a_server_deaf_to_sigint_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
    server = stand_in(tmp_path / "log", "deaf")
    server.start()
    group = server.process_group
    wait_until_ready(server)
    server.stop()
    assert group_members(group) == []
    assert "killing it" in (tmp_path / "log").read_text()


def test_the_signals_of_a_job_manager_do_not_reach_a_server(running):
    """The trainer has them too, and may need the server until it has saved."""
    members = group_members(running.process_group)
    assert len(members) == 3  # the minder, the server and its own child
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for pid in members:
            os.kill(pid, number)
    assert running.is_ready()  # an answer: what was sent before has been dealt with
    assert group_members(running.process_group) == members


@pytest.mark.parametrize("victim", ["server", "minder"])
def test_what_is_left_of_a_killed_server_is_ended(tmp_path, victim):
    server = stand_in(tmp_path / "log")
    server.start()
    try:
        wait_until_ready(server)
        group = server.process_group
        [child] = psutil.Process(group).children()
        os.kill(group if victim == "minder" else child.pid, signal.SIGKILL)
        wait_until(lambda: not server.is_running(), 30, "the death is seen")
        if victim == "server":
            assert group_members(group) == []
            assert "exit code -9" in server.last_words()
        else:
            wait_until(lambda: not child.is_running() or is_over(child), 30, "the server ends with its minder")
    finally:
        server.stop()
    assert group_members(group) == []


def test_a_killed_owner_leaves_no_process(tmp_path):
    program = ROOT / "tests" / "programs" / "owned_server.py"
    command = [sys.executable, str(program), str(tmp_path / "log")]
    with subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        url, group = owner.stdout.readline().split()
        members = group_members(int(group))
        owner.kill()
    assert len(members) == 3
    wait_until(lambda: group_members(int(group)) == [], 30, "all of the server ends")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port))


def test_a_server_that_does_not_start_is_explained(tmp_path):
    log = tmp_path / "log"
    log.write_text("KeyError: of an earlier run\n")
    server = stand_in(log, "dies")
    server.start()
    wait_until(lambda: not server.is_running(), 30, "it ends")
    assert server.last_words() == f"its log {log} ends with: ValueError: no such model"
    server.stop()


def test_a_server_of_somebody_else(running, tmp_path):
    nobody = ExternalServer(server_process(tmp_path / "log").url, KEY)
    assert not nobody.is_ready() and "no answer to /health" in nobody.last_words()
    external = ExternalServer(running.url + "/", KEY)
    assert external.is_ready() and external.is_running() and external.num_workers == 3
    stranger = ExternalServer(running.url, "another")
    assert not stranger.is_ready() and "refuses the key" in stranger.last_words()
    external.restart()
    external.stop()
    assert running.is_ready()  # it is not ours to end


# --- mmr1-ds serve ------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path):
    return [
        "worker.actor.model.model_path=org/model",
        f"data.train_files={write_rows(tmp_path)}",
        "data.prompt_key=problem",
    ]


@pytest.mark.parametrize(
    ("key", "settings", "message"),
    [
        ("", [], "MMR1_DS_SERVER_KEY (worker.rollout.server_key_variable) is not set; export a secret"),
        ("a b", [], "MMR1_DS_SERVER_KEY holds a space"),
        (KEY, ["worker.rollout.server_devices=[1,2]"], "a server takes tensor_parallel_size=1 GPU(s)"),
        (KEY, ["worker.rollout.sede=3"], "unknown key worker.rollout.sede"),
        (KEY, ["worker.rollout.tensor_parallel_size=0"], "tensor_parallel_size must be"),
        (KEY, ["data.train_files="], "data.train_files"),
        (KEY, ["worker.actor.model.model_path=/no/such/folder"], "no such folder"),
        (KEY, ["port=8001"], "unknown key port in the command line"),
        (KEY, ["--port=0"], "--port=0 must be in [1, 65535]"),
        (KEY, ["--port=70000"], "--port=70000 must be in [1, 65535]"),
        (KEY, ["--port=TAKEN"], "already in use; give another port"),
        (KEY, ["worker.rollout.server_host=no.such.host.invalid"], "server_host=no.such.host.invalid is unknown"),
    ],
)
def test_serve_names_the_mistake_first(arguments, monkeypatch, capfd, key, settings, message):
    monkeypatch.setenv("MMR1_DS_SERVER_KEY", key)
    monkeypatch.setattr(serve, "_Signals", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = [word.replace("TAKEN", str(taken.getsockname()[1])) for word in settings]
        assert cli.main(["serve", *arguments, "--port=21777", *settings]) == 2
    error = capfd.readouterr().err
    assert error.startswith("mmr1-ds: error: ") and message in error and error.count("\n") == 1
    assert not key or key not in error


def test_serve_refuses_what_is_longer_than_the_model_s_positions_and_warns_of_no_key_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MMR1_DS_SERVER_KEY", KEY)
    settings = [model_folder(tmp_path, max_position_embeddings=1000), "worker.rollout.server_host=127.0.0.2"]
    with pytest.raises(UserError, match="512 \\+ 512 = 1024, the model has 1000 positions"):
        serve.read(settings, 8000)
    assert load_config(settings).warnings  # the training's are those of a run without servers
    warned = []
    monkeypatch.setattr(serve.logger, "warning", lambda *words: warned.append(words))
    with pytest.raises(UserError, match=r"data\.train_files"):
        serve.read([*settings, "data.max_response_length=64"], 8000)
    assert warned == []


class Stopping:
    """Stands in for the signals: SIGTERM comes as soon as the server is ready."""

    received = signal.SIGTERM

    def __init__(self, server):
        self._server = server

    def wait(self, seconds):
        return self._server.is_ready()


def test_serve_tells_the_address_and_ends_the_server(tmp_path, capfd):
    server = stand_in(tmp_path / "log")
    assert serve.run(server, 30, Stopping(server)) == 0
    assert not server.is_running()
    out = capfd.readouterr().out
    assert out in ("", f"rollout server ready: {server.url}\n")


def test_serve_says_why_a_server_does_not_start(tmp_path, capfd):
    server = stand_in(tmp_path / "log", "dies")
    assert serve.run(server, 30, Stopping(server)) == 1
    assert "ends with: ValueError: no such model" in capfd.readouterr().err


# --- a real server ------------------------------------------------------------------------------------------------


def ask(url, method, path, key=None, body=None):
    """Status and body."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def websocket_status(url, path, key=None):
    """The status of the answer to a websocket's opening handshake."""
    authorization = "" if key is None else f"Authorization: Bearer {key}\r\n"
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 10) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{authorization}"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        return int(connection.recv(100).split()[1])


def processes_of(root: int) -> dict[int, str]:
    """A process and all below it, with their command lines."""
    owner = psutil.Process(root)
    found = {}
    for process in (owner, *owner.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            found[process.pid] = " ".join(process.cmdline())
    return found


@pytest.mark.nightly
def test_a_real_server(tmp_path):
    """`mmr1-ds serve`: its options, its guard on every route, its restart after a SIGKILL, its end with its owner."""
    model = save_vision_model(tmp_path / "model")
    port = ServerPort("127.0.0.1")
    port.release()
    url = f"http://127.0.0.1:{port.number}"
    command = [
        sys.executable, "-m", "mmr1_ds.commands.cli", "serve", f"--port={port.number}",
        f"worker.actor.model.model_path={model}",
        "worker.rollout.limit_images=2",
        "worker.rollout.kv_cache_gb=1",
        "worker.rollout.enforce_eager=true",
        "worker.rollout.max_num_seqs=5",
        "worker.rollout.server_key_variable=A_KEY",
        "data.max_prompt_length=150",
        "data.max_response_length=50",
        f"trainer.run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    output = (tmp_path / "output").open("w")
    with subprocess.Popen(
        command, env=environment(A_KEY=KEY), cwd=ROOT, stdout=subprocess.PIPE, stderr=output, text=True
    ) as owner:
        try:
            assert owner.stdout.readline() == f"rollout server ready: {url}\n", (tmp_path / "output").read_text()
            [log] = (tmp_path / "run" / "servers").glob("*.log")
            check_options(log.read_text(), model)
            check_guard(url, log.read_text())
            check_answers(url)
            members = processes_of(owner.pid)
            assert len(members) > 3
            assert not any(KEY in line for line in members.values())
            check_restart(url, members, owner.pid)
        finally:
            members = processes_of(owner.pid)
            owner.kill()
    wait_until(lambda: not any(map(psutil.pid_exists, members)), 30, "all of the server ends")
    assert KEY not in log.read_text() + (tmp_path / "output").read_text()
    output.close()


def check_options(log, model):
    """vLLM's own account of what it was given, against what an engine inside a rank is given."""
    given = re.search(r"non-default args: (\{.*\})", log)[1]
    rollout = RolloutConfig(limit_images=2, kv_cache_gb=1, enforce_eager=True, max_num_seqs=5)
    data = DataConfig(max_prompt_length=150, max_response_length=50)
    model_config = ModelConfig(model_path=str(model))
    images = image_bounds(PromptEncoder(model_config, data), 0)
    options = engine_options(rollout, model_config, data, on_gpu=False, images=images)
    said = {name for name in options if f"'{name}': " in given}
    assert {name for name in said if f"'{name}': {options[name]!r}" not in given} == set()
    assert {"max_model_len", "max_num_seqs", "dtype", "enforce_eager", "logprobs_mode"} <= said
    assert {"limit_mm_per_prompt", "mm_processor_kwargs"} <= said


def check_guard(url, log):
    routes = re.findall(r"Route: (\S+), Methods: (.*)", log)
    paths = {path for path, _ in routes}
    assert len(paths) > 40
    assert {"/pause", "/resume", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"} < paths
    assert {"/finish_weight_update", "/inference/v1/generate", "/v1/completions", "/health", "/collective_rpc"} < paths
    asked = [(method, path) for path, methods in routes for method in methods.split(", ")]
    others = ["/metrics", "/docs", "/openapi.json", "/", "/no/such/route", "//pause", "/v1/realtime"]
    asked += [(method, path) for path in (*paths, *others) for method in ("OPTIONS", "HEAD", "GET", "POST")]
    for method, path in asked:
        for key in (None, KEY[:-1]):
            assert ask(url, method, path, key)[0] == 401, (method, path, key)
    assert websocket_status(url, "/v1/realtime") == websocket_status(url, "/pause", "wrong") == 401
    assert websocket_status(url, "/v1/realtime", KEY) != 401
    for path in paths:  # nothing is done by an OPTIONS
        assert ask(url, "OPTIONS", path, KEY)[0] != 401, path
    assert ask(url, "GET", "/is_paused", KEY) == (200, b'{"is_paused":false}')  # none of the above got through
    assert ask(url, "GET", "/health", KEY)[0] == ask(url, "GET", "/metrics", KEY)[0] == 200


def check_answers(url):
    """Response k of a request with seed s is that of a request with seed s + k."""

    def sample(num_responses, seed):
        settings = {"n": num_responses, "seed": seed, "max_tokens": 6, "logprobs": 0, "detokenize": False}
        body = {"token_ids": [3, 1, 4, 1, 5], "sampling_params": settings, "priority": 1}
        status, answer = ask(url, "POST", "/inference/v1/generate", KEY, body)
        assert status == 200, answer
        return [
            (choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]])
            for choice in json.loads(answer)["choices"]
        ]

    assert sample(3, 11) == [*sample(1, 11), *sample(1, 12), *sample(1, 13)]


def check_restart(url, members, owner):
    """A SIGKILL of the engine: the server goes, and is back at its address with nothing left of the first."""
    [engine] = [pid for pid, line in members.items() if "EngineCore" in line]
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in members if pid != owner), 60, "the old server ends")
    wait_until(ExternalServer(url, KEY).is_ready, 180, "the server is back")
