"""The Triton kernels of backend `triton`. `gpu` launches them; docs/kernel.md counts their bytes and operations.

The mathematics, over that of `reference`. Let second(g) be the second largest of the counts that an n-gram g has in
the responses of its group, with multiplicity. Then for every response i

    min(c_i(g), max_{j != i} c_j(g)) = min(c_i(g), second(g)),

for if i alone holds the largest count, the best of the others is second(g), and else c_i(g) <= second(g) <= the best
of the others. So matches_n(i) is a sum over the *cells* (g, i) alone, and integers sum to the same in any order.

Two hash tables a group and order, open addressing, an empty slot is all zeros:

    grams, one a group:     {key int64, largest int32, second int32},  key = (slot of the first n - 1 tokens, last one)
    cells, one a response:  {key int32, count int32},                  key = slot of the n-gram in `grams`

A slot never moves, so it is the n-gram's exact name and a position's chain of orders needs no other position's result:
all orders are counted in one launch. A region has LOAD slots for each of its tokens and begins at LOAD times the
offset of its first token, so regions never meet and no table ever fills.

Integers are int32 where the host has checked that they fit (`gpu.MAX_GROUP_TOKENS`). Atomics are relaxed: a key is
the only thing that its own compare-and-swap publishes, everything else is read by a later launch.
"""

# Triton turns these functions into GPU code: arguments are pointers, scalars or compile-time constants, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from mmr1_kernels import scoring

SMOOTHED_ZERO = tl.constexpr(scoring.SMOOTHED_ZERO)
STD_EPSILON = tl.constexpr(scoring.STD_EPSILON)
# At most half full even if no n-gram repeats. A search of 64 lanes then takes 6 steps until its last lane is done,
# against 10 with 1.5 slots a token (docs/kernel.md).
LOAD = tl.constexpr(2)
SPARE = tl.constexpr(1024)  # slots behind each table for the lanes that have nothing to swap


@triton.jit
def _last_at_most(rising, count, values):
    """Per lane, the last index below `count` with rising[index] <= value. rising[0] must be <= every value."""
    low = tl.zeros(values.shape, tl.int32)
    width = count  # the answer lies in [low, low + width); halved alike for all lanes, so the loop needs no reduction
    while width > 1:
        half = width // 2
        low = tl.where(tl.load(rising + low + half) <= values, low + half, low)
        width -= half
    return low


@triton.jit
def _home(key, capacity):
    """The slot where a search for `key` begins: two rounds of multiply and shift, then a range reduction by product."""
    mixed = key.to(tl.uint64)
    mixed = (mixed ^ (mixed >> 32)) * 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93
    return (((mixed >> 32) * capacity.to(tl.uint64)) >> 32).to(tl.int32)


@triton.jit
def _find_or_insert(table, spare, key, capacity, active, WORDS: tl.constexpr):
    """Per lane, the slot of `key` in its table, inserted where missing. Undefined where not active.

    Linear probing: the next slots mostly lie in the sector already fetched. A key once written never changes, so a
    load that misses another program's insert only leads to a swap that fails and returns the winner's key.

    Args: table: pointer to the lane's slot 0, key word; WORDS: key-sized words a slot. spare: pointer to a zero.
    """
    slot = _home(key, capacity)
    pending = active
    while tl.max(pending.to(tl.int32), axis=0) > 0:
        # Loads until every lane stands on its key or on an empty slot, then one swap for all: atomics have no mask
        # here, so a swap in every step would cost one for every lane that is already done.
        walking = pending
        found = key
        while tl.max(walking.to(tl.int32), axis=0) > 0:
            # .cg: from L2, where swaps take place. A zero kept in L1 would cost a failing swap each time.
            found = tl.load(table + slot.to(tl.int64) * WORDS, mask=walking, other=found, cache_modifier=".cg")
            walking = walking & (found != 0) & (found != key)
            slot = tl.where(walking, slot + 1, slot)
            slot = tl.where(slot == capacity, 0, slot)
        pending = pending & (found == 0)
        if tl.max(pending.to(tl.int32), axis=0) > 0:
            # A lane with nothing to insert swaps a zero of its own for a zero: no contention on frequent n-grams.
            target = tl.where(pending, table + slot.to(tl.int64) * WORDS, spare)
            winner = tl.atomic_cas(target, tl.zeros_like(key), tl.where(pending, key, 0), sem="relaxed")
            pending = pending & (winner != 0) & (winner != key)
    return slot


