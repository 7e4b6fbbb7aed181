"""The samplers of others, each under its own rule and with its published constants; written from their descriptions.

MoPPS (arXiv 2507.04632; github.com/thu-rllab/MoPPS, and recipe/mopps of github.com/volcengine/verl): a Beta(1, 1) a
    prompt, pulled back to the prior when it is visited; a Thompson draw of each of c B candidates, of which the B
    nearest to 1/2 are taken. Its scripts: Geo3K c = 8, decay .5; MATH c = 16, decay 1 (none), the recipe's default.
DPS (arXiv 2603.10887; github.com/maoyixiu/DPS): a three-state hidden Markov model a prompt (none, some, all right),
    transitions with a Dirichlet prior of 1, decayed at each step; of c B candidates the B most probably in the middle
    state. Its scripts: Geo3K c = 8, decay .5; MATH c = 32, decay .7.
VADE (arXiv 2511.18902): a Beta(1, 1) a prompt, of which the evidence decays at two scales, of all prompts at each step
    and of a prompt at its own visit; the B largest Thompson draws of p (1-p)^2. Its decay factors could not be
    verified: .998 a step and .9 a visit suit it here, as slow as two scales can be; with none it does a little
    better, with faster ones much worse.
GRESO (arXiv 2506.02177; github.com/Infini-AI-Lab/GRESO): a prompt whose last z groups were all right is rolled out
    again with probability p^z, at least .01, and so where none was right, p of either kind apart: from .5 on, after the
    first epoch in steps of .01 towards a quarter of groups without variance, a third of it easy, within .05 and .95. A
    round has 1.5 B prompts; a later one what is missing over the share that taught in the last, times 1.25, at least
    B / 4; when that is no more than 1.5 B, it is the last, and the batch may stay short.
Difficulty pools: easy, normal, hard by the last group's mean, drawn with replacement, weights .2, 1, .2. The buffer of
    github.com/PrimeIntellect-ai/prime-rl has such pools, with quotas in place of weights: a tenth of the batch above
    .8, a tenth below .2, which are no prompt at all in a batch of eight.
Pilot-Commit (arXiv 2605.26606; github.com/databricks/pilot-commit): a round samples pilots of 3 B prompts, and the rest
    of the groups of prompts that wait since an earlier one; those with .125 to .75 of the pilots right wait, at most
    four steps; rounds go on until the batch is full. A quarter of its groups of 64 and 128 responses are pilots; of 8
    that would be 2, by which it does a little worse than with the 3 given here. Its scripts leave a prompt out for good
    when all of 16 or more pilots were right; with so few it does better without (`evicts`).
DAPO (arXiv 2503.14476): uniform draws of B prompts until the batch is full of groups that teach, at most twenty. Its
    script draws 3 B at a time, which samples more than is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from curriculum_lab_policies import RESPONSES, Roll, Run, Uniform

from mmr1_ds.curriculum.sampler import PromptSampler

_MAX_ROUNDS = 20  # of DAPO's draws for one batch
_MANY_ROUNDS = 200  # of those without a bound of their own


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


class Walker(Uniform):
    """Takes prompts in turn, as many as it needs."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._position = 0

    def _next(self, count: int) -> np.ndarray:
        """The next prompts of the endless walk."""
        walked = self._walk.walk(self._position, count)
        self._position += count
        return walked


class Dapo(Walker):
    def batch(self, step: int, roll: Roll) -> tuple[np.ndarray, np.ndarray, int]:
        size = self.run.batch_size
        kept_prompts, kept_right = np.empty(0, dtype=np.int64), np.empty(0)
        spent = 0
        for _ in range(_MAX_ROUNDS):
            prompts = self._next(size)
            num_right = roll(prompts, RESPONSES)
            spent += RESPONSES * len(prompts)
            teaches = _teaches(num_right)
            kept_prompts = np.concatenate([kept_prompts, prompts[teaches]])
            kept_right = np.concatenate([kept_right, num_right[teaches]])
            if len(kept_prompts) >= size:
                break
        self.sizes = self.group_sizes(kept_prompts[:size])
        return kept_prompts[:size], kept_right[:size], spent


