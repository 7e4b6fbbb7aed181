"""The demo's data: questions about real handwritten digits, with answers that can be checked.

digits.npz has the 1,797 scans of 8 x 8 pixels that are the test set of UCI's "Optical Recognition of Handwritten
Digits" (E. Alpaydin and C. Kaynak, 1998, doi 10.24432/C50P49, CC BY 4.0), pixels from 0 to 16. 1,397 are for training,
400 are held out: no held-out scan is ever shown in training. An image is a row of four slots of 28 x 28 pixels, filled
from the left, one digit a slot.

A question is the name of an operation and the number of digits it is about: `max3` asks for the largest of three.
Three sorts of questions, by what a model can do with them after the warm-up:

- easy (`get1`, `max2`, `min2`): nearly always right;
- learnable (`max3`, `min3`, `max4`, `min4`): sometimes right, because the warm-up's teacher is hasty;
- too hard (`mul3`, `add3`): right by luck.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SLOT_PIXELS = 28  # 2 x 2 patches of 14 pixels, which the vision tower merges to one token
NUM_SLOTS = 4
NUM_HELD_OUT = 400
SPLIT_SEED = 20250921  # the split never changes: another run seed must not leak held-out scans into training

OPERATIONS: Mapping[str, Callable[[Sequence[int]], int]] = {
    "get": lambda digits: digits[0],
    "max": max,
    "min": min,
    "med": lambda digits: sorted(digits)[len(digits) // 2],
    "add": sum,
    "mul": math.prod,
}
LEARNABLE = ("max3", "min3", "max4", "min4")
# Weights of the kinds of questions in the pool of training prompts. A is balanced, B is mostly dead
# (45 % easy, 15 % learnable, 40 % too hard), as a real data set is for a model that is much too good or too weak.
POOLS: Mapping[str, Mapping[str, int]] = {
    "A": {
        "get1": 10, "max2": 10, "min2": 10, "max3": 10, "min3": 10, "max4": 10, "min4": 10, "mul3": 15, "add3": 15,
    },
    "B": {
        "get1": 15, "max2": 15, "min2": 15, "max3": 3, "min3": 3, "max4": 5, "min4": 4, "mul3": 30, "add3": 10,
    },
}  # fmt: skip
NUM_TRAINING_PROMPTS = 512
NUM_VALIDATION_PROMPTS = 512  # 300 gave a noise of +-.03 a point


@dataclass(frozen=True)
class Digits:
    """The scans: pixels uint8 (1797, 8, 8), 0 = black; labels int64 (1797,); positions of the two splits."""

    pixels: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class Question:
    """One question: `kind` such as max3, the digits that are shown, and the scans that show them."""

    kind: str
    digits: tuple[int, ...]
    scans: tuple[int, ...]  # positions in Digits.pixels

    @property
    def problem(self) -> str:
        """The text of the prompt, with EasyR1's marker where the image goes."""
        return f"<image>{self.kind}"

    @property
    def answer(self) -> str:
        """The right answer, in decimal."""
        return str(OPERATIONS[self.kind[:-1]](self.digits))


@functools.cache
def load_digits() -> Digits:
    """Load the scans and split them, the same way on every machine."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as scans:
        counts, labels = scans["pixels"], scans["labels"].astype(np.int64)
    pixels = np.rint(counts * (255.0 / 16.0)).astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels))
    return Digits(pixels, labels, order[NUM_HELD_OUT:], order[:NUM_HELD_OUT])


def draw_question(kind: str, rng: np.random.Generator, *, held_out: bool = False) -> Question:
    """Draw the scans for a question. Products are asked of digits without zero, which would give them away."""
    data = load_digits()
    scans = data.held_out if held_out else data.train
    if kind.startswith("mul"):
        scans = scans[data.labels[scans] > 0]
    chosen = rng.choice(scans, size=int(kind[-1]))
    return Question(kind, tuple(int(label) for label in data.labels[chosen]), tuple(int(scan) for scan in chosen))


def render(question: Question) -> Image.Image:
    """Return the question's image: RGB, 112 x 28 pixels, white digits on black.

    Scans are enlarged smoothly to fill their slots: from blocks of 3 x 3 pixels the model reads worse.
    """
    canvas = Image.new("L", (NUM_SLOTS * SLOT_PIXELS, SLOT_PIXELS))
    for slot, scan in enumerate(question.scans):
        picture = Image.fromarray(load_digits().pixels[scan])
        canvas.paste(picture.resize((SLOT_PIXELS, SLOT_PIXELS), Image.Resampling.BICUBIC), (slot * SLOT_PIXELS, 0))
    return canvas.convert("RGB")


def training_questions(pool: str, seed: int, count: int = NUM_TRAINING_PROMPTS) -> list[Question]:
    """Return the fixed pool of training prompts: the kinds in the pool's proportions, in random order."""
    weights = POOLS[pool]
    rng = np.random.default_rng([seed, 1])
    kinds = np.repeat(list(weights), proportional_counts(list(weights.values()), count))
    return [draw_question(str(kind), rng) for kind in rng.permutation(kinds)]


def validation_questions(seed: int, count: int = NUM_VALIDATION_PROMPTS) -> list[Question]:
    """Return held-out questions of the learnable kinds, as many of each."""
    rng = np.random.default_rng([seed, 2])
    return [draw_question(LEARNABLE[i % len(LEARNABLE)], rng, held_out=True) for i in range(count)]


def proportional_counts(weights: Sequence[int], total: int) -> list[int]:
    """Split `total` in the proportions of `weights`, by the largest remainders."""
    shares = [weight * total / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def write_parquet(path: Path, questions: Sequence[Question], name: str) -> None:
    """Write questions as a parquet file with the columns problem, answer, images (as PNG), category and id.

    Ids are `name`-0000, ...
    """
    from datasets import Dataset, Features, Image, List, Value

    rows = [
        {
            "problem": question.problem,
            "answer": question.answer,
            "images": [render(question)],
            "category": question.kind,
            "id": f"{name}-{number:04d}",
        }
        for number, question in enumerate(questions)
    ]
    text = Value("string")
    features = Features(problem=text, answer=text, images=List(Image()), category=text, id=text)
    Dataset.from_list(rows, features=features).to_parquet(path)
