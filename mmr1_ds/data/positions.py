"""The positions of a prompt's tokens in time, height and width, by which Qwen-VL models turn their rotary embedding."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Block = tuple[int, int, int, float]  # tokens in time, height and width, and the positions that a step in time takes


def spatial_positions(is_seen: np.ndarray, blocks: Iterable[Block]) -> np.ndarray:
    """Return the positions, (3, T) int64: text counts on in all three, a block spans them and text goes on behind it.

    As vLLM has them, and the models' authors before. transformers 5.19 lets text go on behind a video's height and
    width, so that a longer video reaches into it.

    Args: is_seen: (T,) bool, tokens of images and videos; blocks: those of each, in the order of the text.
    """
    positions = np.empty((3, len(is_seen)), dtype=np.int64)
    at = following = 0  # the token, and its position
    for *shape, step in blocks:
        text = int(is_seen[at:].argmax())
        positions[:, at : at + text] = following + np.arange(text)
        at, following = at + text, following + text
        grid = np.indices(shape).reshape(3, -1)
        grid[0] = (grid[0] * step).astype(np.int64)
        positions[:, at : at + grid.shape[1]] = following + grid
        at, following = at + grid.shape[1], following + int(grid.max()) + 1
    positions[:, at:] = following + np.arange(len(is_seen) - at)
    return positions
