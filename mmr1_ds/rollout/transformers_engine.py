"""Rollouts by transformers on the actor's own ZeRO-3 module: the reference engine, and the fallback without vLLM."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mmr1_ds.distributed import Ranks
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.batching import blank_image_prompt, collate
from mmr1_ds.records import Prompt, Response, RolloutGroup, RolloutRequest, SamplingSettings

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


class TransformersRollout:
    """Samples with `generate`, one prompt a call. Plain and slow: every token gathers the model once."""

    def __init__(self, actor: Actor, ranks: Ranks, encoder: PromptEncoder, log_prob_batch_size: int) -> None:
        self._actor, self._ranks, self._encoder = actor, ranks, encoder
        self._log_prob_batch_size = log_prob_batch_size
        blank = Prompt(-1, "blank", (encoder.eos_token_ids[0],), (), "")
        self._filler = blank_image_prompt(encoder) if encoder.is_multimodal else blank

    def generate(self, requests: Sequence[RolloutRequest], settings: SamplingSettings) -> list[RolloutGroup]:
        """See RolloutEngine. Ranks with fewer prompts keep in step on a filler, whose responses are dropped."""
        sizes = self._ranks.all_gather_objects([request.num_responses for request in requests], "rollout requests")
        filler = RolloutRequest(self._filler, num_responses=1, seed=0)
        groups = []
        for request, at_once in itertools.zip_longest(requests, itertools.zip_longest(*sizes, fillvalue=1)):
            groups.append(self._one_group(request or filler, settings, max(at_once)))
        return groups[: len(requests)]

    @torch.no_grad()
    def _one_group(self, request: RolloutRequest, settings: SamplingSettings, most_rows: int) -> RolloutGroup:
        """most_rows: the most responses that any rank samples at this place."""
        prompt, num_rows = request.prompt, request.num_responses
        batch = collate([(prompt, ())] * num_rows, self._encoder, self._ranks.device)
        greedy = settings.temperature == 0
        model = self._actor.model
        model.eval()
        with torch.random.fork_rng(devices=[self._ranks.device] if self._ranks.on_gpu else []):
            torch.manual_seed(request.seed)
            sequences = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                **batch.vision,
                max_new_tokens=settings.max_tokens,
                do_sample=not greedy,
                temperature=None if greedy else settings.temperature,
                top_p=None if greedy else settings.top_p,
                top_k=None if greedy or settings.top_k < 0 else settings.top_k,
                suppress_tokens=list(self._encoder.forbidden_token_ids) or None,
                eos_token_id=list(self._encoder.eos_token_ids),
                pad_token_id=self._encoder.eos_token_ids[0],
                synced_gpus=self._ranks.size > 1,
            )
        new_tokens = sequences[:num_rows, batch.input_ids.shape[1] :].tolist()
        responses = [self._until_eos(tokens, settings.max_tokens) for tokens in new_tokens]
        # generate() does not return what it sampled with; one more forward does, at temperature and bans alike.
        # Every forward gathers the model on all ranks, so all make as many, whatever their numbers of responses.
        pairs = [(prompt, ids) for ids, _ in responses]
        pairs += pairs[:1] * (most_rows - num_rows)
        logprobs = self._actor.log_probs(pairs, self._log_prob_batch_size)[:num_rows]
        return RolloutGroup(
            prompt,
            tuple(
                Response(ids, tuple(values.tolist()), finished)
                for (ids, finished), values in zip(responses, logprobs, strict=True)
            ),
            self._actor.num_updates_done,
        )

    def _until_eos(self, tokens: list[int], limit: int) -> tuple[tuple[int, ...], bool]:
        for position, token in enumerate(tokens):
            if token in self._encoder.eos_token_ids:
                return tuple(tokens[: position + 1]), True
        return tuple(tokens[:limit]), False

    def sync_weights(self, actor: Actor) -> None:
        """See RolloutEngine. Nothing to move: the weights are the actor's own."""
        assert actor is self._actor

    def close(self) -> None:
        """See RolloutEngine."""
