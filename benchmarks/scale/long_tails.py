"""How long a step's sampling takes with lengths of a heavy tail: prompts bound to ranks, and taken from one queue.

    python benchmarks/scale/long_tails.py [--ranks 2 8 64 512] [--groups 8 32] [--most-tokens 4096] [--slowness 1]

The rollout engine of the ranks runs over a stand-in for vLLM, whose time is counted and not waited for: a step gives
each response that is sampled one token, at most 64 of them at once, and takes as long however many they are; prefill
takes nothing. Lengths are log-normal (median 1,000 tokens, sigma .8 by the prompt and .6 by the response, cut at
--most-tokens). `known`: the lengths of other responses to the same prompts, by which shares are even in tokens and the
longest begin first; else prompts are taken as drawn, as in the first step of a run.
Times are in tokens, means over the batches: `apart` and `queue`, until the last rank is done; `least`, what no order
can beat: the longest response, or all tokens over all places. `idle` is the share of the ranks' time in which an engine
has nothing left while another still samples. With --slowness the last rank takes so many times as long for a token.
With --store: what taking a number from the real store costs, with as many processes as --ranks has first.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from mmr1_ds.cluster.launch import free_port, launch_environment
from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import ModelConfig
from mmr1_ds.engine.micro_batches import balance
from mmr1_ds.loop.sharing import work_of
from mmr1_ds.records import Prompt, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.base import longest_first
from mmr1_ds.rollout.colocated import engine

N, MAX_NUM_SEQS, MINI_BATCHES = 8, 64, 4
SETTINGS = SamplingSettings(1.0, 1.0, -1, 1)  # the stand-in knows the lengths
COUNTED = 2_000  # numbers that each process takes from the store


class Clock:
    """The time of R ranks, whose threads run one at a time, always the one that is furthest behind."""

    def __init__(self, size: int) -> None:
        self.now, self.ends = [0.0] * size, [0.0] * size
        self._waiting = [(0.0, rank) for rank in range(size)]
        self._turns = [threading.Event() for _ in range(size)]

    def begin(self) -> None:
        self._turns[heapq.heappop(self._waiting)[1]].set()

    def wait(self, rank: int) -> None:
        self._turns[rank].wait()
        self._turns[rank].clear()

    def advance(self, rank: int, tokens: float) -> None:
        self.now[rank] += tokens
        heapq.heappush(self._waiting, (self.now[rank], rank))
        self.begin()
        self.wait(rank)

    def end(self, rank: int) -> None:
        self.ends[rank] = self.now[rank]
        if self._waiting:
            self.begin()


class StandIn:
    """What the rollout engine asks of vLLM."""

    def __init__(self, rank: int, clock: Clock, lengths: np.ndarray, slowness: float) -> None:
        self._rank, self._clock, self._lengths, self._slowness = rank, clock, lengths, slowness
        self._numbers = itertools.count()
        self._waiting: list[tuple[str, int]] = []  # request, tokens
        self._running: list[tuple[int, str]] = []  # the engine's tokens by which it ends, request: a heap
        self._left: dict[str, int] = {}  # responses by request
        self._tokens = 0
        counts = SimpleNamespace(get_request_counts=lambda: (len(self._running), len(self._waiting)))
        core = SimpleNamespace(scheduler=counts)
        self.llm_engine = SimpleNamespace(
            has_unfinished_requests=lambda: bool(self._left),
            get_num_unfinished_requests=lambda: len(self._running) + len(self._waiting),
            step=self._step,
            engine_core=SimpleNamespace(engine_core=core),
        )

    def reset_prefix_cache(self) -> None:
        pass

    def collective_rpc(self, function: Any, args: Any = ()) -> list[bool]:
        return [False]

    def enqueue(self, inputs: Sequence[dict[str, Any]], parameters: Sequence[Any], **settings: Any) -> list[str]:
        ids = []
        for item, parameter in zip(inputs, parameters, strict=True):
            id = str(next(self._numbers))
            self._left[id] = parameter.n
            self._waiting += [(id, int(tokens)) for tokens in self._lengths[item["prompt_token_ids"][0]]]
            ids.append(f"{id}-own")
        return ids

    def _step(self) -> list[Any]:
        """Steps until the next response ends."""
        while self._waiting and len(self._running) < MAX_NUM_SEQS:
            id, tokens = self._waiting.pop(0)
            heapq.heappush(self._running, (self._tokens + tokens, id))
        end, ended = self._running[0][0], []
        self._clock.advance(self._rank, (end - self._tokens) * self._slowness)
        self._tokens = end
        while self._running and self._running[0][0] == end:
            _, id = heapq.heappop(self._running)
            self._left[id] -= 1
            if self._left[id] == 0:
                del self._left[id]
                ended.append(SimpleNamespace(request_id=id, finished=True, outputs=[]))
        return ended


class Queue:
    """All requests; one thread at a time runs."""

    def __init__(self, requests: Sequence[RolloutRequest]) -> None:
        self._requests, self._numbers = requests, itertools.count()
        self.num_responses = sum(request.num_responses for request in requests)

    def take(self) -> int | None:
        number = next(self._numbers)
        return number if number < len(self._requests) else None

    def request(self, number: int) -> RolloutRequest:
        return self._requests[number]


def ends(lengths: np.ndarray, expected: np.ndarray, size: int, queued: bool, slowness: float) -> np.ndarray:
    """When each rank is done, in tokens. lengths: (G, N) of all responses; expected: (G,), 0 = nothing is known.

    slowness: times which the last rank takes as long for a token.
    """
    clock = Clock(size)
    requests = [
        RolloutRequest(Prompt(g, "", (g,), (), ""), N, g, expected_tokens=tokens)
        for g, tokens in enumerate(expected.tolist())
    ]
    queue, found = Queue([requests[g] for g in longest_first(requests, 0)]), [0] * size
    shares = shares_of(expected, size)
    config = SimpleNamespace(
        tensor_parallel_size=1, sleep=False, logprobs="processed", temperature=1.0, max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=8192,
    )  # fmt: skip
    encoder = SimpleNamespace(is_multimodal=False, forbidden_token_ids=(), eos_token_ids=(1,))
    preemption = Preemption(60.0, None)

    def run(rank: int) -> None:
        clock.wait(rank)
        ranks = SimpleNamespace(on_gpu=False, rank=rank, size=size, any=lambda flag, stage: flag)
        engine._start_engine = lambda *arguments: StandIn(rank, clock, lengths, slowness if rank == size - 1 else 1.0)
        rollout = engine.VllmRollout(config, ModelConfig(), None, ranks, encoder, 1, preemption)
        if queued:
            found[rank] = len(rollout.collect_shared(queue, SETTINGS))
        else:
            own = [requests[g] for g in shares[rank]]
            found[rank] = len(rollout.collect(rollout.submit(own, SETTINGS)))
        clock.end(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    clock.begin()
    for thread in threads:
        thread.join()
    assert sum(found) == len(requests), "a request is lost, or was sampled twice"
    return np.array(clock.ends)


def shares_of(expected: np.ndarray, size: int) -> list[list[int]]:
    """The groups of each rank, as `sampled_slots` gives them to each, for all ranks at once."""
    waits = len(expected) * N > size * MAX_NUM_SEQS
    work = work_of(np.full(len(expected), N), expected, waits)
    shares: list[list[int]] = [[] for _ in range(size)]
    mini_batch = len(expected) // MINI_BATCHES
    for start in range(0, len(expected), mini_batch):
        order = np.array(balance(work[start : start + mini_batch].tolist(), size)).reshape(size, -1)
        for share, own in zip(shares, np.sort(order), strict=True):
            share += (start + own).tolist()
    return shares


def draw(num_groups: int, most_tokens: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all responses, (G, N) int64, and what other responses to the prompts let expect, (G,) int64."""
    of_prompt = random.normal(np.log(1000.0), 0.8, (num_groups, 1))
    both = np.exp(of_prompt + random.normal(0.0, 0.6, (num_groups, 2 * N)))
    sampled, before = np.split(np.clip(both, 1, most_tokens).astype(np.int64), 2, axis=1)
    return sampled, np.rint(before.mean(axis=1)).astype(np.int64)


