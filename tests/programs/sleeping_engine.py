"""The rollout engine with vLLM's asynchronous scheduler, as on a GPU, through its sleeps; write what it did.

Usage: sleeping_engine.py MODEL OUT.json

vLLM's CPU build takes the synchronous scheduler. Here its EngineCore gets AsyncScheduler and a queue of two batches;
only what gives memory back and takes it, which the CPU lacks, is a recorder in the worker.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from fixtures.tiny_models import make_prompt
from safetensors.torch import load_file
from settings import end, schedule_asynchronously, small_config, start_ranks

from mmr1_ds.cluster.preemption import Preemption, SamplingAbandoned
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.loop.turns import Turns
from mmr1_ds.records import RolloutRequest, SamplingSettings
from mmr1_ds.rollout.base import generate
from mmr1_ds.rollout.colocated.engine import VllmRollout
from mmr1_ds.rollout.colocated.sleeping import SleepCycle

model, out = sys.argv[1:]
ranks = start_ranks()
config = small_config(model, 2, 3, micro_batch=3)
encoder = PromptEncoder(config.worker.actor.model, config.data)
calls: list[str] = []


class FolderPolicy:
    """The weights of the model folder; a sync that is told to fails in the middle."""

    num_updates_done, fails = 0, False

    def offloaded(self, with_weights: bool = True) -> AbstractContextManager[None]:
        return nullcontext()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        calls.append("load")
        for place, item in enumerate(load_file(f"{model}/model.safetensors").items()):
            if self.fails and place == 5:
                raise OSError("lost")
            yield item


def record(worker: object) -> None:
    """In place of the memory calls, none of which the CPU has."""
    for name in ("sleep", "wake_up", "discard"):
        setattr(worker, name, lambda *args, _name=name, **kwargs: calls.append(f"{_name} {args or kwargs}"))


class Lines(logging.Handler):
    """Of our own log."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


lines = Lines()
logging.getLogger("mmr1_ds").addHandler(lines)
logging.getLogger("mmr1_ds").setLevel(logging.INFO)
schedule_asynchronously()
rollout = VllmRollout(
    config.worker.rollout, config.worker.actor.model, config.data, ranks, encoder, 1, Preemption(60.0, None)
)
llm = rollout._llm
llm.collective_rpc(record)
torch.cuda.empty_cache = lambda: calls.append("empty")
rollout._cycle = SleepCycle(llm, enabled=True)
core = llm.llm_engine.engine_core.engine_core
policy = FolderPolicy()
prompts = [make_prompt(encoder, i, encoder.is_multimodal) for i in range(2)]
requests = [RolloutRequest(prompt, 3, 1000 * i) for i, prompt in enumerate(prompts)]
settings = SamplingSettings(1.0, 1.0, -1, 9)
found: dict = {"scheduler": type(core.scheduler).__name__, "queue": core.batch_queue.maxlen, "tokens": [], "left": []}
found["lines"] = [line for line in lines.found if line.startswith("vLLM: ")]


def sample() -> None:
    groups = generate(rollout, requests, settings)
    calls.append("sample")
    found["tokens"].append([response.token_ids.tolist() for group in groups for response in group.responses])
    found["left"].append(len(core.batch_queue))


def error_of(function, *args) -> str:
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def turn(name: str) -> None:
    """Keep what was called since the last."""
    found[name] = calls.copy()
    calls.clear()


def rolled_out(num_chunks: int, then_learns: bool = False) -> str:
    with turns.rollout(then_learns):
        for _ in range(num_chunks):
            sample()
    return ""


# 1. A step: sync, sample, learn.
turns = Turns(rollout, policy, None)
turns.sync_weights()
rolled_out(1, then_learns=True)
turn("first step")
# 2. A sync, a validation in two chunks, a refresh, a step without a sync between.
turns.sync_weights()
found["validation"] = error_of(rolled_out, 2)
turn("validation calls")
found["refresh"] = error_of(rolled_out, 3)
turn("refresh calls")
rolled_out(1, then_learns=True)
turn("second step")
# 3. Weights that are gone are not sampled from.
found["discarded"] = error_of(sample)
turn("refused")
rollout.sync_weights(policy)
sample()
turn("third step")
# 4. The end of a validation again; a second sleep has nothing to release.
found["again"] = [error_of(rollout.sleep, True), error_of(rollout.sleep, True)]
turn("again calls")
# 5. An engine that may not sleep.
llm.wake_up(tags=["kv_cache"])
calls.clear()
awake, rollout._cycle = rollout._cycle, SleepCycle(llm, enabled=False)
found["left awake"] = []
for keep_weights in (True, False):
    rollout.sleep(keep_weights)
    found["left awake"].append(len(core.batch_queue))
    sample()
turn("never asleep")
# 6. What vLLM says of a cache that is released after one step more, with a batch still in the queue.
rollout._cycle = awake
sample()
drain, awake.drain = awake.drain, llm.llm_engine.step
found["not drained"] = error_of(rollout.sleep, True)
awake.drain = drain
# 7. Sampling that is abandoned in the middle: no step more, and all memory is given back once.
step, steps = llm.llm_engine.step, []


def abandoned_in_the_third() -> object:
    steps.append(None)
    if len(steps) == 3:
        raise SamplingAbandoned
    return step()


llm.llm_engine.step = abandoned_in_the_third
calls.clear()
try:
    rolled_out(1)
except SamplingAbandoned:
    found["abandoned"] = [len(steps), core.scheduler.has_requests()]
turn("abandoned calls")
# 8. Nor are weights sampled from that were loaded in part.
policy.fails = True
found["half loaded"] = [error_of(rollout.sync_weights, policy), error_of(sample)]
with open(out, "w", encoding="utf-8") as file:
    json.dump(found, file)
rollout.close()
end(ranks)
