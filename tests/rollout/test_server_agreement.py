"""Three ranks, in threads, that use the same servers: they agree on which, and send the weights together."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from fixtures.scripted_server import EOS, FORBIDDEN, KEY, VOCABULARY, scripted_servers, tokens_of
from fixtures.server_requests import SETTINGS, body_of, is_its_own, requests

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.config import RunConfig
from mmr1_ds.errors import UserError
from mmr1_ds.records import WeightInfo
from mmr1_ds.rollout.base import ServersGone, generate
from mmr1_ds.rollout.servers import engine as server_engine
from mmr1_ds.rollout.servers import group as server_group
from mmr1_ds.rollout.servers import supervisor as server_supervisor
from mmr1_ds.rollout.servers.engine import ServerRollout

RANKS = 3


class Rank:
    """One rank in a thread; all must be at the same stage."""

    on_gpu = False

    def __init__(self, rank, barrier, slots):
        self.rank, self.size, self._barrier, self._slots = rank, RANKS, barrier, slots

    def all_gather_objects(self, value, stage):
        self._slots[self.rank] = (stage, value)
        self._barrier.wait(20)
        found = list(self._slots)
        self._barrier.wait(20)
        assert len({name for name, _ in found}) == 1, found
        return [value for _, value in found]

    def max(self, values, stage):
        found = self.all_gather_objects(values, stage)
        return {name: max(one[name] for one in found) for name in values}

    def sum(self, values, stage):
        found = self.all_gather_objects(values, stage)
        return {name: sum(one[name] for one in found) for name in values}


class Watched:
    """A scripted server as the supervisor sees it; it comes back from a restart when the test says so."""

    num_workers = 1

    def __init__(self, server):
        self.server, self.url, self.num_starts = server, server.url, 0
        self.is_up = self.may_come_back = True

    def start(self):
        self.num_starts += 1

    def restart(self):
        self.num_starts += 1
        if self.may_come_back:
            self.server.script, self.server.lives, self.server.version = lambda body: None, True, "default"
            self.is_up = True

    def is_running(self):
        return True

    def is_ready(self):
        return self.is_up

    def complaint(self):
        return ""

    def last_words(self):
        return "its log ends with: out of memory"

    def stop(self):
        """Nothing."""


class Transfer:
    """Notes what it is asked on each rank; rank 0's gives the scripted servers their version."""

    def __init__(self, calls, servers, rank):
        self.calls, self.servers, self.rank = calls, servers, rank

    def send(self, addresses, version):
        self.calls[self.rank].append([(address.number, address.generation) for address in addresses])
        if self.rank == 0:
            for address in addresses:
                self.servers[address.number].version = str(version)
        return {}

    def close(self):
        """Nothing."""


class Control:
    """No server is paused here."""

    def __init__(self, *_):
        pass

    def pause(self, keep):
        return {}

    def forget_and_resume(self):
        return {}


