"""The backend `triton`: checks the batch with one copy to the host, then launches the kernels of `gpu_kernels`.

Groups are counted in chunks, so that the tables take WORKSPACE_BYTES at most (a larger single group takes what it
needs: TABLE_BYTES a token and order). A chunk is three launches after the clearing of its tables; two more score the
whole batch. Nothing between them waits for the GPU. docs/kernel.md counts bytes and time.
Shape letters: G groups, B responses, K = max_order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from mmr1_kernels import gpu_kernels
from mmr1_kernels.checks import check_outcomes, check_packing, check_smallest_token, checked_tensor
from mmr1_kernels.records import GroupStatistics

LOAD = gpu_kernels.LOAD.value
SPARE = gpu_kernels.SPARE.value
TABLE_BYTES = LOAD * (16 + 8)  # a token and order: a slot of an n-gram and one of a cell
WORKSPACE_BYTES = 1 << 29  # 3.7 million tokens at max_order 3, more than fill an H100 or a B200 ten times over
MAX_GROUP_TOKENS = 1 << 29  # slots of a group are int32
INTERPRETED: bool = triton.knobs.runtime.interpret  # as read by triton.jit when gpu_kernels was imported


class Launch(NamedTuple):
    """The launch parameters of a kernel: elements and warps of a program."""

    block: int
    num_warps: int


# One warp a program where lanes walk through tables: its loop ends when the last of its own lanes is done, without
# barriers, and no other warp waits for it. An SM of H100 and B200 holds 32 programs, so 32 warps if a thread takes 64
# registers at most; two positions a lane keep as many searches in flight as 64 warps would, four take 87 registers.
# The cell kernels stream: four warps, 8 independent cells a thread to cover the latency of their random accesses, and
# blocks wide enough that one sum and one atomic serve 512 tokens. The small work at the end: one warp.
LAUNCHES = {
    gpu_kernels.count_kernel: Launch(64, 1),
    gpu_kernels.top_two_kernel: Launch(1024, 4),
    gpu_kernels.match_kernel: Launch(1024, 4),
    gpu_kernels.bleu_kernel: Launch(32, 1),
    gpu_kernels.group_kernel: Launch(32, 1),
}


def group_statistics(arrays: dict[str, torch.Tensor], group_size: int | None, max_order: int) -> GroupStatistics:
    """Compute `mmr1_kernels.group_statistics` for tensors on one GPU, or on the CPU in Triton's interpreter.

    Memory beside input and result: WORKSPACE_BYTES or the largest group's K * TABLE_BYTES * tokens, and 12 K + 40
    bytes a response. The function synchronises once, before the first launch.

    Args: arrays: token_ids, offsets, rewards, accuracies and maybe group_offsets.
    Raises: TypeError, ValueError naming the argument and the value; RuntimeError for tensors that are not on a GPU.
    """
    device = arrays["token_ids"].device
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"backend triton needs tensors on a GPU, got {device}")
    arrays = {name: checked_tensor(name, tensor).contiguous() for name, tensor in arrays.items()}
    with torch.cuda.device_of(arrays["token_ids"]):  # Triton launches on the current device
        offsets, group_offsets = _checked_on_host(arrays, group_size)
        if "group_offsets" not in arrays:  # groups of one size: no need to upload what the device can write
            assert group_size is not None
            arrays["group_offsets"] = torch.arange(0, len(offsets), int(group_size), device=device)
        return launch_all(arrays, offsets, group_offsets, max_order)


def _checked_on_host(arrays: dict[str, torch.Tensor], group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Check the values, offsets (B + 1,) and group_offsets (G + 1,), and return those two. The only synchronisation."""
    token_ids = arrays["token_ids"]
    small = {name: tensor for name, tensor in arrays.items() if name != "token_ids"}
    if len(token_ids):
        small["smallest"] = token_ids.amin(dim=0, keepdim=True)
    words = [tensor.view(torch.int32) for tensor in small.values()]
    on_host = torch.cat(words).cpu().numpy()
    parts = np.split(on_host, np.cumsum([len(part) for part in words])[:-1])
    values = {
        name: part.view({torch.int64: np.int64, torch.float32: np.float32, torch.int32: np.int32}[tensor.dtype])
        for (name, tensor), part in zip(small.items(), map(np.copy, parts), strict=True)
    }
    if len(token_ids):
        check_smallest_token(int(values["smallest"][0]))
    offsets = values["offsets"]
    group_offsets = check_packing(len(token_ids), offsets, group_size, values.get("group_offsets"))
    check_outcomes(values["rewards"], values["accuracies"], len(offsets) - 1)
    largest = int(np.diff(offsets[group_offsets]).max(initial=0))
    if largest > MAX_GROUP_TOKENS:
        raise ValueError(f"a group may have {MAX_GROUP_TOKENS} tokens with backend triton, got {largest}")
    return offsets, group_offsets


