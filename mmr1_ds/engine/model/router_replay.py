"""Router replay: the tokens of a mixture of experts go to the experts that were chosen for them before.

Rollout engine and actor round differently, and so does a policy after a small update. Near a tie of two experts that
sends a token to another one, whose output has nothing to do with the first's: importance ratios jump. Replayed are the
experts I of a token and a layer, not their weights, which follow from the actor's own logits s, so that routers learn:

    g_e = exp(s_e) / sum_{j in I} exp(s_j),  e in I

(with norm_topk_prob=false the sum is over all experts). R2 takes the experts of the policy before the update (GSPO,
arXiv 2507.18071, "routing replay"), R3 those of the rollout engine (arXiv 2510.11370).

Shape letters: S sequences, L longest, K tokens of a forward, l layers, k experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

INPUT = "replayed_experts"  # of the model's forward: (K, l, k), -1 where the router's own choice stands


class RouterReplay:
    """Stands behind the routers of a model: sends tokens elsewhere where it is told to, or notes what they choose.

    What is told comes with the forward, as `INPUT`: layers that are computed again in the backward get it once more.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Register hooks; before DeepSpeed registers its own."""
        self.records = False
        self._given: dict[int, Tensor | None] = {}  # by layer: (K, k)
        self._chosen: dict[int, Tensor] = {}  # (K, k), by the router itself
        self._differs: dict[int, Tensor] = {}  # (K,) bool
        text = getattr(model.base_model, "language_model", model.base_model)
        self._num_layers = len(text.layers)
        for number, layer in enumerate(text.layers):
            layer.register_forward_pre_hook(partial(self._take, number), with_kwargs=True)
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.register_forward_hook(partial(self._route, number))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, what the routers choose is noted."""
        self.records = True
        try:
            yield
        finally:
            self.records = False
            self._chosen.clear()

    def differing(self) -> Tensor:
        """The share of layers in which the last forward sent a token to other experts than its own router, (K,)."""
        return torch.stack([*self._differs.values()]).float().mean(dim=0)

    def chosen(self) -> Tensor:
        """What the routers chose in the last forward while recording, (K, l, k) int16; 0 in dense layers."""
        one = next(iter(self._chosen.values()))
        found = one.new_zeros(len(one), self._num_layers, one.shape[1], dtype=torch.int16)
        for number, chosen_Kk in self._chosen.items():
            found[:, number] = chosen_Kk
        return found

    def _take(self, number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        given = kwargs.pop(INPUT, None)
        self._given[number] = None if given is None else given[:, number]
        return args, kwargs

    def _route(self, number: int, router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits_KE, weights_Kk, own_Kk = output
        if self.records:
            self._chosen[number] = own_Kk
        given_Kk = self._given[number]
        if given_Kk is None:
            return output
        chosen_Kk = torch.where(given_Kk >= 0, given_Kk.to(own_Kk.dtype), own_Kk)
        self._differs[number] = (chosen_Kk.sort(dim=1).values != own_Kk.sort(dim=1).values).any(dim=1)
        replayed_Kk = logits_KE.softmax(dim=-1, dtype=torch.float32).gather(1, chosen_Kk)
        if getattr(router, "norm_topk_prob", True):  # Qwen3-VL-MoE's and Qwen3.5's always do
            replayed_Kk = replayed_Kk / replayed_Kk.sum(dim=1, keepdim=True)
        return logits_KE, replayed_Kk.to(weights_Kk.dtype), chosen_Kk
