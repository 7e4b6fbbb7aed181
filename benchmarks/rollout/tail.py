"""What beginning with the longest expected responses saves, in steps of vLLM's own scheduler.

    python benchmarks/rollout/tail.py [--seeds 3] [--ranks 4] [--json FILE]

Nothing is computed but the schedule: vLLM's scheduler and its cache of blocks get the requests of a rank, and each
step every sampled response grows by a token, until it has the length that was drawn for it. Lengths are log-normal,
around a mean of each prompt that is log-normal too, and cut at the limit. What is expected is learned, by the
program's own code, from other responses to the same prompts.

`drawn` is the order of the draw, `now` what the program does, `best` the longest prompts first by their true means,
wherever. `ratio` is now / drawn, `worst` that of the worst seed. A step lasts as long as a forward pass; `tokens` are
those computed, anew after a preemption too, now / drawn.
The figures are counts: they are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from mmr1_ds.curriculum.lengths import ResponseLengths
from mmr1_ds.loop.sharing import sampled_slots, work_of
from mmr1_ds.records import Prompt, RolloutRequest
from mmr1_ds.rollout.base import longest_first

BLOCK_TOKENS, MAX_BATCHED_TOKENS = 16, 8192
TYPICAL, PROMPT_SPREAD, SPREAD = 150.0, 0.8, 0.4  # tokens of the middle prompt; of the logarithms, over and in prompts
MINI_BATCHES = 4


@dataclass(frozen=True)
class World:
    """Prompts with responses of certain lengths."""

    lengths: np.ndarray  # (G, N) tokens of the responses that are sampled
    means: np.ndarray  # (G,) that they were drawn around
    expected: np.ndarray  # (G,) tokens, from other responses; 0 = nothing is known

    @classmethod
    def of(cls, seed: int, num_prompts: int, group_size: int, limit: int, seen: float) -> World:
        """Args: seen: the share of the prompts that were sampled from before."""
        random = np.random.default_rng(seed)
        means = random.lognormal(np.log(TYPICAL), PROMPT_SPREAD, num_prompts)

        def sample() -> np.ndarray:
            drawn = random.lognormal(np.log(means)[:, None], SPREAD, (num_prompts, group_size))
            return np.clip(np.rint(drawn), 1, limit).astype(np.int64)

        known = ResponseLengths(num_prompts)
        of_before = sample()
        indices = np.flatnonzero(random.random(num_prompts) < seen)
        known.observe_counts(indices, of_before[indices].sum(axis=1), np.full(len(indices), group_size))
        return cls(sample(), means, known.expected(np.arange(num_prompts)))

    def requests(self, places: np.ndarray) -> list[RolloutRequest]:
        """The requests for some of the prompts."""
        count, expected = self.lengths.shape[1], self.expected.tolist()
        return [
            RolloutRequest(Prompt(g, f"p{g}", (), (), ""), count, 0, expected_tokens=expected[g])
            for g in places.tolist()
        ]


class Engine:
    """vLLM's scheduler with a cache of blocks, and no model."""

    def __init__(self, max_num_seqs: int, cache_tokens: int, prompt_tokens: int, limit: int) -> None:
        import torch
        from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        longest = prompt_tokens + limit
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 1, **sizes}
        with tempfile.TemporaryDirectory() as folder:
            config = model | {"vocab_size": 50_000, "max_position_embeddings": longest}
            Path(folder, "config.json").write_text(json.dumps(config))
            of_model = ModelConfig(
                model=folder, skip_tokenizer_init=True, max_model_len=longest, dtype="float32", enforce_eager=True
            )
        cache = CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True)
        scheduling = SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=MAX_BATCHED_TOKENS, max_model_len=longest,
            enable_chunked_prefill=True, is_encoder_decoder=False,
        )  # fmt: skip
        whole = VllmConfig(
            model_config=of_model, scheduler_config=scheduling, cache_config=cache, device_config=DeviceConfig("cpu")
        )
        cache.num_gpu_blocks = cache_tokens // BLOCK_TOKENS
        layer = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
        blocks = KVCacheConfig(cache.num_gpu_blocks, [], [KVCacheGroupSpec(["layer"], layer)])
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self._scheduler = Scheduler(whole, blocks, StructuredOutputManager(whole), block_size=BLOCK_TOKENS)
        self._prompt_tokens = prompt_tokens

    def sample(self, groups: Sequence[int], lengths: np.ndarray) -> tuple[int, int]:
        """Sample groups in this order. Returns: steps, and the tokens that were computed."""
        from vllm import SamplingParams
        from vllm.v1.outputs import ModelRunnerOutput
        from vllm.v1.request import Request

        scheduler, num_steps, num_tokens = self._scheduler, 0, 0
        for g in groups:
            prompt = [(g * 7919 + i) % 50_000 for i in range(self._prompt_tokens)]
            for k, length in enumerate(lengths[g].tolist()):
                parameters = SamplingParams(max_tokens=length, ignore_eos=True)
                scheduler.add_request(Request(f"{g}-{k}", prompt, parameters, None, block_hasher=self._hasher))
        while scheduler.has_requests():
            planned = scheduler.schedule()
            asked = [scheduler.requests[name] for name in planned.num_scheduled_tokens]
            # A prompt, or what is computed anew after a preemption, may take several steps before a token comes.
            sampled = [[1] if one.num_computed_tokens >= one.num_tokens else [] for one in asked]
            names = [one.request_id for one in asked]
            output = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
            scheduler.update_from_output(planned, output)
            num_steps += bool(asked)  # the last one only clears up
            num_tokens += planned.total_num_scheduled_tokens
        return num_steps, num_tokens


