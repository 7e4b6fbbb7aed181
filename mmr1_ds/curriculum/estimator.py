"""The online estimator: a filter on the logit of each prompt's pass rate, learned from the training's own responses.

Every prompt's logit z has a Gaussian belief N(m, V). A group of N responses with c right updates it through the
binomial likelihood. Between its visits a prompt moves with the policy:

    z <- z + d + delta_k + noise of variance q         every prompt, every step; k is its category
    z <- z + eta u, u = 4 p (1 - p) shrunk by V        a prompt that was trained on
    z ~ the prior                                      with a small chance a step: prompts revive, or die, at once

d, eta, delta_k, q, the rate of such jumps and the prior of prompts never seen are learned from the same observations
(`drift_law`). When a drift parameter changes, every prompt moves by the share of it that has reached the prompt since
it was last seen; so prompts never visited move too.

Nothing is done to a prompt unless it is observed: it stores its belief relative to sums over steps (P prompts,
B observed, C categories), so a step costs O(B + C), and `weights` O(P).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmr1_ds.curriculum.drift_law import DriftLaw, FilterSettings, Prior
from mmr1_ds.curriculum.feature_prior import FeaturePrior
from mmr1_ds.curriculum.metric_names import FEATURE_EXPLAINED_FRACTION, FEATURE_WEIGHT
from mmr1_ds.curriculum.posterior import pooled, posterior
from mmr1_ds.curriculum.utilities import (
    expected_utility,
    logistic,
    sharpening,
    utility_function,
    utility_moments,
    utility_peak,
)

__all__ = ["EARLY_PROBING", "PROBE_RESPONSES", "FilterSettings", "LogitFilter", "probe_budget"]

PROBE_RESPONSES = 4  # to one prompt
EARLY_PROBING = 1.75  # times the mean rate, while little is known

_NEVER = -1
_BLOCK = 1 << 15  # prompts evaluated at a time, so that intermediate results stay in cache
_SHARPENING_SAMPLE = 1 << 14  # prompts that the exponent is found from
_TIED_SAMPLE = 64  # prompts equally stale that a probe is chosen from
# Of a belief's deviation, by which utilities are drawn: the whole (Thompson) draws many prompts that turn out dead,
# none at all starves what was once believed dead; in the laboratory a half avoids both.
_SAMPLED_SHARE = np.float32(0.5)
_MEAN_LIMIT = 15.0  # logits beyond are beyond any pass rate that a run could measure


def probe_budget(
    step: int, num_steps: int, num_prompts: int, batch_size: int, num_responses: int, fraction: float
) -> float:
    """Rollouts that probes may have taken by the end of `step` (from 1): early ones teach most.

    By the end of the run they are `fraction` of the training rollouts. For a quarter of it, or until the batches could
    have held every prompt twice if that is sooner, they come at 1.75 times that rate, then at what is left.
    """
    early_steps = min(num_steps / 4.0, 2.0 * num_prompts / batch_size)
    late_rate = (num_steps - EARLY_PROBING * early_steps) / (num_steps - early_steps)
    spent = EARLY_PROBING * min(step, early_steps) + late_rate * max(0.0, step - early_steps)
    return fraction * spent * batch_size * num_responses


class LogitFilter:
    """Beliefs about the pass rates of P prompts. These are the calls of a step:

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
        features: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            categories: (P,) ints from 0, at most 65,535; None: all prompts in one.
            num_responses: N of a training group.
            features: (P, D) int8 that the prior learns from besides the category; see `feature_prior`.
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

        # Of each prompt, 20 bytes with its category. The shares are as of its last observation.
        self._anchor = np.zeros(num_prompts, dtype=np.float32)  # m less what has moved it since step 0
        self._variance = np.zeros(num_prompts, dtype=np.float32)  # V less all process noise since step 0
        self._drift_share = np.zeros(num_prompts, dtype=np.float16)  # dm/dd, in steps
        self._gain_share = np.zeros(num_prompts, dtype=np.float16)  # dm/deta
        self._noise_share = np.zeros(num_prompts, dtype=np.float16)  # dV/dq, in steps
        self._last_seen = np.full(num_prompts, _NEVER, dtype=np.int32)

        # With features, theirs and 2 bytes more: dm/d(prior mean).
        self._features = None if features is None else FeaturePrior(features)
        self._feature_share = np.ones(num_prompts if features is not None else 0, dtype=np.float16)

        # What has moved all prompts: m = anchor + shift_k + (drift_share - last_seen) * slope_k + gain_share * gained
        # + feature_share * x . w.
        self.step = 0
        self._shift = np.zeros(num_categories)
        self._slope = np.zeros(num_categories)
        self._gained = 0.0
        self._noise_sum = 0.0

        self._law = DriftLaw(num_categories, self.settings)
        self._prior = Prior(num_categories, self.settings)
        self._sharpening = 1.0
        # Of p(1 - p) of the prompts observed, decayed sums: as expected before, and as found.
        self._expected_variance = 0.0
        self._found_variance = 0.0

    @property
    def last_seen_step(self) -> np.ndarray:
        """(P,) int32, read only: `step` when last observed; -1 never."""
        view = self._last_seen.view()
        view.flags.writeable = False
        return view

    @property
    def knows_features(self) -> bool:
        """Whether there are features that tell any prompts apart."""
        return self._features is not None and bool(self._features.features.any())

    def take_features(self, features: np.ndarray) -> None:
        """Put features in the place of those without any spread. Beliefs about prompts that were seen do not move.

        Args: features: (P, D) int8, of as many as those.
        """
        assert self._features is not None and not self.knows_features, "features replace such as say nothing"
        assert features.shape == self._features.features.shape, (features.shape, self._features.features.shape)
        self._features = FeaturePrior(features)

    def unseen_steps(self) -> np.ndarray:
        """Steps since each prompt was last observed, (P,) int32; for those never seen more than any run has."""
        unseen_steps = self.step - self._last_seen
        unseen_steps[self._last_seen == _NEVER] = np.iinfo(np.int32).max
        return unseen_steps

    # Beliefs

    def belief(self, indices: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """The means m and variances V of the logits now, float32."""
        category, last_seen = self._category[indices], self._last_seen[indices]
        # In place, and "clip" though no category is out of bounds: it spares a buffer, and both most of the time.
        mean = np.take(self._shift.astype(np.float32), category, mode="clip")
        mean += self._anchor[indices]
        share = self._drift_share[indices].astype(np.float32)
        share -= last_seen.astype(np.float32)
        share *= np.take(self._slope.astype(np.float32), category, mode="clip")
        mean += share
        share[...] = self._gain_share[indices]
        share *= np.float32(self._gained)
        mean += share
        variance = self._variance[indices] + np.float32(self._noise_sum)
        unseen = last_seen == _NEVER
        if unseen.any():
            prior = (self._prior.mean + self._prior.offset).astype(np.float32)
            mean = np.where(unseen, prior[category], mean)
            variance = np.where(unseen, np.float32(self._prior.variance), variance)
        if self._features is not None:
            mean += self._feature_share[indices].astype(np.float32) * self._features.effect(indices)
        return mean, np.clip(variance, self.settings.min_variance, self.settings.max_variance, out=variance)

    def predicted_pass_rates(self, indices: np.ndarray) -> np.ndarray:
        """E[p] of the next response to each prompt, (K,) float64 in (0, 1); for a prompt never seen, the prior's."""
        expected = np.empty(len(indices))
        for start in range(0, len(indices), _BLOCK):
            mean, variance = self.belief(indices[start : start + _BLOCK])
            expected[start : start + _BLOCK] = expected_utility(mean, variance, lambda p, n: p, self.num_responses)
        return np.clip(expected, 1e-7, 1.0 - 1e-7, out=expected)

    def utility(self, name: str) -> np.ndarray:
        """E[u] of each prompt, (P,) float32: neither sharpened nor floored. Raises: UserError for an unknown name."""
        function = utility_function(name)
        expected = np.empty(self.num_prompts, dtype=np.float32)
        # Prompts that nothing tells apart have one expectation: all that were never seen, most of a large data set.
        shared_mean, shared_variance = self._beliefs_unseen()
        shared = expected_utility(shared_mean, shared_variance, function, self.num_responses)
        for start in range(0, self.num_prompts, _BLOCK):
            block = slice(start, start + _BLOCK)
            (mean, variance), category = self.belief(block), self._category[block]
            own = mean != np.take(shared_mean, category, mode="clip")
            own |= variance != shared_variance[0]  # of every category the same
            if own.all():
                expected[block] = expected_utility(mean, variance, function, self.num_responses)
                continue
            expected[block] = np.take(shared, category, mode="clip")
            if own.any():
                expected[block][own] = expected_utility(mean[own], variance[own], function, self.num_responses)
        return expected

    def sampled_utility(self, name: str, noise: np.ndarray) -> np.ndarray:
        """A draw of each prompt's u from its belief, at half its deviation, (P,) float32.

        Args: noise: (P,) float32, standard normal.
        """
        function = utility_function(name)
        sampled = np.empty(self.num_prompts, dtype=np.float32)
        for start in range(0, self.num_prompts, _BLOCK):
            block = slice(start, start + _BLOCK)
            mean, variance = self.belief(block)
            deviation = np.sqrt(variance, out=variance)
            deviation *= _SAMPLED_SHARE
            deviation *= noise[block]
            mean += deviation
            sampled[block] = function(logistic(mean), self.num_responses)
        return sampled

    def _beliefs_unseen(self) -> tuple[np.ndarray, np.ndarray]:
        """The belief about a prompt of each category that was never seen, as `belief` gives it, (C,) float32 each."""
        mean = (self._prior.mean + self._prior.offset).astype(np.float32)
        variance = np.full(len(mean), self._prior.variance, dtype=np.float32)
        return mean, np.clip(variance, self.settings.min_variance, self.settings.max_variance)

    def weights(self, utility: str = "learnability") -> np.ndarray:
        """Weights to draw by: (floor + (1 - floor) E[u] / peak)^gamma over its largest, (P,) float32 in (0, 1].

        Read only. peak is the largest u of any pass rate, so that a floor of 1 draws uniformly whatever the utility.

        Raises: UserError for an unknown utility.
        """
        first = self.utility(utility)
        sample = slice(None, None, max(1, self.num_prompts // _SHARPENING_SAMPLE))
        sampled = utility_moments(*self.belief(sample), utility_function(utility), self.num_responses)
        self._sharpening = sharpening(*sampled, self._calibration, self.settings.max_sharpening)
        floor = self.settings.score_floor
        first *= np.float32((1.0 - floor) / utility_peak(utility, self.num_responses))
        first += np.float32(floor)
        first /= first.max()
        weights: np.ndarray = np.power(first, np.float32(self._sharpening), out=first)
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
        last_seen[exclude] = self.step + 1
        # By counting, a few milliseconds for a million prompts: a partition takes 100, nearly all being equal.
        num_as_stale = np.cumsum(np.bincount(last_seen - _NEVER))
        threshold = int(np.searchsorted(num_as_stale, num_probes)) + _NEVER
        staler = np.flatnonzero(last_seen < threshold)
        tied = np.flatnonzero(last_seen == threshold)
        needed = num_probes - len(staler)
        stride = max(1, len(tied) // (_TIED_SAMPLE * needed))  # of millions never seen, a part is enough to choose from
        tied = tied[self.step % stride :: stride]
        # A multiplicative hash of the index: any fixed order unrelated to the data's would do.
        order = tied.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        chosen = tied[np.argpartition(order, needed - 1)[:needed]]
        return np.concatenate([staler, np.sort(chosen)])

    # Learning

    def observe(self, indices: np.ndarray, num_right: np.ndarray, num_responses: np.ndarray) -> None:
        """Take in the step's groups and probes, in one call; several groups of one prompt are pooled.

        Args:
            indices: (K,) prompts; num_right: (K,) successes, fractions allowed, NaN = unknown, skipped;
            num_responses: (K,) responses behind them, or one number for all.
        """
        indices, right, total = pooled(indices, num_right, num_responses)
        category = self._category[indices]
        seen = self._last_seen[indices] != _NEVER
        effect = self._feature_effect(indices)
        self._prior.learn(category[~seen], right[~seen], total[~seen], effect[~seen])

        self._calibrate(indices, right, total)
        mean, variance = (array.astype(np.float64) for array in self.belief(indices))
        new_mean, new_variance, evidence = posterior(mean, variance, right, total)
        kept = new_variance / variance
        gradient = (new_mean - mean) / variance
        curvature = (variance - new_variance) / variance**2

        # Or the prompt has jumped since: the belief is the mixture of both accounts, by how well each predicted.
        elapsed = np.where(seen, self.step - self._last_seen[indices], 0).astype(np.float64)
        fresh_mean = self._prior.mean + self._prior.offset[category] + effect
        fresh_variance = np.full(len(indices), self._prior.variance)
        jumped_mean, jumped_variance, jumped_evidence = posterior(fresh_mean, fresh_variance, right, total)
        chance = 1.0 - (1.0 - self._law.jump_rate) ** elapsed
        odds = np.log(np.maximum(chance, 1e-300)) - np.log1p(-chance) + jumped_evidence - evidence
        jumped = np.where(seen, logistic(odds), 0.0)
        stayed = 1.0 - jumped

        drift_share = np.where(seen, self._drift_share[indices] + elapsed, 0.0)
        gain_share = np.where(seen, self._gain_share[indices], 0.0).astype(np.float64)
        noise_share = np.where(seen, self._noise_share[indices] + elapsed, 0.0)
        self._law.learn_jumps(jumped[seen], elapsed[seen])
        self._law.learn_noise(gradient, curvature, noise_share, stayed)
        drift_change, gain_change = self._law.learn_drift(
            stayed * gradient, stayed * np.maximum(0.0, curvature), category, drift_share, gain_share
        )
        # m = anchor + shift + (share - last_seen) * slope: this moves every prompt by its present share of the change.
        self._slope += drift_change
        self._shift += self.step * drift_change
        self._gained += gain_change

        if self._features is not None:
            moved = drift_share * drift_change[category] + gain_share * gain_change
            left = stayed * (gradient - np.maximum(0.0, curvature) * moved)
            feature_share = self._feature_share[indices].astype(np.float64)
            self._features.learn(indices, left, stayed * curvature, feature_share)
            self._feature_share[indices] = stayed * kept * feature_share + jumped * jumped_variance / fresh_variance
        kept *= stayed
        drift_share, gain_share, noise_share = kept * drift_share, kept * gain_share, kept**2 * noise_share
        mixed_mean = stayed * new_mean + jumped * jumped_mean
        mixed_variance = stayed * (new_variance + (new_mean - mixed_mean) ** 2)
        mixed_variance += jumped * (jumped_variance + (jumped_mean - mixed_mean) ** 2)
        mixed_mean += drift_share * drift_change[category] + gain_share * gain_change
        if self._features is not None:
            mixed_mean += self._feature_share[indices] * (self._feature_effect(indices) - effect)
        self._store(indices, mixed_mean, mixed_variance, drift_share, gain_share, noise_share)

    def _calibrate(self, indices: np.ndarray, num_right: np.ndarray, num_responses: np.ndarray) -> None:
        """Compare p(1 - p) with its unbiased estimate from the responses, right * wrong / (n (n - 1))."""
        expected = expected_utility(*self.belief(indices), utility_function("learnability"), self.num_responses)
        pairs = np.maximum(num_responses - 1.0, 0.0)  # one response says nothing of a variance
        memory = self.settings.memory
        self._expected_variance = float(memory * self._expected_variance + (pairs * expected).sum())
        found = num_right * (num_responses - num_right) / num_responses
        self._found_variance = float(memory * self._found_variance + found[pairs > 0.0].sum())

    @property
    def _calibration(self) -> float:
        """How much of the expected p(1 - p) was found, [0.8, 1.25]."""
        if self._expected_variance == 0.0:
            return 1.0
        return float(np.clip(self._found_variance / self._expected_variance, 0.8, 1.25))

    def _store(
        self,
        indices: np.ndarray,
        mean: np.ndarray,
        variance: np.ndarray,
        drift_share: np.ndarray,
        gain_share: np.ndarray,
        noise_share: np.ndarray,
    ) -> None:
        """Store the beliefs of observed prompts as of now."""
        category = self._category[indices]
        self._last_seen[indices] = self.step
        self._drift_share[indices] = drift_share
        self._gain_share[indices] = gain_share
        self._noise_share[indices] = noise_share
        self._variance[indices] = np.maximum(variance, self.settings.min_variance) - self._noise_sum
        # The shares as they were rounded, or the mean would be off by the rounding times the sums.
        drift_share, gain_share = (array[indices].astype(np.float64) for array in (self._drift_share, self._gain_share))
        moved = self._shift[category] + (drift_share - self.step) * self._slope[category] + gain_share * self._gained
        if self._features is not None:
            moved += self._feature_share[indices] * self._feature_effect(indices)
        self._anchor[indices] = mean.clip(-_MEAN_LIMIT, _MEAN_LIMIT) - moved

    def _feature_effect(self, indices: np.ndarray) -> np.ndarray:
        """By how much the features raise the prior mean of prompts, (K,) float64; 0 without features."""
        if self._features is None:
            return np.zeros(len(indices))
        return self._features.effect(indices).astype(np.float64)

    def predict_step(self, trained_indices: np.ndarray) -> None:
        """End the step: every prompt drifts, those trained on gain. Args: trained_indices: (B,), repeats count."""
        indices, counts = np.unique(np.asarray(trained_indices, dtype=np.int64), return_counts=True)
        seen = self._last_seen[indices] != _NEVER  # a prompt whose accuracies are all unknown stays unseen
        indices, counts = indices[seen], counts[seen]
        mean, variance = (array.astype(np.float64) for array in self.belief(indices))
        pass_rate = logistic(mean)
        gain = counts * 4.0 * pass_rate * (1.0 - pass_rate) / np.sqrt(1.0 + 0.3 * variance)
        before = self._gain_share[indices].astype(np.float64)
        self._gain_share[indices] = before + gain
        added = self._gain_share[indices] - before
        # m must grow by gain * eta alone: what eta changed by in earlier steps has not moved this share.
        self._anchor[indices] += (gain * self._law.gain - added * self._gained).astype(np.float32)

        drift, category_drift = float(self._law.drift[0]), self._law.category_drift
        self._shift += drift + category_drift
        self._prior.mean += drift
        self._prior.offset = self._prior.offset + category_drift
        self._noise_sum += self._law.noise
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """The learned parameters, as `curriculum/estimator_*`; with features, how much those count and explain."""
        metrics = {
            "curriculum/estimator_drift": float(self._law.drift[0]),
            "curriculum/estimator_training_gain": self._law.gain,
            "curriculum/estimator_process_noise": self._law.noise,
            "curriculum/estimator_jump_rate": self._law.jump_rate,
            "curriculum/estimator_prior_mean": self._prior.mean,
            "curriculum/estimator_prior_variance": self._prior.variance,
            "curriculum/estimator_sharpening": self._sharpening,
        }
        if self._features is not None:
            stride = max(1, self.num_prompts // _SHARPENING_SAMPLE)
            explained = float(self._features.effect(slice(None, None, stride)).var(dtype=np.float64))
            metrics[FEATURE_WEIGHT] = self._features.trust
            metrics[FEATURE_EXPLAINED_FRACTION] = explained / (explained + self._prior.variance)
        return metrics

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """`arrays`, of length P, C or 2, and `numbers`: all that a resume needs, exactly; no copies."""
        return {
            "arrays": self.arrays(),
            "numbers": {key: getattr(owner, name) for key, owner, name in self._saved(_NUMBERS)},
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of `state_dict`, no copies."""
        return {key: getattr(owner, name) for key, owner, name in self._saved(_ARRAYS)}

    def load_state_dict(self, state: Mapping[str, Any], positions: np.ndarray | None = None) -> None:
        """Resume from a saved state.

        Args: positions: (P,) the saved position of each of our prompts; None: the same order. A category's number
            must mean what it meant when saved.
        """
        wanted, saved_features = self._features, state["arrays"].get(_FEATURES)
        if saved_features is not None:  # those of today may round otherwise
            self._features = FeaturePrior(saved_features)
            self._feature_share = np.ones(self.num_prompts, dtype=np.float16)
        else:
            self._features = None
        for key, owner, name in self._saved(_ARRAYS):
            saved, present = state["arrays"][key], getattr(owner, name)
            if key in _OF_PROMPTS and positions is not None:
                saved = saved[positions]
            assert saved.shape == present.shape, (key, saved.shape, present.shape)
            setattr(owner, name, saved.astype(present.dtype))
        for key, owner, name in self._saved(_NUMBERS):
            setattr(owner, name, state["numbers"][key])

        if wanted is None and self._features is not None:
            # The beliefs about the prompts that were seen have in them what the features said.
            effect = self._features.effect(slice(None))
            self._anchor += np.where(self._last_seen != _NEVER, self._feature_share * effect, 0.0)
        elif wanted is not None and self._features is None:
            self._feature_share = (self._last_seen == _NEVER).astype(np.float16)
        if wanted is None or self._features is None:
            self._features = wanted

    def _saved(self, keys: tuple[str, ...]) -> list[tuple[str, Any, str]]:
        """Each key with the object and the attribute that it stands for."""
        owners = {"law": self._law, "prior": self._prior, "features": self._features}
        found = []
        for key in keys:
            if self._features is None and key.startswith("feature"):
                continue
            owner, _, name = key.rpartition(".")
            found.append((key, owners[owner], name) if owner else (key, self, name if name == "step" else f"_{name}"))
        return found


_FEATURES = "features.features"
_OF_PROMPTS = (
    "anchor",
    "variance",
    "drift_share",
    "gain_share",
    "noise_share",
    "last_seen",
    "feature_share",
    _FEATURES,
)
_ARRAYS = (
    *_OF_PROMPTS,
    "shift",
    "slope",
    "law.drift",
    "law.drift_information",
    "law.category_drift",
    "law.category_information",
    "prior.offset",
    "prior.offset_information",
    "features.information",
    "features.evidence",
    "features.levels",
)
_NUMBERS = (
    "step",
    "gained",
    "noise_sum",
    "sharpening",
    "expected_variance",
    "found_variance",
    "law.noise",
    "law.noise_information",
    "law.jumps",
    "law.jump_exposure",
    "prior.mean",
    "prior.mean_information",
    "prior.offset_variance",
    "prior.variance",
    "prior.variance_information",
    "features.deviation_squared",
    "features.trust_information",
    "features.trust_evidence",
    "features.level_size",
)