@triton.jit(do_not_specialize=list(range(9)))
def count_kernel(
    token_ids,  # (num_tokens,) int32, of the chunk
    offsets,  # (num_responses + 1,) int64, of the chunk, in tokens of the whole batch
    group_of,  # (num_responses,) int32, of the chunk, groups of the whole batch
    group_starts,  # (G + 1,) int64, in tokens, of the whole batch
    grams,  # (max_order * LOAD * num_tokens + SPARE, 2) int64, zeros
    cells,  # (max_order * LOAD * num_tokens + SPARE, 2) int32, zeros
    num_tokens,
    num_responses,
    max_order,
    BLOCK: tl.constexpr,
):
    """Fill both tables. A program takes BLOCK positions and, order by order, the n-grams that begin there."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_tokens
    chunk_start = tl.load(offsets)
    response = _last_at_most(offsets, num_responses, tl.minimum(position, num_tokens - 1) + chunk_start)
    group = tl.load(group_of + response)
    group_start = tl.load(group_starts + group)
    response_start = tl.load(offsets + response)
    response_end = tl.load(offsets + response + 1)
    gram_capacity = ((tl.load(group_starts + group + 1) - group_start) * LOAD).to(tl.int32)
    cell_capacity = ((response_end - response_start) * LOAD).to(tl.int32)
    left = tl.where(inside, (response_end - chunk_start).to(tl.int32) - position, 0)  # tokens to the response's end

    slots = num_tokens.to(tl.int64) * LOAD  # of one order
    gram_table = grams + (group_start - chunk_start) * LOAD * 2
    cell_table = cells + (response_start - chunk_start) * LOAD * 2
    spare_slot = max_order * slots + position % SPARE
    gram = tl.zeros([BLOCK], tl.int32)
    for order in range(max_order):
        active = left > order
        token = tl.load(token_ids + position + order, mask=active, other=0)
        gram_key = ((gram.to(tl.int64) << 32) | token.to(tl.int64)) + 1  # 0 is an empty slot
        gram = _find_or_insert(gram_table, grams + spare_slot * 2, gram_key, gram_capacity, active, 2)
        cell = _find_or_insert(cell_table, cells + spare_slot * 2, gram + 1, cell_capacity, active, 2)
        tl.atomic_add(cell_table + cell.to(tl.int64) * 2 + 1, 1, mask=active, sem="relaxed")
        gram_table += slots * 2
        cell_table += slots * 2


@triton.jit
def _load_cells(offsets, group_of, group_starts, cells, num_tokens, num_responses, BLOCK: tl.constexpr):
    """BLOCK slots of one order: occupied, count, n-gram (a slot of `grams`, of all orders), response and group."""
    order = tl.program_id(1)
    slots = num_tokens.to(tl.int64) * LOAD
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    chunk_start = tl.load(offsets)
    position = tl.minimum(slot // LOAD, num_tokens - 1)  # tables begin at LOAD times the offset of their tokens
    response = _last_at_most(offsets, num_responses, position + chunk_start)
    group = tl.load(group_of + response)
    cell = tl.load(cells + order * slots + slot, mask=inside, other=0)  # little-endian: key below, count above
    key = (cell & 0xFFFFFFFF).to(tl.int32)
    gram = order * slots + (tl.load(group_starts + group) - chunk_start) * LOAD + key - 1
    return key != 0, (cell >> 32).to(tl.int32), gram, response, group


@triton.jit(do_not_specialize=list(range(8)))
def top_two_kernel(
    offsets,  # the first three as in count_kernel
    group_of,
    group_starts,
    grams,  # as in count_kernel, seen as (..., 4) int32
    cells,  # as in count_kernel, seen as (...,) int64
    distinct,  # (G, max_order) int32, zeros, of the whole batch
    num_tokens,
    num_responses,
    BLOCK: tl.constexpr,
):
    """Largest and second count of every n-gram, and the number of different n-grams. Grid: blocks of cells, orders.

    Why any order of cells will do: each comparison keeps the larger of two counts in `largest` and hands the smaller
    to `second`. Counts are never lost, so `second` sees all of them but the last keeper: its maximum is the runner-up.
    """
    order, max_order = tl.program_id(1), tl.num_programs(1).to(tl.int64)
    occupied, count, gram, _, group = _load_cells(
        offsets, group_of, group_starts, cells, num_tokens, num_responses, BLOCK
    )
    largest = grams + gram * 4 + 2
    before = tl.atomic_max(largest, count, mask=occupied, sem="relaxed")
    tl.atomic_max(largest + 1, tl.minimum(before, count), mask=occupied & (before > 0), sem="relaxed")
    is_first = occupied & (before == 0)  # exactly one cell of an n-gram finds nothing there
    # Nearly always one group, so one sum and one atomic a block.
    for one in range(tl.min(group, axis=0), tl.max(group, axis=0) + 1):
        num_first = tl.sum((is_first & (group == one)).to(tl.int32), axis=0)
        tl.atomic_add(distinct + one * max_order + order, num_first, sem="relaxed")


@triton.jit(do_not_specialize=list(range(8)))
def match_kernel(
    offsets,  # the first five as in top_two_kernel
    group_of,
    group_starts,
    grams,
    cells,
    matches,  # (num_responses, max_order) int32, zeros, of the chunk
    num_tokens,
    num_responses,
    BLOCK: tl.constexpr,
):
    """Clipped matches of every response. Grid: blocks of cells, orders."""
    order, max_order = tl.program_id(1), tl.num_programs(1).to(tl.int64)
    occupied, count, gram, response, _ = _load_cells(
        offsets, group_of, group_starts, cells, num_tokens, num_responses, BLOCK
    )
    second = tl.load(grams + gram * 4 + 3, mask=occupied, other=0)
    matched = tl.minimum(count, second)
    # A response's cells lie together: a sum and an atomic for each response of the block, mostly one or two.
    for one in range(tl.min(response, axis=0), tl.max(response, axis=0) + 1):
        num_matched = tl.sum(tl.where(response == one, matched, 0), axis=0)
        tl.atomic_add(matches + one * max_order + order, num_matched, sem="relaxed")


@triton.jit(do_not_specialize=list(range(8)))
def bleu_kernel(
    offsets,  # (B + 1,) int64
    group_of,  # (B,) int32
    group_offsets,  # (G + 1,) int64
    matches,  # (B, max_order) int32
    bleu,  # (B,) float64, out
    bleu_by_order,  # (B, max_order) float64, out
    num_responses,
    max_order,
    BLOCK: tl.constexpr,
):
    """BLEU of each response against the others of its group, as in `scoring`. A program takes BLOCK responses."""
    response = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = response < num_responses
    group = tl.load(group_of + response, mask=inside, other=0)
    first = tl.load(group_offsets + group, mask=inside, other=0)
    last = tl.load(group_offsets + group + 1, mask=inside, other=0)
    start = tl.load(offsets + response, mask=inside, other=0)
    length = tl.load(offsets + response + 1, mask=inside, other=0) - start

    # The closest other length, the shorter of two: the smallest of 2 |difference| + (1 if longer).
    closest = length
    smallest = tl.full([BLOCK], 1 << 62, tl.int64)
    for step in range(tl.max(last - first, axis=0)):
        other = first + step
        is_other = (other < last) & (other != response)
        other_start = tl.load(offsets + other, mask=is_other, other=0)
        other_length = tl.load(offsets + other + 1, mask=is_other, other=0) - other_start
        distance = 2 * tl.abs(other_length - length) + (other_length > length).to(tl.int64)
        is_closer = is_other & (distance < smallest)
        smallest = tl.where(is_closer, distance, smallest)
        closest = tl.where(is_closer, other_length, closest)

    one = tl.full([BLOCK], 1.0, tl.float64)  # Python's floats would come as float32
    smoothed_zero = tl.full([BLOCK], SMOOTHED_ZERO, tl.float64)
    shortfall = closest.to(tl.float64) / tl.maximum(length, 1).to(tl.float64)
    brevity = tl.where(length > closest, one, tl.exp(one - shortfall))
    num_matched = tl.load(matches + response * max_order, mask=inside, other=0)
    factor = tl.where(num_matched > 0, brevity, 0.0)  # no token in common: 0, whatever the smoothing
    sum_of_logs = tl.zeros([BLOCK], tl.float64)
    for order in range(max_order):
        num_matched = tl.load(matches + response * max_order + order, mask=inside, other=0)
        total = tl.maximum(length - order, 1).to(tl.float64)
        precision = tl.where(num_matched > 0, num_matched.to(tl.float64), smoothed_zero) / total
        sum_of_logs += tl.log(precision)
        tl.store(bleu_by_order + response * max_order + order, factor * precision, mask=inside)
    tl.store(bleu + response, factor * tl.exp(sum_of_logs / max_order), mask=inside)


@triton.jit(do_not_specialize=list(range(16)))
def group_kernel(
    offsets,  # (B + 1,) int64
    group_offsets,  # (G + 1,) int64
    rewards,  # (B,) float32
    accuracies,  # (B,) float32
    bleu,  # (B,) float64
    bleu_by_order,  # (B, max_order) float64
    num_distinct,  # (G, max_order) int32
    reward_mean,  # (G,) float64, out, as all below
    reward_variance,  # (G,)
    pass_rate,  # (G,)
    outcome_variance,  # (G,)
    self_bleu,  # (G,)
    self_bleu_by_order,  # (G, max_order)
    distinct,  # (G, max_order)
    advantages,  # (B,)
    max_order,
    BLOCK: tl.constexpr,
):
    """Everything that is left. One program a group, BLOCK responses at a time."""
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(group_offsets + group)
    last = tl.load(group_offsets + group + 1)
    size = (last - first).to(tl.float64)
    # Nothing differs between empty responses; 0 would call them perfectly diverse.
    is_silent = (tl.load(offsets + first) == tl.load(offsets + last)) & (last - first > 1)
    lane = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float64)

    reward_sum, num_known, num_right, bleu_sum = zeros, zeros, zeros, zeros
    for start in range(first, last, BLOCK):
        inside = start + lane < last
        reward_sum += tl.load(rewards + start + lane, mask=inside, other=0.0).to(tl.float64)
        accuracy = tl.load(accuracies + start + lane, mask=inside, other=0.0)
        is_known = inside & (accuracy == accuracy)  # NaN is unknown
        num_known += is_known.to(tl.float64)
        num_right += tl.where(is_known, accuracy, 0.0).to(tl.float64)
        bleu_sum += tl.load(bleu + start + lane, mask=inside, other=0.0)
    mean = tl.sum(reward_sum, axis=0) / size
    known = tl.sum(num_known, axis=0)
    rate = tl.sum(num_right, axis=0) / known  # 0 / 0 is the NaN of a group without a known accuracy
    tl.store(reward_mean + group, mean)
    tl.store(pass_rate + group, rate)
    tl.store(outcome_variance + group, rate * (1.0 - rate))
    tl.store(self_bleu + group, tl.where(is_silent, 1.0, tl.sum(bleu_sum, axis=0) / size))

    # By comparison, not by rounding: 0 if and only if all rewards of the group are equal.
    first_reward = tl.load(rewards + first)
    squares, num_different = zeros, tl.zeros([BLOCK], tl.int32)
    for start in range(first, last, BLOCK):
        inside = start + lane < last
        reward = tl.load(rewards + start + lane, mask=inside, other=0.0)
        centred = tl.where(inside, reward.to(tl.float64) - mean, 0.0)
        squares += centred * centred
        num_different += (inside & (reward != first_reward)).to(tl.int32)
    varies = tl.sum(num_different, axis=0) > 0
    sum_of_squares = tl.sum(squares, axis=0)
    scale = tl.sqrt(sum_of_squares / tl.maximum(size - 1.0, 1.0)) + tl.full([], STD_EPSILON, tl.float64)
    tl.store(reward_variance + group, tl.where(varies, sum_of_squares / size, 0.0))
    for start in range(first, last, BLOCK):
        inside = start + lane < last
        reward = tl.load(rewards + start + lane, mask=inside, other=0.0)
        centred = reward.to(tl.float64) - mean
        tl.store(advantages + start + lane, tl.where(varies, centred / scale, 0.0), mask=inside)

    for order in range(max_order):
        score_sum, num_ngrams = zeros, tl.zeros([BLOCK], tl.int64)
        for start in range(first, last, BLOCK):
            inside = start + lane < last
            score_sum += tl.load(bleu_by_order + (start + lane) * max_order + order, mask=inside, other=0.0)
            response_start = tl.load(offsets + start + lane, mask=inside, other=0)
            response_end = tl.load(offsets + start + lane + 1, mask=inside, other=0)
            num_ngrams += tl.maximum(response_end - response_start - order, 0)
        entry = group * max_order + order
        score = tl.sum(score_sum, axis=0) / size
        tl.store(self_bleu_by_order + entry, tl.where(is_silent, 1.0, score))
        total = tl.maximum(tl.sum(num_ngrams, axis=0), 1).to(tl.float64)
        tl.store(distinct + entry, tl.load(num_distinct + entry).to(tl.float64) / total)
