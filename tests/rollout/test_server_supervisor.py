"""The supervisor against servers of no weight: what it starts, when, and what it says of it."""

import threading
from itertools import pairwise

import pytest
from fixtures.launching import wait_until

from mmr1_ds.rollout.servers.supervisor import Supervisor


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Server:
    """Notes what is asked of it; lives and answers as the test says."""

    num_workers = 2

    def __init__(self, number):
        self.url = f"http://127.0.0.1:{9000 + number}"
        self.calls, self.lives, self.answers, self.complains = [], True, False, ""

    def start(self):
        self.calls.append("start")

    def restart(self):
        self.calls.append("restart")
        self.lives, self.answers, self.complains = True, False, ""

    def is_running(self):
        return self.lives

    def is_ready(self):
        return self.lives and self.answers

    def complaint(self):
        return self.complains

    def last_words(self):
        return "log: out of memory"

    def stop(self):
        self.calls.append("stop")


@pytest.fixture
def watched():
    servers, clock = [Server(0), Server(1)], Clock()
    supervisor = Supervisor(servers, 60.0, clock)

    def look(times=1):
        for _ in range(times):
            supervisor.look()

    look()
    return supervisor, servers, clock, look


def addresses(supervisor):
    return [(address.number, address.generation) for address in supervisor.ready()]


def test_servers_are_ready_when_they_answer(watched):
    supervisor, servers, _, look = watched
    assert addresses(supervisor) == []
    servers[1].answers = True
    look()
    assert addresses(supervisor) == [(1, 1)]
    (address,) = supervisor.ready()
    assert (address.url, address.num_workers) == ("http://127.0.0.1:9001", 2)
    assert supervisor.failed_start() == "" and supervisor.num_restarts == 0


@pytest.mark.parametrize("fault", ["dead", "complaint", "own complaint"])
def test_a_server_that_fails_is_started_anew_once(watched, fault, caplog):
    supervisor, servers, clock, look = watched
    servers[0].answers = servers[1].answers = True
    look()
    if fault == "dead":
        servers[0].lives = False
    elif fault == "own complaint":  # the front end of an engine that died
        servers[0].complains = "it answers 503 to /health"
        clock.now += 10
    else:
        supervisor.complain({0: (1, "no sign of life for 60 s")})
        assert addresses(supervisor) == [(1, 1)]  # at once, for all
    look(3)
    assert servers[0].calls == ["start", "restart"] and servers[1].calls == ["start"]
    assert addresses(supervisor) == [(1, 1)]
    assert "rollout server 0 (http://127.0.0.1:9000): " in caplog.text and "out of memory" in caplog.text
    servers[0].answers = True
    look()
    assert addresses(supervisor) == [(0, 2), (1, 1)]  # another generation: it has no weights
    supervisor.complain({0: (1, "late news of the one before")})
    look()
    assert addresses(supervisor) == [(0, 2), (1, 1)]
    assert supervisor.num_restarts == 1


def test_a_server_that_falls_over_again_is_given_longer_each_time(watched):
    _, servers, clock, look = watched
    servers[0].answers = servers[1].answers = True
    look()
    starts = []
    for _ in range(400):
        servers[0].lives = False
        before = len(servers[0].calls)
        look()
        if len(servers[0].calls) > before:
            starts.append(clock.now)
        clock.now += 0.5
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[:5] == sorted(pauses[:5]) and pauses[0] < 5 and max(pauses) <= 61
    assert len(starts) < 12


def test_one_that_does_not_answer_in_time_is_started_anew_and_told(watched):
    supervisor, servers, clock, look = watched
    servers[1].answers = True
    clock.now += 59
    look()
    assert supervisor.failed_start() == ""
    clock.now += 2
    look()
    told = supervisor.failed_start()
    assert "rollout server 0 (http://127.0.0.1:9000) did not start" in told and "60 s" in told and "memory" in told
    assert servers[0].calls == ["start"]  # after a pause
    clock.now += 1.5
    look()
    assert servers[0].calls == ["start", "restart"]


def test_closing_ends_every_server():
    servers = [Server(0), Server(1)]
    supervisor = Supervisor(servers, 60.0)
    supervisor.start()
    supervisor.close()
    assert [server.calls[-1] for server in servers] == ["stop", "stop"]
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout servers"]


def raises(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize("asked", ["start", "is_ready"])
def test_what_nobody_expected_is_the_end_of_a_start_and_not_of_the_watch(asked, caplog):
    """A log that cannot be written, an answer that is no JSON: the run waits for `failed_start` or for servers."""
    servers = [Server(0), Server(1)]
    real = getattr(servers[0], asked)
    setattr(servers[0], asked, raises(OSError(28, "No space left on device")))
    servers[1].answers = True
    supervisor = Supervisor(servers, 60.0)
    supervisor.start()
    try:
        wait_until(supervisor.failed_start, 30, "the start that failed")
        assert "rollout server 0 (http://127.0.0.1:9000) did not start: OSError" in supervisor.failed_start()
        wait_until(lambda: addresses(supervisor) == [(1, 1)], 30, "the other server")
        setattr(servers[0], asked, real)
        servers[0].answers = True
        wait_until(lambda: addresses(supervisor) == [(0, 1), (1, 1)], 30, "the watch is at work still")
    finally:
        supervisor.close()
    assert [record.getMessage().count("cannot be attended to") for record in caplog.records].count(1) == 1
