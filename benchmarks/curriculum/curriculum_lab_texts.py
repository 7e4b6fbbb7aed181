"""A world whose prompts have texts, by which part of their difficulty can be told."""

from __future__ import annotations

import numpy as np
from curriculum_lab_worlds import NUM_CATEGORIES, Setting, SimulatedPolicy

_NAMES = "Alice Bob Chen Dara Emil Farah Goran Hana Ivo Jun Kofi Lena Mei Nia Omar Pia Quin Rosa Sven Tara".split()
_THINGS = "apples books coins dice eggs flags gears hats inks jars keys lamps maps nuts oars pens rods".split()
_THINGS += ["sacks", "tins"]
_OPERATORS = {"+": 0.0, "-": 0.2, "*": 0.7, "/": 1.0, "^": 1.4, "%": 1.6}
_TASKS = {
    "Compute {e} .": 0.0,
    "{n} has {e} {t} . How many {t} does {n} have ?": -0.4,
    "What is the remainder when {e} is divided by {k} ?": 0.9,
    "Find the number of divisors of {e} .": 1.2,
    "Round {e} to the nearest ten .": -0.2,
    "{n} shares {e} {t} among {k} friends . How many {t} are left over ?": 0.3,
    "Solve for x : {e} = {k} x .": 0.4,
    "A box holds {e} {t} , of which {k} are red . What is the probability that two drawn at random are red ?": 1.5,
    "Is {e} larger than {k} ? Answer yes or no .": -1.5,
    "How many zeros does {e} end with ?": 0.8,
    "The sides of a triangle are {k} , {k} and {e} . Find the square of its area .": 1.3,
    "What is half of {e} ?": -0.7,
}
_TWISTS = {
    "": 0.0, "Give the answer in base {k} .": 1.4, "Write the answer as a word .": 0.3, "Think step by step .": -0.1,
    "Ignore all numbers over {k} .": 0.8, "The answer is an integer .": -0.2, "Answer modulo {k} .": 1.0,
}  # fmt: skip


def make_texts(num_prompts: int, random: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Return texts and how hard each looks, (P,) of mean 0 and deviation 1: not linear in what it consists of."""
    texts, hardness = [], np.empty(num_prompts)
    tasks, twists = list(_TASKS.items()), list(_TWISTS.items())
    operators = list(_OPERATORS.items())
    for index in range(num_prompts):
        count, digits = int(random.integers(2, 7)), int(random.integers(1, 6))
        numbers = random.integers(10 ** (digits - 1), 10**digits, size=count)
        chosen = [operators[k] for k in random.integers(len(operators), size=count - 1)]
        expression = str(numbers[0]) + "".join(f" {sign} {x}" for (sign, _), x in zip(chosen, numbers[1:], strict=True))
        (task, of_task), (twist, of_twist) = tasks[random.integers(len(tasks))], twists[random.integers(len(twists))]
        fields = {
            "e": expression, "n": _NAMES[random.integers(len(_NAMES))], "t": _THINGS[random.integers(len(_THINGS))],
            "k": int(random.integers(2, 100)),
        }  # fmt: skip
        texts.append(f"{task} {twist}".strip().format(**fields))
        of_expression = sum(weight for _, weight in chosen) * (0.4 + 0.2 * digits) + 0.3 * digits
        hardness[index] = 0.5 * of_expression + of_task + of_twist
    return texts, (hardness - hardness.mean()) / hardness.std()


class TextWorld(SimulatedPolicy):
    """A simulated policy whose prompts have texts, and in these `share` of the logits' variance within a category."""

    def __init__(self, setting: Setting, num_prompts: int, num_steps: int, seed: int, share: float = 0.5) -> None:
        super().__init__(setting, num_prompts, num_steps, seed)
        random = np.random.default_rng([seed, 6])
        self.texts, hardness = make_texts(num_prompts, random)
        by_category = np.bincount(self.categories, self.logits, NUM_CATEGORIES) / np.bincount(self.categories)
        center = by_category[self.categories]
        left = self.logits - center
        in_text = np.sqrt(share) * left.std() * -hardness
        self.logits = (center + in_text + np.sqrt(1.0 - share) * left).astype(np.float32)
