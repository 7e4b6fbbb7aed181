"""Attention inside the pieces of a packed row: by one varlen call, or by torch's SDPA on one piece after the other.

transformers knows both by name and hands each layer the `Row` that the model's inputs carry.

- **varlen** (GPU): `torch.nn.attention.varlen.varlen_attn`, flash-attention over sequences end to end. The keys of a
  response that shares its prompt are the prompt's and its own, gathered by index; the kernel aligns causal masks and
  windows at the last key, so that each token sees the prompt and what precedes it. Merging two parts by their
  log-sum-exp would gather nothing, but the call has no gradient of its log-sum-exp, and the windows of the part over
  the prompt would differ for each token.
- **sdpa** (anywhere): pieces of like length side by side, with a mask where a prompt is shared.

Shape letters: K tokens of the row, P pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import embedding, pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmr1_ds.config.families import FAMILIES
from mmr1_ds.engine.model.batching import to_device
from mmr1_ds.errors import UserError

logger = logging.getLogger(__name__)

PACKED, VARLEN = "packed_sdpa", "packed_varlen"
# Vision towers hand all windows and images over at once to an attention with "flash" in its name, and only to such.
# But of a name with it, loading asks that it be a published kernel's: the tower is renamed when it is loaded.
VARLEN_TOWER = "packed_varlen_flash"
_NEWER_KERNELS = {9: "FA3", 10: "FA4"}  # by the GPU's compute capability; of torch's own, FA2, elsewhere
KEY = "worker.actor.attention"


def attention_implementation(
    choice: str, padding_free: bool, family: str, dtype: torch.dtype, device: torch.device
) -> str:
    """Return the name under which transformers finds the attention of the policy; it decides whether rows are packed.

    Args: choice: auto, varlen or sdpa; family: the model type of its config.json.
    Raises: UserError when varlen is demanded where it cannot run.
    """
    runs_varlen = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if choice == "varlen" and not runs_varlen:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{KEY}=varlen needs a GPU and bf16, but the model is {kind} on {device.type}; set it to auto")
    if padding_free and family not in FAMILIES:
        logger.warning("worker.actor.padding_free: %s models were not tested packed; they are padded", family)
        padding_free = False
    if not padding_free:
        return "sdpa"
    if choice == "sdpa" or not runs_varlen:
        logger.info("attention of packed sequences: torch's SDPA, sequence by sequence")
        return PACKED
    logger.info("attention of packed sequences: one varlen call, kernel %s", _activate_kernel(device))
    return VARLEN


@cache
def _activate_kernel(device: torch.device) -> str:
    """Let torch's flash-attention run the newest kernel that is installed for this GPU, in the whole process."""
    newer = _NEWER_KERNELS.get(torch.cuda.get_device_capability(device)[0])
    if newer is not None:
        try:
            activate_flash_attention_impl(newer)
            return newer
        except (ImportError, RuntimeError) as error:
            logger.info("%s, the newer kernel for this GPU, is not used: %s", newer, error)
    return "FA2"


def attend_images_at_once(model: PreTrainedModel) -> None:
    """Let a vision tower with varlen attention call it once a layer, not once an image or window. After loading."""
    tower = getattr(model.base_model, "visual", None)
    for module in [] if tower is None else tower.modules():
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == VARLEN:
            module.config._attn_implementation = VARLEN_TOWER


class Cuts(NamedTuple):
    """What a varlen call asks of a row."""

    queries: Tensor  # (P + 1,) int32: where each piece's queries begin, and the end
    keys: Tensor  # (P + 1,) int32: the same of its keys
    most_queries: int  # of a piece
    most_keys: int
    gathered: Tensor | None  # int64: the place in the row of every piece's keys; None = each piece has its own alone


