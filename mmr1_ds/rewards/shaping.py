"""Parts of a reward that depend on a response's shape: its length and its repetitions."""

from __future__ import annotations

import math
from collections.abc import Mapping

REPETITION_NGRAM = 40  # words
MAX_REPETITION_PENALTY = -0.5


def cosine_length(is_correct: bool, length: int, values: Mapping[str, float], max_length: int) -> float:
    """Return a reward by length along half a cosine (arXiv 2502.03373, appendix C).

    A right answer has `max_value_correct` at length 0 and `min_value_correct` at `max_length`; a wrong one has
    `min_value_wrong` at 0 and `max_value_wrong` at `max_length`. Longer ones have the value of `max_length`: the bare
    cosine, as upstream has it, would rise again and reward the longest.

    Args: length, max_length: tokens. Upstream divides characters by tokens.
    """
    progress = min(max(length / max_length, 0.0), 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 at length 0, 0 at max_length
    short, long = ("max_value_correct", "min_value_correct") if is_correct else ("min_value_wrong", "max_value_wrong")
    return values[long] + share * (values[short] - values[long])


def repetition_penalty(
    response: str, ngram_size: int = REPETITION_NGRAM, max_penalty: float = MAX_REPETITION_PENALTY
) -> float:
    """Return `max_penalty` times the share of word n-grams that occurred before (arXiv 2502.03373, appendix C.2).

    0 for fewer than `ngram_size` words. Words are split at white space, capitals ignored.
    """
    words = response.lower().split()
    num_ngrams = len(words) - ngram_size + 1
    if num_ngrams < 1:
        return 0.0
    distinct = {tuple(words[start : start + ngram_size]) for start in range(num_ngrams)}
    return (1.0 - len(distinct) / num_ngrams) * max_penalty
