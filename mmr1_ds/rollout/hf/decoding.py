"""Sampling from a transformers model: many responses in one `generate`, each drawn by a seed of its own.

Each response is a function of the weights, its prompt and its seed alone, whatever else is in the batch, and the
log-probability of each token is kept from the pass that sampled it. The responses to one prompt share its prefill.

Shape letters: P prompts, L longest of them, R responses, T tokens of a response at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmr1_ds.records import SamplingSettings

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import ModelInputs


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, so that their last tokens stand side by side."""

    input_ids: Tensor  # (P, L) int64
    attention_mask: Tensor  # (P, L) int64
    positions: Tensor  # (P, L) int64, or (3, P, L) where images turn the rotary embedding in three dimensions
    vision: dict[str, Tensor]  # pixel_values and image_grid_thw, of images and videos, where there are any

    @staticmethod
    def of(prompts: Sequence[ModelInputs], device: torch.device) -> PromptBatch:
        """Each is padded with its own last token, which is masked; a penalty of repetition sees no other token."""
        shape = (len(prompts), max(2, *(len(prompt.input_ids) for prompt in prompts)))
        input_ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        positions = torch.zeros((3, *shape), dtype=torch.int64)
        vision: dict[str, Tensor] = {}
        for row, prompt in enumerate(prompts):
            columns = slice(shape[1] - len(prompt.input_ids), None)
            input_ids[row] = prompt.input_ids[-1]
            input_ids[row, columns], mask[row, columns] = prompt.input_ids, 1
            own = torch.arange(len(prompt.input_ids)) if prompt.positions is None else prompt.positions
            positions[:, row, columns] = own
        if any(prompt.pixel_values is not None for prompt in prompts):
            vision["pixel_values"] = torch.cat([p.pixel_values for p in prompts if p.pixel_values is not None])
            vision["image_grid_thw"] = torch.cat([p.image_grid_thw for p in prompts if p.image_grid_thw is not None])
        # `generate` goes on from there in each dimension alike: the next token is behind the whole of the prompt.
        assert torch.equal(positions[:, :, -1], positions.amax(dim=(0, 2)).expand(3, -1)), "a prompt ends in an image"
        return PromptBatch(
            input_ids.to(device),
            mask.to(device),
            (positions if vision else positions[0]).to(device),
            {name: tensor.to(device) for name, tensor in vision.items()},
        )


