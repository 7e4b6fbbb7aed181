"""The online estimator: a filter on the logit of each prompt's pass rate, learned from the training's own responses.

Every prompt's logit z has a Gaussian belief N(m, V). A group of N responses with c right updates it through the
binomial likelihood. Between its visits a prompt moves with the policy:

    z <- z + d + delta_k + noise of variance q         every prompt, every step; k is its category
    z <- z + eta u, u = 4 p (1 - p) shrunk by V        a prompt that was trained on

d, eta, delta_k, q, and the prior N(mu_k, v0) of prompts never seen, are all learned the same way: each observation
gives the gradient g = (m' - m) / V of its log-likelihood in m and the information I = (V - V') / V^2 about it, and a
parameter takes a step of (summed gradient) / (decayed sum of information). When a drift parameter changes, every
prompt moves by the share of it that has reached the prompt since it was last seen; so prompts never visited move too.

Nothing is done to a prompt unless it is observed: it stores its belief relative to sums over steps (P prompts,
B observed, C categories), so a step costs O(B + C), and `weights` O(P).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmr1_ds.curriculum.utilities import expected_utility, logistic, sharpening, utility_function

_NEVER = -1
_BLOCK = 1 << 16  # prompts evaluated at a time, so that intermediate results stay in cache
_SHARPENING_SAMPLE = 1 << 14  # prompts that the exponent is found from
_MEAN_LIMIT = 15.0  # logits beyond are beyond any pass rate that a run could measure


@dataclass(frozen=True)
class FilterSettings:
    """Constants of the filter; variances are of logits."""

    prior_variance: float = 4.0  # v0 before the first observation
    prior_category_strength: float = 20.0  # pulls mu_k to the mean of all categories
    min_variance: float = 0.01
    max_variance: float = 16.0
    drift_deviation: float = 0.02  # prior standard deviation of d
    gain_deviation: float = 0.1  # of eta
    drift_memory: float = 0.97  # what information of earlier steps still counts, a step
    category_deviation: float = 0.004  # of delta_k
    noise: float = 0.003  # q before the first observation
    noise_memory: float = 0.99
    score_floor: float = 0.0025
    max_sharpening: float = 1.4


class LogitFilter:
    """Beliefs about the pass rates of P prompts. The order of calls in a step:

        batch = draw by weights(utility)
        probes = probes(num_probes, exclude=batch)
        predicted = predicted_pass_rates(indices)      if wanted, before the observation
        observe(...)                                   once: training groups and probes together
        predict_step(batch)                            not the probes: nothing was trained on them
    """

    def __init__(
        self,
        num_prompts: int,
        categories: np.ndarray | None,
        num_responses: int,
        settings: FilterSettings | None = None,
    ) -> None:
        """
        Args:
            categories: (P,) ints from 0, at most 65,535; None: all prompts in one.
            num_responses: N of a training group.
        """
        assert num_prompts > 0 and num_responses > 0, (num_prompts, num_responses)
        self.num_prompts, self.num_responses = num_prompts, num_responses
        self.settings = settings or FilterSettings()
        if categories is None:
            categories = np.zeros(num_prompts, dtype=np.uint16)
        assert len(categories) == num_prompts, (len(categories), num_prompts)
        assert categories.min() >= 0 and categories.max() < 1 << 16, (categories.min(), categories.max())
        self._category = categories.astype(np.uint16)
        num_categories = int(categories.max()) + 1

        # Of each prompt. The shares are as of its last observation.
        self._anchor = np.zeros(num_prompts, dtype=np.float32)  # m less what has moved it since step 0
        self._variance = np.zeros(num_prompts, dtype=np.float32)  # V less all process noise since step 0
        self._drift_share = np.zeros(num_prompts, dtype=np.float16)  # dm/dd, in steps
        self._gain_share = np.zeros(num_prompts, dtype=np.float16)  # dm/deta
        self._noise_share = np.zeros(num_prompts, dtype=np.float16)  # dV/dq, in steps
        self._last_seen = np.full(num_prompts, _NEVER, dtype=np.int32)

        # What has moved all prompts: m = anchor + shift_k + (drift_share - last_seen) * slope_k + gain_share * gained.
        self.step = 0
        self._shift = np.zeros(num_categories)
        self._slope = np.zeros(num_categories)
        self._gained = 0.0
        self._noise_sum = 0.0

        # The learned parameters and the information about them.
        self._drift = np.zeros(2)  # d, eta
        self._drift_information = self._drift_prior
        self._category_drift = np.zeros(num_categories)
        self._category_information = np.zeros(num_categories)
        self._noise = self.settings.noise
        self._noise_information = 0.0
        self._prior_mean = 0.0
        self._prior_mean_information = 0.0
        self._prior_offset = np.zeros(num_categories)
        self._prior_offset_information = np.zeros(num_categories)
        self._prior_variance = self.settings.prior_variance
        self._prior_variance_information = 0.0
        self._sharpening = 1.0

    @property
    def _drift_prior(self) -> np.ndarray:
        return np.diag([1.0 / self.settings.drift_deviation**2, 1.0 / self.settings.gain_deviation**2])

    @property
    def last_seen_step(self) -> np.ndarray:
        """(P,) int32, read only: `step` when last observed; -1 never."""
        view = self._last_seen.view()
        view.flags.writeable = False
        return view

    # Beliefs

    def _belief(self, indices: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """m and V now, float32."""
        category = self._category[indices]
        last_seen = self._last_seen[indices]
        mean = self._anchor[indices] + self._shift.astype(np.float32)[category]
        mean += (self._drift_share[indices] - last_seen) * self._slope.astype(np.float32)[category]
        mean += self._gain_share[indices] * np.float32(self._gained)
        variance = self._variance[indices] + np.float32(self._noise_sum)
        unseen = last_seen == _NEVER
        if unseen.any():
            prior = (self._prior_mean + self._prior_offset).astype(np.float32)
            mean = np.where(unseen, prior[category], mean)
            variance = np.where(unseen, np.float32(self._prior_variance), variance)
        return mean, np.clip(variance, self.settings.min_variance, self.settings.max_variance)

    def predicted_pass_rates(self, indices: np.ndarray) -> np.ndarray:
        """E[p] of the next response to each prompt, (K,) float64 in (0, 1); for a prompt never seen, the prior's."""
        mean, variance = self._belief(indices)
        expected, _ = expected_utility(mean, variance, lambda p, n: p, self.num_responses)
        return expected.astype(np.float64).clip(1e-7, 1.0 - 1e-7)

    def utility(self, name: str) -> np.ndarray:
        """E[u] of each prompt, (P,) float32: neither sharpened nor floored."""
        return self._utilities(name, slice(0, self.num_prompts))[0]

    def _utilities(self, name: str, indices: slice) -> tuple[np.ndarray, np.ndarray]:
        utility = utility_function(name)
        if indices.step not in (None, 1):
            return expected_utility(*self._belief(indices), utility, self.num_responses)
        blocks = [
            expected_utility(*self._belief(slice(start, start + _BLOCK)), utility, self.num_responses)
            for start in range(0, self.num_prompts, _BLOCK)
        ]
        return np.concatenate([first for first, _ in blocks]), np.concatenate([second for _, second in blocks])

    def weights(self, utility: str = "learnability") -> np.ndarray:
        """What to draw by: (E[u] + floor)^gamma over its largest, (P,) float32 in (0, 1], read only."""
        first, second = self._utilities(utility, slice(0, self.num_prompts))
        stride = max(1, self.num_prompts // _SHARPENING_SAMPLE)
        exponent = sharpening(first[::stride], second[::stride], self.settings.max_sharpening)
        self._sharpening = exponent
        first += np.float32(self.settings.score_floor)
        first /= first.max()
        weights: np.ndarray = np.power(first, np.float32(exponent), out=first)
        weights.flags.writeable = False
        return weights

    # Probes

    def probes(self, num_probes: int, exclude: np.ndarray) -> np.ndarray:
        """The prompts not seen for longest, (K,) int64, K <= num_probes; none of `exclude`.

        Prompts equally stale are taken in an order that has nothing to do with their place in the data set.
        """
        num_probes = min(num_probes, self.num_prompts - len(np.unique(exclude)))
        if num_probes <= 0:
            return np.empty(0, dtype=np.int64)
        last_seen = self._last_seen.copy()
        last_seen[exclude] = np.iinfo(np.int32).max
        threshold = np.partition(last_seen, num_probes - 1)[num_probes - 1]
        staler = np.flatnonzero(last_seen < threshold)
        tied = np.flatnonzero(last_seen == threshold)
        # A multiplicative hash of the index: any fixed order unrelated to the data's would do.
        order = tied.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        needed = num_probes - len(staler)
        chosen = tied[np.argpartition(order, needed - 1)[:needed]]
        return np.concatenate([staler, np.sort(chosen)])

    # Learning

    def observe(self, indices: np.ndarray, num_right: np.ndarray, num_responses: np.ndarray) -> None:
        """Take in the step's groups and probes, in one call; several groups of one prompt are pooled.

        Args:
            indices: (K,) prompts; num_right: (K,) successes, fractions allowed, NaN = unknown, skipped;
            num_responses: (K,) responses behind them, or one number for all.
        """
        indices, right, total = _pool(np.asarray(indices), num_right, num_responses)
        if len(indices) == 0:
            self._decay()
            return
        seen = self._last_seen[indices] != _NEVER
        self._learn_prior(indices[~seen], right[~seen], total[~seen])
        mean, variance = (array.astype(np.float64) for array in self._belief(indices))
        new_mean, new_variance = posterior(mean, variance, right, total)
        new_variance = np.maximum(new_variance, self.settings.min_variance)
        kept = new_variance / variance

        elapsed = self.step - self._last_seen[indices].astype(np.float64)
        drift_share = np.where(seen, self._drift_share[indices] + elapsed, 0.0)
        gain_share = np.where(seen, self._gain_share[indices], 0.0).astype(np.float64)
        noise_share = np.where(seen, self._noise_share[indices] + elapsed, 0.0)
        gradient = (new_mean - mean) / variance
        information = np.maximum(0.0, (variance - new_variance) / variance**2)
        category = self._category[indices]
        self._learn_noise(gradient, information, (variance - new_variance) / variance**2, noise_share)
        drift_change, gain_change = self._learn_drift(category, drift_share, gain_share, gradient, information)
        drift_share *= kept
        gain_share *= kept
        new_mean += drift_share * drift_change[category] + gain_share * gain_change
        self._store(indices, new_mean, new_variance, drift_share, gain_share, noise_share * kept**2)

    def _store(
        self,
        indices: np.ndarray,
        mean: np.ndarray,
        variance: np.ndarray,
        drift_share: np.ndarray,
        gain_share: np.ndarray,
        noise_share: np.ndarray,
    ) -> None:
        """The belief of observed prompts, now, relative to the sums."""
        category = self._category[indices]
        self._last_seen[indices] = self.step
        self._drift_share[indices] = drift_share
        self._gain_share[indices] = gain_share
        self._noise_share[indices] = noise_share
        # As rounded, or the mean would be off by the rounding times the sums.
        drift_share, gain_share = (a[indices].astype(np.float64) for a in (self._drift_share, self._gain_share))
        self._variance[indices] = variance - self._noise_sum
        moved = self._shift[category] + (drift_share - self.step) * self._slope[category] + gain_share * self._gained
        self._anchor[indices] = mean.clip(-_MEAN_LIMIT, _MEAN_LIMIT) - moved

    def _learn_prior(self, indices: np.ndarray, right: np.ndarray, total: np.ndarray) -> None:
        """mu_k and v0 from first observations: prompts never seen are drawn alike within their category."""
        settings = self.settings
        self._prior_mean_information *= settings.drift_memory
        self._prior_offset_information *= settings.drift_memory
        self._prior_variance_information *= settings.drift_memory
        if len(indices) == 0:
            return
        category = self._category[indices]
        num_passes = 1 if self._prior_mean_information > 0.0 else 15
        for this_pass in range(num_passes):
            mean, variance = (array.astype(np.float64) for array in self._belief(indices))
            new_mean, new_variance = posterior(mean, variance, right, total)
            gradient = (new_mean - mean) / variance
            curvature = (variance - new_variance) / variance**2
            information = np.maximum(0.0, curvature)
            by_category = np.bincount(category, information, minlength=len(self._prior_offset))
            mean_information = self._prior_mean_information + information.sum() + 0.1
            change = gradient.sum() / mean_information
            self._prior_mean += change
            offset_information = self._prior_offset_information + by_category
            pull = settings.prior_category_strength / self._prior_variance
            gradients = np.bincount(category, gradient - information * change, minlength=len(self._prior_offset))
            self._prior_offset += (gradients - pull * self._prior_offset) / (offset_information + pull)
            variance_information = self._prior_variance_information + (information**2).sum() / 2.0 + 0.1
            change = ((gradient**2 - curvature) / 2.0).sum() / variance_information / self._prior_variance
            self._prior_variance = float(
                np.clip(self._prior_variance * np.exp(np.clip(change, -0.5, 0.5)), 0.1, settings.max_variance)
            )
            if this_pass == num_passes - 1:
                self._prior_mean_information = mean_information
                self._prior_offset_information = offset_information
                self._prior_variance_information = variance_information

    def _learn_drift(
        self,
        category: np.ndarray,
        drift_share: np.ndarray,
        gain_share: np.ndarray,
        gradient: np.ndarray,
        information: np.ndarray,
    ) -> tuple[np.ndarray, float]:
        """d, eta and delta_k, and with them every prompt seen before. Returns: the changes of d + delta_k and eta."""
        settings = self.settings
        shares = np.stack([drift_share, gain_share])
        self._drift_information = (
            settings.drift_memory * self._drift_information
            + (1.0 - settings.drift_memory) * self._drift_prior
            + (shares * information) @ shares.T
        )
        change = np.linalg.solve(self._drift_information, shares @ gradient)
        self._drift += change
        num_categories = len(self._category_drift)
        self._category_information = settings.drift_memory * self._category_information + np.bincount(
            category, information * drift_share**2, minlength=num_categories
        )
        left = drift_share * (gradient - information * (change @ shares))
        pull = 1.0 / settings.category_deviation**2
        decay = 1.0 - settings.drift_memory
        gradients = np.bincount(category, left, minlength=num_categories) - decay * pull * self._category_drift
        category_change = gradients / (self._category_information + pull)
        self._category_drift += category_change
        total = change[0] + category_change
        self._slope += total
        self._shift += self.step * total
        self._gained += float(change[1])
        return total, float(change[1])

    def _learn_noise(
        self, gradient: np.ndarray, information: np.ndarray, curvature: np.ndarray, noise_share: np.ndarray
    ) -> None:
        """q, on its logarithm; the beliefs keep the variance that they have."""
        share = noise_share * self._noise
        self._noise_information = (
            self.settings.noise_memory * self._noise_information + 0.2 + ((information * share) ** 2).sum() / 2.0
        )
        change = ((gradient**2 - curvature) * share).sum() / 2.0 / self._noise_information
        self._noise = float(np.clip(self._noise * np.exp(np.clip(change, -0.1, 0.1)), 1e-4, 0.05))

    def _decay(self) -> None:
        nothing = np.empty(0)
        self._learn_prior(np.empty(0, dtype=np.int64), nothing, nothing)
        self._learn_noise(nothing, nothing, nothing, nothing)
        self._learn_drift(np.empty(0, dtype=np.int64), nothing, nothing, nothing, nothing)

    def predict_step(self, trained_indices: np.ndarray) -> None:
        """End the step: every prompt drifts, those trained on gain. Args: trained_indices: (B,), repeats count."""
        indices, counts = np.unique(np.asarray(trained_indices, dtype=np.int64), return_counts=True)
        seen = self._last_seen[indices] != _NEVER  # a batch whose accuracies are all unknown leaves its prompts unseen
        indices, counts = indices[seen], counts[seen]
        if len(indices):
            mean, variance = (array.astype(np.float64) for array in self._belief(indices))
            pass_rate = logistic(mean)
            gain = counts * 4.0 * pass_rate * (1.0 - pass_rate) / np.sqrt(1.0 + 0.3 * variance)
            before = self._gain_share[indices].astype(np.float64)
            self._gain_share[indices] = before + gain
            added = self._gain_share[indices] - before
            # m must grow by gain * eta alone: what eta changed by in earlier steps has not moved this share.
            self._anchor[indices] += (gain * np.clip(self._drift[1], -0.3, 0.4) - added * self._gained).astype(np.float32)
        moved = self._drift[0] + self._category_drift
        self._shift += moved
        self._prior_offset += self._category_drift
        self._prior_mean += self._drift[0]
        self._noise_sum += self._noise
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """The learned parameters, as `curriculum/estimator_*`."""
        return {
            "curriculum/estimator_drift": float(self._drift[0]),
            "curriculum/estimator_training_gain": float(self._drift[1]),
            "curriculum/estimator_process_noise": self._noise,
            "curriculum/estimator_prior_mean": self._prior_mean,
            "curriculum/estimator_prior_variance": self._prior_variance,
            "curriculum/estimator_sharpening": self._sharpening,
        }

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """`arrays`, of length P, C or 2, and `numbers`: all that a resume needs, exactly."""
        return {
            "arrays": {name: getattr(self, f"_{name}").copy() for name in _PROMPT_ARRAYS + _SHARED_ARRAYS},
            "numbers": {name: getattr(self, name if name == "step" else f"_{name}") for name in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any], positions: np.ndarray | None = None) -> None:
        """Go on from a saved state.

        Args: positions: (P,) the saved position of each of our prompts; None: the same order. A category's number
            must mean what it meant when saved.
        """
        for name in _PROMPT_ARRAYS:
            saved = state["arrays"][name]
            taken = saved.copy() if positions is None else saved[positions]
            assert taken.shape == (self.num_prompts,), (name, taken.shape, self.num_prompts)
            setattr(self, f"_{name}", taken.astype(getattr(self, f"_{name}").dtype))
        for name in _SHARED_ARRAYS:
            assert state["arrays"][name].shape == getattr(self, f"_{name}").shape, name
            setattr(self, f"_{name}", state["arrays"][name].copy())
        for name in _NUMBERS:
            setattr(self, name if name == "step" else f"_{name}", state["numbers"][name])


_PROMPT_ARRAYS = ("anchor", "variance", "drift_share", "gain_share", "noise_share", "last_seen")
_SHARED_ARRAYS = (
    "shift",
    "slope",
    "drift",
    "drift_information",
    "category_drift",
    "category_information",
    "prior_offset",
    "prior_offset_information",
)
_NUMBERS = (
    "step",
    "gained",
    "noise_sum",
    "noise",
    "noise_information",
    "prior_mean",
    "prior_mean_information",
    "prior_variance",
    "prior_variance_information",
    "sharpening",
)


def _pool(
    indices: np.ndarray, num_right: np.ndarray, num_responses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct prompts with their sums; what is unknown or empty left out."""
    right = np.asarray(num_right, dtype=np.float64)
    total = np.broadcast_to(np.asarray(num_responses, dtype=np.float64), right.shape)
    known = ~np.isnan(right) & (total > 0.0)
    distinct, inverse = np.unique(indices[known].astype(np.int64), return_inverse=True)
    size = len(distinct)
    return distinct, np.bincount(inverse, right[known], size), np.bincount(inverse, total[known], size)


_quadrature_nodes, _quadrature_weights = np.polynomial.hermite_e.hermegauss(15)
_NEWTON_STEPS = 12


def posterior(
    mean: np.ndarray, variance: np.ndarray, num_right: np.ndarray, num_responses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the logit z ~ N(mean, variance) after `num_right` of `num_responses` were right.

    Gauss-Hermite quadrature around the posterior's mode, so it holds for any number of responses.

    Args: (K,) float64 each. Returns: two (K,) float64.
    """
    mode = mean.copy()
    for _ in range(_NEWTON_STEPS):  # the log posterior is concave
        pass_rate = logistic(mode)
        slope = num_right - num_responses * pass_rate - (mode - mean) / variance
        curvature = num_responses * pass_rate * (1.0 - pass_rate) + 1.0 / variance
        mode += np.clip(slope / curvature, -1.5, 1.5)
    pass_rate = logistic(mode)
    deviation = 1.0 / np.sqrt(num_responses * pass_rate * (1.0 - pass_rate) + 1.0 / variance)
    z = mode[:, None] + deviation[:, None] * _quadrature_nodes
    logarithm = (
        num_right[:, None] * z
        - num_responses[:, None] * np.logaddexp(0.0, z)
        - (z - mean[:, None]) ** 2 / (2.0 * variance[:, None])
        + _quadrature_nodes**2 / 2.0
    )
    omega = np.exp(logarithm - logarithm.max(axis=1, keepdims=True)) * _quadrature_weights
    omega /= omega.sum(axis=1, keepdims=True)
    new_mean = (omega * z).sum(axis=1)
    new_variance = (omega * (z - new_mean[:, None]) ** 2).sum(axis=1)
    return new_mean, new_variance
