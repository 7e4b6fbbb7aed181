"""What a prompt's features say of its pass rate: Bayesian linear regression on the logit, learned as the run goes.

A prompt with features x (D of them) has a prior mean that is higher by x . w. Responses to a prompt with belief
N(m, V), whose m has moved by s x . w since (s = 1 never seen, less the more often it was), give the gradient g and the
curvature j of their log-likelihood in m (see `drift_law`); a quadratic approximation makes them a linear observation:

    A <- rho A + sum s^2 j x x^T        b <- rho b + sum s x (g + j s x . w)        w = c (A + 1 / tau^2)^-1 b

rho forgets, as w drifts with the policy. tau, how much the features may matter, is learned by expectation-maximisation,
and c in [0, 1] by how well the regression predicted responses before they were taken in, some deviations less than what
fits best: features that say nothing end up with hardly any weight.
"""

from __future__ import annotations

import numpy as np

FEATURE_UNIT = 32.0

_MEMORY = 0.98  # rho
_ASSUMED_VARIANCE = 0.5  # of x . w before the first observation
_ASSUMED_COUNT = 2.0  # how many weights' evidence that assumption is worth
_MARGIN = 2.0  # deviations of c; roughly, as errors of neighbouring steps go together
_TRUST_INFORMATION = _MARGIN**2  # that c = 1 before the first observation; with the margin c is 0 then
_LEAST_MEMORY = 64.0  # information on c that is kept, though no more comes once every prompt was seen
_LEVELS = 2047  # a weight is a whole number of steps of its largest / 2047
_EM_PASSES = 3  # a step


class FeaturePrior:
    """The weights of D features, and the features themselves."""

    def __init__(self, features: np.ndarray) -> None:
        """Args: features: (P, D) int8, each of mean 0 and deviation about `FEATURE_UNIT`, or all 0."""
        assert features.dtype == np.int8 and features.ndim == 2, (features.dtype, features.shape)
        # Whole numbers below 2^24 add up without rounding, so no result depends on the order of a library's sums.
        assert features.shape[1] * 127 * _LEVELS < 1 << 24, features.shape
        self.features = features
        size = features.shape[1]
        self.information = np.zeros((size, size))  # A
        self.evidence = np.zeros(size)  # b
        self.deviation_squared = _ASSUMED_VARIANCE / size  # tau^2
        self.trust_information = self.trust_evidence = _TRUST_INFORMATION
        self.levels = np.zeros(size, dtype=np.int16)
        self.level_size = 0.0

    @property
    def trust(self) -> float:
        """c, [0, 1]: below the factor that fits best, so that features that say nothing cost hardly anything."""
        cautious = self.trust_evidence - _MARGIN * np.sqrt(self.trust_information)
        return float(np.clip(cautious / self.trust_information, 0.0, 1.0))

    def effect(self, indices: np.ndarray | slice) -> np.ndarray:
        """By how much the features raise the prior mean of prompts, (K,) float32."""
        return self._regression(indices) * np.float32(self.trust)

    def _regression(self, indices: np.ndarray | slice) -> np.ndarray:
        """x . w without c, (K,) float32."""
        sums = self.features[indices].astype(np.float32) @ self.levels.astype(np.float32)
        regression: np.ndarray = sums * np.float32(self.level_size)
        return regression

    def learn(self, indices: np.ndarray, gradient: np.ndarray, curvature: np.ndarray, share: np.ndarray) -> None:
        """Take in a step's observations; call it also when there are none.

        Args: (K,) each: distinct prompts; g and j at their beliefs before; s.
        """
        curvature = np.maximum(0.0, curvature)
        regression = share * self._regression(indices).astype(np.float64)
        response = gradient + curvature * self.trust * regression
        kept = min(1.0, max(_MEMORY, _LEAST_MEMORY / self.trust_information))
        self.trust_information = kept * self.trust_information + float((curvature * regression**2).sum())
        self.trust_evidence = kept * self.trust_evidence + float((response * regression).sum())

        x = self.features[indices] * (share / FEATURE_UNIT)[:, None]
        self.information *= _MEMORY
        self.information += np.einsum("kd,ke->de", x * curvature[:, None], x)
        self.evidence *= _MEMORY
        self.evidence += (x * response[:, None]).sum(axis=0)
        size = len(self.evidence)
        for _ in range(_EM_PASSES):
            covariance = inverse(self.information + np.eye(size) / self.deviation_squared)
            weights = (covariance * self.evidence).sum(axis=1)
            squares = (weights**2).sum() + covariance.trace() + _ASSUMED_COUNT * _ASSUMED_VARIANCE / size
            self.deviation_squared = float(squares / (size + _ASSUMED_COUNT))
        largest = float(np.abs(weights).max())
        if largest > 0.0:
            self.levels = np.rint(weights * (_LEVELS / largest)).astype(np.int16)
            self.level_size = largest / _LEVELS / FEATURE_UNIT


def inverse(matrix: np.ndarray) -> np.ndarray:
    """The inverse of a symmetric positive definite matrix, by Gauss-Jordan elimination.

    Written out, since the bits of a linear-algebra library depend on its threads.
    """
    result = matrix.copy()
    for k in range(len(result)):
        pivot, column = result[k, k], result[:, k].copy()
        row = result[k] / pivot
        result -= column[:, None] * row
        result[k], result[:, k] = row, -column / pivot
        result[k, k] = 1.0 / pivot
    return result
