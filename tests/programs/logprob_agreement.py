"""Sample with vLLM, update, synchronise, several times; write how far vLLM's log-probabilities were from the actor's.

Usage: logprob_agreement.py MODEL OUT.json NUM_STEPS ENGINE TENSOR_PARALLEL [LORA_RANK [TOP_P TOP_K]] [no-videos]

ENGINE is one of worker.rollout.engine, or adapters or server-adapters: vllm or server with
worker.rollout.lora_sync=adapters.

With TOP_P and TOP_K, min_p and a repetition penalty besides, and log-probabilities are those of the whole distribution
(worker.rollout.logprobs=raw).
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixtures.delta_net import compute_delta_nets_in_float32, compute_delta_nets_in_float32_in_servers
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, schedule_asynchronously, small_config, start_ranks

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.lora import adapted_layers, layers_to_adapt
from mmr1_ds.engine.reference import AdapterlessReference
from mmr1_ds.engine.weights import gathering as weights
from mmr1_ds.records import RolloutGroup, RolloutRequest, SamplingSettings, Trajectory
from mmr1_ds.rollout.base import generate
from mmr1_ds.rollout.colocated.engine import VllmRollout
from mmr1_ds.rollout.colocated.sleeping import SleepCycle
from mmr1_ds.rollout.hf.engine import TransformersRollout
from mmr1_ds.rollout.servers.engine import ServerRollout

weights.BUCKET_BYTES = 20_000  # several buckets, and parameters larger than one

model, out, num_steps, engine, tensor_parallel, *more = sys.argv[1:]
without_videos = more[-1:] == ["no-videos"] or engine.startswith("server")
more = [word for word in more if word != "no-videos"]
lora_rank, cuts = int(more[0]) if more else 0, more[1:]
PROMPTS, RESPONSES, MOST_IMAGES, MOST_VIDEOS = 4, 3, 4, 2

ranks = start_ranks()
# On one rank micro-batches mix prompts of text, of one image and of several; on more each is one prompt's responses.
config = small_config(model, PROMPTS, RESPONSES, micro_batch=4 if ranks.size == 1 else 3)
config.data.max_prompt_length = 224  # with two videos, and the times of their frames by the letter
config.worker.rollout.temperature = 0.8  # raw and processed log-probabilities then differ
config.worker.rollout.tensor_parallel_size = int(tensor_parallel)
config.worker.rollout.logprobs = "raw" if cuts else "processed"
top_p, top_k = (float(cuts[0]), int(cuts[1])) if cuts else (1.0, -1)
if lora_rank:
    config.worker.actor.model.lora.rank, config.worker.actor.optim.lr = lora_rank, 1e-2
encoder = PromptEncoder(config.worker.actor.model, config.data)
settings_of_actor = deepspeed_configs(config, ranks.size)[0]
if ranks.on_gpu:
    settings_of_actor["bf16"] = {"enabled": True}
    config.worker.rollout.gpu_memory_utilization = 0.2
actor = make_actor(config, settings_of_actor, ranks, encoder)
unasked = Preemption(60.0, None)
rollout: VllmRollout | ServerRollout | TransformersRollout


def free_bytes() -> int:
    """Of the GPU; 0 without one."""
    if not ranks.on_gpu:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def lost_in_sleep(worker: Any) -> list[torch.Tensor]:
    """What a worker on a GPU loses of the model in a sleep of level 2: all but buffers."""
    model = worker.get_model()
    kept = {id(buffer) for buffer in model.buffers()}
    beside = [
        value for part in model.modules() for name, value in vars(part).items() if name[0] != "_" and name != "kv_cache"
    ]
    tensors = [item for value in beside for item in (value if isinstance(value, list) else [value])]
    return [*model.parameters(), *(x for x in tensors if isinstance(x, torch.Tensor) and id(x) not in kept)]


def lose_in_sleep(worker: Any) -> None:
    """Let the CPU's worker lose it."""
    sleep = worker.sleep

    def sleep_and_lose(level: int = 1) -> None:
        sleep(level=level)
        for tensor in lost_in_sleep(worker) if level == 2 else ():
            tensor.data.fill_(torch.nan if tensor.is_floating_point() else -77)

    worker.sleep = sleep_and_lose


