"""Which sequences are computed together: groups balanced over the ranks, micro-batches by number or by tokens.

Under ZeRO-3 every forward is a collective: all ranks make as many, and wait for the slowest.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

Agree = Callable[[int], int]  # from how many micro-batches this rank needs to how many all make: a collective

_EVEN = 0.01  # of the mean: more balance than this is not worth moving groups for


def in_turn(num_sequences: int, size: int, agree: Agree) -> list[list[int]]:
    """Micro-batches of `size` sequences, in their order; the last may be smaller, and those after it are empty.

    Collective: all ranks make as many as the one with most sequences needs.
    """
    parts = [list(range(start, min(start + size, num_sequences))) for start in range(0, num_sequences, size)]
    return _up_to(parts, agree(len(parts)))


def by_tokens(lengths: Sequence[int], budget: int, agree: Agree) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens, as few as the ranks need, all of nearly the same number of tokens.

    Args: lengths: tokens of this rank's sequences; one over the budget gets a micro-batch of its own.
    Returns: the positions in each, ascending; every position once, none empty but where there are fewer sequences than
        micro-batches: then the last ones.
    Collective: all ranks, each with at least one sequence.
    """
    fewest = first_fit(lengths, budget)
    number = agree(len(fewest))
    return _up_to(_parts(lengths, budget, fewest, min(number, len(lengths))), number)


def _up_to(parts: list[list[int]], number: int) -> list[list[int]]:
    """The parts, and empty ones behind them where `number` are needed."""
    return parts + [[] for _ in range(number - len(parts))]


def _parts(lengths: Sequence[int], budget: int, fewest: list[list[int]], number: int) -> list[list[int]]:
    even = spread(lengths, number)
    if max(sum(lengths[i] for i in part) for part in even) <= max(budget, *lengths):
        return even
    # Spread evenly they do not fit, which happens where sequences nearly fill the budget: cut the tight bins up.
    while len(fewest) < number:
        largest = max((part for part in fewest if len(part) > 1), key=lambda part: sum(lengths[i] for i in part))
        fewest.remove(largest)
        fewest += [largest[::2], largest[1::2]]
    return [sorted(part) for part in fewest]


def by_prompts(
    prompts: Sequence[int], prompt_lengths: Sequence[int], lengths: Sequence[int], budget: int, agree: Agree
) -> list[list[int]]:
    """Micro-batches as of `by_tokens`, the responses to a prompt together where they fit, their prompt counted once.

    Args: prompts: names the prompt of each response, equal ones side by side; lengths: of the responses alone.
    """
    runs: list[list[int]] = []
    tokens = budget
    for i, own in enumerate(lengths):
        tokens += own
        if not runs or prompts[i] != prompts[i - 1] or tokens > budget:
            runs.append([])
            tokens = prompt_lengths[i] + own
        runs[-1].append(i)
    number = agree(len(first_fit([prompt_lengths[run[0]] + sum(lengths[i] for i in run) for run in runs], budget)))
    most = min(number, len(lengths))
    while len(runs) < most:  # what another rank needs; each run is a micro-batch then
        longest = max(range(len(runs)), key=lambda place: len(runs[place]))
        runs[longest : longest + 1] = [runs[longest][::2], runs[longest][1::2]]
    sizes = [prompt_lengths[run[0]] + sum(lengths[i] for i in run) for run in runs]
    parts = _parts(sizes, budget, first_fit(sizes, budget), most)
    return _up_to([sorted(i for place in part for i in runs[place]) for part in parts], number)


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of at most `budget`, longest first into the first with room: 11/9 of the fewest possible at most, plus 1."""
    bins: list[list[int]] = []
    left: list[int] = []
    for i in _longest_first(lengths):
        place = next((place for place, room in enumerate(left) if lengths[i] <= room), None)
        if place is None:
            bins.append([i])
            left.append(budget - lengths[i])
        else:
            bins[place].append(i)
            left[place] -= lengths[i]
    return bins


def spread(lengths: Sequence[int], number: int) -> list[list[int]]:
    """`number` parts of nearly the same sum: longest first, each to the smallest so far (none stays empty)."""
    parts: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, place) for place in range(number)]
    for i in _longest_first(lengths):
        total, place = heapq.heappop(heap)
        parts[place].append(i)
        heapq.heappush(heap, (total + lengths[i], place))
    return [sorted(part) for part in parts]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def balance(tokens: Sequence[int], num_ranks: int) -> list[int]:
    """Assign the groups of an optimiser step to ranks that get nearly as many tokens and equally many groups each.

    Starts from groups that lie rank by rank, and swaps one of the fullest rank with one of the emptiest for as long as
    that evens the two out, so that few groups move. All ranks come to the same result.

    Args: tokens: of each group; their number is a multiple of num_ranks.
    Returns: positions of the groups, rank by rank; a permutation.
    """
    weights = np.array(tokens, dtype=np.int64).reshape(num_ranks, -1)
    places = np.arange(weights.size).reshape(weights.shape)
    for _ in range(weights.size):
        totals = weights.sum(axis=1)
        full, empty = int(totals.argmax()), int(totals.argmin())
        gap = int(totals[full] - totals[empty])
        if gap <= 2 * _EVEN * totals.mean():
            break
        # A swap that moves d tokens leaves a gap of |gap - 2d|; one that moves half of the gap closes it.
        moved = weights[full][:, None] - weights[empty][None, :]
        mine, yours = np.unravel_index(np.abs(gap - 2 * moved).argmin(), moved.shape)
        if abs(gap - 2 * int(moved[mine, yours])) >= gap:
            break
        for table in (weights, places):
            table[full, mine], table[empty, yours] = table[empty, yours], table[full, mine]
    return places.reshape(-1).tolist()
