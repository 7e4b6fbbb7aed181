"""What a step's responses cost in Python between two forward passes: as lists and tuples, and as arrays.

    python benchmarks/loop/records.py [--responses 512] [--tokens 2048] [--group 8] [--repeats 9] [--json FILE]

Old and new take turns in one process, on one thread; of the repeats the median counts. The new way calls the functions
of the run where they are functions of their own. The old way stands here, as it was before responses were arrays.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from mmr1_ds.algorithm import advantages
from mmr1_ds.algorithm.experience import make_experience
from mmr1_ds.algorithm.kl import KLController
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.curriculum.statistics import pack
from mmr1_ds.engine.model.batching import end_to_end
from mmr1_ds.loop.group_arrays import groups_from_arrays, groups_to_arrays
from mmr1_ds.loop.in_flight import pack_responses
from mmr1_ds.records import GroupRewards, Prompt, Response, RolloutGroup, ScoredGroup

EOS = 151_645
CPU = torch.device("cpu")
ALGORITHM = AlgorithmConfig(disable_kl=True)
Tuples = list[tuple[tuple[int, ...], tuple[float, ...]]]  # token ids and log-probabilities of each response


class Step:
    """A step's responses, as the engine gave them, as tuples, and as records of arrays."""

    def __init__(self, num_responses: int, num_tokens: int, group_size: int) -> None:
        random = np.random.default_rng(0)
        tokens = random.integers(0, 150_000, (num_responses, num_tokens))
        tokens[:, -1] = EOS
        logprobs = -random.exponential(0.5, (num_responses, num_tokens)).astype(np.float32)
        self.sampled = list(zip(tokens.tolist(), logprobs.tolist(), strict=True))
        self.tuples = old_response(self)
        self.responses = new_response(self)
        self.rewards_GN = random.random((num_responses // group_size, group_size), dtype=np.float32)
        self.groups = {
            slot: _scored(slot, self.responses[slot * group_size : (slot + 1) * group_size], rewards)
            for slot, rewards in enumerate(self.rewards_GN)
        }
        self.advantages = advantages.grpo(self.rewards_GN.astype(np.float64)).reshape(-1)
        self.lengths = np.full(num_responses, num_tokens)


def _scored(index: int, responses: list[Response], rewards: np.ndarray) -> ScoredGroup:
    failed = np.zeros(len(rewards), dtype=bool)
    group = RolloutGroup(Prompt(index, "", (1,), (), ""), tuple(responses), 0)
    return ScoredGroup(group, GroupRewards(rewards, rewards, failed, {}))


def old_response(step: Step) -> Tuples:
    return [(tuple(tokens), tuple(logprobs)) for tokens, logprobs in step.sampled]


def new_response(step: Step) -> list[Response]:
    return [
        Response(np.array(tokens, dtype=np.int32), np.array(logprobs, dtype=np.float32), True)
        for tokens, logprobs in step.sampled
    ]


def old_packing(step: Step) -> tuple[np.ndarray, np.ndarray]:
    responses = [tokens[:-1] if tokens[-1] == EOS else tokens for tokens, _ in step.tuples]
    offsets = np.cumsum([0, *map(len, responses)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(responses), np.int32, count=int(offsets[-1])), offsets


def new_packing(step: Step) -> tuple[np.ndarray, np.ndarray]:
    return pack([*step.groups.values()], (EOS,))


def old_exchange(step: Step) -> Any:
    return pickle.loads(pickle.dumps((step.tuples, step.rewards_GN)))


def new_exchange(step: Step) -> Any:
    return groups_from_arrays(load(save(groups_to_arrays(step.groups))))


def old_checkpoint(step: Step) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([token for tokens, _ in step.tuples for token in tokens], dtype=np.int64)
    return tokens, np.array([value for _, logprobs in step.tuples for value in logprobs], dtype=np.float64)


def new_checkpoint(step: Step) -> tuple[np.ndarray, np.ndarray]:
    arrays = pack_responses(step.responses)
    return arrays["token_ids"], arrays["logprobs"]


def old_collation(step: Step) -> torch.Tensor:
    return torch.cat([torch.tensor(tokens, dtype=torch.int64) for tokens, _ in step.tuples])


def new_collation(step: Step) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([response.token_ids for response in step.responses])).long()


def old_importance(step: Step) -> torch.Tensor:
    return torch.tensor(list(chain.from_iterable(logprobs for _, logprobs in step.tuples)))


def new_importance(step: Step) -> torch.Tensor:
    return end_to_end([response.logprobs for response in step.responses], CPU)


def old_advantages(step: Step) -> torch.Tensor:
    """One number a response, as a trajectory held it, written out at every token."""
    advantages_T = np.repeat(step.advantages, step.lengths)
    parts = np.split(advantages_T, np.cumsum(step.lengths)[:-1])
    of_responses = [float(part[0]) if (part == part[0]).all() else float(part.mean()) for part in parts]
    by_token = ((value,) * length for value, length in zip(of_responses, step.lengths.tolist(), strict=True))
    return torch.tensor(list(chain.from_iterable(by_token)), dtype=torch.float32)


def new_advantages(step: Step) -> torch.Tensor:
    """All of it: from the rewards to trajectories, and these end to end. Without a KL no rank is asked."""
    groups = [*step.groups.values()]
    found = make_experience(groups, ALGORITHM, KLController(ALGORITHM), None)  # type: ignore[arg-type]
    return end_to_end([item.advantages for item in found.trajectories], CPU)


STAGES: dict[str, tuple[Callable[[Step], Any], Callable[[Step], Any]]] = {
    "from the engine": (old_response, new_response),
    "packing for the scores": (old_packing, new_packing),
    "to another rank and back": (old_exchange, new_exchange),
    "for a checkpoint": (old_checkpoint, new_checkpoint),
    "collation": (old_collation, new_collation),
    "importance weights": (old_importance, new_importance),
    "advantages": (old_advantages, new_advantages),
}


def measure(step: Step, repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each stage, old and new, after one warm-up."""
    found = {}
    for name, ways in STAGES.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            for way, times in zip(ways, seconds, strict=True):
                begin = time.perf_counter()
                way(step)
                times.append(time.perf_counter() - begin)
        old, new = (1000 * statistics.median(times[1:]) for times in seconds)
        found[name] = (old, new)
    return found


def bytes_a_token(step: Step) -> tuple[float, float]:
    """Memory of one token with its log-probability, old and new. Small ints are shared, which is left out."""
    num_tokens = int(step.lengths.sum())
    old = sum(sys.getsizeof(part) + sum(map(sys.getsizeof, part)) for pair in step.tuples for part in pair)
    new = sum(response.token_ids.nbytes + response.logprobs.nbytes for response in step.responses)
    return old / num_tokens, new / num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    step = Step(arguments.responses, arguments.tokens, arguments.group)
    rows = measure(step, arguments.repeats)
    rows["sum"] = (sum(old for old, _ in rows.values()), sum(new for _, new in rows.values()))
    lines = [f"{'ms':26}{'tuples':>10}{'arrays':>10}{'ratio':>8}"]
    lines += [f"{name:26}{old:10.1f}{new:10.2f}{old / new:8.1f}" for name, (old, new) in rows.items()]
    old, new = bytes_a_token(step)
    lines.append(f"{'bytes a token':26}{old:10.1f}{new:10.2f}{old / new:8.1f}")
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.json:
        kept = {"settings": vars(arguments), "milliseconds": rows, "bytes_a_token": [old, new]}
        Path(arguments.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