def launch_all(
    arrays: dict[str, torch.Tensor], offsets: np.ndarray, group_offsets: np.ndarray, max_order: int
) -> GroupStatistics:
    """Launch everything; never waits for the GPU. It expects checked input with group_offsets.

    Args: offsets, group_offsets: the host's copies of those in `arrays`.
    """
    device = arrays["token_ids"].device
    num_groups, num_responses = len(group_offsets) - 1, len(offsets) - 1

    def out(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float64, device=device)

    result = GroupStatistics(
        reward_mean=out(num_groups),
        reward_variance=out(num_groups),
        pass_rate=out(num_groups),
        outcome_variance=out(num_groups),
        self_bleu=out(num_groups),
        self_bleu_by_order=out(num_groups, max_order),
        distinct=out(num_groups, max_order),
        advantages=out(num_responses),
    )
    if num_groups == 0:
        return result
    responses = torch.arange(num_responses, device=device)
    group_of = torch.searchsorted(arrays["group_offsets"], responses, right=True, out_int32=True) - 1
    matches = torch.zeros((num_responses, max_order), dtype=torch.int32, device=device)
    num_distinct = torch.zeros((num_groups, max_order), dtype=torch.int32, device=device)
    _count(arrays, group_of, offsets, group_offsets, matches, num_distinct)

    packing = arrays["offsets"], arrays["group_offsets"]
    bleu, bleu_by_order = out(num_responses), out(num_responses, max_order)
    _launch(
        gpu_kernels.bleu_kernel,
        (_num_blocks(gpu_kernels.bleu_kernel, num_responses),),
        *(packing[0], group_of, packing[1], matches, bleu, bleu_by_order, num_responses, max_order),
    )
    _launch(
        gpu_kernels.group_kernel,
        (num_groups,),
        *(*packing, arrays["rewards"], arrays["accuracies"], bleu, bleu_by_order, num_distinct),
        *(*vars(result).values(), max_order),
    )
    return result


def _count(
    arrays: dict[str, torch.Tensor],
    group_of: torch.Tensor,
    offsets: np.ndarray,
    group_offsets: np.ndarray,
    matches: torch.Tensor,
    num_distinct: torch.Tensor,
) -> None:
    """Add the clipped matches (B, K) of every response and the different n-grams (G, K) of every group."""
    max_order = matches.shape[1]
    group_starts = arrays["offsets"].index_select(0, arrays["group_offsets"])
    parts = list(chunks(offsets[group_offsets], group_offsets, max_order))
    num_slots = [max_order * LOAD * (int(offsets[last]) - int(offsets[first])) + SPARE for first, last in parts]
    grams = torch.empty((max(num_slots), 2), dtype=torch.int64, device=group_of.device)
    cells = torch.empty((max(num_slots), 2), dtype=torch.int32, device=group_of.device)
    for (first, last), slots in zip(parts, num_slots, strict=True):
        start, end = int(offsets[first]), int(offsets[last])
        num_tokens, num_responses = end - start, last - first
        if num_tokens == 0:
            continue
        grams[:slots].zero_()
        cells[:slots].zero_()
        packing = arrays["offsets"][first : last + 1], group_of[first:last], group_starts
        sizes = num_tokens, num_responses
        token_ids = arrays["token_ids"][start:end]
        grid = (_num_blocks(gpu_kernels.count_kernel, num_tokens),)
        _launch(gpu_kernels.count_kernel, grid, token_ids, *packing, grams, cells, *sizes, max_order)
        tables = grams.view(torch.int32), cells.view(torch.int64)
        for kernel, sums in ((gpu_kernels.top_two_kernel, num_distinct), (gpu_kernels.match_kernel, matches[first:])):
            _launch(kernel, (_num_blocks(kernel, LOAD * num_tokens), max_order), *packing, *tables, sums, *sizes)


def chunks(group_starts: np.ndarray, group_offsets: np.ndarray, max_order: int) -> Iterator[tuple[int, int]]:
    """Yield first and last response (exclusive) of chunks of one group or more whose tables fit WORKSPACE_BYTES."""
    max_tokens = WORKSPACE_BYTES // (TABLE_BYTES * max_order)
    first = 0
    while first < len(group_offsets) - 1:
        last = int(np.searchsorted(group_starts, group_starts[first] + max_tokens, side="right")) - 1
        last = max(last, first + 1)
        yield int(group_offsets[first]), int(group_offsets[last])
        first = last


def _num_blocks(kernel: Any, num_elements: int) -> int:
    return -(-num_elements // LAUNCHES[kernel].block)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    kernel[grid](*arguments, BLOCK=LAUNCHES[kernel].block, num_warps=LAUNCHES[kernel].num_warps)
