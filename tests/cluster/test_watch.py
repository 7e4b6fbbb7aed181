"""A lost rank is named on every other rank within the limit, and all end. Real processes, real network."""

import contextlib
import dataclasses
import faulthandler
import hmac
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures.launching import PROGRAMS, environment, processes_with, wait_until

from mmr1_ds.cluster import judgement
from mmr1_ds.cluster import watch as watch_module
from mmr1_ds.cluster.judgement import Heard, Known, Place
from mmr1_ds.cluster.watch import GRACE_SECONDS, Watch, exit_code, report_fault
from mmr1_ds.errors import UserError

LIMIT_SECONDS = 4
SIZE = 3
END_SECONDS = 60  # far beyond what the ranks have: the tests tell a hang, not a slow machine
HOST = re.escape(socket.gethostname())


@dataclass
class Launch:
    """Ranks that run, by rank; None = never started."""

    folder: Path
    processes: list[subprocess.Popen[str] | None]

    def wait_until_met(self) -> None:
        """Returns when all ranks have met, and lets the fault come."""
        running = [process for process in self.processes if process is not None]
        wait_until(
            lambda: (
                all((self.folder / f"{rank}.ready").exists() for rank in range(SIZE))
                or any(process.poll() is not None for process in running)
            ),
            120,
            "the ranks meet",
        )
        assert all(process.poll() is None for process in running), [self.log(rank) for rank in range(SIZE)]
        (self.folder / "go").touch()

    def end(self, rank: int) -> str:
        """The fault that this rank reported, after it has ended, not zero."""
        process = self.processes[rank]
        assert process is not None
        code = process.wait(END_SECONDS)
        assert code == 1, f"rank {rank} exited with {code}:\n{self.log(rank)}"
        reported = re.findall(rf"^mmr1-ds: fault \(rank {rank}, host .*?\): (.*)$", self.log(rank), re.MULTILINE)
        assert len(reported) == 1, self.log(rank)
        return reported[0]

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()

    def stacks(self, rank: int) -> str:
        return (self.folder / "stacks" / f"rank_{rank}.txt").read_text()


