"""How long reading a rollout server's answer keeps another thread of the process, as the training's, from running.

    python benchmarks/scale/server_answers.py [--responses 8] [--tokens 8192] [--repeats 5]

One thread reads answers as vLLM writes them while another counts; a halt is the longest time between two counts.
The second line is the same without any answer: what the machine's other work costs. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time

import numpy as np

from mmr1_ds.records import Prompt, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.servers.client import Exchange

VOCABULARY = 151_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    answer = written(arguments.responses, arguments.tokens)
    exchange = Exchange([0], [], VOCABULARY)
    settings = SamplingSettings(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=arguments.tokens)
    request = RolloutRequest(Prompt(0, "p", (1, 2), (), ""), arguments.responses, 7)

    def read() -> None:
        exchange.group(request, settings, answer)

    start = time.perf_counter()
    read()
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{len(answer) / 1e6:.1f} MB, read in {1e3 * seconds:.0f} ms\n")
    for name, work in (("while an answer is read", read), ("without", lambda: time.sleep(seconds))):
        halts = [longest_halt(work) for _ in range(arguments.repeats)]
        sys.stdout.write(f"longest halt {name}: {1e3 * statistics.median(halts):.1f} ms\n")


def written(num_responses: int, num_tokens: int) -> bytes:
    """Return an answer as vLLM writes it, with each token's text and bytes."""
    random = np.random.default_rng(3)
    choices = []
    for index in range(num_responses):
        tokens = random.integers(1, VOCABULARY, num_tokens).tolist()
        content = [
            {"token": f"token_id:{token}", "token_id": token, "logprob": float(-random.exponential()), "bytes": [84, 7],
             "top_logprobs": []}
            for token in tokens
        ]  # fmt: skip
        spans = [{"version": "3", "start": 0, "end": num_tokens}]
        choices.append({"index": index, "token_ids": tokens, "logprobs": {"content": content},
                        "finish_reason": "length", "weight_versions": spans})  # fmt: skip
    return json.dumps({"choices": choices}).encode()


def longest_halt(work: object) -> float:
    """Return the longest time, s, between two counts of a thread while another does the work."""
    thread, longest = threading.Thread(target=work), 0.0
    thread.start()
    last = time.perf_counter()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


if __name__ == "__main__":
    main()
