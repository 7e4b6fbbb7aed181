"""Reward of short answers: the first number of a response."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def score(items):
    return [reward(item["response"], item["ground_truth"]) for item in items]


def reward(response: str, truth: str) -> dict[str, float]:
    """Return 1 for the right number, which must be the first that is given: no second try counts."""
    found = NUMBER.search(response)
    is_right = found is not None and float(found[0].replace(",", "")) == float(truth.replace(",", ""))
    return {"overall": float(is_right), "accuracy": float(is_right), "answered": float(found is not None)}
