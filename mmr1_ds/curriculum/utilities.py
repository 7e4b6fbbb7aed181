"""What a prompt is worth as a function of its pass rate p, its expectation under a belief, and weights from it.

A belief is Gaussian in the logit of p: z ~ N(m, V).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mmr1_ds.errors import UserError

Utility = Callable[[np.ndarray, int], np.ndarray]  # (p, responses a group) -> utility, elementwise


def _learnability(pass_rate: np.ndarray, num_responses: int) -> np.ndarray:
    value: np.ndarray = 1.0 - pass_rate
    value *= pass_rate
    return value


_UTILITIES: dict[str, Utility] = {
    "learnability": _learnability,
    # Peaks at 1/3: where a correct response is rare enough to be worth more than its share.
    "learnability-squared": lambda p, n: p * (1.0 - p) ** 2,
    # Chance that a group of n has both right and wrong responses, without which its gradient is zero.
    "gradient-probability": lambda p, n: 1.0 - p**n - (1.0 - p) ** n,
}
UTILITIES = tuple(_UTILITIES)

NODES, _weights = np.polynomial.hermite_e.hermegauss(15)  # of expectations under a standard normal
NODE_WEIGHTS = _weights / _weights.sum()

_BISECTIONS = 12


def utility_function(name: str) -> Utility:
    """The utility of that name. Raises: UserError that lists the known names."""
    if name not in _UTILITIES:
        raise UserError(f"unknown utility {name!r}; known are {', '.join(UTILITIES)}")
    return _UTILITIES[name]


def utility_peak(name: str, num_responses: int) -> float:
    """Largest utility of any pass rate: 1/4, 4/27, and 1 - 2^(1 - N). Raises: as `utility_function`."""
    return float(utility_function(name)(np.arange(1, 600) / 600, num_responses).max())  # 1/2 and 1/3 among them


def logistic(z: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-z), in z's type; no overflow for any finite z."""
    half = np.asarray(0.5, dtype=z.dtype)
    result = np.multiply(half, z, out=np.empty_like(z))  # in place from here: fresh memory takes longer than the sums
    np.tanh(result, out=result)
    result *= half
    result += half
    return result


def expected_utility(mean: np.ndarray, variance: np.ndarray, utility: Utility, num_responses: int) -> np.ndarray:
    """E[u] under z ~ N(mean, variance), (K,) float32. Args: mean, variance: (K,) float32."""
    first = np.zeros_like(mean)
    for weight, value in _at_nodes(mean, variance, utility, num_responses):
        value *= weight
        first += value
    return first


def utility_moments(
    mean: np.ndarray, variance: np.ndarray, utility: Utility, num_responses: int
) -> tuple[np.ndarray, np.ndarray]:
    """E[u] and E[u^2] under z ~ N(mean, variance), two (K,) float32. Args: mean, variance: (K,) float32."""
    first, second = np.zeros_like(mean), np.zeros_like(mean)
    for weight, value in _at_nodes(mean, variance, utility, num_responses):
        weighted = weight * value
        first += weighted
        weighted *= value
        second += weighted
    return first, second


def _at_nodes(
    mean: np.ndarray, variance: np.ndarray, utility: Utility, num_responses: int
) -> Iterator[tuple[np.float32, np.ndarray]]:
    """Yield the weight of each node of the quadrature, and u there, which the caller may write over."""
    half = np.float32(0.5)
    half_mean, half_deviation, pass_rate = half * mean, half * np.sqrt(variance), np.empty_like(mean)
    for node, weight in zip(NODES.astype(np.float32), NODE_WEIGHTS.astype(np.float32), strict=True):
        # `logistic` to the bit, since halves are exact; in one array for all nodes.
        np.multiply(half_deviation, node, out=pass_rate)
        pass_rate += half_mean
        np.tanh(pass_rate, out=pass_rate)
        pass_rate *= half
        pass_rate += half
        yield weight, utility(pass_rate, num_responses)


def sharpening(first: np.ndarray, second: np.ndarray, calibration: float, cap: float) -> float:
    """The exponent that makes draws by w = E[u]^gamma as good as draws by the unknown u itself, [1, cap].

    An expectation is shrunk towards the mean, so weights proportional to it are too flat. Draws proportional to the
    true u would collect sum u^2 / sum u on average; gamma solves
    calibration * sum(w E[u]) / sum(w) = sum E[u^2] / sum E[u].

    Args:
        first, second: E[u] and E[u^2], (K,) float32, not negative.
        calibration: what draws have collected over what they were expected to.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    total, largest = first.sum(), first.max()
    if not total > 0.0:
        return 1.0
    target = second.sum() / total / calibration
    logarithm = np.log(np.maximum(first / largest, 1e-30))

    def collected(exponent: float) -> float:
        weights = np.exp(exponent * logarithm)
        return float((weights * first).sum() / weights.sum())

    low, high = 1.0, cap
    if collected(cap) <= target:
        return cap
    if collected(1.0) >= target:
        return 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if collected(middle) < target else (low, middle)
    return (low + high) / 2.0
