"""Change the actor's weights several times, give them to a real vLLM server, compare its log-probabilities with ours.

Usage: server_weights.py MODEL OUT.json NUM_CHANGES [LORA_RANK]
"""

import base64
import io
import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
from fixtures.delta_net import compute_delta_nets_in_float32_in_servers
from fixtures.launching import wait_until
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.weights import gathering as weights
from mmr1_ds.records import Prompt
from mmr1_ds.rollout.options import image_bounds
from mmr1_ds.rollout.servers.address import ServerAddress
from mmr1_ds.rollout.servers.process import ServerProcess
from mmr1_ds.rollout.servers.weights.transfer import ServerControl, WeightTransfer

weights.BUCKET_BYTES = 40_000  # several buckets, layers cut, and parameters larger than one

model, out, num_changes, *lora_rank = sys.argv[1:]
PROMPTS, RESPONSES, MOST_IMAGES, TOKENS, KEY = 4, 3, 2, 14, "the key of this test"

ranks = start_ranks(300)
config = small_config(model, PROMPTS, RESPONSES, micro_batch=3)
rollout = config.worker.rollout
rollout.engine, rollout.weight_transfer, rollout.temperature = "server", "shared_memory", 0.8
if lora_rank:
    config.worker.actor.model.lora.rank = int(lora_rank[0])
encoder = PromptEncoder(config.worker.actor.model, config.data)
server = None
if ranks.rank == 0:
    compute_delta_nets_in_float32_in_servers(Path(out).with_suffix(".plugin"))
    server = ServerProcess(
        rollout,
        config.worker.actor.model,
        config.data,
        number=0,
        key=KEY,
        on_gpu=False,
        devices=[],
        images=image_bounds(encoder, MOST_IMAGES),
        log=Path(out).with_suffix(".log"),
    )
    server.start()
actor = make_actor(config, deepspeed_configs(config, ranks.size)[0], ranks, encoder)
transfer = WeightTransfer(actor, backend="shared_memory", rank=ranks.rank, key=KEY)
url = server.url if server is not None else ""
addresses = [ServerAddress(0, ranks.all_gather_objects(url, "share")[0], 1, 1)]


def generate(prompt: Prompt, seed: int) -> list[dict]:
    """The server's responses."""
    parts = []
    for image in prompt.images:
        png = io.BytesIO()
        image.save(png, format="PNG")
        data = base64.b64encode(png.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    body = {
        "token_ids": list(prompt.token_ids),
        "sampling_params": {
            "n": RESPONSES,
            "seed": seed,
            "temperature": 0.8,
            "max_tokens": TOKENS,
            "logprobs": 0,
            "logit_bias": {str(token): -100.0 for token in encoder.forbidden_token_ids},
            "stop_token_ids": list(encoder.eos_token_ids),
            "detokenize": False,
        },
    }
    if parts:
        body["content_parts"] = [{"type": part["type"], "url": part["image_url"]["url"]} for part in parts]
    request = urllib.request.Request(
        f"{url}/inference/v1/generate",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"]


def change(number: int) -> None:
    """Other weights in every shard."""
    generator = torch.Generator().manual_seed(1000 * number + ranks.rank)
    for parameter in actor.model.parameters():
        shard = parameter.ds_tensor.data
        noise = torch.randn(shard.shape, generator=generator, dtype=shard.dtype)
        shard.mul_(0.98).add_(noise, alpha=0.02)


rows = []
try:
    if server is not None:
        wait_until(server.is_ready, 200, "the server answers")
    for number in range(int(num_changes) + 1):
        if number > 0:
            change(number)
        row = {"failed": {}, "seconds": 0.0}
        ranks.barrier("send")
        if number > 0:  # at first the server has the model folder's weights
            began = time.perf_counter()
            if ranks.rank == 0:
                failed = ServerControl(addresses, KEY).pause(keep=False)
                assert failed == {}, failed
            row["failed"] = transfer.send(addresses, number)
            if ranks.rank == 0:
                failed = ServerControl(addresses, KEY).forget_and_resume()
                assert failed == {}, failed
            row["seconds"] = time.perf_counter() - began
        # Some prompts come again after the change: what vLLM caches of them must not outlive the weights.
        with_image = [encoder.is_multimodal and i % 3 != 0 for i in range(PROMPTS)]
        prompts = [make_prompt(encoder, i, with_image[i], MOST_IMAGES) for i in range(PROMPTS)]
        choices = [generate(prompt, 100 * i + number) for i, prompt in enumerate(prompts)] if ranks.rank == 0 else []
        choices = ranks.all_gather_objects(choices, "share responses")[0]
        pairs = [
            (prompt, np.array(choice["token_ids"], np.int32))
            for prompt, group in zip(prompts, choices, strict=True)
            for choice in group
        ]
        theirs = [[x["logprob"] for x in choice["logprobs"]["content"]] for group in choices for choice in group]
        ours = actor.log_probs(pairs)
        row["difference"] = max(float(np.abs(np.array(a) - b).max()) for a, b in zip(theirs, ours, strict=True))
        row["versions"] = sorted({x["version"] for group in choices for c in group for x in c["weight_versions"]})
        row["images"] = sum(len(prompt.images) for prompt in prompts)
        row["first"] = [float(b[0]) for b in ours]
        rows.append(row)
finally:
    if server is not None:
        server.stop()
report = {
    "rows": rows,
    "num_buckets": len(actor.weight_buckets()),
    "shared_memory": [path.name for path in Path("/dev/shm").iterdir() if "mmr1" in path.name],
    "descriptor": os.path.exists(transfer._shared_memory._buffer.address.path) if ranks.rank == 0 else None,
}
transfer.close()
if ranks.rank == 0:
    Path(out).write_text(json.dumps(report))
end(ranks)