def num_lost(worker: Any) -> int:
    """How many tensors a sync has not made good."""
    return sum(int(bool((tensor.isnan() | (tensor == -77)).any())) for tensor in lost_in_sleep(worker))


free_before_engine = free_bytes()
if engine in ("vllm", "adapters"):
    if not ranks.on_gpu:
        compute_delta_nets_in_float32()
        if tensor_parallel == "1":
            schedule_asynchronously()
    adapted = adapted_layers(actor.model) if engine == "adapters" else ()
    rollout = VllmRollout(
        config.worker.rollout, config.worker.actor.model, config.data, ranks, encoder, MOST_IMAGES, unasked,
        most_videos=MOST_VIDEOS if encoder.takes_videos else 0, adapted=adapted,
    )  # fmt: skip
    # On CPU vLLM's worker keeps its memory; its scheduler, its caches and its record of what sleeps are those on GPU.
    if not ranks.on_gpu:
        rollout._llm.collective_rpc(lambda worker: setattr(worker, "discard", lambda tags: None))
        rollout._llm.collective_rpc(lose_in_sleep)
        rollout._cycle = SleepCycle(rollout._llm, enabled=True, keeps_base=engine == "adapters")
    rollout.sync_weights(actor)
elif engine in ("server", "server-adapters"):
    config.worker.rollout.engine, config.worker.rollout.server_timeout_seconds = "server", 120.0
    if ranks.rank == 0:
        compute_delta_nets_in_float32_in_servers(Path(out).with_suffix(".plugin"))
    rollout = ServerRollout(
        config.worker.rollout, config.worker.actor.model, config.data, ranks, encoder,
        first_device=config.trainer.n_gpus_per_node, most_images=MOST_IMAGES,
        log_folder=Path(out).with_suffix(".servers"), preemption=unasked,
        adapted=layers_to_adapt(config.worker.actor.model) if engine == "server-adapters" else (),
    )  # fmt: skip
    rollout.sync_weights(actor)
else:
    rollout = TransformersRollout(actor, ranks, encoder, max_num_seqs=5)  # in the middle of a prompt's responses

