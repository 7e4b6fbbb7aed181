"""Sampling from a transformers model: many responses in one batch, each by a seed of its own.

What `generate` would do, with three things it cannot: the responses to one prompt share its prefill, each response is
a function of the weights, its prompt and its seed alone, whatever else is in the batch, and the log-probability of
each token is kept from the pass that sampled it. Greedily it writes the same tokens.

Shape letters: P prompts, L longest of them, R responses, T tokens of a response at most, V vocabulary, K key-value
heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmr1_ds.records import SamplingSettings

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import ModelInputs

ATTENTION = "mmr1_ds_decoding"  # name of `_attention` among transformers' implementations


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, so that their last tokens stand side by side."""

    input_ids: Tensor  # (P, L) int64
    attention_mask: Tensor  # (P, L) int64
    positions: Tensor  # (P, L) int64, or (3, P, L) where images turn the rotary embedding in three dimensions
    next_positions: Tensor  # (P,) int64, of the tokens after
    vision: dict[str, Tensor]  # pixel_values and image_grid_thw, of images and videos, where there are any

    @staticmethod
    def of(prompts: Sequence[ModelInputs], padding: int, device: torch.device) -> PromptBatch:
        """padding: any token of the vocabulary; it is masked."""
        shape = (len(prompts), max(len(prompt.input_ids) for prompt in prompts))
        input_ids, mask = torch.full(shape, padding), torch.zeros(shape, dtype=torch.int64)
        positions = torch.zeros((3, *shape), dtype=torch.int64)
        vision: dict[str, Tensor] = {}
        for row, prompt in enumerate(prompts):
            columns = slice(shape[1] - len(prompt.input_ids), None)
            input_ids[row, columns], mask[row, columns] = prompt.input_ids, 1
            own = torch.arange(len(prompt.input_ids)) if prompt.positions is None else prompt.positions
            positions[:, row, columns] = own
        if any(prompt.pixel_values is not None for prompt in prompts):
            vision["pixel_values"] = torch.cat([p.pixel_values for p in prompts if p.pixel_values is not None])
            vision["image_grid_thw"] = torch.cat([p.image_grid_thw for p in prompts if p.image_grid_thw is not None])
        following = positions.amax(dim=(0, 2)) + 1
        return PromptBatch(
            input_ids.to(device),
            mask.to(device),
            (positions if vision else positions[0]).to(device),
            following.to(device),
            {name: tensor.to(device) for name, tensor in vision.items()},
        )


class Sampler:
    """The distribution that tokens are drawn from, and the draw."""

    def __init__(self, settings: SamplingSettings, forbidden_token_ids: Sequence[int], device: torch.device) -> None:
        self._temperature = settings.temperature
        self._forbidden = torch.tensor(list(forbidden_token_ids), dtype=torch.int64, device=device)
        self._penalty = settings.repetition_penalty
        self._filters: list[Any] = []
        if settings.temperature > 0 and settings.min_p > 0:  # first, as vLLM has it
            self._filters.append(MinPLogitsWarper(settings.min_p))
        if settings.temperature > 0 and settings.top_k > 0:
            self._filters.append(TopKLogitsWarper(settings.top_k))
        if settings.temperature > 0 and settings.top_p < 1:
            self._filters.append(TopPLogitsWarper(settings.top_p))

    def log_probs(self, logits_RV: Tensor, cut: bool = True, seen_RV: Tensor | None = None) -> Tensor:
        """Temperature applied, forbidden tokens left out, then min-p, top-k and top-p; (R, V) float32. Greedy: as at 1.

        Args:
            cut: False = of the whole distribution, without any of these and without the penalty.
            seen_RV: tokens that the repetition penalty is for.
        """
        scores_RV = logits_RV.float()
        if cut and seen_RV is not None:
            bent_RV = torch.where(scores_RV > 0, scores_RV / self._penalty, scores_RV * self._penalty)
            scores_RV = torch.where(seen_RV, bent_RV, scores_RV)
        scores_RV = scores_RV / (self._temperature or 1.0)
        scores_RV.index_fill_(1, self._forbidden, float("-inf"))
        for keep in self._filters if cut else ():
            scores_RV = keep(None, scores_RV)
        return scores_RV.log_softmax(dim=-1)

    def draw(self, logprobs_RV: Tensor, uniforms_R: Tensor) -> Tensor:
        """One token a row, (R,) int64: where a uniform number in [0, 1) falls among the summed probabilities.

        One number a token, and not one for each token of the vocabulary, is what makes a seed a response cheap. Sums
        in float64: in float32 they would end before the rare tokens of a large vocabulary.
        """
        if self._temperature == 0:
            return logprobs_RV.argmax(dim=-1)
        sums_RV = logprobs_RV.double().exp_().cumsum(dim=-1)
        places_R1 = (uniforms_R * sums_RV[:, -1])[:, None]
        # right=True: a token without probability, which adds nothing to the sum, is never where a number falls.
        found_R1 = torch.searchsorted(sums_RV, places_R1, right=True)
        return found_R1.clamp_(max=sums_RV.shape[1] - 1).squeeze(1)