class SeededDraw(LogitsProcessor):
    """The distribution that tokens are drawn from, and the draw: it leaves one token a row for `generate` to take."""

    def __init__(self, settings: SamplingSettings, forbidden_token_ids: Sequence[int], uniforms_RT: Tensor) -> None:
        """uniforms_RT: in [0, 1) float64, what each token is drawn by."""
        is_greedy = settings.temperature == 0
        whole = list[Any]([] if is_greedy else [TemperatureLogitsWarper(float(settings.temperature))])
        if forbidden_token_ids:
            whole.append(SuppressTokensLogitsProcessor(forbidden_token_ids, device=str(uniforms_RT.device)))
        cut = list(whole)
        if settings.repetition_penalty != 1:
            cut.insert(0, RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
        if not is_greedy and settings.min_p > 0:  # before the others, as vLLM has it
            cut.append(MinPLogitsWarper(settings.min_p))
        if not is_greedy and settings.top_k > 0:
            cut.append(TopKLogitsWarper(settings.top_k))
        if not is_greedy and settings.top_p < 1:
            cut.append(TopPLogitsWarper(settings.top_p))
        self._cut, self._kept = LogitsProcessorList(cut), LogitsProcessorList(whole if settings.raw_logprobs else cut)
        self._is_greedy, self._uniforms_RT = is_greedy, uniforms_RT
        self.logprobs = list[Tensor]()  # T of (R,) float32, those of the tokens drawn

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See LogitsProcessor. Args: input_ids: (R, tokens so far) int64; scores: (R, V) float32."""
        logprobs_RV = self._cut(input_ids, scores).log_softmax(dim=-1)
        tokens_R1 = self._draw(logprobs_RV, self._uniforms_RT[:, len(self.logprobs)])[:, None]
        if self._kept is not self._cut:
            logprobs_RV = self._kept(input_ids, scores).log_softmax(dim=-1)
        self.logprobs.append(logprobs_RV.gather(1, tokens_R1).squeeze(1))
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens_R1, 0.0)

    def _draw(self, logprobs_RV: Tensor, uniforms_R: Tensor) -> Tensor:
        """One token a row, (R,) int64: where a uniform number in [0, 1) falls among the summed probabilities.

        One number a token, and not one for each token of the vocabulary, is what makes a seed a response cheap. Sums
        in float64: in float32 they would end before the rare tokens of a large vocabulary.
        """
        if self._is_greedy:
            return logprobs_RV.argmax(dim=-1)
        sums_RV = logprobs_RV.double().exp_().cumsum(dim=-1)
        places_R1 = (uniforms_R * sums_RV[:, -1])[:, None]
        # right=True: a token without probability, which adds nothing to the sum, is never where a number falls.
        found_R1 = torch.searchsorted(sums_RV, places_R1, right=True)
        return found_R1.clamp_(max=sums_RV.shape[1] - 1).squeeze(1)


class Stops(StoppingCriteria):
    """Tells where a response's text holds a stop string, asked after each of its tokens.

    transformers' own would also find one that the prompt begins and the response ends.
    """

    _SPARE = 8  # tokens that spell no character of their own, or the first bytes of one

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._reach = max(len(text.encode()) for text in stop) + self._SPARE  # a token spells a byte or more
        self.start = 0  # of the responses in what `generate` gives

    def end(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of the last tokens holds one."""
        text = self._tokenizer.decode(token_ids[-self._reach :], skip_special_tokens=True)
        return any(stop in text for stop in self._stop)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """See StoppingCriteria."""
        rows = input_ids[:, self.start :].tolist()
        return torch.tensor([self.end(row) for row in rows], device=input_ids.device)


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

    Args: model: in evaluation mode, without hooks; prompt_of_response: row of `prompts`, one a response.
    """
    device, length = prompts.input_ids.device, prompts.input_ids.shape[1]
    draw = SeededDraw(
        settings, forbidden_token_ids, torch.stack([_uniforms(seed, settings.max_tokens) for seed in seeds]).to(device)
    )
    rows = torch.tensor(list(prompt_of_response), device=device)
    cache = DynamicCache(config=model.config)
    model(  # all but the last token, once a prompt
        input_ids=prompts.input_ids[:, :-1],
        attention_mask=prompts.attention_mask[:, :-1],
        position_ids=prompts.positions[..., :-1],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **prompts.vision,
    )
    cache.reorder_cache(rows)
    if stops is not None:
        stops.start = length
    model.generation_config = GenerationConfig()  # what a model folder says of sampling would fill in
    written_RT = model.generate(
        input_ids=prompts.input_ids[rows],
        attention_mask=prompts.attention_mask[rows],
        position_ids=prompts.positions[..., rows, :],
        past_key_values=cache,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_tokens,
            eos_token_id=list(eos_token_ids),
            pad_token_id=eos_token_ids[0],
        ),
        logits_processor=LogitsProcessorList([draw]),
        stopping_criteria=[] if stops is None else [stops],
        synced_gpus=False,  # the model is whole: no rank waits for another
    )[:, length:]
    found = []
    for tokens, logprobs in zip(written_RT.tolist(), torch.stack(draw.logprobs, dim=1).tolist(), strict=True):
        end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens) - 1)
        if stops is not None:
            end = next((i for i in range(end) if stops.end(tokens[: i + 1])), end)
        found.append((tokens[: end + 1], logprobs[: end + 1]))
    return found


def _uniforms(seed: int, count: int) -> Tensor:
    """Drawn on the CPU, so that a seed means the same everywhere."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
