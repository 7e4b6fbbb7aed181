"""From what is measured of each prompt to its features: 40 whole numbers of one unit, whatever they are made from.

Measures that mean something by themselves are standardised. Vectors, whose columns mean nothing alone, are reduced to
their principal components first, by a sample of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

NUM_FEATURES = 40
UNIT = 32  # what one standard deviation is in the int8 of a feature

_SAMPLE = 1 << 15  # prompts that components, means and deviations are computed from
_BLOCK = 1 << 14
_LEAST_DEVIATION = 1e-5

Parts = tuple[np.ndarray, np.ndarray]  # of K prompts: measures (K, M) and vectors (K, V), float32


def as_features(parts_of: Callable[[slice], Parts], num_prompts: int) -> np.ndarray:
    """Reduce what is known of P prompts to features with mean 0 and deviation `UNIT`, those without any spread 0.

    What lies more than four deviations off is cut. The components come from a linear-algebra library, so other
    machines may round a few of them otherwise.

    Args: parts_of: what is known of the prompts of a slice.
    Returns: (P, NUM_FEATURES) int8: the M measures, then the vectors' components, the widest first, as many as fit.
    """
    measures, vectors = parts_of(slice(None, None, max(1, num_prompts // _SAMPLE)))
    center = vectors.mean(axis=0)
    axes = _principal_axes(vectors - center, NUM_FEATURES - measures.shape[1])
    raw = np.concatenate([measures, (vectors - center) @ axes], axis=1)
    mean, deviation = raw.mean(axis=0), raw.std(axis=0)
    scale = np.where(deviation > _LEAST_DEVIATION, UNIT / np.maximum(deviation, _LEAST_DEVIATION), 0.0)
    features = np.empty((num_prompts, NUM_FEATURES), dtype=np.int8)
    for start in range(0, num_prompts, _BLOCK):
        measures, vectors = parts_of(slice(start, start + _BLOCK))
        raw = np.concatenate([measures, (vectors - center) @ axes], axis=1)
        features[start : start + _BLOCK] = np.rint((raw - mean) * scale).clip(-127, 127)
    return features


def _principal_axes(centered: np.ndarray, number: int) -> np.ndarray:
    """The axes along which vectors (K, V) spread most, (V, number) float32, widest first; 0 where there are no more."""
    _, found = np.linalg.eigh((centered.T @ centered).astype(np.float64))
    found = found[:, ::-1][:, :number]
    found = found * np.sign(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])])
    axes = np.zeros((centered.shape[1], number), dtype=np.float32)
    axes[:, : found.shape[1]] = found
    return axes
