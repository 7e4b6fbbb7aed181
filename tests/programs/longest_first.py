"""Sample the same requests with vLLM in their order and the longest first; write what came of it.

Usage: longest_first.py MODEL OUT.json
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from fixtures.tiny_models import make_prompt
from safetensors.torch import load_file
from settings import end, small_config, start_ranks

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.records import RolloutRequest, SamplingSettings
from mmr1_ds.rollout.base import generate
from mmr1_ds.rollout.colocated.engine import VllmRollout

model, out = sys.argv[1:]
NUM_PROMPTS, LONGEST = 11, 24
ranks = start_ranks()
config = small_config(model, 2, 3, micro_batch=3)
config.worker.rollout.max_num_seqs = 2
encoder = PromptEncoder(config.worker.actor.model, config.data)


class FolderPolicy:
    num_updates_done = 0

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from load_file(f"{model}/model.safetensors").items()


rollout = VllmRollout(
    config.worker.rollout, config.worker.actor.model, config.data, ranks, encoder, 1, Preemption(60.0, None)
)
rollout.sync_weights(FolderPolicy())
llm = rollout._llm
begun: list[int] = []
num_steps = 0
enqueue, step = llm.enqueue, llm.llm_engine.step


def noted_enqueue(inputs, parameters, **settings):  # type: ignore[no-untyped-def]
    begun.extend(parameter.seed // 1000 for parameter in parameters)
    return enqueue(inputs, parameters, **settings)


def counted_step():  # type: ignore[no-untyped-def]
    global num_steps
    num_steps += 1
    return step()


llm.enqueue, llm.llm_engine.step = noted_enqueue, counted_step
# One response a prompt, of a length of its own: the model is random and ends nothing by itself.
limits = [1 + (7 * i + 1) % LONGEST for i in range(NUM_PROMPTS)]
requests = [
    RolloutRequest(make_prompt(encoder, i, False), 1, 1000 * i, max_tokens=limit) for i, limit in enumerate(limits)
]
settings = SamplingSettings(1.0, 1.0, -1, LONGEST)
found: dict[str, dict[str, list]] = {"begun": {}, "tokens": {}, "steps": {}, "stopped": {}}  # type: ignore[type-arg]


def sample(name: str, asked: list[RolloutRequest]) -> list[int]:
    global num_steps
    begun.clear()
    num_steps = 0
    groups = generate(rollout, asked, settings)
    found["tokens"][name] = [group.responses[0].token_ids.tolist() for group in groups]
    found["begun"][name], found["steps"][name] = list(begun), num_steps
    return [len(group.responses[0].token_ids) for group in groups]


lengths = sample("in order", requests)
expecting = [
    dataclasses.replace(request, expected_tokens=length) for request, length in zip(requests, lengths, strict=True)
]
assert sample("longest", expecting) == lengths
# What is stopped is what has not ended, whatever its place.
longest = max(range(NUM_PROMPTS), key=lambda place: (lengths[place], -place))
groups = rollout.collect(rollout.submit(expecting, settings), enough=lambda groups: longest in groups)
found["stopped"] = {
    "longest": [groups[longest] is not None],
    "rest": [groups[min(range(NUM_PROMPTS), key=lengths.__getitem__)] is not None],
}
Path(out).write_text(json.dumps(found | {"lengths": lengths}))
rollout.close()
end(ranks)
