"""Checks of how long the sequences of a run may be."""

from __future__ import annotations

import importlib.util
import os

from mmr1_ds.config.schema import RunConfig
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.models import model_positions


def check_lengths(config: RunConfig) -> None:
    """Check the sizes of images, videos and sequences against one another. Raises: UserError."""
    data, rollout = config.data, config.worker.rollout
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        raise UserError(f"data.min_pixels={data.min_pixels} is over data.max_pixels={data.max_pixels}; lower it")
    if data.video_min_pixels > data.video_max_pixels:
        raise UserError(
            f"data.video_min_pixels={data.video_min_pixels} is over data.video_max_pixels={data.video_max_pixels}; "
            "lower it"
        )
    length = data.max_prompt_length + data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < length:
        raise UserError(
            f"worker.rollout.max_model_len={rollout.max_model_len} is under data.max_prompt_length + "
            f"data.max_response_length = {data.max_prompt_length} + {data.max_response_length} = {length}; "
            "raise it or leave it out"
        )
    longest = rollout.max_model_len or length
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < longest:
        raise UserError(
            f"worker.rollout.max_num_batched_tokens={rollout.max_num_batched_tokens} is under the longest sequence "
            f"({longest} tokens), which worker.rollout.enable_chunked_prefill=false does not allow; "
            "raise it or allow chunked prefill"
        )


def check_positions(config: RunConfig) -> None:
    """Check that vLLM takes the longest sequence: over the model's positions it does not start. Raises: UserError."""
    data, rollout = config.data, config.worker.rollout
    uses_vllm = rollout.engine == "vllm" or (rollout.engine == "server" and not rollout.server_urls)
    uses_vllm |= rollout.engine == "auto" and importlib.util.find_spec("vllm") is not None
    positions = model_positions(config.worker.actor.model)
    if not uses_vllm or positions is None or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") not in ("0", ""):
        return
    length, has = data.max_prompt_length + data.max_response_length, f"the model has {positions} positions"
    if length > positions:
        left = positions - data.max_prompt_length
        remedy = f"set data.max_response_length to {left}" if left > 0 else f"set the two to {positions} together"
        raise UserError(
            f"data.max_prompt_length + data.max_response_length = {data.max_prompt_length} + "
            f"{data.max_response_length} = {length}, {has} (max_position_embeddings); {remedy} or less"
        )
    if (rollout.max_model_len or 0) > positions:
        raise UserError(f"worker.rollout.max_model_len={rollout.max_model_len}, {has}; lower it or leave it out")