taken_bytes = free_before_engine - free_bytes()  # by the engine
steps = []
random = np.random.default_rng(5)
for step in range(int(num_steps)):
    share = PROMPTS // ranks.size
    # Half of a step's prompts come again in the next: what vLLM caches of an image must not outlive the weights.
    first = step * PROMPTS // 2 + ranks.rank * share
    indices = range(first, first + share)
    # Every third prompt is text only; in some micro-batches no prompt has an image at all.
    with_videos = encoder.takes_videos and not without_videos
    prompts = [make_prompt(encoder, i, encoder.is_multimodal and i % 3 != 0, MOST_IMAGES, with_videos) for i in indices]
    requests = [RolloutRequest(prompt, RESPONSES, 1000 * i) for prompt, i in zip(prompts, indices, strict=True)]
    settings = SamplingSettings(0.8, top_p, top_k, 12 + step, raw_logprobs=bool(cuts))
    if cuts:
        settings = dataclasses.replace(settings, min_p=0.01, repetition_penalty=1.3)
    groups = generate(rollout, requests, settings)
    given_back_bytes = 0
    if isinstance(rollout, VllmRollout):
        if tensor_parallel == "1":  # what is stopped leaves nothing behind
            short = [dataclasses.replace(requests[0], max_tokens=1), *requests[1:]]
            found = rollout.collect(rollout.submit(short, settings), lambda there: 0 in there)
            assert found[0] is not None and None in found
            assert all(len(response.token_ids) == 1 for response in found[0].responses)
        rollout.sleep(keep_weights=True)
        assert rollout._llm.llm_engine.is_sleeping()
        before, groups = groups, generate(rollout, requests, settings)
        if not ranks.on_gpu:  # in bf16 a near tie may fall the other way
            tokens_before, tokens_after = (
                [r.token_ids.tolist() for g in x for r in g.responses] for x in (before, groups)
            )
            assert tokens_after == tokens_before
        free_awake = free_bytes()
        rollout.sleep(keep_weights=False)
        given_back_bytes = free_bytes() - free_awake
    trajectories = [
        Trajectory(
            group.prompt,
            response.token_ids,
            response.logprobs,
            np.full(len(response.token_ids), random.normal(), np.float32),
        )
        for group in groups
        for response in group.responses
    ]
    moved = 0.0  # by the adapters
    if lora_rank:
        off = np.concatenate(AdapterlessReference(actor).log_probs([item.pair for item in trajectories]))
        moved = float(np.abs(off - np.concatenate([item.rollout_logprobs for item in trajectories])).max())
    metrics = actor.update(trajectories)
    sync_bytes = rollout.sync_weights(actor)
    if isinstance(rollout, VllmRollout) and not ranks.on_gpu:
        assert not any(rollout._llm.collective_rpc(num_lost))
    lengths = [len(item.token_ids) for item in trajectories]
    tokens = [item.token_ids.tolist() for item in trajectories]
    forbidden = sum(token in encoder.forbidden_token_ids for row in tokens for token in row)
    seen = {"images": [len(prompt.images) for prompt in prompts], "videos": [len(prompt.videos) for prompt in prompts]}
    metrics |= {"moved": moved, "given_back_bytes": given_back_bytes, "sync_bytes": sync_bytes}
    steps.append({**metrics, "lengths": lengths, "tokens": tokens, "forbidden": forbidden, **seen})


def tokens_of(found: list[RolloutGroup]) -> list[list[int]]:
    return [response.token_ids.tolist() for group in found for response in group.responses]


if ranks.size == 1 and not ranks.on_gpu:
    # Sampled from what is as likely as the likeliest, penalty applied: the greedy ones of transformers.
    greedy = SamplingSettings(0.0, 1.0, -1, 12, repetition_penalty=10.0)
    likeliest = dataclasses.replace(settings, top_p=1.0, top_k=-1, max_tokens=12, min_p=1.0, repetition_penalty=10.0)
    plain = TransformersRollout(actor, ranks, encoder, 5)
    expected = generate(plain, requests, greedy)
    assert tokens_of(generate(rollout, requests, likeliest)) == tokens_of(expected)
    unbent = generate(plain, requests, dataclasses.replace(greedy, repetition_penalty=1.0))
    repeats = any(len(set(row)) < len(row) for row in tokens_of(unbent))
    assert not repeats or tokens_of(unbent) != tokens_of(expected)  # without a repeat there is nothing to penalise
    # A text of two tokens ends each response with the token that completes it.
    whole = generate(rollout, requests, dataclasses.replace(settings, max_tokens=12))
    stop = encoder.tokenizer.decode(tokens_of(whole)[0][3:5])
    cut = generate(rollout, requests, dataclasses.replace(settings, max_tokens=12, stop=(stop,)))
    ends = [
        next((n for n in range(1, len(row)) if stop in encoder.tokenizer.decode(row[:n])), len(row))
        for row in tokens_of(whole)
    ]
    assert ends[0] <= 5 and tokens_of(cut) == [row[:n] for row, n in zip(tokens_of(whole), ends, strict=True)]
    assert cut[0].responses[0].finished
if engine == "hf":  # a rank without requests keeps up with the others
    own = requests if ranks.rank == 0 else []
    assert len(generate(rollout, own, SamplingSettings(0.8, 0.9, 7, 5))) == len(own)
shared_memory = [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
if ranks.rank == 0:
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"steps": steps, "taken_bytes": taken_bytes, "shared_memory": shared_memory}, file)
rollout.close()
end(ranks)
