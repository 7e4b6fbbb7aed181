"""No padding: the sequences of a micro-batch end to end in one row, attention kept inside each of them.

The responses to one prompt share it: the row holds the prompt once, then its responses one after the other, each at the
positions that follow the prompt, and each sees the prompt and itself (attention.py). Same states and gradients; for 8
responses as long as their prompt, 9/16 of the tokens, and each image once.

Shape letters: S sequences, L longest, K tokens of all of them, T response tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmr1_ds.engine.model.attention import PACKED, VARLEN, Row
from mmr1_ds.engine.model.batching import ModelBatch, to_device
from mmr1_ds.engine.model.router_replay import INPUT


class Computed(NamedTuple):
    """What a forward computes, of all of its K tokens, padding included."""

    states_KH: Tensor
    router_logits: tuple[Tensor, ...]  # (K, experts) of each layer that has them; () = nobody asked
    places_SL: Tensor  # int64, on the host: the place among the K tokens of each sequence's tokens
    places_T: Tensor  # int64: of those that predict the response tokens


def response_states(model: PreTrainedModel, batch: ModelBatch) -> Tensor:
    """The hidden state that predicts each response token, (T, H)."""
    found = compute(model, batch)
    return found.states_KH[found.places_T]


def compute(model: PreTrainedModel, batch: ModelBatch, **options: Any) -> Computed:
    """Run the model without its head. options: of its forward, as output_router_logits."""
    return (_packed if shares_prompts(model) else _padded)(model, batch, **options)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether responses to one prompt are computed after one copy of it. Sequence parallelism has its own attention."""
    return model.config.get_text_config()._attn_implementation in (PACKED, VARLEN)


def _packed(model: PreTrainedModel, batch: ModelBatch, **options: Any) -> Computed:
    inputs, places_SL = pack(model, batch, prompts_once=True)
    found = model.base_model(**inputs, use_cache=False, **options)
    return _computed(batch, found.last_hidden_state[0], found, places_SL, options)


def _computed(batch: ModelBatch, states_KH: Tensor, found: Any, places_SL: Tensor, options: dict[str, Any]) -> Computed:
    routed = found.router_logits if options.get("output_router_logits") else ()
    return Computed(states_KH, routed, places_SL, response_places(batch, places_SL))


def response_places(batch: ModelBatch, places_SL: Tensor) -> Tensor:
    """The place of each token that predicts one of a response, (T,), on the device."""
    return to_device(places_SL[batch.rows, batch.columns], batch.targets.device)


def pack(model: PreTrainedModel, batch: ModelBatch, prompts_once: bool = False) -> tuple[dict[str, Any], Tensor]:
    """The inputs of the model, all sequences in one row of K tokens, and where in it each sequence's tokens are.

    The row is laid out on the host, which waits for nothing of the device.
    Args: prompts_once: each prompt once, its responses after it.
    Returns: row, input_ids (1, K), position_ids (1, K), or (4, 1, K) where images turn the rotary embedding in three
        dimensions and the first is the place in the sequence, vision inputs, replayed experts; places (S, L) int64, on
        the host.
    """
    device = batch.targets.device
    real_SL = batch.attention_mask.bool()
    first_S = batch.shares if prompts_once else torch.arange(len(real_SL))
    prompts_S = real_SL.sum(dim=1) - torch.bincount(batch.rows, minlength=len(real_SL))
    in_prompt_SL = torch.arange(real_SL.shape[1]) < prompts_S[:, None]
    is_first_S = first_S == torch.arange(len(first_S))
    order_S = first_S.argsort(stable=True)  # a prompt's responses follow it
    kept_SL = (real_SL & (is_first_S[:, None] | ~in_prompt_SL))[order_S]
    starts_S = prompts_S.where(~is_first_S, torch.zeros_like(prompts_S))[order_S]
    row = Row.of(kept_SL.sum(dim=1).tolist(), starts_S.tolist(), device)

    position_ids = (batch.attention_mask.cumsum(dim=1) - 1)[order_S][kept_SL][None]
    inputs: dict[str, Any] = {}
    if batch.positions is not None:
        position_ids = torch.cat([position_ids[None], batch.positions[:, order_S][:, kept_SL][:, None]])
        inputs = _images_of(model, batch, first_S)
    inputs |= {"input_ids": batch.input_ids[order_S][kept_SL][None], "position_ids": position_ids}
    if batch.experts is not None:
        inputs[INPUT] = batch.experts[order_S][kept_SL]
    places_SL = torch.empty_like(batch.input_ids)
    places_SL[order_S] = (kept_SL.reshape(-1).cumsum(0) - 1).view(kept_SL.shape)
    # The prompt's are where the row that has it has them.
    places_SL = torch.where(in_prompt_SL, places_SL[first_S], places_SL)
    return _on_device(inputs, device) | {"row": row}, places_SL


def _rows_of_images(model: PreTrainedModel, batch: ModelBatch) -> Tensor:
    """The row of each image in `image_grid_thw`, by the tokens that it takes there."""
    patches = batch.vision["image_grid_thw"].prod(dim=1)
    ends = (patches // model.config.vision_config.spatial_merge_size**2).cumsum(0)
    tokens_S = (batch.input_ids == model.config.image_token_id).sum(dim=1)
    return torch.arange(len(tokens_S)).repeat_interleave(tokens_S)[ends - 1]


def _on_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: tensor if tensor.device == device else to_device(tensor, device) for name, tensor in inputs.items()}


def _images_of(model: PreTrainedModel, batch: ModelBatch, first_S: Tensor) -> dict[str, Tensor]:
    """Grids and pixels of the images of the rows that stand for themselves, in their order; see `ModelBatch.vision`."""
    grid, pixels = batch.vision["image_grid_thw"], batch.vision["pixel_values"]
    rows_S = torch.arange(len(first_S))
    patches, row_of = grid.prod(dim=1), _rows_of_images(model, batch)
    kept = (first_S == rows_S)[row_of]
    if torch.equal(first_S, batch.shares):
        return {"image_grid_thw": grid[kept], "pixel_values": pixels}
    patches_S = torch.zeros(len(rows_S), dtype=torch.int64).index_add(0, row_of, patches)
    there_S = patches_S.where(batch.shares == rows_S, torch.zeros_like(patches_S))
    starts_S = (there_S.cumsum(0) - there_S)[batch.shares]
    places = [torch.arange(start, start + size) for start, size in zip(starts_S, patches_S, strict=True)]
    return {"image_grid_thw": grid, "pixel_values": pixels[to_device(torch.cat(places), pixels.device)]}


def _padded(model: PreTrainedModel, batch: ModelBatch, **options: Any) -> Computed:
    device = batch.targets.device
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.vision}
    if batch.vision:
        inputs |= _images_of(model, batch, torch.arange(len(batch.input_ids)))
    if batch.experts is not None:
        inputs[INPUT] = batch.experts.flatten(0, 1)
    if batch.positions is not None and hasattr(model.base_model, "get_rope_index"):
        inputs["position_ids"] = batch.positions
    found = model.base_model(**_on_device(inputs, device), use_cache=False, **options)
    places_SL = torch.arange(batch.input_ids.numel()).view(batch.input_ids.shape)
    return _computed(batch, found.last_hidden_state.flatten(0, 1), found, places_SL, options)