class Stops:
    """Tells where a response's text holds a stop string, asked after each of its tokens."""

    _SPARE = 8  # tokens that spell no character of their own, or the first bytes of one

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._reach = max(len(text.encode()) for text in stop) + self._SPARE  # a token spells a byte or more

    def end(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of the last tokens holds one."""
        text = self._tokenizer.decode(token_ids[-self._reach :], skip_special_tokens=True)
        return any(stop in text for stop in self._stop)


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompts: PromptBatch,
    prompt_of_response: Sequence[int],
    seeds: Sequence[int],
    settings: SamplingSettings,
    forbidden_token_ids: Sequence[int],
    eos_token_ids: Sequence[int],
    stops: Stops | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Token ids, up to the end-of-sequence token, a stop string or max_tokens, and log-probabilities of R responses.

    Args: model: built with `ATTENTION`, in evaluation mode; prompt_of_response: row of `prompts`, one a response.
    """
    device, limit = prompts.input_ids.device, settings.max_tokens
    sampler = Sampler(settings, forbidden_token_ids, device)
    uniforms_RT = torch.stack([_uniforms(seed, limit) for seed in seeds]).to(device)
    eos = torch.tensor(list(eos_token_ids), device=device)
    tokens_RT = torch.zeros((len(seeds), limit), dtype=torch.int64, device=device)
    chosen_RT = torch.zeros((len(seeds), limit), device=device)
    lengths_R = torch.zeros(len(seeds), dtype=torch.int64, device=device)

    decoder = _Decoder(model, prompts, torch.tensor(list(prompt_of_response), device=device), limit)
    seen_RV = None
    if settings.repetition_penalty != 1:
        seen_RV = torch.zeros(decoder.logits_RV.shape, dtype=torch.int64, device=device)
        of_prompt = list(prompt_of_response)
        seen_RV = seen_RV.scatter_add_(1, prompts.input_ids[of_prompt], prompts.attention_mask[of_prompt]) > 0
    live = torch.arange(len(seeds), device=device)  # the responses in the batch
    ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)  # of those
    for step in range(limit):
        logprobs_RV = sampler.log_probs(decoder.logits_RV, seen_RV=None if seen_RV is None else seen_RV[live])
        tokens_R = sampler.draw(logprobs_RV, uniforms_RT[live, step])
        if settings.raw_logprobs:
            logprobs_RV = sampler.log_probs(decoder.logits_RV, cut=False)
        tokens_RT[live, step] = tokens_R
        chosen_RT[live, step] = logprobs_RV.gather(1, tokens_R[:, None]).squeeze(1)
        lengths_R[live] += ~ended
        ended = ended | torch.isin(tokens_R, eos)
        if seen_RV is not None:
            seen_RV[live, tokens_R] = True
        if stops is not None:
            for row in (~ended).nonzero().squeeze(1).tolist():
                ended[row] = stops.end(tokens_RT[live[row], : step + 1].tolist())
        num_left = len(ended) - int(ended.sum())
        if num_left == 0 or step == limit - 1:
            break
        if num_left <= len(ended) // 2:  # each time the batch halves: copying the cache then costs less than it saves
            rows = (~ended).nonzero().squeeze(1)
            decoder.keep(rows)
            live, ended, tokens_R = live[rows], ended[rows], tokens_R[rows]
        decoder.advance(tokens_R)
    lengths = lengths_R.tolist()
    return [
        (tokens[:length], values[:length])
        for tokens, values, length in zip(tokens_RT.tolist(), chosen_RT.tolist(), lengths, strict=True)
    ]


