"""TODO."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import RunConfig
from mmr1_ds.engine.build_lock import lock_builds_by_kernel
from mmr1_ds.engine.micro_batches import by_prompts, by_tokens, in_turn
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.engine.model.packing import shares_prompts
from mmr1_ds.engine.model.policy import exact_types, load_policy
from mmr1_ds.engine.weights.gathering import weights_digest, whole_parameters
from mmr1_ds.records import Prompt

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


Pair = tuple[Prompt, tuple[int, ...]]


def start_deepspeed(ranks: Ranks) -> None:
    """Let DeepSpeed adopt the process group that is there."""
    lock_builds_by_kernel()
    deepspeed.init_distributed(auto_mpi_discovery=False)
    ranks.barrier("start of DeepSpeed")
    # On CPU each rank makes 66 MB of shared memory that outlives it. Unlinked, once every rank has it open, it ends
    # with the last of them, however they end.
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path(f"/dev/shm/{name}_{ranks.rank}").unlink(missing_ok=True)


class ZeroEngine:
    """A ZeRO-3 partitioned policy that can say how likely given responses are."""

    def __init__(
        self,
        config: RunConfig,
        deepspeed_config: Mapping[str, Any],
        ranks: Ranks,
        encoder: PromptEncoder,
        trainable: bool,
    ) -> None:
        """Collective: load the model and wrap it."""
        settings = exact_types(deepspeed_config)
        start_deepspeed(ranks)
        self.policy = load_policy(
            config.worker.actor.model,
            settings,
            encoder.forbidden_token_ids,
            config.worker.rollout.temperature,
            torch.bfloat16 if ranks.on_gpu else torch.float32,
            trainable,
            config.worker.actor.padding_free,
            ranks.neighbours(size) if (size := config.worker.actor.ulysses_size) > 1 else None,
        )
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=self.policy, config=settings, model_parameters=parameters or None)
        self._ranks, self._encoder = ranks, encoder
        self._settings = config.worker.actor
        self._longest = config.data.max_prompt_length + config.data.max_response_length  # tokens of a sequence

    @torch.no_grad()
    def log_probs(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Log-probability of every response token, one float32 tensor (T,) a pair, on the CPU.

        Collective: all ranks, with the same number of pairs.
        """
        self.engine.eval()
        parallel = self.policy.parallel
        pairs = pairs if parallel is None else parallel.gather(pairs)
        outputs: dict[int, Tensor] = {}
        for part in self._micro_batches(pairs, self._settings.micro_batch_size_per_device_for_experience):
            chosen = [pairs[i] for i in part]
            logprobs, _ = self.engine(collate(chosen, self._encoder, self._ranks.device))
            cut = logprobs.float().cpu().split([len(response) for _, response in chosen])
            outputs.update(zip(part, cut, strict=True))
        found = [outputs[i] for i in range(len(pairs))]
        return found if parallel is None else parallel.own(found)

    def _micro_batches(self, pairs: Sequence[Pair], size: int) -> list[list[int]]:
        """Which pairs are computed together, by position. Collective: all ranks, with the same number of pairs."""
        size *= self._settings.ulysses_size  # a rank holds a cut of each sequence
        if not self._settings.dynamic_batching:
            return in_turn(len(pairs), size)
        prompt_lengths = [prompt.num_tokens or len(prompt.token_ids) for prompt, _ in pairs]
        lengths = [len(response) for _, response in pairs]
        if shares_prompts(self.model):
            names = [id(prompt) for prompt, _ in pairs]
            return by_prompts(names, prompt_lengths, lengths, size * self._longest, self._ranks)
        both = [prompt + response for prompt, response in zip(prompt_lengths, lengths, strict=True)]
        return by_tokens(both, size * self._longest, self._ranks)

    def weights_digest(self) -> str:
        """Names these very weights, whatever the number of ranks. Collective: gathers them as a sync does."""
        return weights_digest(whole_parameters(self.model))

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside, partitioned."""
        return self.policy.model
