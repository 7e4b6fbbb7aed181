"""The public op: checks its input once, then hands it to a backend."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mmr1_kernels import cpu, reference
from mmr1_kernels.checks import check_max_order, check_outcomes, check_packing, check_tokens, checked_tensor
from mmr1_kernels.records import Array, GroupStatistics
from mmr1_kernels.scoring import score_groups

BACKENDS = ("reference", "cpu", "triton")


def group_statistics(
    token_ids: Array,
    offsets: Array,
    rewards: Array,
    accuracies: Array,
    group_size: int | None,
    max_order: int = 3,
    *,
    group_offsets: Array | None = None,
    backend: str | None = None,
) -> GroupStatistics:
    """Compute rewards, advantages and diversity of G groups of consecutive responses, in one pass.

    Self-BLEU equals NLTK's `sentence_bleu` with `method1` smoothing of each response against all others of its
    group, averaged; advantages equal verl's GRPO (unbiased standard deviation, 1e-6 added to it).

    Edge cases, defined:
      - an empty response scores self-BLEU 0, as in NLTK, but a group of empty responses only scores 1: nothing
        differs, and 0 would reward silence as the most diverse answer of all;
      - a response of fewer than n tokens has n-gram precision 0.1 (method1's smoothing of 0/1), as in NLTK;
      - a group of one has no others to resemble: self-BLEU 0, advantage 0. Diversity scores of it mean nothing;
      - a group without an n-gram has distinct-n 0;
      - no groups at all (B = 0) gives arrays of length 0.

    Args:
        token_ids: (total,) int32, not negative: response tokens only, no prompt, padding or end-of-sequence.
        offsets: (B + 1,) int64; response b is token_ids[offsets[b]:offsets[b + 1]].
        rewards: (B,) float32, finite.
        accuracies: (B,) float32 in [0, 1]; NaN = unknown, left out of the pass rate.
        group_size: N, responses a group; None beside group_offsets.
        max_order: longest n-gram, in 1..64.
        group_offsets: (G + 1,) int64, for groups of unequal size: group g is responses
            group_offsets[g]:group_offsets[g + 1], one at least.
        backend: `reference` (plain numpy), `cpu` (C++) or `triton` (GPU). Default: `triton` for tensors on a GPU,
            else `cpu` where the extension is built, else `reference`.
    The arrays are numpy arrays, or torch tensors on one device.
    Returns: a record of arrays of the same kind, on the same device.
    Raises: TypeError, ValueError naming the argument and the value; RuntimeError for a backend asked for by name that
        is not available here.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    check_max_order(max_order)
    max_order = int(max_order)
    arrays = {"token_ids": token_ids, "offsets": offsets, "rewards": rewards, "accuracies": accuracies}
    if group_offsets is not None:
        arrays["group_offsets"] = group_offsets
    device = _device_of(arrays)
    if backend == "triton" or (backend is None and device is not None and device.type != "cpu"):
        if device is None:
            raise RuntimeError("backend triton needs torch tensors on a GPU, got numpy arrays")
        try:
            from mmr1_kernels import gpu  # imports triton
        except ImportError as error:
            raise RuntimeError(
                f"backend triton does not import ({error}); install triton, or ask for backend='cpu'"
            ) from error
        return gpu.group_statistics(arrays, group_size, max_order)
    if device is not None:
        arrays = {name: checked_tensor(name, tensor).cpu().numpy() for name, tensor in arrays.items()}
    statistics = _on_host(arrays, group_size, max_order, backend)
    return statistics if device is None else _as_tensors(statistics, device)


def _on_host(
    arrays: dict[str, np.ndarray], group_size: int | None, max_order: int, backend: str | None
) -> GroupStatistics:
    check_tokens(arrays["token_ids"])
    token_ids, offsets = arrays["token_ids"], arrays["offsets"]
    group_offsets = check_packing(len(token_ids), offsets, group_size, arrays.get("group_offsets"))
    check_outcomes(arrays["rewards"], arrays["accuracies"], len(offsets) - 1)
    if backend is None and not cpu.is_available():
        cpu.warn_that_it_is_missing()
        backend = "reference"
    count_ngrams = reference.count_ngrams if backend == "reference" else cpu.count_ngrams
    counts = count_ngrams(token_ids, offsets, group_offsets, max_order)
    return score_groups(counts, offsets, arrays["rewards"], arrays["accuracies"], group_offsets)


def _device_of(arrays: dict[str, Array]) -> Any:
    """The torch.device of the tensors, None for numpy arrays. Raises: TypeError when they are mixed, or neither."""
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    first = None
    for position, (name, array) in enumerate(arrays.items()):
        is_tensor = torch is not None and isinstance(array, torch.Tensor)
        if not is_tensor and not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be a numpy array or a torch tensor, got {type(array).__name__}")
        device = array.device if is_tensor else None
        if position == 0:
            first = device
        elif device != first:
            first_kind, kind = ("a numpy array" if d is None else f"a tensor on {d}" for d in (first, device))
            raise TypeError(f"{name} must be what token_ids is, {first_kind}, got {kind}")
    return first


def _as_tensors(statistics: GroupStatistics, device: Any) -> GroupStatistics:
    import torch

    return GroupStatistics(
        **{name: torch.from_numpy(array).to(device) for name, array in vars(statistics).items()},
    )
