"""A lost rank is named on every other rank within the limit, and all end. Real processes, real network."""

import contextlib
import dataclasses
import faulthandler
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

from mmr1_ds.cluster.watch import GRACE_SECONDS, Place, Watch, tell_fault
from mmr1_ds.errors import UserError

pytestmark = pytest.mark.cluster

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
        """The fault that this rank told, after it has ended, not zero."""
        process = self.processes[rank]
        assert process is not None
        code = process.wait(END_SECONDS)
        assert code == 1, f"rank {rank} exited with {code}:\n{self.log(rank)}"
        told = re.findall(rf"^mmr1-ds: fault \(rank {rank}, host .*?\): (.*)$", self.log(rank), re.MULTILINE)
        assert len(told) == 1, self.log(rank)
        return told[0]

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()

    def stacks(self, rank: int) -> str:
        return (self.folder / "stacks" / f"rank_{rank}.txt").read_text()


@contextlib.contextmanager
def launch(
    folder: Path, fault: str, lost: int, address: str = "127.0.0.1", prefixes: Sequence[Sequence[str]] = ((),) * SIZE
) -> Iterator[Launch]:
    """Start lost_rank.py on each rank, all but `lost` for a fault of that name; nothing is left at the end.

    prefixes: what runs the command of each rank.
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
            program = [str(PROGRAMS / "lost_rank.py"), str(folder), str(LIMIT_SECONDS), fault, str(lost)]
            with (folder / f"{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen([*prefixes[rank], sys.executable, *program], env=variables, stdout=log, stderr=log)
                )
        yield Launch(folder, processes)
        wait_until(
            lambda: len(processes_with(marker)) <= (fault in ("stop", "stop_in_update", "cut")), 30, "no process left"
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
    """The longest time that a message tells."""
    return max(float(number) for number in re.findall(r"(\d+\.\d) s\b", message))


@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        ("kill", 1),
        pytest.param("kill", 0, marks=pytest.mark.slow),
        pytest.param("kill_in_update", 1, marks=pytest.mark.slow),
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
@pytest.mark.parametrize(("fault", "lost"), [("stop", 0), ("stop_in_update", 1)])
def test_a_rank_that_is_stopped_is_named(tmp_path, fault, lost):
    with launch(tmp_path, fault, lost) as run:
        run.wait_until_met()
        for rank in range(SIZE):
            if rank != lost:
                message = run.end(rank)
                assert re.search(rf"rank {lost} \(host {HOST}\) is lost: no sign of life.* stage 'reward'", message)
                assert seconds_in(message) < LIMIT_SECONDS + GRACE_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_a_rank_that_stalls_is_named_and_shows_where(tmp_path, lost):
    with launch(tmp_path, "stall", lost) as run:
        run.wait_until_met()
        for rank in range(SIZE):  # the stalled one too
            message = run.end(rank)
            found = re.search(rf"rank {lost} \(host {HOST}\) has stalled: (.*) s in stage 'reward' at step 17", message)
            assert float(found[1]) < LIMIT_SECONDS + GRACE_SECONDS
            assert "'gather rewards'" in message
        assert "in stall" in run.stacks(lost)


@pytest.mark.slow
def test_a_native_call_that_keeps_the_interpreter_is_named_and_ends(tmp_path):
    with launch(tmp_path, "hold_interpreter", 1) as run:
        run.wait_until_met()
        for rank in (0, 2):
            assert f"rank 1 (host {socket.gethostname()}) is lost: no sign of life" in run.end(rank)
        assert run.processes[1].wait(END_SECONDS) == 1
        assert "Timeout (" in run.log(1)
        assert "in run" in run.log(1)


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
@pytest.mark.parametrize("lost", [2, 0])
def test_a_rank_that_never_comes_is_named(tmp_path, lost):
    with launch(tmp_path, "never_come", lost) as run:
        for rank in range(SIZE):
            if rank != lost:
                message = run.end(rank)
                assert message.startswith(f"rank {lost} ")
                assert f"within {LIMIT_SECONDS} s" in message


@pytest.mark.slow
def test_stacks_on_demand(tmp_path):
    with launch(tmp_path, "none", -1) as run:
        wait_until(lambda: all((tmp_path / f"{rank}.ready").exists() for rank in range(SIZE)), 120, "the ranks meet")
        run.processes[1].send_signal(signal.SIGUSR2)
        wait_until(lambda: "wait_until" in run.stacks(1), 30, "a stack dump")
        (tmp_path / "go").touch()
        assert [process.wait(END_SECONDS) for process in run.processes] == [0, 0, 0]
        assert run.stacks(0) == ""


@pytest.mark.slow
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


def watched(places: dict[int, Place], own: int, seconds: float = 10.5) -> Watch:
    """The watch of rank `own`, which has waited so long, and has just heard of the others."""
    watch, now = Watch(own, len(places), 10, None), time.monotonic()
    place = places[own]
    watch.step, watch._number, watch._collective = place.step, place.number, place.collective
    watch._stage, watch._stage_since, watch._waiting_since = place.stage, now - place.stage_seconds, now - seconds
    watch._places = {rank: (place, now) for rank, place in places.items()}
    return watch


def at(rank: int, stage: str, seconds: float, number: int, collective: str = "", step: int = 5) -> Place:
    return Place(rank, f"h{rank}", 9, "running", step, stage, seconds, number, collective)


def named(words: str) -> list[int]:
    return [int(rank) for rank in re.findall(r"rank (\d+) \(host", words.split("; told by")[0])]


@pytest.mark.parametrize("own", [0, 2, 3])
def test_ranks_that_wait_in_a_group_or_in_a_later_collective_are_not_named(own):
    """Groups of two: 0 waits for 1, which stalls, in their group; 2 and 3 are done with theirs."""
    places = {
        0: at(0, "old", 10.5, 7, "gather sequences of a group"),
        1: at(1, "old", 11.0, 7),
        2: at(2, "update_actor", 10.2, 8, "count response tokens"),
        3: at(3, "update_actor", 10.2, 8, "count response tokens"),
    }
    words = watched(places, own)._overdue()
    assert re.match(r"rank 1 \(host h1\) has stalled: 11\.\d s in stage 'old' at step 5; told by", words)
    assert named(words) == [1]


def test_two_ranks_that_stall_are_named_both():
    places = {0: at(0, "old", 10.5, 8, "count"), 1: at(1, "gen", 11.0, 7), 2: at(2, "gen", 12.0, 7)}
    assert named(watched(places, 0)._overdue()) == [1, 2]


@pytest.mark.parametrize(
    ("heard_ago", "answered_ago", "lost"),
    [({0: 14, 1: 14, 3: 15}, 14, [0]), ({0: 1, 1: 0, 3: 14}, 0, [3]), ({0: 20, 1: 14, 3: 30}, 14, [0])],
)
def test_silence_after_the_stores_end_is_not_the_others(heard_ago, answered_ago, lost):
    watch, now = watched({rank: at(rank, "gen", 1.0, 7) for rank in range(4)}, 2), time.monotonic()
    watch._places |= {rank: (watch._places[rank][0], now - ago) for rank, ago in heard_ago.items()}
    watch._answered = now - answered_ago
    assert named(watch._lost()) == lost
    assert named(watch._overdue()) == lost


def test_rank_0_that_ended_with_an_error_is_named_alone():
    """Its store ended with it, 14 seconds ago: nothing was heard of anyone since."""
    places = {rank: at(rank, "gen", 1.0, 7) for rank in range(4)}
    places[0] = dataclasses.replace(places[0], state="MemoryError")
    watch, now = watched(places, 2), time.monotonic()
    watch._places = {rank: (place, now - 14) for rank, place in places.items()}
    watch._answered, watch._store_is_lost = now - 13.5, True
    assert watch._lost() == "rank 0 (host h0) has ended with MemoryError in stage 'gen' at step 5"
    assert named(watch._overdue()) == [0]


def test_where_a_collective_of_deepspeed_fails_the_ranks_elsewhere_are_named():
    """A rank in such a collective tells of none."""
    places = {rank: at(rank, "update_actor", 3.0, 7) for rank in range(4)}
    places[3] = at(3, "old", 11.0, 7)
    words = watched(places, 0)._astray_or_all()
    assert re.fullmatch(
        r"elsewhere than rank 0 \(host .*?\): rank 3 \(host h3\) for 11\.\d s in stage 'old' at step 5", words
    )
    places[3] = at(3, "update_actor", 11.0, 7, step=4)
    assert "rank 3 (host h3) for 11.0 s in stage 'update_actor' at step 4" in watched(places, 1)._astray_or_all()


def test_where_a_collective_of_deepspeed_fails_in_one_stage_every_place_is_told():
    places = {0: at(0, "update_actor", 3.0, 7), 1: at(1, "update_actor", 4.0, 7), 2: at(2, "update_actor", 5.0, 7)}
    words = watched(places, 1)._astray_or_all()
    assert named(words) == [0, 1, 2]
    assert "rank 2 (host h2) for 5.0 s in stage 'update_actor' at step 5" in words


def test_where_an_announced_collective_fails_the_rank_behind_is_named():
    places = {0: at(0, "old", 10.5, 8, "count"), 1: at(1, "old", 11.0, 7), 2: at(2, "old", 10.0, 8, "count")}
    assert named(watched(places, 0)._astray_or_all()) == [1]


def test_credentials_in_a_fault_are_told_to_nobody(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("JUDGE_KEY", "sk-0123456789")
    told = "cannot load https://me:hunter22@data.example/x with sk-0123456789"
    watch = Watch(0, 1, 10, None)
    watch.stacks.write_into(tmp_path, signal.SIGUSR2)
    try:
        watch._store, watch._rank = object(), 1  # something to tell, without threads
        watch.close(UserError(told))
        assert watch._state == "UserError: cannot load https://***@data.example/x with ***"
        watch._store = None
        assert "hunter22" not in str(watch.explain("load", RuntimeError(told)))
        tell_fault(0, told)
        watch.stacks.dump(told)
    finally:
        faulthandler.unregister(signal.SIGUSR2)
    written = capfd.readouterr().err + (tmp_path / "rank_0.txt").read_text()
    assert written.count("https://***@data.example/x with ***") == 4  # fault and stacks, twice
    assert "hunter22" not in written and "sk-0123456789" not in written


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
