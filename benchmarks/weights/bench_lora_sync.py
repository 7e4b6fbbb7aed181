"""A sync of LoRA adapters to vLLM inside the rank: weights with the adapters added beside the adapters alone.

    python benchmarks/weights/bench_lora_sync.py MODEL [--lora-rank R] [--rounds N] [--responses K] [--json FILE]

One rank holds MODEL, a folder with a text model, under ZeRO-3 with an adapter beside every linear layer, and two vLLM
engines, one for each value of worker.rollout.lora_sync. In every round the adapters change, and each engine gets them
and samples K responses of 32 tokens to one prompt; who comes first changes from round to round, and the first round
warms up. On the CPU vLLM computes adapters by its plain reference, which copies the factors for each token: what
sampling takes there says nothing of a GPU.

The JSON file holds a list of rows: lora_sync, lora_rank, num_parameters, bytes, seconds (median), rounds (seconds of
each), sampling_seconds (median).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("merged", "adapters")
RESPONSE_TOKENS = 32


def main() -> None:
    """Measure both ways in turn and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    rows = measure(options)
    for row in rows:
        sys.stdout.write(
            f"{row['lora_sync']:<9} {row['bytes'] / 1e6:9.3f} MB  {1e3 * row['seconds']:8.1f} ms a sync  "
            f"{row['sampling_seconds']:6.2f} s sampling\n"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way."""
    import torch

    from mmr1_ds.cluster.launch import free_port, launch_environment
    from mmr1_ds.cluster.preemption import Preemption
    from mmr1_ds.cluster.ranks import Ranks
    from mmr1_ds.config import RunConfig
    from mmr1_ds.data.encoding import PromptEncoder
    from mmr1_ds.engine.actor import Actor
    from mmr1_ds.engine.bad_updates import BadUpdates
    from mmr1_ds.engine.model.lora import adapted_layers, adapters
    from mmr1_ds.engine.zero_engine import Sizes
    from mmr1_ds.records import Prompt, RolloutRequest, SamplingSettings
    from mmr1_ds.rollout.base import generate
    from mmr1_ds.rollout.colocated.engine import VllmRollout

    os.environ["MASTER_PORT"] = str(free_port("127.0.0.1"))
    ranks = Ranks(launch_environment(), timeout_seconds=600)
    config = RunConfig()
    model, rollout = config.worker.actor.model, config.worker.rollout
    model.model_path, model.lora.rank = options.model, options.lora_rank
    model.lora.target_modules = "all-linear"
    config.data.max_prompt_length, config.data.max_response_length = 64, RESPONSE_TOKENS
    rollout.kv_cache_gb, rollout.max_num_batched_tokens, rollout.max_num_seqs = 1, 256, 64
    encoder = PromptEncoder(model, config.data)
    zero = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    actor = Actor(
        config.worker.actor, config.algorithm, Sizes(8, 64, RESPONSE_TOKENS), 1.0, zero, ranks, encoder, 1,
        BadUpdates("actor", 1, ranks, None),
    )  # fmt: skip
    engines = {}
    for way in WAYS:
        adapted = adapted_layers(actor.model) if way == "adapters" else ()
        engines[way] = VllmRollout(
            rollout, model, config.data, ranks, encoder, 0, Preemption(60.0, None), adapted=adapted
        )
    prompt = Prompt(0, "0", tuple(range(5, 25)), (), "")
    settings = SamplingSettings(1.0, 1.0, -1, RESPONSE_TOKENS)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    sampling: dict[str, list[float]] = {way: [] for way in WAYS}
    num_bytes = dict.fromkeys(WAYS, 0)
    for number in range(options.rounds + 1):
        for adapter in adapters(actor.model).values():  # a rank alone holds its shards whole
            adapter.b.ds_tensor.data.uniform_(-0.01, 0.01, generator=torch.Generator().manual_seed(number))
        answers = {}
        for way in WAYS if number % 2 else WAYS[::-1]:
            begun = time.perf_counter()
            num_bytes[way] = engines[way].sync_weights(actor)
            synced = time.perf_counter()
            (group,) = generate(engines[way], [RolloutRequest(prompt, options.responses, 7)], settings)
            if number:
                seconds[way].append(synced - begun)
                sampling[way].append(time.perf_counter() - synced)
            answers[way] = group.responses[0].logprobs[0]
        assert abs(answers["merged"] - answers["adapters"]) < 1e-3, answers
    num_parameters = sum(parameter.ds_numel for parameter in actor.model.parameters())
    rows = [
        {
            "lora_sync": way,
            "lora_rank": options.lora_rank,
            "num_parameters": num_parameters,
            "bytes": num_bytes[way],
            "seconds": statistics.median(seconds[way]),
            "rounds": seconds[way],
            "sampling_seconds": statistics.median(sampling[way]),
        }
        for way in WAYS
    ]
    for engine in engines.values():
        engine.close()
    ranks.close()
    return rows


if __name__ == "__main__":
    main()
