"""Prompt-response pairs into padded model inputs. Shape letters: S sequences, L longest, T response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmr1_ds.records import Prompt

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


@dataclass(frozen=True)
class ModelBatch:
    """What one forward takes. The response tokens of all rows are packed end to end, in row order."""

    input_ids: Tensor  # (S, L) int64, padded on the right
    attention_mask: Tensor  # (S, L) int64
    vision: dict[str, Tensor]  # pixel_values, image_grid_thw, mm_token_type_ids (S, L); empty for text models
    rows: Tensor  # (T,) int64: row of each response token
    columns: Tensor  # (T,) int64: position whose hidden state predicts it
    targets: Tensor  # (T,) int64: the token itself
    shares: Tensor | None = None  # (S,) int64: the first row with the same prompt; None = not known


def blank_image_prompt(encoder: PromptEncoder) -> Prompt:
    """The smallest prompt that makes the vision tower run."""
    from PIL import Image

    side = encoder.pixel_limits.factor
    return Prompt(-1, "blank", (encoder.image_token_id,), (Image.new("RGB", (side, side)),), "")


def collate(
    pairs: Sequence[tuple[Prompt, tuple[int, ...]]], encoder: PromptEncoder, device: torch.device
) -> ModelBatch:
    """Pad prompt-response pairs to one batch.

    Under ZeRO-3 every forward gathers parameters collectively, so the vision tower must run on all ranks or on
    none. A multi-modal batch without images therefore gets one more row with a small blank image and no targets.
    """
    assert pairs, "an empty micro-batch would skip the collectives of the other ranks"
    inputs = [encoder.expand(prompt) for prompt, _ in pairs]
    responses = [torch.tensor(token_ids, dtype=torch.int64) for _, token_ids in pairs]
    if encoder.is_multimodal and all(item.pixel_values is None for item in inputs):
        inputs.append(encoder.expand(blank_image_prompt(encoder)))
        responses.append(torch.empty(0, dtype=torch.int64))

    sequences = [torch.cat([item.input_ids, ids]) for item, ids in zip(inputs, responses, strict=True)]
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    input_ids = torch.full(shape, encoder.eos_token_ids[0])  # masked: any token will do
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        attention_mask[row, : len(sequence)] = 1

    vision = {}
    if encoder.is_multimodal:
        token_types = torch.zeros(shape, dtype=torch.int64)  # 0 = text, so responses need nothing
        for row, item in enumerate(inputs):
            assert item.mm_token_type_ids is not None
            token_types[row, : len(item.input_ids)] = item.mm_token_type_ids
        vision = {
            "mm_token_type_ids": token_types,
            "pixel_values": torch.cat([item.pixel_values for item in inputs if item.pixel_values is not None]),
            "image_grid_thw": torch.cat([item.image_grid_thw for item in inputs if item.image_grid_thw is not None]),
        }
    first: dict[int, int] = {}  # a group's rows have one Prompt between them: no need to compare images
    shares = [first.setdefault(id(prompt), row) for row, (prompt, _) in enumerate(pairs)]
    shares += range(len(pairs), len(inputs))
    lengths = torch.tensor([len(ids) for ids in responses])
    starts = torch.tensor([len(item.input_ids) for item in inputs])
    rows = torch.repeat_interleave(torch.arange(shape[0]), lengths)
    within = torch.cat([torch.arange(int(length)) for length in lengths])
    columns = starts[rows] + within - 1
    return ModelBatch(
        input_ids.to(device),
        attention_mask.to(device),
        {name: tensor.to(device) for name, tensor in vision.items()},
        rows.to(device),
        columns.to(device),
        torch.cat(responses).to(device),
        torch.tensor(shares).to(device),
    )
