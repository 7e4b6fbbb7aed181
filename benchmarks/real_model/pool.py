"""The questions of the experiment: reasoning-gym's, in families from mostly right to never right before training.

No family was made to be dead, and none is left out for being so: how hard the model finds each is what it is.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "real_text"
sys.path.insert(0, str(EXAMPLE))
from prepare import CHAIN, asked  # noqa: E402

NUM_TRAIN, NUM_VAL = 90, 18  # of a family; one with few questions gives fewer, in the same proportion
# Family -> task of reasoning-gym, its settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "add_1_digit": ("chain_sum", {**CHAIN, "min_digits": 1, "max_digits": 1}),
    "add_2_digits": ("chain_sum", {**CHAIN, "min_digits": 2, "max_digits": 2}),
    "add_3_digits": ("chain_sum", {**CHAIN, "min_digits": 3, "max_digits": 3}),
    "add_3_terms": ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    "add_3_terms_2_digits": ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2}),
    "times_1_digit": ("products", {**CHAIN, "min_digits": 1, "max_digits": 1}),
    "times_2_digits": ("products", {**CHAIN, "min_digits": 2, "max_digits": 2}),
    "gcd": ("gcd", {"min_value": 2, "max_value": 20}),
    "gcd_large": ("gcd", {"min_value": 20, "max_value": 200}),
    "lcm": ("lcm", {"min_value": 2, "max_value": 12}),
    "letters": ("letter_counting", {"min_words": 1, "max_words": 1}),
    "letters_in_words": ("letter_counting", {"min_words": 4, "max_words": 8}),
    "sequence": ("number_sequence", {}),
}


def begun(task: str, question: str) -> tuple[str, str]:
    """Return a short form of the question, and the words that its answer begins with; see `prepare.asked`."""
    if task == "lcm":
        numbers = question.split("numbers:")[1].strip()
        return f"What is the least common multiple of {numbers}?", f"The least common multiple of {numbers} is"
    if task == "number_sequence":
        shown = question.split("?")[0].strip()
        return f"Which number comes next? {shown}", shown
    return asked(task, question)


def write_pool(folder: Path, most: int | None = None) -> None:
    """Write train.json, its first `most` questions alone, and val.json, which share none; the same at every call."""
    import reasoning_gym

    parts: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for family, (task, settings) in FAMILIES.items():
        found: dict[str, dict[str, Any]] = {}
        for item in itertools.chain.from_iterable(
            reasoning_gym.create_dataset(task, size=256, seed=seed, **settings) for seed in range(1, 4)
        ):
            question, beginning = begun(task, item["question"])
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": beginning}]
            found.setdefault(question, {"prompt": messages, "answer": str(item["answer"]).strip(), "family": family})
            if len(found) == NUM_TRAIN + NUM_VAL:
                break
        rows = list(found.values())
        cut = len(rows) * NUM_VAL // (NUM_TRAIN + NUM_VAL)
        parts["val"] += rows[:cut]
        parts["train"] += rows[cut:]
    for name, part in parts.items():
        random.Random(0).shuffle(part)
        rows = [row | {"id": f"{row['family']}-{name}-{number:04d}"} for number, row in enumerate(part)]
        rows = rows[:most] if name == "train" else rows
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
