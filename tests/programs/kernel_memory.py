"""Prints the peak extra memory of one call of the cpu backend, in bytes a token. Arguments: pattern, number of threads.

One group of 64 x 32,768 tokens; a small call first loads the library and starts the threads.
"""

import sys
from pathlib import Path

import numpy as np
from mmr1_kernels import cpu

NUM_RESPONSES, LENGTH = 64, 32_768


def peak_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def tokens_of(pattern: str, random: np.random.Generator) -> np.ndarray:
    total = NUM_RESPONSES * LENGTH
    match pattern:
        case "all distinct":
            return random.permutation(total)
        case "one token":
            return np.full(total, 7)
        case "short period":
            return np.arange(total) % 3
        case "same response":
            return np.tile(random.integers(0, 150_000, LENGTH), NUM_RESPONSES)
        case "half one token":  # one n-gram fills a bucket, the others follow it
            return np.where(random.random(total) < 0.5, 7, random.integers(0, 2**31, total))
    raise ValueError(pattern)


def main() -> None:
    num_threads = int(sys.argv[2])
    token_ids = tokens_of(sys.argv[1], np.random.default_rng(1)).astype(np.int32)
    offsets = np.arange(0, len(token_ids) + 1, LENGTH)
    group_offsets = np.array([0, NUM_RESPONSES])
    cpu.count_ngrams(token_ids[:100], np.array([0, 100]), np.array([0, 1]), 3, num_threads=num_threads)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_bytes()
    cpu.count_ngrams(token_ids, offsets, group_offsets, 3, num_threads=num_threads)
    sys.stdout.write(f"{(peak_bytes() - before) / len(token_ids)}\n")


if __name__ == "__main__":
    main()
