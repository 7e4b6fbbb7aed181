"""Rollouts by transformers from the actor's own weights: the reference engine, and the fallback without vLLM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.records import Response, RolloutGroup, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.base import Enough, InTurn, Policy, Submitted, ignore, longest_first, never
from mmr1_ds.rollout.hf.decoding import PromptBatch, Stops, sample_responses

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


class TransformersRollout(InTurn):
    """Samples from a plain copy of the model that has weights while it generates only.

    The weights are gathered once a call, all of them: this engine is for models that fit a device whole, beside what
    training holds there. After that no rank waits for another, whatever their numbers of requests.
    """

    def __init__(self, policy: Policy, ranks: Ranks, encoder: PromptEncoder, max_num_seqs: int) -> None:
        """max_num_seqs: responses sampled at once; what more is asked for comes after."""
        self._policy, self._ranks, self._encoder = policy, ranks, encoder
        self._max_num_seqs = max_num_seqs
        self._model = _without_weights(policy.model, ranks.device)

    def collect(
        self, submitted: Submitted, enough: Enough = never, advance: Callable[[int], None] = ignore
    ) -> list[RolloutGroup | None]:
        """See RolloutEngine. It never stops early; `enough` sees the groups as they end."""
        requests, settings, version = submitted.requests, submitted.settings, self._policy.num_updates_done
        groups = dict[int, RolloutGroup]()
        order = longest_first(requests, self._max_num_seqs)  # those sampled together end together
        wanted = [(i, requests[i].seed + k) for i in order for k in range(requests[i].num_responses)]
        responses: list[list[Response]] = [[] for _ in requests]
        with self._weights():
            for start in range(0, len(wanted), self._max_num_seqs):
                part = wanted[start : start + self._max_num_seqs]
                for (i, _), response in zip(part, self._sample(requests, part, settings), strict=True):
                    responses[i].append(response)
                    if len(responses[i]) == requests[i].num_responses:
                        groups[i] = RolloutGroup(requests[i].prompt, tuple(responses[i]), version)
                advance(len(part))
                enough(groups)
        return [groups[i] for i in range(len(requests))]

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """The actor's weights, whole, in the copy. Collective on entry."""
        parameters = dict(self._model.named_parameters())
        for name, weight in self._policy.weights(as_held=True):
            parameters.pop(name).data = weight
        assert not parameters, f"the actor has no weight named {next(iter(parameters))}"
        try:
            yield
        finally:
            for parameter in self._model.parameters():
                parameter.data = parameter.data.new_empty(0)

    def _sample(
        self, requests: Sequence[RolloutRequest], wanted: Sequence[tuple[int, int]], settings: SamplingSettings
    ) -> Iterator[Response]:
        """One response for each (place of the request, seed); a prompt is read once for all of its responses."""
        rows = {i: row for row, i in enumerate(dict.fromkeys(i for i, _ in wanted))}
        inputs = [self._encoder.expand(requests[i].prompt) for i in rows]
        stops = Stops(self._encoder.tokenizer, settings.stop) if settings.stop else None
        found = sample_responses(
            self._model,
            PromptBatch.of(inputs, self._ranks.device),
            [rows[i] for i, _ in wanted],
            [seed for _, seed in wanted],
            settings,
            self._encoder.forbidden_token_ids,
            self._encoder.eos_token_ids,
            stops,
        )
        for token_ids, logprobs in found:
            finished = token_ids[-1] in self._encoder.eos_token_ids or (stops is not None and stops.end(token_ids))
            yield Response(np.array(token_ids, dtype=np.int32), np.array(logprobs, dtype=np.float32), finished)

    def sync_weights(self, policy: Policy) -> int:
        """See RolloutEngine. Nothing to move: each generation takes the actor's own weights."""
        assert policy is self._policy
        return 0

    def close(self) -> None:
        """See RolloutEngine."""


def _without_weights(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The same model without DeepSpeed's hooks and without memory for its parameters; buffers are the model's own."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    if hasattr(config.get_text_config(), "output_router_logits"):  # of a loss, which nothing here computes
        config.get_text_config().output_router_logits = False
    with torch.device("meta"):
        bare = type(model)(config).eval()
    empty: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay one
    for module in bare.modules():
        if type(module) is nn.Linear:
            module.__class__ = _PlainLinear
        for name, parameter in module._parameters.items():
            if parameter is not None:
                nothing = nn.Parameter(torch.empty(0, dtype=model.dtype, device=device), requires_grad=False)
                module._parameters[name] = empty.setdefault(parameter, nothing)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, own_name = name.rpartition(".")
        bare.get_submodule(owner)._buffers[own_name] = buffer
    assert not any(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    return bare


class _PlainLinear(nn.Linear):
    """DeepSpeed replaces torch.nn.functional.linear in the whole process, by one that takes longer than the product
    of a small model's layer."""

    def forward(self, states: Tensor) -> Tensor:
        return torch.ops.aten.linear(states, self.weight, self.bias)
