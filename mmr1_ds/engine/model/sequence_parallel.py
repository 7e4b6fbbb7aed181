"""Long sequences: the ranks of a group compute each sequence together (Ulysses, arXiv 2309.14509), by DeepSpeed.

Each rank holds a cut of the packed row through all layers; around attention an exchange gives it all tokens of some
heads instead. Outside of the model the ranks of a group hold the same sequences and all of their log-probabilities.

Shape letters: K tokens of a packed row, T response tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmr1_ds.cluster.ranks import Neighbours
from mmr1_ds.engine.model.attention import Row
from mmr1_ds.engine.model.batching import ModelBatch
from mmr1_ds.engine.model.packing import pack, response_places
from mmr1_ds.engine.model.router_replay import INPUT, RouterReplay
from mmr1_ds.errors import UserError

T = TypeVar("T")
NAME = "ulysses"  # of the attention
KEY = "worker.actor.ulysses_size"


class SequenceParallel:
    """What one group of ranks does together."""

    def __init__(self, neighbours: Neighbours, config: PreTrainedConfig, core: str) -> None:
        """Register the attention with transformers, under `NAME`.

        Args: config: of the model; core: the name of the attention that each rank runs on its heads.
        Raises: UserError when its heads cannot be shared out.
        """
        self._neighbours = neighbours
        text = config.get_text_config()
        heads, kv_heads, size = text.num_attention_heads, text.num_key_value_heads, neighbours.size
        if heads % size or (kv_heads % size and size % kv_heads):
            raise UserError(
                f"{KEY}={size} cannot share out {heads} attention heads and {kv_heads} key-value heads; "
                "it must divide the former, and divide or be a multiple of the latter"
            )
        ulysses = UlyssesSPAttentionHF(
            attn=ALL_ATTENTION_FUNCTIONS[core],
            batch_size=1,  # a packed row
            attn_head_count=heads,
            attn_head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            kv_head_count=kv_heads,
            num_hidden_layers=text.num_hidden_layers,
            process_group=neighbours.group,
            seq_length_is_variable=True,
        )

        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            return ulysses(module, query, key, value, None, **options)  # the row says where sequences begin

        AttentionInterface.register(NAME, attention)  # and no mask, so that transformers makes none

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self._neighbours.size

    def install(self, model: PreTrainedModel) -> None:
        """Let the language model see this rank's cut. Embeddings of images are made whole, on every rank."""
        language_model = getattr(model.base_model, "language_model", model.base_model)
        language_model.register_forward_pre_hook(self._cut_inputs, with_kwargs=True)

    def gather(self, values: Sequence[T]) -> list[T]:
        """What all ranks of the group hold, rank by rank. Collective of the group."""
        return self._neighbours.gather_lists(values)

    def own(self, values: Sequence[T]) -> list[T]:
        """This rank's part of what was gathered, where every rank gave as much."""
        share = len(values) // self.size
        return list(values[self._neighbours.rank * share : (self._neighbours.rank + 1) * share])

    def log_probs(
        self, model: PreTrainedModel, batch: ModelBatch, replay: RouterReplay | None = None
    ) -> tuple[Tensor, ...]:
        """Log-probability and entropy of all response tokens, (T,) each, with the gradient of this rank's cut.

        Each rank's loss is that of all tokens, its gradient that of its own ones: their sum over the ranks of the group
        is the gradient of the loss. With replayed experts also `RouterReplay.differing`, (T,).
        """
        inputs, places_SL = pack(model, batch)
        places_T = response_places(batch, places_SL)
        length = inputs["input_ids"].shape[1]
        cut = -(-length // self.size)
        spare = cut * self.size - length
        # The rest of the last cut is a sequence of its own that nobody asks for. Its token is not an image's.
        filler = model.config.get_text_config().eos_token_id
        filler = filler[0] if isinstance(filler, list) else filler
        inputs["input_ids"] = pad(inputs["input_ids"], (0, spare), value=filler or 0)
        positions = torch.arange(spare, device=places_T.device).expand(*inputs["position_ids"].shape[:-1], spare)
        inputs["position_ids"] = torch.cat([inputs["position_ids"], positions], dim=-1)
        if INPUT in inputs:
            inputs[INPUT] = pad(inputs[INPUT], (0, 0, 0, 0, 0, spare), value=-1)
        row = inputs["row"]
        inputs["row"] = Row.of([*row.lengths, spare], [*row.firsts, 0], row.device)
        states = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        start = self._neighbours.rank * cut
        own = ((places_T >= start) & (places_T < start + cut)).nonzero().squeeze(1)
        logprobs, entropies = model.get_output_embeddings()(states[places_T[own] - start], batch.targets[own])
        found = [logprobs, entropies]
        if INPUT in inputs:
            assert replay is not None
            found.append(replay.differing()[places_T[own] - start])
        return tuple(self._merge(values, own, len(places_T)) for values in found)

    def _merge(self, values: Tensor, own: Tensor, length: int) -> Tensor:
        """The values of all ranks at their places, (T,), of which this rank's have a gradient."""
        everyone = values.new_zeros(length).index_copy(0, own, values.detach())
        return self._neighbours.add_up(everyone).index_copy(0, own, values)

    def _cut_inputs(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """This rank's cut of everything that runs along the row."""
        whole = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        cut = whole.shape[1] // self.size
        start = self._neighbours.rank * cut
        kwargs = dict(kwargs)
        for name in ("input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].narrow(1, start, cut)
        kwargs["position_ids"] = kwargs["position_ids"].narrow(-1, start, cut)
        if INPUT in kwargs:
            kwargs[INPUT] = kwargs[INPUT].narrow(0, start, cut)
        masks = kwargs.get("visual_pos_masks")
        if masks is not None:  # Qwen3-VL adds features of images in its first layers once more
            before, inside = int(masks[:, :start].sum()), int(masks[:, start : start + cut].sum())
            kwargs["visual_pos_masks"] = masks[:, start : start + cut]
            kwargs["deepstack_visual_embeds"] = [
                features[before : before + inside] for features in kwargs["deepstack_visual_embeds"]
            ]
        return args, kwargs