@dataclass(frozen=True)
class Case:
    """A rank with 64 prompts of 8 responses, or what it is asked to be."""

    name: str
    max_num_seqs: int
    cache_tokens: int = 2_000_000  # more than all take
    seen: float = 1.0


CASES = (
    Case("all at once", 512),
    Case("half at once", 256),
    Case("a quarter at once", 128),
    Case("a quarter at once, half of the prompts never seen", 128, seen=0.5),
    Case("a quarter at once, no prompt seen", 128, seen=0.0),
    Case("a quarter at once, and room for half of that in the cache", 128, 12_000),
    Case("all at once, and room for a quarter in the cache", 512, 24_000),
)


def measure(case: Case, world: World, prompt_tokens: int, limit: int, places: np.ndarray) -> dict[str, float]:
    """One rank's steps for some of the prompts, and the tokens computed, in three orders."""
    requests = world.requests(places)
    orders = {
        "drawn": places,
        "now": places[longest_first(requests, case.max_num_seqs)],
        "best": places[np.argsort(-world.means[places], kind="stable")],
    }
    found: dict[str, float] = {"longest": float(world.lengths[places].max())}
    for name, order in orders.items():
        engine = Engine(case.max_num_seqs, case.cache_tokens, prompt_tokens, limit)
        found[name], found[f"{name} tokens"] = engine.sample(order.tolist(), world.lengths)
    return found


def of_one_rank(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """The cases, each over the seeds."""
    for case in CASES:
        rows = []
        for seed in range(options.seeds):
            world = World.of(seed, options.prompts, options.responses, options.limit, case.seen)
            rows.append(measure(case, world, options.prompt_tokens, options.limit, np.arange(options.prompts)))
        yield case.name, _means(rows)


def of_ranks(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Several ranks that wait for the slowest: `drawn` shares prompts out as they lie, `now` by their tokens."""
    case, rows = Case(f"a quarter at once, {options.ranks} ranks", 128), []
    num_prompts, size = options.prompts * options.ranks, options.ranks
    for seed in range(options.seeds):
        world = World.of(seed, num_prompts, options.responses, options.limit, 1.0)
        sizes = np.full(num_prompts, options.responses)
        slowest: dict[str, float] = {}
        for rank in range(size):
            for name, waits in (("drawn", False), ("now", True)):
                work = work_of(sizes, world.expected, waits)
                own = sampled_slots(work, num_prompts // MINI_BATCHES, rank, size)
                order = own[longest_first(world.requests(own), case.max_num_seqs)] if waits else own
                engine = Engine(case.max_num_seqs, case.cache_tokens, options.prompt_tokens, options.limit)
                steps, tokens = engine.sample(order.tolist(), world.lengths)
                slowest[name] = max(slowest.get(name, 0), steps)
                slowest[f"{name} tokens"] = slowest.get(f"{name} tokens", 0) + tokens
        rows.append(slowest | {"longest": float(world.lengths.max())})
    yield case.name, _means(rows)


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return found | {"worst": max(row["now"] / row["drawn"] for row in rows)}


def describe(name: str, row: dict[str, float]) -> str:
    """A line of the table."""
    best = f"{row['best']:>6.0f}" if "best" in row else "     -"
    ratio, tokens = row["now"] / row["drawn"], row["now tokens"] / row["drawn tokens"]
    steps = f"{row['longest']:>7.0f} {row['drawn']:>6.0f} {row['now']:>6.0f} {best}"
    return f"{name:<58} {steps} {ratio:>6.2f} {row['worst']:>6.2f} {tokens:>6.2f}"


def main() -> None:
    """Measure all cases, print a line each, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4, help="of the last case; 1 = leave it out")
    parser.add_argument("--prompts", type=int, default=64, help="of a rank")
    parser.add_argument("--responses", type=int, default=8, help="to each prompt")
    parser.add_argument("--limit", type=int, default=1024, help="tokens of a response")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    rows = {}
    heads = "longest", "drawn", "now", "best", "ratio", "worst", "tokens"
    sys.stdout.write(f"{'steps of the engine, means over the seeds':<58} " + " ".join(f"{h:>6}" for h in heads) + "\n")
    for name, row in chain(of_one_rank(options), of_ranks(options) if options.ranks > 1 else ()):
        rows[name] = row
        sys.stdout.write(describe(name, row) + "\n")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