def store(rank: int) -> None:
    """Take numbers from the store of the ranks. Prints what one takes on rank 0."""
    with Ranks(launch_environment(), 60.0) as ranks:
        counter = ranks.counter()
        ranks.barrier("begin")
        begin = time.perf_counter()
        for _ in range(COUNTED):
            counter.next()
        seconds = (time.perf_counter() - begin) / COUNTED
        ranks.barrier("end")
        if rank == 0:
            sys.stdout.write(f"a number from the store, {ranks.size} processes at once: {seconds * 1e6:.0f} us\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 512])
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 32], help=f"of {N} responses, for each rank")
    parser.add_argument("--most-tokens", type=int, default=4_096, help="of a response, which is cut there")
    parser.add_argument("--slowness", type=float, default=1.0, help="times which the last rank takes for a token")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--store", action="store_true", help="also measure the store")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        store(int(os.environ["RANK"]))
        return
    sys.stdout.write("known groups/rank ranks   apart   queue   least   queue/apart   idle apart   idle queue\n")
    for known, groups, size in itertools.product((False, True), arguments.groups, arguments.ranks):
        rows = []
        for batch in range(arguments.batches):
            lengths, expected = draw(groups * size, arguments.most_tokens, np.random.default_rng((batch, groups, size)))
            apart, queue = (
                ends(lengths, expected * known, size, queued, arguments.slowness) for queued in (False, True)
            )
            least = max(lengths.max(), lengths.sum() / (size * MAX_NUM_SEQS))
            rows.append(
                [apart.max(), queue.max(), least, 1 - apart.mean() / apart.max(), 1 - queue.mean() / queue.max()]
            )
        apart, queue, least, *idle = np.mean(rows, axis=0)
        times = f"{apart:7.0f} {queue:7.0f} {least:7.0f} {queue / apart:13.2f}"
        head = f"{'yes' if known else 'no':5s} {groups:11d} {size:5d}"
        sys.stdout.write(f"{head} {times} {idle[0]:12.0%} {idle[1]:12.0%}\n")
        sys.stdout.flush()
    if arguments.store:
        size, port = arguments.ranks[0], str(free_port())
        environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = [
            subprocess.Popen([sys.executable, __file__], env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(size)
        ]
        assert [process.wait() for process in started] == [0] * size


if __name__ == "__main__":
    main()
