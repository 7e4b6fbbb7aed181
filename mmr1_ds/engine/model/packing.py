"""No padding: the sequences of a micro-batch end to end in one row, attention kept inside each of them.

transformers tells packed sequences by positions that start again at 0. Its flash-attention reads them as they are; its
other implementations build a mask over all pairs of tokens of the row, most of which belong to different sequences.
Where flash-attention is not installed, `packed_attention` runs torch's own kernel on each sequence instead, and the
responses to one prompt share it: the row holds the prompt once, then its responses one after the other, each at the
positions that follow the prompt. A piece that starts at a position other than 0 sees the prompt before it and itself.
Same states and gradients; for 8 responses as long as their prompt, 9/16 of the tokens, and each image once.

Shape letters: S sequences, L longest, K tokens of all of them, T response tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from mmr1_ds.data.encoding import IMAGE_TYPE
from mmr1_ds.engine.model.batching import ModelBatch

logger = logging.getLogger(__name__)

# Families whose attention and positions were tested packed against one sequence at a time. Others, which may carry
# state from token to token (as linear attention does), are padded.
PACKABLE = {"llama", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
PACKED, FLASH = "packed_sdpa", "flash_attention_2"


def attention_implementation(padding_free: bool, family: str, dtype: torch.dtype) -> str:
    """The name under which transformers finds the attention of the policy; it decides whether sequences are packed.

    Args: family: the model type of its config.json.
    """
    if padding_free and family not in PACKABLE:
        logger.warning("worker.actor.padding_free: %s models were not tested packed; they are padded", family)
        padding_free = False
    if not padding_free:
        return "sdpa"
    if dtype == torch.bfloat16 and is_flash_attn_2_available():  # it is installed, and there is a GPU
        logger.info("attention of packed sequences: flash-attention")
        return FLASH
    logger.info("attention of packed sequences: torch's, sequence by sequence (flash-attention is not installed)")
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, causal_by_itself)
    return PACKED


def response_states(model: PreTrainedModel, batch: ModelBatch) -> Tensor:
    """The hidden state that predicts each response token, (T, H)."""
    packs = model.config.get_text_config()._attn_implementation in (PACKED, FLASH)
    return packed_states(model, batch) if packs else padded_states(model, batch)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether responses to one prompt are computed after one copy of it. Sequence parallelism has its own attention."""
    return model.config.get_text_config()._attn_implementation == PACKED


def packed_states(model: PreTrainedModel, batch: ModelBatch) -> Tensor:
    """The states of `padded_states`, to rounding, computed without padding."""
    inputs, places_T = pack(model, batch, shares_prompts(model))
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0, places_T]


