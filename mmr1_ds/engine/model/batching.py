"""Prompt-response pairs into padded model inputs. Shape letters: S sequences, L longest, T response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmr1_ds.data.encoding import ModelInputs, PromptEncoder
from mmr1_ds.records import Pair, Prompt


@dataclass(frozen=True)
class ModelBatch:
    """The inputs of one forward. The response tokens of all rows are packed end to end, in row order.

    Pixels and targets are on the device. The rest stays on the host, where rows are laid out without waiting for it.
    """

    input_ids: Tensor  # (S, L) int64, padded on the right
    attention_mask: Tensor  # (S, L) int64
    # Of images and videos: image_grid_thw of each row's, pixel_values of each shared prompt's. Empty for text models.
    vision: dict[str, Tensor]
    rows: Tensor  # (T,) int64: row of each response token
    columns: Tensor  # (T,) int64: position whose hidden state predicts it
    targets: Tensor  # (T,) int64: the token itself
    shares: Tensor  # (S,) int64: the first row with the same prompt, whose images and videos they share
    positions: Tensor | None = None  # (3, S, L) int64, in time, height and width; None for text models
    experts: Tensor | None = None  # (S, L, layers, chosen) int16: where tokens are sent; -1 = where the router says


def blank_image_prompt(encoder: PromptEncoder) -> Prompt:
    """The smallest prompt that makes the vision tower run."""
    from PIL import Image

    side = encoder.pixel_limits.factor
    return Prompt(-1, "blank", (encoder.image_token_id,), (Image.new("RGB", (side, side)),), "")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the host, which does not wait: a GPU reads it from pinned memory when its turn comes."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def end_to_end(arrays: Sequence[np.ndarray | None], device: torch.device) -> Tensor:
    """One array (T,) a response as one float32 tensor, (T,); none of them may be None."""
    return to_device(torch.from_numpy(np.concatenate(arrays, dtype=np.float32)), device)  # type: ignore[arg-type]


def collate(
    pairs: Sequence[Pair],
    encoder: PromptEncoder,
    device: torch.device,
    experts: Sequence[np.ndarray] | None = None,
) -> ModelBatch:
    """Pad prompt-response pairs to one batch. experts: where the tokens of each pair are sent (`Response.experts`).

    Under ZeRO-3 every forward gathers parameters collectively, so the vision tower must run on all ranks or on
    none. A multi-modal batch without images therefore gets one more row with a small blank image and no targets.
    """
    assert pairs, "an empty micro-batch would skip the collectives of the other ranks"
    inputs = [encoder.expand(prompt) for prompt, _ in pairs]
    lengths = [len(response) for _, response in pairs]
    targets = torch.from_numpy(np.concatenate([response for _, response in pairs], dtype=np.int64))
    if encoder.is_multimodal and all(item.pixel_values is None for item in inputs):
        inputs.append(encoder.expand(blank_image_prompt(encoder)))
        lengths.append(0)

    starts = [len(item.input_ids) for item in inputs]
    shape = (len(inputs), max(start + length for start, length in zip(starts, lengths, strict=True)))
    input_ids = torch.full(shape, encoder.eos_token_ids[0])  # masked: any token will do
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (item, start, response) in enumerate(zip(inputs, starts, targets.split(lengths), strict=True)):
        input_ids[row, :start] = item.input_ids
        input_ids[row, start : start + len(response)] = response
        attention_mask[row, : start + len(response)] = 1

    first: dict[int, int] = {}  # a group's rows have one Prompt between them: no need to compare images
    shares = [first.setdefault(id(prompt), row) for row, (prompt, _) in enumerate(pairs)]
    shares += range(len(pairs), len(inputs))
    vision, positions = {}, None
    if encoder.is_multimodal:
        columns_L = torch.arange(shape[1])
        positions = torch.empty(3, *shape, dtype=torch.int64)
        for row, item in enumerate(inputs):
            assert item.positions is not None
            positions[:, row] = columns_L + (item.positions.max() + 1 - starts[row])  # responses go on as text
            positions[:, row, : starts[row]] = item.positions
        once = [item for row, item in enumerate(inputs) if shares[row] == row]
        vision = {
            "pixel_values": _pixels([item for item in once if item.pixel_values is not None], device),
            "image_grid_thw": torch.cat([item.image_grid_thw for item in inputs if item.image_grid_thw is not None]),
        }
    experts_SLlk = None
    if experts is not None:
        experts_SLlk = torch.full((*shape, *experts[0].shape[1:]), -1, dtype=torch.int16)
        for row, chosen in enumerate(experts):
            assert len(chosen) == starts[row] + lengths[row] - 1, "experts of another sequence"
            experts_SLlk[row, : len(chosen)] = torch.from_numpy(chosen.astype(np.int16))
            last = experts_SLlk[shares[row], starts[row] - 1]  # of the shared prompt, which an empty response has not
            last.copy_(torch.where(last < 0, experts_SLlk[row, starts[row] - 1], last))
    lengths_S, starts_S = torch.tensor(lengths), torch.tensor(starts)
    rows = torch.repeat_interleave(torch.arange(len(inputs)), lengths_S)
    within = torch.arange(len(targets)) - (lengths_S.cumsum(0) - lengths_S)[rows]
    columns = starts_S[rows] + within - 1
    shares_S = torch.tensor(shares)
    return ModelBatch(
        input_ids, attention_mask, vision, rows, columns, to_device(targets, device), shares_S, positions, experts_SLlk
    )


def _pixels(items: Sequence[ModelInputs], device: torch.device) -> Tensor:
    """The pixels of all items end to end, on their way to the device."""
    if device.type == "cuda":
        parts = [item.pinned_pixels.to(device, non_blocking=True) for item in items]
    else:
        parts = [item.pixel_values for item in items if item.pixel_values is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
