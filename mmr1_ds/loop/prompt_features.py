"""What the model makes of each prompt before it is trained, for the curriculum: data.curriculum_features=model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.cluster.agreement import by_rank_0
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.data.model_features import compress_states, keep, kept_file, projected, read_kept
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from mmr1_ds.data.dataset import PromptDataset
    from mmr1_ds.data.encoding import PromptEncoder
    from mmr1_ds.engine.actor import Actor

logger = logging.getLogger(__name__)

_TEXTS = 256  # prompts a rank between two gatherings, where they are short
_IGNORED = ("_name_or_path", "transformers_version")  # of a model's configuration: the states do not depend on them

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]


def describe_prompts(
    actor: Actor,
    coordinator: Coordinator,
    data: PromptDataset,
    prompts_at_once: int,
    encoder: PromptEncoder,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Give the curriculum its features by the model, unless a checkpoint brought some. Collective.

    Args: actor: with the weights that training starts from; prompts_at_once: over all ranks, held with their images.
    Raises: UserError, on every rank, for a model whose states are no numbers.
    """
    if by_rank_0(ranks, "ask for features of the prompts", lambda: coordinator.knows_features):
        logger.info("what is known of each prompt comes from the checkpoint")
        return
    model = {name: value for name, value in actor.model.config.to_dict().items() if name not in _IGNORED}
    path = kept_file(data, encoder.fingerprint(), actor.weights_digest(), model)

    def take_kept() -> bool:
        features = read_kept(path, len(data))
        if features is not None:
            coordinator.take_features(features)
        return features is not None

    if by_rank_0(ranks, "look for kept features of the prompts", take_kept):
        logger.info("what the model makes of each prompt is known from an earlier run (%s)", path)
        return
    if not data.max_images and not data.max_videos:
        prompts_at_once = max(prompts_at_once, _TEXTS * ranks.size)
    states = _states(actor, data, prompts_at_once, encoder, ranks, progress)

    def take() -> None:
        if not np.isfinite(states).all():
            raise UserError(
                "data.curriculum_features=model: some hidden states of worker.actor.model.model_path are not finite; "
                "set text or none"
            )
        features = compress_states(states)
        keep(features, path)
        coordinator.take_features(features)

    by_rank_0(ranks, "make features of the prompts", take)


def _states(
    actor: Actor, data: PromptDataset, at_once: int, encoder: PromptEncoder, ranks: Ranks, progress: Progress
) -> np.ndarray:
    """The projected states of all prompts on rank 0, (P, V) float32; nothing elsewhere. Collective."""
    states = np.empty((0, 0), dtype=np.float32)
    with progress(len(data), "what the model makes of each prompt") as advance:
        for start in range(0, len(data), at_once):
            size = min(at_once, len(data) - start)
            # In turn, and the last prompt again where a rank would have one less: every forward is a collective.
            places = np.arange(ranks.rank, -(-size // ranks.size) * ranks.size, ranks.size).clip(max=size - 1)
            prompts = data.prompts(start + places)
            encoder.expand_ahead(prompts)
            own = projected(actor.prompt_states(prompts), len(data))
            parts = ranks.all_gather_array(own, "gather hidden states of the prompts")
            if ranks.rank == 0:
                if start == 0:
                    states = np.empty((len(data), own.shape[1]), dtype=np.float32)
                states[start : start + size] = np.stack(parts, axis=1).reshape(-1, own.shape[1])[:size]
            advance(size)
    return states