@contextlib.contextmanager
def launch(
    folder: Path, fault: str, lost: int, address: str = "127.0.0.1", prefixes: Sequence[Sequence[str]] = ((),) * SIZE,
    limits: str = str(LIMIT_SECONDS),
) -> Iterator[Launch]:
    """Start lost_rank.py on each rank, all but `lost` for a fault of that name; nothing is left at the end.

    prefixes: what runs the command of each rank; limits: seconds of a wait, and after a slash of silence.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    marker = f"MMR1_TEST_LAUNCH={os.getpid()}-{port}"
    processes: list[subprocess.Popen[str] | None] = []
    try:
        for rank in range(SIZE):
            if fault == "never_come" and rank == lost:
                processes.append(None)
                continue
            variables = environment(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(SIZE), MASTER_ADDR=address)
            variables |= {"MASTER_PORT": port, **dict([marker.split("=")])}
            if address != "127.0.0.1":
                variables["GLOO_SOCKET_IFNAME"] = "eth0"
            program = [str(PROGRAMS / "lost_rank.py"), str(folder), limits, fault, str(lost)]
            with (folder / f"{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen([*prefixes[rank], sys.executable, *program], env=variables, stdout=log, stderr=log)
                )
        yield Launch(folder, processes)
        wait_until(
            lambda: len(processes_with(marker)) <= (fault.startswith("stop") or fault == "cut"), 30, "no process left"
        )
    finally:
        for line in processes_with(marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split(":")[0]), signal.SIGKILL)
        for process in processes:
            if process is not None:
                process.kill()
                process.wait()


def seconds_in(message: str) -> float:
    """The longest time that a message names."""
    return max(float(number) for number in re.findall(r"(\d+\.\d) s\b", message))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        ("kill", 1),
        pytest.param("kill", 0, marks=pytest.mark.nightly),
        ("kill_in_update", 1),
        pytest.param("kill_in_count", 0, marks=pytest.mark.nightly),  # the others count in its store
        pytest.param("kill_in_count", 1, marks=pytest.mark.nightly),
    ],
)
def test_a_rank_that_dies_is_named(tmp_path, fault, lost):
    with launch(tmp_path, fault, lost) as run:
        run.wait_until_met()
        others = [rank for rank in range(SIZE) if rank != lost]
        for rank in others:
            message = run.end(rank)
            assert re.search(rf"rank {lost} \(host {HOST}\) is lost: .* in stage 'reward'.* at step 17", message)
            assert seconds_in(message) < LIMIT_SECONDS + GRACE_SECONDS
            assert message.split(";")[0] in run.stacks(rank)
            assert 'lost_rank.py", line' in run.stacks(rank)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        pytest.param("stop", 0, marks=pytest.mark.nightly),
        ("stop_in_update", 1),
        pytest.param("stop_in_count", 0, marks=pytest.mark.nightly),
        pytest.param("stop_in_count", 1, marks=pytest.mark.nightly),
    ],
)
def test_a_rank_that_is_stopped_is_named(tmp_path, fault, lost):
    with launch(tmp_path, fault, lost) as run:
        run.wait_until_met()
        for rank in range(SIZE):
            if rank != lost:
                message = run.end(rank)
                assert re.search(rf"rank {lost} \(host {HOST}\) is lost: no sign of life.* stage 'reward'", message)
                assert seconds_in(message) < LIMIT_SECONDS + GRACE_SECONDS


@pytest.mark.slow
def test_a_silent_rank_is_named_long_before_the_time_limit(tmp_path):
    with launch(tmp_path, "stop", 1, limits="1800/3") as run:
        run.wait_until_met()
        for rank in (0, 2):
            assert f"rank 1 (host {socket.gethostname()}) is lost: no sign of life" in run.end(rank)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.nightly)])
def test_a_rank_that_stalls_is_named_and_shows_where(tmp_path, lost):
    with launch(tmp_path, "stall", lost) as run:
        run.wait_until_met()
        for rank in range(SIZE):  # the stalled one too
            message = run.end(rank)
            found = re.search(rf"rank {lost} \(host {HOST}\) has stalled: (.*) s in stage 'reward' at step 17", message)
            assert float(found[1]) < LIMIT_SECONDS + GRACE_SECONDS
            assert "'gather rewards'" in message
        assert "in stall" in run.stacks(lost)


@pytest.mark.nightly
def test_a_native_call_that_keeps_the_interpreter_is_named_and_ends(tmp_path):
    with launch(tmp_path, "hold_interpreter", 1) as run:
        run.wait_until_met()
        for rank in (0, 2):
            assert f"rank 1 (host {socket.gethostname()}) is lost: no sign of life" in run.end(rank)
        assert run.processes[1].wait(END_SECONDS) == 1
        assert "Timeout (" in run.log(1)
        assert "in run" in run.log(1)


@pytest.mark.slow
def test_ranks_in_different_collectives_are_named_at_once(tmp_path):
    with launch(tmp_path, "call_another", 1) as run:
        run.wait_until_met()
        host = socket.gethostname()
        for rank in range(SIZE):
            assert run.end(rank) == (
                f"the ranks are desynchronised at step 17: rank 1 (host {host}) calls 'count tokens', "
                f"but ranks 0 (host {host}), 2 (host {host}) call 'gather rewards'"
            )


@pytest.mark.slow
def test_a_rank_in_a_collective_that_the_others_do_not_call_is_named(tmp_path):
    with launch(tmp_path, "call_device", 1) as run:
        run.wait_until_met()
        for rank in range(SIZE):
            assert re.search(rf"rank 1 \(host {HOST}\) has stalled: .* in stage 'reward' at step 17", run.end(rank))


@pytest.mark.slow
def test_the_error_of_a_rank_that_gives_up_is_named(tmp_path):
    with launch(tmp_path, "raise", 1) as run:
        run.wait_until_met()
        for rank in (0, 2):
            message = run.end(rank)
            assert re.search(rf"rank 1 \(host {HOST}\) has ended with MemoryError in stage 'reward' at", message)
        assert run.processes[1].wait(END_SECONDS) == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", [2, pytest.param(0, marks=pytest.mark.nightly)])
def test_a_rank_that_never_comes_is_named(tmp_path, lost):
    with launch(tmp_path, "never_come", lost) as run:
        for rank in range(SIZE):
            if rank != lost:
                message = run.end(rank)
                assert message.startswith(f"rank {lost} ")
                assert f"within {LIMIT_SECONDS} s" in message


@pytest.mark.nightly
def test_stacks_on_demand(tmp_path):
    with launch(tmp_path, "none", -1) as run:
        wait_until(lambda: all((tmp_path / f"{rank}.ready").exists() for rank in range(SIZE)), 120, "the ranks meet")
        run.processes[1].send_signal(signal.SIGUSR2)
        wait_until(lambda: "wait_until" in run.stacks(1), 30, "a stack dump")
        (tmp_path / "go").touch()
        assert [process.wait(END_SECONDS) for process in run.processes] == [0, 0, 0]
        assert run.stacks(0) == ""


@pytest.mark.nightly
def test_a_file_system_that_hangs_holds_up_no_end(tmp_path):
    """Every write to the files of the stacks hangs: full FIFOs that nobody reads."""
    (tmp_path / "stacks").mkdir()
    fifos = []
    try:
        for rank in range(SIZE):
            os.mkfifo(tmp_path / "stacks" / f"rank_{rank}.txt")
            fifos.append(os.open(tmp_path / "stacks" / f"rank_{rank}.txt", os.O_RDWR | os.O_NONBLOCK))
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(fifos[-1], bytes(1 << 16))
        with launch(tmp_path, "stall", 1) as run:
            run.wait_until_met()
            for rank in range(SIZE):
                assert re.search(rf"rank 1 \(host {HOST}\) has stalled: .* in stage 'reward' at step 17", run.end(rank))
    finally:
        for fifo in fifos:
            os.close(fifo)


class Store:
    """A store of one process, with what was written last."""

    def __init__(self):
        self.values, self.num_read = {}, 0

    def set(self, key, value):
        self.values[key] = value.encode()

    def check(self, keys):
        return set(keys) <= self.values.keys()

    def multi_get(self, keys):
        self.num_read += len(keys)
        return [self.values[key] for key in keys]

    def get(self, key):
        return self.values[key]


def signed(place, key=b""):
    text = json.dumps(dataclasses.asdict(place))
    return f"{hmac.digest(key, text.encode(), 'sha256').hex()} {text}"


@pytest.mark.parametrize("strange", ["garbage", "{}", "[1]", "\xff", signed(Place(0, "h9", beat=9), b"another run's"),
                                     signed(Place(2, "h9", beat=9))])  # fmt: skip
def test_what_no_rank_of_this_run_wrote_is_ignored_and_logged(strange, caplog):
    store = Store()
    store.set("place/0", signed(Place(0, "h0", beat=1, stage="gen")))
    watch = Watch(1, 2, 10, store)
    try:
        watch.wait_for_all()
        store.set("place/0", strange)
        read = store.num_read
        wait_until(lambda: store.num_read >= read + 4, 30, "further readings")
        store.set("place/0", signed(Place(0, "h0", beat=2, stage="reward")))
        wait_until(lambda: watch.known().others[0].place.stage == "reward", 30, "the rank heard again")
    finally:
        watch.close()
    assert caplog.text.count("that no rank of this run wrote") <= 1
    if strange == "garbage":
        assert "garbage" in caplog.text


class Counted(Store):
    """One rank's connection to a store that several share: how many places it read at its last look."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def multi_get(self, keys):
        self.num_read = len(keys)
        return [self.values[key] for key in keys]