class Greso(Walker):
    TARGETS = np.array([0.25 / 3, 0.5 / 3])  # share of groups all right, none right
    SLACK, STEP, LOWEST, HIGHEST, LEAST_CHANCE = 1.25, 0.01, 0.05, 0.95, 0.01

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.streaks = np.zeros((run.num_prompts, 2), dtype=np.int64)  # groups in a row all right, none right
        self.explored = np.array([0.5, 0.5])  # chance to roll out again after one of them
        self._seen = np.zeros(3)  # of the step: groups all right, none right, and all groups
        self._passed = np.empty(0, dtype=np.int64)  # prompts that are rolled out next

    def kept_chance(self, prompts: np.ndarray) -> np.ndarray:
        """How probably each is rolled out when its turn comes."""
        chances: np.ndarray = np.maximum(self.explored ** self.streaks[prompts], self.LEAST_CHANCE).prod(axis=1)
        return chances

    def batch(self, step: int, roll: Roll) -> tuple[np.ndarray, np.ndarray, int]:
        size = self.run.batch_size
        most = wanted = int(1.5 * size)
        kept_prompts, kept_right = np.empty(0, dtype=np.int64), np.empty(0)
        spent, is_last = 0, False
        for _ in range(_MANY_ROUNDS):
            prompts = self._kept(wanted)
            num_right = roll(prompts, RESPONSES)
            spent += RESPONSES * len(prompts)
            self.judge(prompts, num_right)
            teaches = _teaches(num_right)
            kept_prompts = np.concatenate([kept_prompts, prompts[teaches]])
            kept_right = np.concatenate([kept_right, num_right[teaches]])
            if len(kept_prompts) >= size or is_last:
                break
            needed = int((size - len(kept_prompts)) / max(1e-6, teaches.mean()) * self.SLACK)
            is_last = needed <= most  # whatever it brings: the batch may stay short
            wanted = max(min(needed, most), size // 4)
        self.sizes = self.group_sizes(kept_prompts[:size])
        return kept_prompts[:size], kept_right[:size], spent

    def _kept(self, wanted: int) -> np.ndarray:
        found = self._passed
        while len(found) < wanted:
            turn = self._next(wanted)
            found = np.concatenate([found, turn[self.random.random(len(turn)) < self.kept_chance(turn)]])
        self._passed = found[wanted:]
        return found[:wanted]

    def judge(self, prompts: np.ndarray, num_right: np.ndarray) -> None:
        """Take in all groups of a round."""
        of_kinds = np.stack([num_right == RESPONSES, num_right == 0], axis=1)
        self.streaks[prompts] = np.where(of_kinds, self.streaks[prompts] + 1, 0)
        self._seen += [*of_kinds.sum(axis=0), len(prompts)]

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        if self._position >= self.run.num_prompts:  # not in the first epoch
            above = self._seen[:2] / max(1.0, self._seen[2]) >= self.TARGETS
            self.explored = np.clip(self.explored + np.where(above, -self.STEP, self.STEP), self.LOWEST, self.HIGHEST)
        self._seen[:] = 0.0
        return 0


class PilotCommit(Walker):
    LOWER, UPPER, MAX_AGE = 0.125, 0.75, 4

    def __init__(self, run: Run, pilots: int, evicts: bool) -> None:
        super().__init__(run)
        self.pilots, self.evicts = pilots, evicts
        self.evicted = np.zeros(run.num_prompts, dtype=bool)
        self._waiting: dict[int, tuple[int, float]] = {}  # prompt: (step, number right of its pilots)

    def batch(self, step: int, roll: Roll) -> tuple[np.ndarray, np.ndarray, int]:
        size, rest, spent = self.run.batch_size, RESPONSES - self.pilots, 0
        chosen, num_right = np.empty(0, dtype=np.int64), np.empty(0)
        for _ in range(_MANY_ROUNDS):
            # A round samples the pilots of later groups and the rest of groups that earlier rounds found.
            waiting = np.fromiter(self._waiting, dtype=np.int64, count=len(self._waiting))
            committed = self.random.permutation(waiting)[: size - len(chosen)]
            before = np.array([self._waiting.pop(int(k))[1] for k in committed])
            self._pilot(step, roll)
            chosen = np.concatenate([chosen, committed])
            num_right = np.concatenate([num_right, before + roll(committed, rest)])
            spent += self.pilots * 3 * size + rest * len(committed)
            if len(chosen) == size:
                break
        self._waiting = {k: pilot for k, pilot in self._waiting.items() if step - pilot[0] <= self.MAX_AGE}
        self.sizes = self.group_sizes(chosen)
        return chosen, num_right, spent

    def _pilot(self, step: int, roll: Roll) -> None:
        prompts = self._next(3 * self.run.batch_size)
        while self.evicts and self.evicted[prompts].any() and not self.evicted.all():
            left = prompts[~self.evicted[prompts]]
            prompts = np.concatenate([left, self._next(len(prompts) - len(left))])
        num_right = roll(prompts, self.pilots)
        rates = num_right / self.pilots
        self.evicted[prompts[rates >= 1.0]] = True
        kept = (rates >= self.LOWER) & (rates <= self.UPPER)
        self._waiting |= {int(k): (step, right) for k, right in zip(prompts[kept], num_right[kept], strict=True)}


RIVALS: dict[str, Callable[[Run], Uniform]] = {
    "mopps_geo3k": lambda run: Mopps(run, ratio=8, decay=0.5),
    "mopps_math": lambda run: Mopps(run, ratio=16, decay=1.0),
    "dps": Dps,
    "dps_math": lambda run: Dps(run, ratio=32, decay=0.7),
    "vade": lambda run: Vade(run, visit_decay=0.9, step_decay=0.998),
    "greso": Greso,
    "difficulty_pools": DifficultyPools,
    "pilot_commit": lambda run: PilotCommit(run, pilots=3, evicts=False),
    "dapo": Dapo,
}
