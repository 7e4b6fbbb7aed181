"""What all prompts share: the prior of those never seen, and how pass rates move as the policy trains. C = categories.

Every parameter is learned in the same way. A response to a prompt with belief N(m, V), which it turns into N(m', V'),
gives g = (m' - m) / V, the gradient of its log-likelihood in m, and j = (V - V') / V^2, minus the second derivative.
A parameter that has moved m by s units a unit takes a step of (sum of s g) / (decayed sum of s^2 j).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmr1_ds.curriculum.posterior import posterior


@dataclass(frozen=True)
class FilterSettings:
    """Constants of the filter; variances and deviations are of logits, rates are a step."""

    prior_variance: float = 4.0  # v0 before the first observation
    prior_category_variance: float = 0.2  # of mu_k around their mean, before the first observation
    min_variance: float = 0.01
    max_variance: float = 16.0
    drift_deviation: float = 0.02  # prior standard deviation of d
    gain_deviation: float = 0.1  # of eta
    memory: float = 0.97  # what earlier steps' information on the drift and the prior still counts, a step
    category_deviation: float = 0.004  # of delta_k
    noise: float = 0.003  # q before the first observation
    noise_memory: float = 0.99
    jump_rate: float = 0.001  # chance of a jump before the first observation
    jump_memory: float = 0.98
    score_floor: float = 0.01  # share of the utility's peak that every prompt keeps, before sharpening
    max_sharpening: float = 2.0


_FIRST_PASSES = 15  # over the first observations, before which nothing is known of the prior


class Prior:
    """N(mean + offset_k, variance): the belief about a prompt of category k that was never seen.

    It learns from first observations. They are a fair sample whatever draws them, since prompts never seen are all
    drawn alike within their category.
    """

    def __init__(self, num_categories: int, settings: FilterSettings) -> None:
        self.settings = settings
        self.mean = 0.0
        self.mean_information = 0.0
        self.offset = np.zeros(num_categories)
        self.offset_information = np.zeros(num_categories)
        self.offset_variance = settings.prior_category_variance
        self.variance = settings.prior_variance
        self.variance_information = 0.0

    def learn(
        self, category: np.ndarray, num_right: np.ndarray, num_responses: np.ndarray, effect: np.ndarray | float = 0.0
    ) -> None:
        """Take in a step's first observations of prompts; call it also when there are none.

        Args: (K,) each; effect: by how much features raise the prompt's mean.
        """
        self.mean_information *= self.settings.memory
        self.variance_information *= self.settings.memory
        if len(category) == 0:
            return
        is_first = self.mean_information == 0.0
        for _ in range(_FIRST_PASSES if is_first else 1):
            information, by_category, of_variance = self._improve(
                category, num_right, num_responses, effect, is_first
            )
            # How far categories lie apart (expectation-maximisation), as if two more lay as far as assumed.
            squares = self.offset**2 + 1.0 / (self.offset_information + by_category + 1.0 / self.offset_variance)
            assumed = 2.0 * self.settings.prior_category_variance
            self.offset_variance = float((squares.sum() + assumed) / (len(squares) + 2.0))
        self.mean_information += information
        self.offset_information += by_category
        self.variance_information += of_variance

    def _improve(
        self,
        category: np.ndarray,
        num_right: np.ndarray,
        num_responses: np.ndarray,
        effect: np.ndarray | float,
        is_first: bool,
    ) -> tuple[float, np.ndarray, float]:
        """Take one step in all parameters. Returns: the information on each."""
        settings, num_categories = self.settings, len(self.offset)
        mean = self.mean + self.offset[category] + effect
        variance = np.full(len(category), self.variance)
        new_mean, new_variance, _ = posterior(mean, variance, num_right, num_responses)
        gradient = (new_mean - mean) / self.variance
        curvature = (self.variance - new_variance) / self.variance**2
        information = np.maximum(0.0, curvature)

        change = gradient.sum() / (self.mean_information + information.sum() + 0.1)
        self.mean = float(self.mean + change)
        by_category = np.bincount(category, information, num_categories)
        pull = 1.0 / self.offset_variance
        left = np.bincount(category, gradient - information * change, num_categories).astype(np.float64)
        if is_first:  # later the offsets already have this in them, as they have the first observations
            left -= pull * self.offset
        self.offset = self.offset + left / (self.offset_information + by_category + pull)
        of_variance = (information**2).sum() / 2.0
        change = (gradient**2 - curvature).sum() / 2.0 / (self.variance_information + of_variance + 0.1) / self.variance
        self.variance = float(np.clip(self.variance * np.exp(np.clip(change, -0.5, 0.5)), 0.1, settings.max_variance))
        return float(information.sum()), by_category, float(of_variance)


class DriftLaw:
    """d, eta, delta_k, q and the rate of jumps: how a prompt's logit moves from one step to the next."""

    def __init__(self, num_categories: int, settings: FilterSettings) -> None:
        self.settings = settings
        self.drift = np.zeros(2)  # d, eta
        self.drift_information = self._drift_prior.copy()
        self.category_drift = np.zeros(num_categories)
        self.category_information = np.zeros(num_categories)
        self.noise = settings.noise
        self.noise_information = 0.0
        self.jumps = 1.0
        self.jump_exposure = 1.0 / settings.jump_rate

    @property
    def _drift_prior(self) -> np.ndarray:
        """Precisions of d and eta, (2, 2)."""
        return np.diag([self.settings.drift_deviation**-2, self.settings.gain_deviation**-2])

    @property
    def gain(self) -> float:
        """What one training group adds to the logit of a prompt at p = 1/2, [-0.3, 0.4]."""
        return float(np.clip(self.drift[1], -0.3, 0.4))

    @property
    def jump_rate(self) -> float:
        """Chance that a prompt forgets its past, a step."""
        return float(np.clip(self.jumps / self.jump_exposure, 1e-5, 0.02))

    def learn_jumps(self, probability: np.ndarray, elapsed: np.ndarray) -> None:
        """Learn the rate of jumps.

        Args: (K,) of prompts seen before: the chance that each jumped since, and the steps since.
        """
        memory, rate = self.settings.jump_memory, self.settings.jump_rate
        self.jumps = float(memory * self.jumps + (1.0 - memory) + probability.sum())
        self.jump_exposure = float(memory * self.jump_exposure + (1.0 - memory) / rate + elapsed.sum())

    def learn_noise(self, gradient: np.ndarray, curvature: np.ndarray, share: np.ndarray, weight: np.ndarray) -> None:
        """Learn q, on its logarithm; beliefs keep the variance that they have.

        Args: (K,) each: g, j, the steps of noise in V, and how much each observation counts.
        """
        share = share * self.noise
        information = (weight * (np.maximum(0.0, curvature) * share) ** 2).sum() / 2.0
        self.noise_information = float(self.settings.noise_memory * self.noise_information + 0.2 + information)
        change = (weight * (gradient**2 - curvature) * share).sum() / 2.0 / self.noise_information
        self.noise = float(np.clip(self.noise * np.exp(np.clip(change, -0.1, 0.1)), 1e-4, 0.05))

    def learn_drift(
        self, gradient: np.ndarray, information: np.ndarray, category: np.ndarray, steps: np.ndarray, gained: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Learn d, eta and delta_k.

        Args: (K,) each: g and j, both weighted; the category; dm/dd, in steps; dm/deta.
        Returns: the changes of d + delta_k, (C,), and of eta.
        """
        memory, num_categories = self.settings.memory, len(self.category_drift)
        # Sums and the inverse written out: the bits of a linear-algebra library depend on its threads.
        crossed = (information * steps * gained).sum()
        self.drift_information = (
            memory * self.drift_information
            + (1.0 - memory) * self._drift_prior
            + np.array([[(information * steps**2).sum(), crossed], [crossed, (information * gained**2).sum()]])
        )
        (a, b), (_, c) = self.drift_information
        first, second = (gradient * steps).sum(), (gradient * gained).sum()
        determinant = a * c - b * b
        change = np.array([c * first - b * second, a * second - b * first]) / determinant
        self.drift = self.drift + change

        self.category_information = memory * self.category_information + np.bincount(
            category, information * steps**2, num_categories
        )
        left = steps * (gradient - information * (steps * change[0] + gained * change[1]))
        pull = self.settings.category_deviation**-2
        gradients = np.bincount(category, left, num_categories) - (1.0 - memory) * pull * self.category_drift
        category_change = gradients / (self.category_information + pull)
        self.category_drift = self.category_drift + category_change
        return change[0] + category_change, float(change[1])
