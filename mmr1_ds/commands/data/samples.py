"""Prompts as the model gets them: chat template applied, special tokens shown, images by their size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.data.rows import RowReader
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


@dataclass(frozen=True)
class Sample:
    """One prompt."""

    row: str  # names it
    prompt_id: str
    category: str
    num_tokens: int
    prompt: str | None  # from its token ids; the placeholder of an image reads <image 448x448, 256 tokens>
    problem: str | None  # why there is no prompt: what stops a run that draws it
    ground_truth: str


def choose(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the rows, or all that there are, in their order; the same for the same seed."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def render(reader: RowReader, row: int, encoder: PromptEncoder) -> tuple[str | None, str | None]:
    """The prompt of a row, by the way that it takes to the model; None, and why, when its images cannot be read."""
    where = reader.where(row)
    try:
        content = reader.read(row)
        token_ids, images = encoder.encode(content.prompt, content.images, where)
    except UserError as error:
        return None, " ".join(str(error).split()).removeprefix(f"{where}: ")

    def decoded(token_ids: Sequence[int]) -> str:
        text: str = encoder.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    text, start = "", 0
    places = [place for place, token in enumerate(token_ids) if images and token == encoder.image_token_id]
    for place, image in zip(places, images, strict=True):
        tokens = encoder.num_image_tokens(*image.size, where)
        text += f"{decoded(token_ids[start:place])}<image {image.width}x{image.height}, {tokens} tokens>"
        start = place + 1
    return text + decoded(token_ids[start:]), None
