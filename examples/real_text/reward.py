"""Reward of short verifiable answers: the first number, or the first yes or no, of a response."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def score(items):
    return [reward(item["response"], item["ground_truth"].strip()) for item in items]


def reward(response: str, truth: str) -> dict[str, float]:
    """Return 1 for the right answer, which must be the first that is given: no second try counts."""
    if NUMBER.fullmatch(truth):
        found = NUMBER.search(response)
        is_right = found is not None and float(found[0].replace(",", "")) == float(truth.replace(",", ""))
    else:
        found = re.search(r"\b(yes|no)\b", response, re.IGNORECASE)
        is_right = found is not None and found[0].lower() == truth.lower()
    return {"overall": float(is_right), "accuracy": float(is_right), "answered": float(found is not None)}
