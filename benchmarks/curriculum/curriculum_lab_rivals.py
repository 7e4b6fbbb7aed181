"""The samplers of others, each under its own rule and with its published constants; written from their descriptions.

MoPPS (arXiv 2507.04632; github.com/thu-rllab/MoPPS, and recipe/mopps of github.com/volcengine/verl): a Beta(1, 1) a
    prompt, pulled back to the prior when it is visited; a Thompson draw of each of c B candidates, of which the B
    nearest to 1/2 are taken. Its scripts: Geo3K c = 8, decay .5; MATH c = 16, decay 1 (none), the recipe's default.
DPS (arXiv 2603.10887; github.com/maoyixiu/DPS): a three-state hidden Markov model a prompt (none, some, all right),
    transitions with a Dirichlet prior of 1, decayed by .5 a step; of 8 B candidates the B most probably in the middle
    state (Geo3K script).
VADE (arXiv 2511.18902): a Beta(1, 1) a prompt, of which the evidence decays at two scales, of all prompts at each step
    and of a prompt at its own visit; the B largest Thompson draws of p (1-p)^2. Its decay factors could not be
    verified: .998 a step and .9 a visit suit it here, as slow as two scales can be; with none it does a little
    better, with faster ones much worse.
GRESO (arXiv 2506.02177; github.com/Infini-AI-Lab/GRESO): a prompt without variance z times in a row is passed over
    with probability 1 - p^z, p of the easy and of the hard apart, from .5 on in steps of .01 towards a quarter of
    groups without variance, a third of it easy; draws again until the batch is full of groups that teach, 1.5 B at
    first (scripts). The bounds of p and the factor 1.25 of later draws were seen in a reimplementation only.
Difficulty pools (as in the buffer of github.com/PrimeIntellect-ai/prime-rl: easy, normal, hard by the last group's
    mean): drawn with replacement, weights .2, 1, .2. That repository has fractions of a batch instead of weights; the
    weights could not be verified.
Pilot-Commit (arXiv 2605.26606; github.com/databricks/pilot-commit): pilots on 3 B prompts; those from .125 to .75
    right wait in a buffer, at most four steps, for the other responses of their group; none right: deferred to the
    next epoch; all right: evicted for good. At most ten rounds a step (scripts). A quarter of its groups of 64 and 128
    responses are pilots; of 8 that would be 2, by which it does worse than with the 4 given here.
DAPO (arXiv 2503.14476): uniform draws until the batch is full of groups that teach.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from curriculum_lab_policies import RESPONSES, Roll, Run, Uniform

from mmr1_ds.curriculum.sampler import PromptSampler

_MAX_ROUNDS = 20  # of DAPO's and GRESO's draws for one batch


def _teaches(num_right: np.ndarray) -> np.ndarray:
    return (num_right > 0) & (num_right < RESPONSES)


class Candidates(Uniform):
    """Takes from c B candidates, which come in turn, the B that it scores highest."""

    def __init__(self, run: Run, ratio: int) -> None:
        super().__init__(run)
        self._turn = PromptSampler(run.num_prompts, min(ratio * run.batch_size, run.num_prompts), run.seed)

    def draw(self, step: int) -> np.ndarray:
        candidates = self._turn.draw(step, np.empty(0))
        candidates = candidates[np.sort(np.unique(candidates, return_index=True)[1])]  # two epochs may share some
        order = np.argsort(-self.candidate_scores(candidates), kind="stable")
        return candidates[order[: self.run.batch_size]]

    def candidate_scores(self, candidates: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Mopps(Candidates):
    def __init__(self, run: Run, ratio: int, decay: float) -> None:
        super().__init__(run, ratio)
        self.decay = decay
        self.alpha, self.beta = np.ones(run.num_prompts), np.ones(run.num_prompts)

    def candidate_scores(self, candidates: np.ndarray) -> np.ndarray:
        return -((self.random.beta(self.alpha[candidates], self.beta[candidates]) - 0.5) ** 2)

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        self.alpha[batch] = self.decay * self.alpha[batch] + (1.0 - self.decay) + num_right
        self.beta[batch] = self.decay * self.beta[batch] + (1.0 - self.decay) + RESPONSES - num_right
        return 0

    def pass_rates(self) -> np.ndarray:
        return self.alpha / (self.alpha + self.beta)

    def scores(self) -> np.ndarray:
        total = self.alpha + self.beta
        return self.alpha * self.beta / (total * (total + 1.0))


class Vade(Mopps):
    def __init__(self, run: Run, visit_decay: float, step_decay: float) -> None:
        super().__init__(run, 1, visit_decay)
        self.step_decay = step_decay

    def draw(self, step: int) -> np.ndarray:
        drawn = self.random.beta(self.alpha, self.beta)
        return np.argsort(-drawn * (1.0 - drawn) ** 2, kind="stable")[: self.run.batch_size]

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        for evidence in (self.alpha, self.beta):
            evidence *= self.step_decay
            evidence += 1.0 - self.step_decay
        return super().learn(batch, num_right, roll)


class Dps(Candidates):
    def __init__(self, run: Run, ratio: int = 8, decay: float = 0.5) -> None:
        super().__init__(run, ratio)
        self.decay = decay
        self.transitions = np.ones((run.num_prompts, 3, 3))  # (P, to, from): what the Dirichlet distributions hold
        self.states = np.full((run.num_prompts, 3), 1 / 3)  # of the coming step: none right, some, all
        self._before = self.states.copy()  # of the last step

    def candidate_scores(self, candidates: np.ndarray) -> np.ndarray:
        return self.states[candidates, 1]

    def _expected(self) -> np.ndarray:
        return self.transitions / self.transitions.sum(axis=1, keepdims=True)

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        now = self.states
        observed = np.where(num_right == 0, 0, np.where(num_right == RESPONSES, 2, 1))
        now[batch] = np.eye(3)[observed]
        joint = now[batch, :, None] * self._before[batch, None, :] * self._expected()[batch]
        self.transitions = self.decay * self.transitions + (1.0 - self.decay)
        self.transitions[batch] += joint / joint.sum(axis=(1, 2), keepdims=True)
        self._before = now
        self.states = (self._expected() @ now[:, :, None])[:, :, 0]
        return 0

    def pass_rates(self) -> np.ndarray:
        return 0.5 * self.states[:, 1] + self.states[:, 2]

    def scores(self) -> np.ndarray:
        return self.states[:, 1]


class DifficultyPools(Uniform):
    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.weights = np.ones(run.num_prompts)

    def draw(self, step: int) -> np.ndarray:
        chances = self.weights / self.weights.sum()
        return self.random.choice(self.run.num_prompts, self.run.batch_size, p=chances)

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        self.weights[batch] = np.where(_teaches(num_right), 1.0, 0.2)
        return 0


class Dapo(Uniform):
    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._position = 0

    def _next(self, count: int) -> np.ndarray:
        """The next prompts of the endless walk."""
        walked = self._walk.walk(self._position, count)
        self._position += count
        return walked

    def _round(self, missing: int) -> np.ndarray:
        """The prompts to roll out when `missing` groups are still needed."""
        return self._next(self.run.batch_size)

    def judge(self, prompts: np.ndarray, num_right: np.ndarray) -> None:
        """Take in all groups of a round."""

    def batch(self, step: int, roll: Roll) -> tuple[np.ndarray, np.ndarray, int]:
        size = self.run.batch_size
        kept_prompts, kept_right = np.empty(0, dtype=np.int64), np.empty(0)
        spent = 0
        for _ in range(_MAX_ROUNDS):
            prompts = self._round(size - len(kept_prompts))
            num_right = roll(prompts, RESPONSES)
            spent += RESPONSES * len(prompts)
            self.judge(prompts, num_right)
            teaches = _teaches(num_right)
            kept_prompts = np.concatenate([kept_prompts, prompts[teaches]])
            kept_right = np.concatenate([kept_right, num_right[teaches]])
            if len(kept_prompts) >= size:
                break
        self.sizes = self.group_sizes(kept_prompts[:size])
        return kept_prompts[:size], kept_right[:size], spent


class Greso(Dapo):
    TARGETS = np.array([0.25 / 3, 0.5 / 3])  # share of groups all right, none right
    SLACK, STEP, LOWEST, HIGHEST = 1.25, 0.01, 0.05, 0.95

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.streaks = np.zeros(run.num_prompts, dtype=np.int64)  # groups without variance in a row
        self.hard = np.zeros(run.num_prompts, dtype=np.int64)  # 1: the last of them had none right
        self.explored = np.array([0.5, 0.5])  # chance to roll out again after one of them: easy, hard
        self._seen = np.zeros(3)  # of the step: groups all right, none right, and all groups

    def kept_chance(self, prompts: np.ndarray) -> np.ndarray:
        """How probably each is rolled out when its turn comes."""
        return self.explored[self.hard[prompts]] ** self.streaks[prompts]

    def _round(self, missing: int) -> np.ndarray:
        wasted = self._seen[:2].sum() / self._seen[2] if self._seen[2] else 0.0
        most = int(1.5 * self.run.batch_size)
        wanted = min(most, int(self.SLACK * missing / max(1e-6, 1.0 - wasted)) + 1) if self._seen[2] else most
        return self._kept(wanted)

    def _kept(self, wanted: int) -> np.ndarray:
        found = np.empty(0, dtype=np.int64)
        for _ in range(_MAX_ROUNDS):
            turn = self._next(wanted)
            kept = turn[self.random.random(len(turn)) < self.kept_chance(turn)]
            found = np.concatenate([found, kept])
            if len(found) >= wanted:
                break
        return found[:wanted]

    def judge(self, prompts: np.ndarray, num_right: np.ndarray) -> None:
        none, everything = num_right == 0, num_right == RESPONSES
        self.hard[prompts] = none
        self.streaks[prompts] = np.where(none | everything, self.streaks[prompts] + 1, 0)
        self._seen += [everything.sum(), none.sum(), len(prompts)]

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        above = self._seen[:2] / max(1.0, self._seen[2]) >= self.TARGETS
        self.explored = np.clip(self.explored + np.where(above, -self.STEP, self.STEP), self.LOWEST, self.HIGHEST)
        self._seen[:] = 0.0
        return 0


class PilotCommit(Dapo):
    LOWER, UPPER, MAX_AGE = 0.125, 0.75, 4

    def __init__(self, run: Run, pilots: int) -> None:
        super().__init__(run)
        self.pilots, self.max_rounds = pilots, 10
        self.evicted = np.zeros(run.num_prompts, dtype=bool)
        self._waiting: dict[int, tuple[int, float]] = {}  # prompt: (step, number right of its pilots)

    def batch(self, step: int, roll: Roll) -> tuple[np.ndarray, np.ndarray, int]:
        size, spent = self.run.batch_size, 0
        self._waiting = {k: pilot for k, pilot in self._waiting.items() if step - pilot[0] <= self.MAX_AGE}
        for _ in range(self.max_rounds):
            if len(self._waiting) >= size:
                break
            prompts = np.unique(self._next(3 * size))
            prompts = prompts[~self.evicted[prompts]]
            num_right = roll(prompts, self.pilots)
            spent += self.pilots * len(prompts)
            rates = num_right / self.pilots
            self.evicted[prompts[rates >= 1.0]] = True
            kept = (rates >= self.LOWER) & (rates <= self.UPPER)
            self._waiting |= {int(k): (step, right) for k, right in zip(prompts[kept], num_right[kept], strict=True)}
        waiting = np.fromiter(self._waiting, dtype=np.int64, count=len(self._waiting))
        chosen = self.random.permutation(waiting)[:size]
        before = np.array([self._waiting.pop(int(k))[1] for k in chosen])
        rest = RESPONSES - self.pilots
        self.sizes = self.group_sizes(chosen)
        return chosen, before + roll(chosen, rest), spent + rest * len(chosen)


RIVALS: dict[str, Callable[[Run], Uniform]] = {
    "mopps_geo3k": lambda run: Mopps(run, ratio=8, decay=0.5),
    "mopps_math": lambda run: Mopps(run, ratio=16, decay=1.0),
    "dps": Dps,
    "vade": lambda run: Vade(run, visit_decay=0.9, step_decay=0.998),
    "greso": Greso,
    "difficulty_pools": DifficultyPools,
    "pilot_commit": lambda run: PilotCommit(run, pilots=4),
    "dapo": Dapo,
}