def _uniforms(seed: int, count: int) -> Tensor:
    """Drawn on the CPU, so that a seed means the same everywhere."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class _Decoder:
    """The model with the keys and values of what it has read; `logits_RV` are those of each response's next token."""

    def __init__(self, model: PreTrainedModel, prompts: PromptBatch, prompt_of_response: Tensor, limit: int) -> None:
        text = model.config.get_text_config()
        self._model = model
        # Where each layer sees all of the past, one mask serves all of them, made once and not for each token anew.
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        self._one_mask = all(kind == "full_attention" for kind in kinds)
        self._layers = [_StateLayer() if kind == "linear_attention" else _Layer() for kind in kinds]
        self._cache = Cache(layers=self._layers)
        self.logits_RV = self._forward(prompts.input_ids, prompts.attention_mask, prompts.positions, **prompts.vision)
        self.logits_RV = self.logits_RV[prompt_of_response]
        self._next_R1 = prompts.next_positions[prompt_of_response][:, None]
        mask_RL = prompts.attention_mask[prompt_of_response]
        self._mask_RL = torch.cat([mask_RL, mask_RL.new_ones(len(mask_RL), limit)], dim=1)
        self._length = mask_RL.shape[1]
        for layer in self._layers:
            layer.take(prompt_of_response, room=limit)

    def advance(self, tokens_R: Tensor) -> None:
        """Read one token a response."""
        self._length += 1
        mask = self._mask_RL[:, : self._length]
        if self._one_mask:
            mask = mask.bool()[:, None, None]
        self.logits_RV = self._forward(tokens_R[:, None], mask, self._next_R1)
        self._next_R1 = self._next_R1 + 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these responses only."""
        room = self._mask_RL.shape[1] - self._length
        self._mask_RL, self._next_R1 = self._mask_RL[rows], self._next_R1[rows]
        for layer in self._layers:
            layer.take(rows, room)

    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, **vision: Tensor) -> Tensor:
        outputs = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **vision,
        )
        return outputs.logits[:, -1]


class _Layer(DynamicLayer):
    """Keys and values of a layer in a buffer with room for what is to come: `DynamicLayer` copies all at each token."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def take(self, rows: Tensor, room: int) -> None:
        """The cache of these rows, in this order, a row as often as it is named; with room for so many tokens more."""
        self._buffers = self._with_room(self.keys, rows, room), self._with_room(self.values, rows, room)
        self._show(self.keys.shape[2])

    @staticmethod
    def _with_room(states: Tensor, rows: Tensor, room: int) -> Tensor:
        buffer = states.new_empty(len(rows), states.shape[1], states.shape[2] + room, states.shape[3])
        torch.index_select(states, 0, rows, out=buffer[:, :, : states.shape[2]])
        return buffer

    def _show(self, length: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """See DynamicLayer."""
        if self._buffers is None:  # the prompts
            return super().update(key_states, value_states, *arguments, **named)
        start = self.keys.shape[2]
        self._show(start + key_states.shape[2])
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values


class _StateLayer(LinearAttentionLayer):
    """The state of a layer of linear attention, which is as large after any number of tokens."""

    def take(self, rows: Tensor, room: int) -> None:
        """The states of these rows, in this order, a row as often as it is named."""
        self.reorder_cache(rows)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """transformers' own, except for one token with grouped heads, where that one copies all keys and values.

    The query heads of a group then take the place of query positions: (R, K, heads a group, D) against (R, K, L, D).
    """
    num_rows, num_heads, num_queries, size = query.shape
    num_groups = key.shape[1]
    if num_queries > 1 or num_heads == num_groups:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **named)
    grouped = query.reshape(num_rows, num_groups, num_heads // num_groups, size)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return mixed.reshape(num_rows, 1, num_heads, size), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
