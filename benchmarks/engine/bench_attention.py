"""Seconds of attention in a packed row, forward and backward: one varlen call against SDPA piece by piece.

    python benchmarks/engine/bench_attention.py [--responses 8] [--prompt 512] [--response 1536] [--groups 2]

The heads are those of a 7B (28, of which 4 for keys and values, of 128). On a GPU in bf16; elsewhere varlen is left out
and the sizes should be small. Median of 10 after 3 untimed; prints a line for each, prompts shared and not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from mmr1_ds.engine.model.attention import Row, attention_implementation, packed_attention, varlen_attention

HEADS, KEY_HEADS, HEAD_SIZE = 28, 4, 128
UNTIMED, TIMED = 3, 10


def seconds(attention: Callable, row: Row, device: torch.device, dtype: torch.dtype) -> float:
    """Return the median of forward and backward of one layer."""
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // KEY_HEADS, True
    shapes = [(1, heads, sum(row.lengths), HEAD_SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    tensors = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    found = []
    for _ in range(UNTIMED + TIMED):
        began = time.perf_counter()
        attention(module, *tensors, None, row=row, scaling=HEAD_SIZE**-0.5)[0].sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[UNTIMED:])


def main() -> None:
    """Time each attention on rows of groups with and without shared prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("groups", 2), ("responses", 8), ("prompt", 512), ("response", 1536)):
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda", 0), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    attentions: dict[str, Callable] = {"sdpa": packed_attention}
    if on_gpu:
        attention_implementation("varlen", True, "qwen2", dtype, device)  # takes the newest kernel
        attentions["varlen"] = varlen_attention
    shared = [o.prompt + o.response] + [o.response] * (o.responses - 1), [0] + [o.prompt] * (o.responses - 1)
    alone = [o.prompt + o.response] * o.responses, [0] * o.responses
    for layout, (lengths, firsts) in (("shared", shared), ("not shared", alone)):
        row = Row.of(lengths * o.groups, firsts * o.groups, device)
        times = {name: seconds(attention, row, device, dtype) for name, attention in attentions.items()}
        said = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in times.items())
        sys.stdout.write(f"prompts {layout}, {sum(row.lengths):,} tokens: {said}\n")


if __name__ == "__main__":
    main()
