"""No padding: the sequences of a micro-batch end to end in one row, attention kept inside each of them.

transformers tells packed sequences by positions that start again at 0. Its flash-attention reads them as they are; its
other implementations build a mask over all pairs of tokens of the row, most of which belong to different sequences.
Where flash-attention is not installed, `packed_attention` runs torch's own kernel on each sequence instead.

Shape letters: S sequences, L longest, K tokens of all of them, T response tokens, H hidden size.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from mmr1_ds.engine.batching import ModelBatch

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
        return FLASH
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, causal_by_itself)
    return PACKED


def response_states(model: PreTrainedModel, batch: ModelBatch) -> Tensor:
    """The hidden state that predicts each response token, (T, H)."""
    packs = model.config.get_text_config()._attn_implementation in (PACKED, FLASH)
    return packed_states(model, batch) if packs else padded_states(model, batch)


def packed_states(model: PreTrainedModel, batch: ModelBatch) -> Tensor:
    """What `padded_states` gives, to rounding, computed without padding."""
    inputs, places_T = pack(model, batch)
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0, places_T]


def pack(model: PreTrainedModel, batch: ModelBatch) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the model, all sequences in one row of K tokens, and where in it each response token is predicted.

    Returns: input_ids (1, K), position_ids (1, K), or (4, 1, K) where images turn the rotary embedding in three
        dimensions and the first says where sequences begin, vision inputs; places (T,) int64.
    """
    real_SL = batch.attention_mask.bool()
    lengths_S = batch.attention_mask.sum(dim=1)
    starts_S = lengths_S.cumsum(0) - lengths_S
    position_ids = (batch.attention_mask.cumsum(dim=1) - 1)[real_SL][None]
    inputs = dict(batch.vision)
    types_SL = inputs.pop("mm_token_type_ids", None)
    if types_SL is not None:
        spatial_3SL, _ = model.base_model.get_rope_index(
            batch.input_ids,
            mm_token_type_ids=types_SL,
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=batch.attention_mask,
        )
        position_ids = torch.cat([position_ids[None], spatial_3SL[:, real_SL][:, None]])
    inputs |= {"input_ids": batch.input_ids[real_SL][None], "position_ids": position_ids}
    return inputs, starts_S[batch.rows] + batch.columns


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
    parts = (tensor.tensor_split(cuts, dim=2) for tensor in (query, key, value))
    outputs = [
        sdpa_attention_forward(module, *part, _window(part[0], sliding_window), **options)[0]
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _cuts(query: Tensor, key: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> list[int]:
    """Where a sequence follows another in the row; none in a vision tower, which has no positions, or with a cache."""
    if attention_mask is not None or position_ids is None or len(query) > 1 or query.shape[2] != key.shape[2]:
        return []
    positions_K = position_ids[0]
    return ((positions_K[1:] - positions_K[:-1] != 1).nonzero().squeeze(1) + 1).tolist()


def _window(query: Tensor, width: int | None) -> Tensor | None:
    """Which tokens see which, (1, 1, length, length), where a sequence is longer than its sliding window."""
    length = query.shape[2]
    if width is None or length <= width:
        return None
    distance = torch.arange(length, device=query.device)
    distance = distance[:, None] - distance[None, :]
    return ((distance >= 0) & (distance < width))[None, None]


def causal_by_itself(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """No mask for whole rows without padding, packed or not, which positions and order tell all of. Else SDPA's."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options)
