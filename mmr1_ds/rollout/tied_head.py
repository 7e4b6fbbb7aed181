"""An output layer that shares the embedding's weight, in vLLM's model. Runs in vLLM's worker."""

from __future__ import annotations

from typing import Any


def head_is_tied(model: Any) -> bool:
    """Before the first reload: afterwards the two are apart also where they are tied."""
    head, embedding = _head_and_embedding(model)
    return head is embedding or head.weight is embedding.weight


def pack_tied_head(model: Any) -> None:
    """Make the CPU build's own copy of a tied output layer anew; to be called after every reload.

    vLLM's CPU build packs lm_head into a layout of its own. A reload renews the embedding but not that copy when the
    two are tied: log-probabilities then drift, without an error.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        head, embedding = _head_and_embedding(model)
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


def _head_and_embedding(model: Any) -> tuple[Any, Any]:
    language_model = model.get_language_model() if hasattr(model, "get_language_model") else model
    return language_model.lm_head, language_model.model.embed_tokens