@pytest.mark.parametrize("key", ["", "of this run"])
def test_many_ranks_read_rank_0_alone_until_something_is_unusual(monkeypatch, key):
    monkeypatch.setattr(watch_module, "READ_BY_ALL", 3)
    monkeypatch.setenv(watch_module.KEY_VARIABLE, key)
    values, size = {}, 6
    stores = [Counted(values) for _ in range(size)]
    watches = [Watch(rank, size, 4, store) for rank, store in enumerate(stores)]
    try:
        for each in watches:
            each.wait_for_all()
        wait_until(lambda: all(store.num_read == 2 for store in stores[1:]), 30, "each reads rank 0 and itself")
        assert stores[0].num_read == size
        assert all(heard.seconds_ago < 3 for heard in watches[3].known().others)
        watches[5].close(MemoryError("no room"))
        wait_until(lambda: "rank 5" in judgement.lost(watches[3].known()), 30, "rank 3 hears of rank 5")
        assert "has ended with MemoryError" in judgement.lost(watches[3].known())
    finally:
        for each in reversed(watches):
            each.close()


def test_credentials_in_a_fault_are_reported_to_nobody(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("JUDGE_KEY", "sk-0123456789")
    words = "cannot load https://me:hunter22@data.example/x with sk-0123456789"
    store = Store()
    Watch(1, 2, 10, store).close(UserError(words))
    state = Place.read(store.values["place/1"].partition(b" ")[2]).state
    assert state == "UserError: cannot load https://***@data.example/x with ***"
    watch = Watch(0, 1, 10, None)
    watch.stacks.write_into(tmp_path, signal.SIGUSR2)
    try:
        assert "hunter22" not in str(watch.explain("load", RuntimeError(words)))
        report_fault(0, words)
        watch.stacks.dump(words)
    finally:
        faulthandler.unregister(signal.SIGUSR2)
    written = capfd.readouterr().err + (tmp_path / "rank_0.txt").read_text()
    assert written.count("https://***@data.example/x with ***") == 4  # fault and stacks, twice
    assert "hunter22" not in written and "sk-0123456789" not in written


def test_a_process_that_was_stopped_blames_nobody_for_what_it_missed(monkeypatch):
    """Ten minutes pass at once, in which nothing of this process ran."""
    missed, clock, ended = [0.0], time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: clock() + missed[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    store = Store()
    store.set("place/0", signed(Place(0, "h0")))
    watch = Watch(1, 2, 1800, store, lost_seconds=120)
    try:
        watch.wait_for_all()
        missed[0] = 600.0
        wait_until(lambda: ended or watch.known().others[0].seconds_ago < 10, 30, "the silence is not counted")
        assert judgement.overdue(watch.known()) == ""
    finally:
        watch.close()
    assert ended == []


def test_the_error_of_a_user_is_every_ranks_status():
    ended = Place(1, "h1", state="UserError: no such file")
    facts = Known(Place(0, "h0"), (Heard(ended, 0.1),), 11.0, 0.0, False, 120.0, 1.5, 10.0)
    verdict = judgement.overdue(dataclasses.replace(facts, own=dataclasses.replace(facts.own, collective="meet")))
    assert exit_code(verdict) == 2
    assert exit_code("rank 1 (host h1) is lost") == 1


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, list[str], str]]:
    """Two network namespaces joined by a third, the switch. Yields: its name, the hosts' names, the first's address."""
    names = [f"mmr1-{os.getpid()}-{part}" for part in ("switch", "a", "b")]
    switch, hosts = names[0], names[1:]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for number, host in enumerate(hosts):
                port = f"port{number}"
                _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
                _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
                _ip("-n", host, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
                _ip("-n", host, "link", "set", "eth0", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
        yield switch, hosts, "10.77.0.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_both_sides_of_a_cut_link_name_the_other(tmp_path):
    with two_hosts() as (switch, hosts, address):
        prefixes = []
        for host in (hosts[0], hosts[0], hosts[1]):
            named = ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"]
            prefixes.append(["ip", "netns", "exec", host, *named])
        with launch(tmp_path, "stall", 1, address, prefixes) as run:
            wait_until(lambda: all((tmp_path / f"{rank}.ready").exists() for rank in range(SIZE)), 120, "they meet")
            _ip("-n", switch, "link", "set", "port1", "down")  # packets are dropped; nobody is told
            for rank in (0, 1):
                message = run.end(rank)
                assert f"rank 2 (host {hosts[1]}) is lost: no sign of life" in message
                assert seconds_in(message) < LIMIT_SECONDS + GRACE_SECONDS
            message = run.end(2)
            assert f"rank 0 (host {hosts[0]}) is lost: no sign of life" in message
            assert seconds_in(message) < LIMIT_SECONDS + GRACE_SECONDS
