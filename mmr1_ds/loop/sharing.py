"""How a batch is shared out over the ranks: who samples, who trains on which group, and how groups travel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import RolloutConfig
from mmr1_ds.engine.micro_batches import balance
from mmr1_ds.loop.drawn import Drawn
from mmr1_ds.loop.group_arrays import groups_from_arrays, groups_to_arrays
from mmr1_ds.records import ScoredGroup

if TYPE_CHECKING:
    from mmr1_ds.data.dataset import PromptDataset


def batch_slots(batch_size: int, mini_batch_size: int, rank: int, size: int) -> np.ndarray:
    """The slots of a batch that this rank samples, mini-batch by mini-batch.

    Every mini-batch is split over the ranks on its own, so that an optimiser step sees the same prompts on any
    number of ranks. Returns: int64, batch_size / size of them.
    """
    share = mini_batch_size // size
    starts = np.arange(0, batch_size, mini_batch_size) + rank * share
    return (starts[:, None] + np.arange(share)).reshape(-1)


def sampled_slots(work: np.ndarray, mini_batch_size: int, rank: int, size: int) -> np.ndarray:
    """The slots of a drawn batch that this rank samples: those of `batch_slots`, moved so that the work is even.

    Args: work: (B,), see `work_of`. Returns: int64, ascending, B / size of them.
    """
    share, own = mini_batch_size // size, []
    for start in range(0, len(work), mini_batch_size):
        order = balance(work[start : start + mini_batch_size].tolist(), size)
        own += [start + place for place in sorted(order[rank * share : (rank + 1) * share])]
    return np.array(own, dtype=np.int64)


def work_of(sizes: np.ndarray, expected_tokens: np.ndarray, waits: bool) -> np.ndarray:
    """What sampling each group asks of a rank, (B,) int64: tokens where responses wait for others, else responses.

    Responses that are all sampled side by side take as long as the longest, whoever samples it: then no group moves
    for its tokens.
    Args: sizes: responses to each prompt; expected_tokens: of one; waits: as `waits_for_room` says.
    """
    return sizes * np.maximum(expected_tokens, 1) if waits else sizes


def waits_for_room(num_responses: int, rollout: RolloutConfig, size: int) -> bool:
    """Whether engines in the ranks are asked for more responses, over all of them, than they sample at once."""
    num_engines = size // rollout.tensor_parallel_size
    return rollout.engine != "server" and num_responses > num_engines * rollout.max_num_seqs


def dealt(expected_tokens: np.ndarray, waits: bool, rank: int, size: int) -> np.ndarray:
    """The places of the prompts that this rank samples of some that every rank could: in turn, int64, ascending.

    In turn by what is expected where responses wait for others: no rank then has more tokens than another, but for
    the difference between two prompts. Else as they lie: interleaved, since long prompts often lie together.
    """
    order = np.argsort(-expected_tokens, kind="stable") if waits else np.arange(len(expected_tokens))
    return np.sort(order[rank::size])


def share_out(
    drawn: Drawn, batch_size: int, mini_batch_size: int, data: PromptDataset, ranks: Ranks
) -> tuple[list[ScoredGroup], np.ndarray, dict[str, float]]:
    """Give each rank its share of the first groups that teach, filled up with the first of the others. Collective.

    They are taken in the order they were drawn in, whichever rank sampled them: the batch is the same on any number of
    ranks. Returns: this rank's groups, the indices of the whole batch, (B,) int64, and metrics.
    """
    own = drawn.teaching | drawn.others
    rows = [(slot not in drawn.teaching, slot, item.group.prompt.index, num_tokens(item)) for slot, item in own.items()]
    gathered = ranks.all_gather_array(np.array(rows, dtype=np.int64).reshape(-1, 4), "choose groups")
    is_other, slots, indices, tokens = np.concatenate(gathered).T
    samplers = np.repeat(np.arange(ranks.size), [*map(len, gathered)])
    chosen = np.lexsort((slots, is_other))[:batch_size]
    takers, metrics = balanced(tokens[chosen], samplers[chosen], mini_batch_size, ranks.size)
    leaving: list[dict[int, ScoredGroup]] = [{} for _ in range(ranks.size)]
    for slot, taker in zip(slots[chosen].tolist(), takers.tolist(), strict=True):
        if slot in own and taker != ranks.rank:
            leaving[taker][slot] = own[slot]
    for arrays in ranks.exchange_arrays([groups_to_arrays(part) for part in leaving], "exchange groups"):
        own |= groups_from_arrays(arrays)
    wanted = slots[chosen][takers == ranks.rank].tolist()
    return [with_prompt(own[slot], data) for slot in wanted], indices[chosen], metrics


def balanced(
    tokens: np.ndarray, samplers: np.ndarray, mini_batch_size: int, size: int
) -> tuple[np.ndarray, dict[str, float]]:
    """The rank that trains on each group of the batch, by the groups' tokens, and how even that is.

    Groups change places inside their optimiser step alone, so that every step learns from the same prompts. They stay
    with the ranks that sampled them, but for what is over the rank's share of the step and what evens the tokens out.
    """
    share = mini_batch_size // size
    takers = np.empty(len(tokens), dtype=np.int64)
    for start in range(0, len(tokens), mini_batch_size):
        places = start + np.array(_as_sampled(samplers[start : start + mini_batch_size].tolist(), size))
        order = balance(tokens[places].tolist(), size)
        takers[places[order]] = np.arange(mini_batch_size) // share
    before = np.arange(len(tokens)) % mini_batch_size // share
    totals, after = (np.bincount(ranks, tokens, minlength=size) for ranks in (before, takers))
    return takers, {
        "global_seqlen/mean": float(totals.mean()),
        "global_seqlen/min": float(totals.min()),
        "global_seqlen/max": float(totals.max()),
        "global_seqlen/minmax_diff": float(np.ptp(totals)),
        "global_seqlen/balanced_min": float(after.min()),
        "global_seqlen/balanced_max": float(after.max()),
    }


def _as_sampled(samplers: Sequence[int], size: int) -> list[int]:
    """The places of groups, rank by rank, equally many each: with their samplers, what is over where there is room."""
    share, parts, surplus = len(samplers) // size, [list[int]() for _ in range(size)], list[int]()
    for place, sampler in enumerate(samplers):
        (parts[sampler] if len(parts[sampler]) < share else surplus).append(place)
    for part in parts:
        missing = share - len(part)
        part += surplus[:missing]
        del surplus[:missing]
    return [place for part in parts for place in part]


def num_tokens(scored: ScoredGroup) -> int:
    """The tokens of all the group's sequences, prompts included."""
    prompt = scored.group.prompt.num_tokens or len(scored.group.prompt.token_ids)
    return sum(prompt + len(response.token_ids) for response in scored.group.responses)


def with_prompt(scored: ScoredGroup, data: PromptDataset) -> ScoredGroup:
    """The group with the prompt that the data set has at its index, where it came without."""
    if scored.group.prompt.token_ids:
        return scored
    return dataclasses.replace(scored, group=dataclasses.replace(scored.group, prompt=data[scored.group.prompt.index]))
