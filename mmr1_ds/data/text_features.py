"""A small vector of each prompt, from its text and its images' sizes, that may go with how hard the prompt is.

The scan sketches every prompt in `SKETCH_BYTES`: its distinct words, pairs of words and runs of four characters,
hashed and summed with random signs (a sparse random projection), and a few counts. `compress` turns the sketches of
a data set into its principal components and the standardised counts: 40 bytes a prompt, which stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmr1_ds.data.features import Parts, as_features

_BUCKETS = 256
_COUNTS = 12
SKETCH_VERSION = 1  # counted up when a sketch changes
SKETCH_BYTES = _BUCKETS + 4 * _COUNTS
_COPIES = 2  # buckets that a token goes to

_MULTIPLIER, _OTHER_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_OTHER, _WORD, _SIGN = range(3)  # kinds of bytes: spaces and control characters; of words; signs by themselves
_KINDS = np.zeros(256, dtype=np.uint8)
_KINDS[33:127] = _SIGN
for _low, _high in ((48, 57), (65, 90), (97, 122), (128, 255)):
    _KINDS[_low : _high + 1] = _WORD
_FOLDED = np.arange(256, dtype=np.uint64)  # lower case; all digits alike: numbers of one length are one word
_FOLDED[65:91] += np.uint64(32)
_FOLDED[48:58] = 48
_SEPARATOR = b"\0\0\0"  # behind a text, so that no run of four characters spans two


def sketch(
    texts: Sequence[str], num_tokens: Sequence[int], image_sizes: Sequence[Sequence[tuple[int, int]]]
) -> list[bytes]:
    """Sketch prompts; a prompt's sketch does not depend on those beside it.

    Args: (K,) each; num_tokens: of the encoded prompt; image_sizes: width and height of each of its images.
    Returns: (K,) of `SKETCH_BYTES`.
    """
    encoded = [text.encode("utf-8", "replace").replace(b"\0", b" ") + _SEPARATOR for text in texts]
    raw = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    owner = np.repeat(np.arange(len(encoded)), [len(item) for item in encoded])
    kinds, folded = _KINDS[raw], _FOLDED[raw]
    places = np.arange(len(raw))
    begins = (kinds == _SIGN) | ((kinds == _WORD) & (np.concatenate([[_OTHER], kinds[:-1]]) != _WORD))
    starts = np.flatnonzero(begins)

    within = (places - np.maximum.accumulate(np.where(begins, places, 0))).astype(np.uint64)
    spelled = np.where(kinds != _OTHER, _mixed(folded + (within << np.uint64(8))), np.uint64(0))
    words = np.add.reduceat(spelled, starts) if len(starts) else np.empty(0, dtype=np.uint64)
    word_owner = owner[starts]
    beside = word_owner[1:] == word_owner[:-1]
    pairs = (words[:-1] * _OTHER_MULTIPLIER + words[1:])[beside]
    runs = folded[:-3] | folded[1:-2] << np.uint64(8) | folded[2:-1] << np.uint64(16) | folded[3:] << np.uint64(24)
    whole = (raw[:-3] > 0) & (raw[1:-2] > 0) & (raw[2:-1] > 0) & (raw[3:] > 0)
    bags, num_distinct = _bags(
        np.concatenate([word_owner, word_owner[:-1][beside], owner[:-3][whole]]),
        np.concatenate([words, pairs, runs[whole]]),
        len(encoded),
    )

    def count(owners: np.ndarray) -> np.ndarray:
        return np.log1p(np.bincount(owners, minlength=len(encoded)))

    is_digit = (raw >= 48) & (raw <= 57)
    first_digit = is_digit & ~np.concatenate([[False], is_digit[:-1]])
    since = places - np.maximum.accumulate(np.where(first_digit, places, 0)) + 1
    longest = np.zeros(len(encoded))
    np.maximum.at(longest, owner[is_digit], since[is_digit])
    counts = [
        count(owner), count(word_owner), np.log1p(num_distinct), count(owner[kinds == _SIGN]), count(owner[raw > 127]),
        count(owner[is_digit]), count(owner[first_digit]), longest, np.log1p(num_tokens),
        np.array([len(sizes) for sizes in image_sizes]),
        np.log1p([sum(width * height for width, height in sizes) for sizes in image_sizes]),
        np.array([max((abs(np.log(w / h)) for w, h in sizes), default=0.0) for sizes in image_sizes]),
    ]  # fmt: skip
    columns = np.stack(counts, axis=1).astype(np.float32)
    return [bag.tobytes() + row.tobytes() for bag, row in zip(bags, columns, strict=True)]


def _mixed(values: np.ndarray) -> np.ndarray:
    values = values * _MULTIPLIER
    values = (values ^ (values >> np.uint64(29))) * _OTHER_MULTIPLIER
    mixed: np.ndarray = values ^ (values >> np.uint64(32))
    return mixed


def _bags(owners: np.ndarray, tokens: np.ndarray, num_texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the signed sums of each text's distinct tokens, (K, buckets) int8, and how many those are, (K,)."""
    low = np.uint64(40)
    keys = np.unique((owners.astype(np.uint64) << low) | (_mixed(tokens) >> (np.uint64(64) - low)))
    owners = (keys >> low).astype(np.int64)
    sums = np.zeros(num_texts * _BUCKETS)
    for copy in range(_COPIES):
        bits = _mixed((keys & np.uint64((1 << 40) - 1)) + (np.uint64(copy) << low))
        signs = (bits & np.uint64(1)).astype(np.float64) * 2.0 - 1.0
        buckets = (bits >> np.uint64(1)) % np.uint64(_BUCKETS)
        sums += np.bincount(owners * _BUCKETS + buckets.astype(np.int64), signs, len(sums))
    return sums.clip(-127, 127).astype(np.int8).reshape(num_texts, _BUCKETS), np.bincount(owners, minlength=num_texts)


def compress(sketches: np.ndarray) -> np.ndarray:
    """Reduce the sketches of a data set to features, the counts first; see `as_features`.

    Args: sketches: (P, SKETCH_BYTES) uint8.
    Returns: (P, NUM_FEATURES) int8.
    """
    return as_features(lambda part: _parts(sketches[part]), len(sketches))


def _parts(sketches: np.ndarray) -> Parts:
    """Return the counts, and the bags, each of length 1."""
    bags = np.ascontiguousarray(sketches[:, :_BUCKETS]).view(np.int8).astype(np.float32)
    counts = np.ascontiguousarray(sketches[:, _BUCKETS:]).view(np.float32)
    return counts, bags / np.maximum(np.sqrt((bags**2).sum(axis=1, keepdims=True)), 1.0)