def pack(model: PreTrainedModel, batch: ModelBatch, prompts_once: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the model, all sequences in one row of K tokens, and where in it each response token is predicted.

    Args: prompts_once: each prompt once, its responses after it; only `packed_attention` reads that.
    Returns: input_ids (1, K), position_ids (1, K), or (4, 1, K) where images turn the rotary embedding in three
        dimensions and the first says where sequences begin, vision inputs; places (T,) int64.
    """
    real_SL = batch.attention_mask.bool()
    first_S = torch.arange(len(real_SL), device=real_SL.device)
    if prompts_once and batch.shares is not None:
        first_S = batch.shares
    prompts_S = real_SL.sum(dim=1) - torch.bincount(batch.rows, minlength=len(real_SL))
    in_prompt_SL = torch.arange(real_SL.shape[1], device=real_SL.device) < prompts_S[:, None]
    is_first_S = first_S == torch.arange(len(first_S), device=first_S.device)
    order_S = first_S.argsort(stable=True)  # a prompt's responses follow it
    kept_SL = (real_SL & (is_first_S[:, None] | ~in_prompt_SL))[order_S]

    position_ids = (batch.attention_mask.cumsum(dim=1) - 1)[order_S][kept_SL][None]
    inputs = dict(batch.vision)
    types_SL = inputs.pop("mm_token_type_ids", None)
    if types_SL is not None:
        spatial_3SL, _ = model.base_model.get_rope_index(
            batch.input_ids,
            mm_token_type_ids=types_SL,
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=batch.attention_mask,
        )
        position_ids = torch.cat([position_ids[None], spatial_3SL[:, order_S][:, kept_SL][:, None]])
        inputs |= _images_of(model, inputs, types_SL, is_first_S)
    inputs |= {"input_ids": batch.input_ids[order_S][kept_SL][None], "position_ids": position_ids}
    places_SL = torch.empty_like(batch.input_ids)
    places_SL[order_S] = (kept_SL.reshape(-1).cumsum(0) - 1).view(kept_SL.shape)
    # The first token of a response is predicted at the end of the prompt, where the row that has it has it.
    rows_T = torch.where(in_prompt_SL[batch.rows, batch.columns], first_S[batch.rows], batch.rows)
    return inputs, places_SL[rows_T, batch.columns]


def _images_of(
    model: PreTrainedModel, vision: dict[str, Tensor], types_SL: Tensor, wanted_S: Tensor
) -> dict[str, Tensor]:
    """Pixels and grids of the images of the wanted rows alone."""
    grid = vision["image_grid_thw"]
    patches = grid.prod(dim=1)
    ends = (patches // model.config.vision_config.spatial_merge_size**2).cumsum(0)  # of each image, in image tokens
    rows = torch.arange(len(types_SL), device=grid.device).repeat_interleave((types_SL == IMAGE_TYPE).sum(dim=1))
    kept = wanted_S[rows[ends - 1]]
    return {"image_grid_thw": grid[kept], "pixel_values": vision["pixel_values"][kept.repeat_interleave(patches)]}


def padded_states(model: PreTrainedModel, batch: ModelBatch) -> Tensor:
    """The hidden state that predicts each response token, (T, H)."""
    states_SLH = model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.vision
    ).last_hidden_state
    return states_SLH[batch.rows, batch.columns]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, sequence by sequence where positions say that the row is packed.

    Args: query, key, value: (1, heads, K, head size) when packed; position_ids: (1, K).
    Returns: (1, K, heads, head size), and no weights.
    """
    cuts = _cuts(query, key, attention_mask, position_ids)
    if sliding_window is None and not cuts:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # the window is in it
    if not cuts:  # no packed row, but longer than the window, or a token generated with a cache
        mask = _seen(query.shape[2], 0, sliding_window, query.device)
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    assert position_ids is not None
    firsts = position_ids[0, [0, *cuts]].tolist()
    # Split, not sliced: the gradients of pieces then meet in one tensor and not in one as long as the row for each.
    # (`tensor_split` slices.)
    lengths = [end - start for start, end in pairwise([0, *cuts, query.shape[2]])]
    pieces = list(zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True))
    outputs: dict[int, Tensor] = {}
    for place, others in _responses_by_prompt(firsts).items():
        first = firsts[others[0]] if others else 0
        prompt = tuple(tensor[:, :, :first] for tensor in pieces[place][1:])
        for part in _of_like_length(others, pieces):
            queries, keys, values = (_side_by_side([pieces[i][k] for i in part]) for k in range(3))
            keys, values = (
                torch.cat([before.expand(len(part), -1, -1, -1), own], dim=2)
                for before, own in zip(prompt, (keys, values), strict=True)
            )
            mask = _seen(queries.shape[2], first, sliding_window, query.device)
            found = sdpa_attention_forward(module, queries, keys, values, mask, **options)[0]
            outputs.update(_cut_apart(found, part, pieces))
    for part in _of_like_length([i for i, first in enumerate(firsts) if first == 0], pieces):
        queries, keys, values = (_side_by_side([pieces[i][k] for i in part]) for k in range(3))
        mask = _seen(queries.shape[2], 0, sliding_window, query.device)
        found = sdpa_attention_forward(module, queries, keys, values, mask, **options)[0]
        outputs.update(_cut_apart(found, part, pieces))
    return torch.cat([outputs[i] for i in range(len(pieces))], dim=1), None


def _responses_by_prompt(firsts: Sequence[int]) -> dict[int, list[int]]:
    """The pieces that begin at 0, each with the further responses to its prompt, which follow it."""
    found: dict[int, list[int]] = {}
    for i, first in enumerate(firsts):
        if first == 0:
            prompt = i
            found[prompt] = []
        else:
            found[prompt].append(i)
    return found


def _of_like_length(places: Sequence[int], pieces: Sequence[tuple[Tensor, ...]]) -> Iterator[list[int]]:
    """Pieces that one call of the kernel takes side by side: one call for each, on CPU, leaves most threads idle.

    The shortest has at least half of the longest's tokens, so that little is computed for nothing.
    """
    part: list[int] = []
    for i in sorted(places, key=lambda i: -pieces[i][0].shape[2]):
        if part and 2 * pieces[i][0].shape[2] < pieces[part[0]][0].shape[2]:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """(1, heads, length, size) each, to (pieces, heads, longest, size); what is added comes last, where none looks."""
    longest = max(tensor.shape[2] for tensor in tensors)
    return torch.cat([t if t.shape[2] == longest else pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors])


def _cut_apart(
    found: Tensor, part: Sequence[int], pieces: Sequence[tuple[Tensor, ...]]
) -> Iterator[tuple[int, Tensor]]:
    """Each piece's place and its own outputs, (1, length, heads, size)."""
    for i, output in zip(part, found.split(1), strict=True):
        length = pieces[i][0].shape[2]
        yield i, output if output.shape[1] == length else output[:, :length]


def _cuts(query: Tensor, key: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> list[int]:
    """Where a sequence follows another in the row; none in a vision tower, which has no positions, or with a cache."""
    if attention_mask is not None or position_ids is None or len(query) > 1 or query.shape[2] != key.shape[2]:
        return []
    positions_K = position_ids[0]
    return ((positions_K[1:] - positions_K[:-1] != 1).nonzero().squeeze(1) + 1).tolist()


def _seen(length: int, first: int, width: int | None, device: torch.device) -> Tensor | None:
    """Which tokens see which, (1, 1, length, first + length); None where each sees all before it in its own piece."""
    if first == 0 and (width is None or length <= width):
        return None
    distance = torch.arange(first, first + length, device=device)[:, None] - torch.arange(first + length, device=device)
    return ((distance >= 0) & (distance < (width or first + length)))[None, None]


def causal_by_itself(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """No mask for whole rows without padding, packed or not, which positions and order tell all of. Else SDPA's."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options)
