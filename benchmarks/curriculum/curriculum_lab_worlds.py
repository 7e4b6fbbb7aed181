"""What the laboratory samples from: simulated policies whose pass rates drift, and recorded traces of real training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUM_CATEGORIES = 8
NUM_CLUSTERS = 64
_CLUSTER_CORRELATION = 0.6  # of a prompt's logit with the feature that clusters are made of


@dataclass(frozen=True)
class Setting:
    """A simulated world; logits and steps throughout."""

    name: str
    mean: float  # of the logits at the start
    deviation: float  # of the logits at the start, between and within categories together
    drift: float = 0.0  # shared, a step, at the start; it slows down as training goes on
    category_drift: float = 0.0  # standard deviation of each category's own, a step
    noise: float = 0.0  # variance of each prompt's own random walk, a step
    gain: float = 0.0  # of one group trained on at p = 1/2
    jumps: tuple[float, ...] = ()  # shares of the run after which a hidden cluster jumps
    dead: float = 0.0  # share of prompts that never succeed or never fail, whatever their logit says


_SLOW = {"drift": 0.010, "category_drift": 0.004, "noise": 0.0010, "gain": 0.03}
_FAST = {"drift": 0.025, "category_drift": 0.010, "noise": 0.0034, "gain": 0.08}
_SHAPES = {"u_shaped": (0.0, 3.0), "uniform": (0.0, 1.6), "hard": (-4.0, 2.0)}
_DRIFTS: dict[str, dict[str, float]] = {"none": {}, "slow": _SLOW, "fast": _FAST}

SETTINGS = {
    f"{shape}_{drift}": Setting(f"{shape}_{drift}", mean, deviation, **law)
    for shape, (mean, deviation) in _SHAPES.items()
    for drift, law in _DRIFTS.items()
}
SETTINGS["u_shaped_sudden"] = Setting("u_shaped_sudden", 0.0, 3.0, **_SLOW, jumps=(1 / 3, 2 / 3))
# A world unlike the filter; not among the ten.
UNLIKE = Setting("u_shaped_dead", 0.0, 3.0, **_SLOW, jumps=(1 / 3, 2 / 3), dead=0.4)
# Most prompts teach nothing; not among the ten either.
MOSTLY_DEAD = {
    f"u_shaped_dead{percent}": Setting(f"u_shaped_dead{percent}", 0.0, 3.0, **_SLOW, dead=percent / 100)
    for percent in (80, 95)
}


class SimulatedPolicy:
    """Pass rates of P prompts under a policy in training. Unlike the filter's assumptions, prompts differ in how fast
    they drift and gain, the shared drift slows down, and clusters that jump are not the given categories.
    """

    def __init__(self, setting: Setting, num_prompts: int, num_steps: int, seed: int) -> None:
        random = np.random.default_rng([seed, 1])
        self.setting, self.num_prompts, self.num_steps = setting, num_prompts, num_steps
        self.categories = random.integers(NUM_CATEGORIES, size=num_prompts)
        offsets = random.standard_normal(NUM_CATEGORIES)
        offsets = (offsets - offsets.mean()) / offsets.std() * 0.4 * setting.deviation
        within = np.sqrt(setting.deviation**2 * (1.0 - 0.4**2))
        logits = setting.mean + offsets[self.categories] + within * random.standard_normal(num_prompts)
        self.logits = logits.astype(np.float32)
        self.clusters = self._make_clusters(np.random.default_rng([seed, 5]))
        self._speeds = random.gamma(4.0, 0.25, num_prompts).astype(np.float32)
        self._gain_speeds = random.gamma(4.0, 0.25, num_prompts).astype(np.float32)
        self._category_drift = setting.category_drift * random.standard_normal(NUM_CATEGORIES)
        self._jump_groups = random.integers(10, size=num_prompts)
        self._jump_steps = {round(share * num_steps): number for number, share in enumerate(setting.jumps)}
        # Dead prompts have an exact pass rate of 0 or 1; each has a chance to revive during the run.
        self._dead = random.random(num_prompts) < setting.dead
        self._revival_step = random.integers(1, 4 * num_steps, size=num_prompts)
        self._random = np.random.default_rng([seed, 2])
        self._step = 1

    def _make_clusters(self, random: np.random.Generator) -> np.ndarray:
        """Groups of prompts alike in one feature that goes with difficulty, as clusters of embeddings might be."""
        standard = (self.logits - self.logits.mean()) / self.logits.std()
        left = np.sqrt(1.0 - _CLUSTER_CORRELATION**2)
        feature = _CLUSTER_CORRELATION * standard + left * random.standard_normal(self.num_prompts)
        clusters: np.ndarray = np.argsort(np.argsort(feature)) * NUM_CLUSTERS // self.num_prompts
        return clusters

    @property
    def pass_rates(self) -> np.ndarray:
        """(P,) float64, of the policy that generates this step."""
        rates = 1.0 / (1.0 + np.exp(-self.logits.astype(np.float64)))
        if self.setting.dead:
            dead = self._dead & (self._step < self._revival_step)
            rates[dead] = np.round(rates[dead])
        return rates

    def train(self, indices: np.ndarray, shares: np.ndarray | None = None) -> None:
        """One optimiser step on these prompts (repeats count), and the drift of all.

        Args: shares: (B,), how much of a usual group each has; None = all of one.
        """
        setting, step = self.setting, self._step
        slowing = 1.5 * np.exp(-step / (0.9 * self.num_steps))
        if setting.gain:
            counts = np.bincount(indices, shares, minlength=self.num_prompts)
            trained = np.flatnonzero(counts)
            p = self.pass_rates[trained]
            self.logits[trained] += setting.gain * counts[trained] * 4.0 * p * (1.0 - p) * self._gain_speeds[trained]
        if setting.drift or setting.category_drift:
            self._category_drift = 0.98 * self._category_drift
            self._category_drift += setting.category_drift * 0.2 * self._random.standard_normal(NUM_CATEGORIES)
            self.logits += np.float32(setting.drift * slowing) * self._speeds
            self.logits += self._category_drift.astype(np.float32)[self.categories]
        if setting.noise:
            noise = self._random.standard_normal(self.num_prompts, dtype=np.float32)
            self.logits += np.float32(np.sqrt(setting.noise)) * noise
        if step in self._jump_steps:
            number = self._jump_steps[step]
            self.logits[self._jump_groups // 3 == number] += np.float32(1.5)  # 30 % of the prompts up,
            self.logits[self._jump_groups == 9 - number // 2] -= np.float32(1.0)  # 10 % down
        self._step += 1


class RecordedTrace:
    """Pass rates of P prompts measured every few steps of a real run, replayed; what is drawn changes nothing.

    k out of n right is taken as (k + .1) / (n + .2), by which about as many groups of eight teach as the counts say.
    The noise of measuring passes for drift. Between measurements the logits are interpolated.
    """

    def __init__(self, path: Path) -> None:
        """Read a trace: an .npz file without pickled objects, with

        steps: (S,) int, increasing, the steps after which pass rates were measured; 0 = before training.
        pass_rates: (S, P) float, [0, 1].
        num_responses: () int, behind each pass rate.
        categories: (P,) int from 0; optional.
        prompt_ids, texts: (P,) fixed-width strings; optional.
        responses_per_group: () int, N of the run that was recorded; optional.
        """
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        steps, rates = arrays["steps"], arrays["pass_rates"].astype(np.float64)
        if rates.ndim != 2 or len(steps) != len(rates) or (np.diff(steps) <= 0).any():
            raise ValueError(
                f"{path}: steps must increase, one for each row of pass_rates, got {steps} and {rates.shape}"
            )
        num_responses = int(arrays["num_responses"])
        shrunk = (rates * num_responses + 0.1) / (num_responses + 0.2)
        self._steps, self._logits = steps, np.log(shrunk / (1.0 - shrunk))
        self.name = path.stem
        self.num_prompts, self.num_steps = rates.shape[1], int(steps[-1])
        self.categories = self.clusters = arrays.get("categories", np.zeros(self.num_prompts, dtype=np.int64))
        self.prompt_ids: list[str] = arrays["prompt_ids"].tolist() if "prompt_ids" in arrays else []
        self.texts: list[str] = arrays["texts"].tolist() if "texts" in arrays else []
        self._step = 1

    @property
    def pass_rates(self) -> np.ndarray:
        """(P,) float64, of the policy that generates this step: trained for one step less."""
        position = np.interp(self._step - 1, self._steps, np.arange(len(self._steps)))
        before = min(int(position), len(self._steps) - 2)
        share = position - before
        logits = (1.0 - share) * self._logits[before] + share * self._logits[before + 1]
        rates: np.ndarray = 1.0 / (1.0 + np.exp(-logits))
        return rates

    def train(self, indices: np.ndarray, shares: np.ndarray | None = None) -> None:
        """Go on to the next step."""
        self._step += 1