@dataclass(frozen=True)
class Row:
    """How pieces lie in a packed row: found once on the host, and read by every layer.

    A piece is a whole sequence, or one more response to the prompt with which the last whole sequence begins.
    """

    lengths: list[int]  # (P,) tokens of each piece
    firsts: list[int]  # (P,) position of its first token: 0, or the length of the prompt that it shares
    device: torch.device
    _masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], firsts: Sequence[int], device: torch.device) -> Row:
        """Leave out what is empty, and join a response to a prompt that no other one follows directly."""
        row = cls([], [], device)
        for length, first in zip(lengths, firsts, strict=True):
            if first and first == row.lengths[-1] + row.firsts[-1]:
                row.lengths[-1] += length
            elif length:
                row.lengths.append(length)
                row.firsts.append(first)
        return row

    @cached_property
    def cuts(self) -> Cuts:
        """Cumulative lengths, and each piece's keys: the prompt's if it shares one, then its own."""
        starts = [0, *accumulate(self.lengths)]
        keys = [first + length for first, length in zip(self.firsts, self.lengths, strict=True)]
        places, prompt = [], 0
        for start, length, first in zip(starts, self.lengths, self.firsts, strict=False):
            prompt = prompt if first else start
            places += [torch.arange(prompt, prompt + first), torch.arange(start, start + length)]
        queries, ends = (
            to_device(torch.tensor(values, dtype=torch.int32), self.device)
            for values in (starts, [0, *accumulate(keys)])
        )
        gathered = to_device(torch.cat(places), self.device) if any(self.firsts) else None
        return Cuts(queries, ends, max(self.lengths), max(keys), gathered)

    @cached_property
    def groups(self) -> list[tuple[int | None, list[list[int]]]]:
        """Pieces that SDPA takes side by side: further responses under their prompt's piece, then whole ones (None).

        A call for each piece would leave most threads of a CPU idle.
        """
        further: dict[int, list[int]] = {}
        prompt = 0
        for i, first in enumerate(self.firsts):
            if first == 0:
                prompt = i
                further[prompt] = []
            else:
                further[prompt].append(i)
        groups = [*further.items(), (None, list(further))]
        return [(prompt, list(self._of_like_length(pieces))) for prompt, pieces in groups if pieces]

    def _of_like_length(self, pieces: Sequence[int]) -> Iterator[list[int]]:
        """Parts whose shortest piece has at least half of the longest's tokens, so that little is padded."""
        part: list[int] = []
        for i in sorted(pieces, key=lambda i: -self.lengths[i]):
            if part and 2 * self.lengths[i] < self.lengths[part[0]]:
                yield part
                part = []
            part.append(i)
        yield part

    def mask(self, length: int, first: int, window: int | None) -> Tensor | None:
        """As `_seen`, made once."""
        key = (length, first, window)
        if key not in self._masks:
            self._masks[key] = _seen(*key, self.device)
        return self._masks[key]


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row: Row | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One call for all pieces of a row, or all windows or images of a vision tower.

    Args: query, key, value: (1, heads, K, head size); row: of text; cu_seq_lens_q, max_length_q: of a vision tower.
    Returns: (1, K, heads, head size), and no weights.
    """
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if cu_seq_lens_q is not None:
        cuts, window = Cuts(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, None), (-1, -1)  # type: ignore[arg-type]
    else:
        assert row is not None, "a varlen model reads packed rows alone"
        # A window of the kernel does not count the token itself.
        cuts, window = row.cuts, (-1 if sliding_window is None else sliding_window - 1, 0)
        if cuts.gathered is not None:
            # By `embedding`, whose backward adds up a prompt's gradients in float32 and in one order: that of indexing
            # would round to bf16 after every response.
            keys, values = (embedding(cuts.gathered, x.flatten(1)).view(-1, *x.shape[1:]) for x in (keys, values))
    found = varlen_attn(
        queries, keys, values, cuts.queries, cuts.keys, cuts.most_queries, cuts.most_keys,
        scale=scaling, window_size=window, enable_gqa=True,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    return found[None], None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row: Row | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, piece by piece where there is a row.

    Args: query, key, value: (1, heads, K, head size) when packed; is_causal: false in a vision tower.
    Returns: (1, K, heads, head size), and no weights.
    """
    options["is_causal"] = is_causal
    if row is None or is_causal is False or len(row.lengths) == 1:
        if attention_mask is None and sliding_window is not None:  # longer than it, or generated with a cache
            attention_mask = _seen(query.shape[2], 0, sliding_window, query.device)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Split, not sliced: the gradients of pieces then meet in one tensor and not in one as long as the row for each.
    pieces = list(zip(*(tensor.split(row.lengths, dim=2) for tensor in (query, key, value)), strict=True))
    outputs: dict[int, Tensor] = {}
    for prompt, parts in row.groups:
        first = 0 if prompt is None else row.firsts[parts[0][0]]
        before = [] if prompt is None else [tensor[:, :, :first] for tensor in pieces[prompt][1:]]
        for part in parts:
            queries, *seen = (_side_by_side([pieces[i][k] for i in part]) for k in range(3))
            if before:
                seen = [
                    torch.cat([shared.expand(len(part), -1, -1, -1), own], dim=2)
                    for shared, own in zip(before, seen, strict=True)
                ]
            mask = row.mask(queries.shape[2], first, sliding_window)
            found = sdpa_attention_forward(module, queries, *seen, mask, **options)[0]
            outputs |= {i: output[:, : row.lengths[i]] for i, output in zip(part, found.split(1), strict=True)}
    return torch.cat([outputs[i] for i in range(len(pieces))], dim=1), None


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """(1, heads, length, size) each, to (pieces, heads, longest, size); what is added comes last, where none looks."""
    longest = max(tensor.shape[2] for tensor in tensors)
    return torch.cat([t if t.shape[2] == longest else pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors])


def _seen(length: int, first: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which tokens see which, (1, 1, length, first + length); None where each sees all before it in its own piece."""
    if first == 0 and (window is None or length <= window):
        return None
    distance = torch.arange(first, first + length, device=device)[:, None] - torch.arange(first + length, device=device)
    return ((distance >= 0) & (distance < (window or first + length)))[None, None]


def causal_by_itself(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """No mask for whole rows without padding, packed or not, which the row and order tell all of. Else SDPA's."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, causal_by_itself)
for _name in (VARLEN, VARLEN_TOWER):  # no mask is registered: transformers then makes none, nor looks for cuts
    AttentionInterface.register(_name, varlen_attention)