def on_ranks(monkeypatch, servers, watched, work, adapted=(), **settings):
    """Run `work(engine, rank)` on every rank. Returns: its results, or its errors, and the sends of each rank."""
    config = RunConfig()
    rollout, config.worker.actor.model.lora.rank = config.worker.rollout, 2
    rollout.engine, rollout.server_timeout_seconds, rollout.max_in_flight = "server", 2.0, 12
    for name, value in settings.items():
        setattr(rollout, name, value)
    calls, barrier, slots = [[] for _ in range(RANKS)], threading.Barrier(RANKS), [None] * RANKS
    monkeypatch.setattr(server_engine, "run_servers", lambda *_, **__: watched)
    monkeypatch.setattr(server_engine, "_key", lambda _: KEY)
    monkeypatch.setattr(server_engine, "ServerControl", Control)
    monkeypatch.setattr(server_engine, "WeightTransfer", lambda actor, *, rank, **_: Transfer(calls, servers, rank))
    monkeypatch.setattr(server_engine, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(server_supervisor, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(server_group, "_FIRST_PAUSE_SECONDS", 0.01)
    encoder = SimpleNamespace(
        is_multimodal=False, eos_token_ids=[EOS], forbidden_token_ids=FORBIDDEN, vocabulary_size=VOCABULARY
    )

    def run(rank):
        engine = ServerRollout(
            config.worker.rollout, config.worker.actor.model, config.data, Rank(rank, barrier, slots), encoder,
            first_device=0, most_images=0, log_folder=Path("unused"), preemption=Preemption(60.0, None),
            adapted=adapted,
        )  # fmt: skip
        try:
            return work(engine, rank)
        except UserError as error:
            return error
        except BaseException:
            barrier.abort()
            raise
        finally:
            engine.close()

    with ThreadPoolExecutor(RANKS) as pool:
        futures = [pool.submit(run, rank) for rank in range(RANKS)]
    return [future.result() for future in futures], calls


ACTOR = SimpleNamespace(
    num_updates_done=3,
    weight_buckets=lambda: [[WeightInfo("a", torch.bfloat16, (3, 5))], [WeightInfo("b", torch.float32, (7,))]],
)


def test_a_server_that_dies_comes_back_with_the_weights(monkeypatch):
    with scripted_servers(2) as servers:
        watched = [Watched(server) for server in servers]

        def die(body):
            watched[0].is_up, servers[0].lives = False, 503
            return "close"

        def work(engine, rank):
            assert engine.sync_weights(ACTOR) == 2 * 3 * 5 + 4 * 7
            if rank == 0:
                servers[0].script = die
            asked = requests(7, first=100 * rank)
            found = engine.collect(engine.submit(asked, SETTINGS))
            assert all(is_its_own(group, request) for group, request in zip(found, asked, strict=True))
            while not all(server.usable for server in engine._group._servers):
                generate(engine, [], SETTINGS)
            more = requests(8, first=1000 + 100 * rank)
            assert all(group.policy_version == 3 for group in generate(engine, more, SETTINGS))
            return engine.metrics()

        metrics, calls = on_ranks(monkeypatch, servers, watched, work)
        assert calls[0] == calls[1] == calls[2] == [[(0, 1), (1, 1)], [(0, 2)]]
        assert metrics[0] == metrics[1] and metrics[0]["rollout/num_server_restarts"] == 1
        assert metrics[0]["rollout/num_repeated_requests"] >= 1
        assert [server.num_starts for server in watched] == [2, 1]


def adapters_that(failures, servers):
    """A stand-in for AdapterTransfer: what each of its sends returns on rank 0."""

    class Adapters:
        num_bytes = 77

        def __init__(self, policy, *, rank, run, **_):
            self._rank, self._run, self._failures = rank, run, list(failures)

        def name(self, version):
            return f"{self._run}-{version}"

        def send(self, addresses, version):
            failed = self._failures.pop(0)
            if isinstance(failed, OSError):
                if self._rank == 0:
                    raise failed
                return {}
            for address in addresses:
                if address.number not in failed:
                    servers[address.number].version = str(version)
            return failed if self._rank == 0 else {}

        def close(self):
            pass

    return Adapters


def test_every_rank_asks_for_the_adapter_by_its_version_and_the_start_of_the_run(monkeypatch):
    with scripted_servers(2) as servers:
        monkeypatch.setattr(server_engine, "AdapterTransfer", adapters_that([{}, {}], servers))

        def work(engine, rank):
            actor = SimpleNamespace(num_updates_done=3)
            engine.sync_weights(actor)
            generate(engine, requests(4, first=100 * rank), SETTINGS)
            actor.num_updates_done = 4
            assert engine.sync_weights(actor) == 77
            generate(engine, requests(4, first=100 * rank), SETTINGS)

        on_ranks(monkeypatch, servers, [Watched(server) for server in servers], work, adapted=["layers.0.q_proj"])
        names = {body["model"] for server in servers for body in server.bodies}
        assert len(names) == 2 and len({name.partition("-")[0] for name in names}) == 1
        assert {name.partition("-")[2] for name in names} == {"3", "4"}


def test_adapters_that_cannot_be_written_end_the_run_on_every_rank_after_it_was_saved(monkeypatch):
    with scripted_servers(2) as servers:
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(server_engine, "AdapterTransfer", adapters_that([full], servers))

        def work(engine, rank):
            engine.sync_weights(SimpleNamespace(num_updates_done=0))

        watched = [Watched(server) for server in servers]
        errors, _ = on_ranks(monkeypatch, servers, watched, work, adapted=["layers.0.q_proj"])
        assert [type(error) for error in errors] == [ServersGone] * RANKS  # which saves what was learned
        assert "cannot be written ([Errno 28] No space left on device); free space in trainer.run_dir" in str(errors[2])


def test_adapters_that_no_server_takes_are_one_line_on_every_rank(monkeypatch):
    with scripted_servers(2) as servers:
        why = "v1/load_lora_adapter: HTTP 500 expected target modules in {'q_proj'} but received ['layers.0.odd']"
        monkeypatch.setattr(server_engine, "AdapterTransfer", adapters_that([{0: why, 1: why}], servers))
        watched = [Watched(server) for server in servers]

        def work(engine, rank):
            engine.sync_weights(SimpleNamespace(num_updates_done=0))

        errors, _ = on_ranks(monkeypatch, servers, watched, work, adapted=["layers.0.odd"])
        assert [type(error) for error in errors] == [UserError] * RANKS
        assert "lora_sync=adapters: vLLM says v1/load_lora_adapter: HTTP 500 expected" in str(errors[2])
        assert str(errors[2]).endswith("(worker.actor.model.lora.exclude_modules)")


def test_with_all_servers_gone_every_rank_stops_at_the_same_call(monkeypatch):
    with scripted_servers(2) as servers:
        watched = [Watched(server) for server in servers]

        def work(engine, rank):
            engine.sync_weights(ACTOR)
            for one in watched:
                one.may_come_back = one.is_up = False
                one.server.script, one.server.lives = (lambda body: "close"), 503
            engine.collect(engine.submit(requests(2), SETTINGS))

        errors, _ = on_ranks(monkeypatch, servers, watched, work, servers_gone_seconds=0.2)
        assert [type(error) for error in errors] == [ServersGone] * RANKS
        assert len({str(error) for error in errors}) == 1 and "out of memory" in str(errors[0])


def test_probes_that_can_wait_are_given_up_when_the_training_has_its_own(monkeypatch):
    with scripted_servers(1) as servers:
        servers[0].script = lambda body: "hang" if body["token_ids"][0] % 2 else None

        def work(engine, rank):
            engine.sync_weights(ACTOR)
            asked = [replace(one, can_wait=one.prompt.index % 2 == 1) for one in requests(5)]
            found = engine.collect(engine.submit(asked, SETTINGS))
            assert [group is None for group in found] == [False, True, False, True, False]
            assert found[2].responses[0].token_ids.tolist() == tokens_of(body_of(asked[2]), 0)
            return engine.metrics()["rollout/num_probes_given_up"]

        assert on_ranks(monkeypatch, servers, [Watched(servers[0])], work)[0] == [2.0 * RANKS] * RANKS


def test_what_is_still_sampled_is_stopped_when_there_is_enough(monkeypatch):
    with scripted_servers(1) as servers:
        servers[0].script = lambda body: "hang" if body["token_ids"][0] % 2 else None

        def work(engine, rank):
            engine.sync_weights(ACTOR)
            asked, seen = requests(5), []

            def enough(groups):
                seen.append(sorted(groups))
                return len(groups) == 3

            found = engine.collect(engine.submit(asked, SETTINGS), enough)
            assert [group is None for group in found] == [False, True, False, True, False]
            assert seen[-1] == [0, 2, 4]
            servers[0].script = lambda body: None
            assert None not in engine.collect(engine.submit(asked, SETTINGS))

        assert on_ranks(monkeypatch, servers, [Watched(servers[0])], work)[0] == [None] * RANKS


def test_a_start_that_fails_is_every_ranks_error(monkeypatch):
    with scripted_servers(1) as servers:
        watched = [Watched(servers[0])]
        watched[0].is_up = watched[0].may_come_back = False
        errors, _ = on_ranks(
            monkeypatch, servers, watched, lambda engine, rank: engine.sync_weights(ACTOR), server_start_seconds=0.05
        )
        assert [type(error) for error in errors] == [UserError] * RANKS
        assert all("did not start" in str(error) and "out of memory" in str(error) for error in errors)
