"""What a validation says: accuracy with its spread over the prompts, pass@k and maj@k, of all prompts and by part."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_PARTS = 64  # more categories than this are a label of each prompt, and no figure of theirs is of use


@dataclass(frozen=True)
class Answered:
    """One prompt with what its n answers were worth."""

    index: int  # of the prompt in the validation data
    prompt_id: str
    parts: tuple[str, ...]  # names of the parts of the data that it belongs to
    overall: np.ndarray  # (n,) float32, NaN = unknown
    accuracy: np.ndarray  # (n,) float32 in [0, 1], NaN = unknown
    votes: tuple[str, ...]  # n final answers, equal as text where they are the same answer

    @property
    def known(self) -> np.ndarray:
        """Return the known accuracies, in the order of the answers."""
        return self.accuracy[np.isfinite(self.accuracy)]


def validation_metrics(answered: Sequence[Answered], most_answers: int) -> dict[str, float]:
    """Compute `val/*` of all prompts, and `val/<part>/*` where there are several parts.

    Args: answered: of all ranks; most_answers: n.
    """
    metrics = {f"val/{name}": value for name, value in _figures(answered, most_answers).items()}
    by_part = defaultdict(list)
    for one in answered:
        for part in one.parts:
            by_part[part].append(one)
    if 1 < len(by_part) <= MOST_PARTS:
        for part, of_part in sorted(by_part.items()):
            figures = _figures(of_part, most_answers) | _means(of_part)
            metrics |= {f"val/{part}/{name}": value for name, value in figures.items()}
    return metrics


def part_name(text: str) -> str:
    """Return a category or file name as a part of a metric's name: trackers refuse more than these characters."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


def _means(answered: Sequence[Answered]) -> dict[str, float]:
    overall, accuracy = (
        np.concatenate([getattr(one, name) for one in answered]) for name in ("overall", "accuracy")
    )
    means = {"overall_reward": overall, "accuracy_reward": accuracy}
    return {name: float(np.nanmean(values)) for name, values in means.items() if np.isfinite(values).any()}


def _figures(answered: Sequence[Answered], most_answers: int) -> dict[str, float]:
    rates = np.array([one.known.mean(dtype=np.float64) for one in answered if len(one.known)])
    if not len(rates):
        return {}
    figures = {"accuracy_std_over_prompts": float(rates.std())}
    if len(rates) > 1:
        figures["accuracy_standard_error"] = float(rates.std(ddof=1) / math.sqrt(len(rates)))
    if most_answers == 1:
        return figures
    for k in powers_of_two(most_answers):
        best = [best_of(one.known, k) for one in answered if len(one.known) >= k]
        if best:
            figures[f"pass_at_{k}"] = float(np.mean(best))
        votes = [majority(one.votes[:k], one.accuracy[:k]) for one in answered if k > 1]
        known = [vote for vote in votes if vote is not None]
        if known:
            figures[f"maj_at_{k}"] = float(np.mean(known))
    return figures


def powers_of_two(n: int) -> list[int]:
    """Return 1, 2, 4 .. and n itself."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def best_of(accuracy: np.ndarray, k: int) -> float:
    """Return the mean, over all choices of k of the n answers, of the best one's accuracy: unbiased pass@k.

    With c right answers of n it equals 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374). A fraction counts
    as what it is.

    Args: accuracy: (n,), n >= k, none of them NaN.
    """
    n = len(accuracy)
    # The i-th smallest is the best of a choice that takes it and k - 1 of the i smaller ones.
    chosen = np.array([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)])
    return float(np.sort(accuracy).astype(np.float64) @ chosen)


def majority(votes: Sequence[str], accuracy: np.ndarray) -> float | None:
    """Return the accuracy of the answer that most votes are for; of several with as many, their mean.

    Returns: None where no accuracy of the winners is known.
    """
    counts = Counter(vote for vote in votes if vote)
    if not counts:
        return 0.0 if np.isfinite(accuracy).any() else None
    most = max(counts.values())
    of_winners = []
    for winner in (vote for vote, count in counts.items() if count == most):
        found = np.array([accuracy[i] for i, vote in enumerate(votes) if vote == winner])
        if np.isfinite(found).any():
            of_winners.append(float(np.nanmean(found)))
    return float(np.mean(of_winners)) if of_winners else None
