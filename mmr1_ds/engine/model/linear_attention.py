"""Linear attention (gated delta net, arXiv 2412.06464) inside the pieces of a packed row.

Its layers carry a state from token to token, after a short convolution over the tokens before: neither may reach from
one sequence into the next. transformers passes the model's inputs, the `Row` among them, on to the functions that
compute the two, and drops what a function does not take. Here both take the row: pieces of like length stand side by
side, each beginning without a state. A response that shares its prompt begins with the prompt's queries, keys and
values once more: all other layers, projections and image towers see the prompt once.

Shape letters: K tokens of the row, P pieces.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from mmr1_ds.engine.model.attention import PACKED, VARLEN, Row


def has_states(config: PreTrainedConfig) -> bool:
    """Return whether layers of the model carry a state along a sequence, so that no part of it stands by itself."""
    return "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def keep_states_apart(model: PreTrainedModel) -> None:
    """Let the model's linear attention begin anew in each piece of a packed row. After loading.

    transformers has one function a family, which its layers find by name in their module: it is replaced there, once,
    for all models of the family. Without a row it does what it did. A model that is padded needs none of it: what
    comes after a sequence changes nothing in it.
    """
    if not has_states(model.config) or model.config.get_text_config()._attn_implementation not in (PACKED, VARLEN):
        return
    for name in {type(module).__module__ for module in model.modules() if hasattr(module, "A_log")}:
        library: Any = sys.modules[name]
        if not hasattr(library.causal_conv1d_fn, "takes_row"):
            library.causal_conv1d_fn = _convolution_by_piece(library.causal_conv1d_fn)
            library.torch_chunk_gated_delta_rule = _rule_by_piece(library.torch_chunk_gated_delta_rule)


def _convolution_by_piece(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(convolve)
    def by_piece(states: Tensor, *weights: Any, row: Row | None = None, **options: Any) -> Tensor:
        """Args: states: (1, channels, K) when packed."""
        if row is None or len(row.lengths) == 1:
            return convolve(states, *weights, **options)

        def of_pieces(states: Tensor) -> Tensor:
            return convolve(states.transpose(1, 2), *weights, **options).transpose(1, 2)

        return _piece_by_piece(row, of_pieces, states.transpose(1, 2)).transpose(1, 2)

    by_piece.takes_row = True  # type: ignore[attr-defined]
    return by_piece


def _rule_by_piece(rule: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    @functools.wraps(rule)
    def by_piece(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, row: Row | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Args: query, key, value: (1, K, heads, head size) when packed; g, beta: (1, K, heads)."""
        if row is None or len(row.lengths) == 1:
            return rule(query, key, value, g=g, beta=beta, **options)

        def of_pieces(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            return rule(query, key, value, g=g, beta=beta, **options)[0]

        return _piece_by_piece(row, of_pieces, query, key, value, g, beta), None

    return by_piece


def _piece_by_piece(row: Row, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What `compute` makes of each piece by itself, (1, K, ...).

    Args: compute: causal, so that the zeros after a shorter piece change nothing; tensors: (1, K, ...) each.
    """
    lengths = [first + own for first, own in zip(row.firsts, row.lengths, strict=True)]
    whole = Row(lengths, [0] * len(lengths), row.device)
    rows = [tensor[0] for tensor in tensors]
    if (gathered := row.cuts.gathered) is not None:  # by `embedding` for the reason of varlen_attention
        rows = [embedding(gathered, values.flatten(1)).view(-1, *values.shape[1:]) for values in rows]
    pieces = [values.split(lengths) for values in rows]
    outputs: dict[int, Tensor] = {}
    for _, parts in whole.groups:
        for part in parts:
            found = compute(*(pad_sequence([of_tensor[i] for i in part], batch_first=True) for of_tensor in pieces))
            outputs |= {i: result[row.firsts[i] : lengths[i]] for i, result in zip(part, found, strict=True)}
    return torch.cat([outputs[i] for i in range(len(row.lengths))])[None]
