"""What the experiment trains: one trial = a pool, an arm, a seed; its data, its model, its run configuration."""

from __future__ import annotations

import fcntl
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmr1_ds.commands.demo.assets import prepare_assets
from mmr1_ds.commands.demo.digits import LEARNABLE, Question, draw_question, proportional_counts, write_parquet
from mmr1_ds.config import RunConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.curriculum.group_sizes import SizeRange
from mmr1_ds.preflight.checks import check_config

# filtering: DAPO; mopps, dps, dps_math, vade, pools, greso, pilot (Pilot-Commit): these rivals' own rules; online: half
# a batch by score and a tenth of probes, as it shipped at first; shipped: as it ships, textless: that without what the
# texts tell, sized: with groups of different sizes; posterior: the best by a draw from each belief, without texts;
# text: that with texts
ARMS = (
    "shuffle", "filtering", "mopps", "dps", "dps_math", "vade", "pools", "greso", "pilot", "full", "online",
    "posterior", "text", "shipped", "textless", "sized",
)  # fmt: skip
BELIEVING: dict[str, dict[str, Any]] = {
    "shipped": {},
    "textless": {"data.curriculum_features": "none"},
    "sized": {"worker.rollout.n_min": 2, "worker.rollout.n_max": 16},
    "posterior": {"data.curriculum_draw": "posterior", "data.curriculum_features": "none"},
    "text": {"data.curriculum_draw": "posterior"},
}  # fmt: skip
WITH_TEXTS = ("shipped", "sized", "text")
TOLD = ("online", *BELIEVING)  # the kinds of the questions, where categories are asked for
CURRICULA = ("full", *TOLD)
RIVAL_RULES = {  # arm -> name in the laboratory
    "mopps": "mopps_math", "dps": "dps", "vade": "vade", "pools": "difficulty_pools", "greso": "greso",
    "pilot": "pilot_commit", "dps_math": "dps_math",
}  # fmt: skip
LOOPED = ("greso", "pilot")  # of these, those that fill the batch by a loop of their own
FILLED = ("filtering", *LOOPED)  # a step samples until the batch is full of groups that teach
BATCH = 8  # prompts a step
RESPONSES = 8  # a group, or on average
SIZES = SizeRange(2, 16)  # of groups; sized
REFRESH_RESPONSES = 8  # a prompt in a full refresh
EASY = {"get1": 15, "max2": 15, "min2": 15}  # proportions within each sort of question, as in the demo's pool B
HARD = {"mul3": 30, "add3": 10}
DEAD, DEAD_ANSWER = "mul4", 1000  # products from here on are right once in 1,500 responses of a warmed-up model
TEACHING = {"max3": 3, "min3": 3, "max4": 5, "min4": 4}
SORTS = {
    kind: sort for sort, kinds in (("easy", EASY), ("hard", (*HARD, DEAD)), ("learnable", LEARNABLE)) for kind in kinds
}
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@dataclass(frozen=True)
class Trial:
    """One training. What an arm does not use is at its default, so that equal trainings have equal names."""

    share: int  # learnable prompts of the pool, %
    size: int  # prompts of the pool
    arm: str
    seed: int
    steps: int
    ratio: float = 0.5  # lambda; full and online
    categories: bool = True  # whether the filter is told the kind of a question; those of TOLD
    probe_fraction: float = 0.1  # online
    refresh_every: int = 60  # steps; full
    mini_batches: int = 1  # optimiser steps a batch
    beta2: float = 0.999  # decay of Adam's second moment; the demo's own is .95
    dead: bool = True  # whether the other prompts of the pool teach nothing at all, or are the demo's mixture
    rollouts: int | None = None  # responses that end the training before its steps do; None = BATCH groups a step

    @property
    def budget(self) -> int:
        """Sampled responses that end the training."""
        return self.steps * BATCH * RESPONSES if self.rollouts is None else self.rollouts

    @property
    def pool(self) -> str:
        """The pool's name."""
        return f"{'dead' if self.dead else 'mixed'}_share{self.share:02d}_size{self.size}"

    @property
    def name(self) -> str:
        """The name of the trial's file."""
        parts = [self.pool, self.arm]
        if self.arm in ("full", "online"):
            parts.append(f"ratio{self.ratio:g}")
        if self.arm in TOLD and not self.categories:
            parts.append("nocategories")
        if self.arm == "online" and self.probe_fraction != 0.1:
            parts.append(f"probes{self.probe_fraction:g}")
        if self.arm == "full" and self.refresh_every != 60:
            parts.append(f"every{self.refresh_every}")
        if self.mini_batches != 1:
            parts.append(f"minibatches{self.mini_batches}")
        if self.beta2 != 0.999:
            parts.append(f"beta{self.beta2:g}")
        if self.rollouts is not None:
            parts.append(f"rollouts{self.rollouts}")
        return "_".join([*parts, f"seed{self.seed}"])

    @property
    def label(self) -> str:
        """The arm in words, without pool and seed."""
        words = [self.arm]
        if self.arm in ("full", "online"):
            words.append(f"lambda {self.ratio:g}")
        if self.arm in TOLD and not self.categories:
            words.append("no categories")
        if self.arm == "online" and self.probe_fraction != 0.1:
            words.append(f"probes {self.probe_fraction:g}")
        if self.arm == "full" and self.refresh_every != 60:
            words.append(f"every {self.refresh_every} steps")
        if self.mini_batches != 1:
            words.append(f"{self.mini_batches} mini-batches")
        if self.beta2 != 0.999:
            words.append(f"beta2 {self.beta2:g}")
        return ", ".join(words)


def all_trials(
    shares: Sequence[int],
    sizes: Sequence[int],
    arms: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    ratios: Sequence[float] = (0.5,),
    categories: Sequence[bool] = (True,),
    probe_fraction: float = 0.1,
    refresh_every: int = 60,
    mini_batches: int = 1,
    dead: Sequence[bool] = (True,),
    beta2: float = 0.999,
    rollouts: int | None = None,
) -> list[Trial]:
    """Every combination once, seed by seed, so that an interrupted experiment has whole seeds."""
    trials = []
    combinations = itertools.product(seeds, dead, shares, sizes, arms, ratios, categories)
    for seed, is_dead, share, size, arm, ratio, told in combinations:
        trial = Trial(
            share, size, arm, seed, steps, mini_batches=mini_batches, beta2=beta2, dead=is_dead, rollouts=rollouts
        )
        if arm in ("full", "online"):
            trial = replace(trial, ratio=ratio)
        if arm == "full":
            trial = replace(trial, refresh_every=refresh_every)
        if arm == "online":
            trial = replace(trial, categories=told, probe_fraction=probe_fraction)
        if arm in BELIEVING:
            trial = replace(trial, categories=told)
        trials.append(trial)
    return list(dict.fromkeys(trials))


def pool_kinds(share: int, size: int, dead: bool) -> list[str]:
    """The kinds of a pool's questions, in no particular order: `share` % learnable.

    The rest is dead, or easy : too hard = 45 : 40.
    """
    if dead:
        num_learnable, num_dead = proportional_counts([share, 100 - share], size)
        parts = [(TEACHING, num_learnable), ({DEAD: 1}, num_dead)]
    else:
        weights_of_sorts = [share, (100 - share) * 45 / 85, (100 - share) * 40 / 85]
        counts = proportional_counts(weights_of_sorts, size)  # type: ignore[arg-type]  # fractions do as well
        parts = list(zip((TEACHING, EASY, HARD), counts, strict=True))
    kinds: list[str] = []
    for weights, count in parts:
        numbers = proportional_counts(list(weights.values()), count)
        kinds += [kind for kind, number in zip(weights, numbers, strict=True) for _ in range(number)]
    return kinds


@dataclass(frozen=True)
class TrialFiles:
    """What a trial reads."""

    model: Path
    pool: Path
    validation: Path


def trial_files(folder: Path, trial: Trial) -> TrialFiles:
    """Where a trial's files lie under `folder`: model and validation of a seed, pool of a seed and a sort."""
    seed = folder / "models" / f"seed_{trial.seed}"
    pool = folder / "pools" / f"{trial.pool}_seed{trial.seed}.parquet"
    return TrialFiles(seed / "model", pool, seed / "val.parquet")


def prepare_model(folder: Path, trial: Trial) -> None:
    """Warm up the seed's model, unless that is done. Several processes may ask at once: one makes, others wait."""
    target = trial_files(folder, trial).model.parent
    with locked(target.with_suffix(".lock")):
        prepare_assets(target, trial.seed)


def prepare_pool(folder: Path, trial: Trial) -> None:
    """Draw the trial's pool, unless that is done; the file is whole or not there."""
    path = trial_files(folder, trial).pool
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            write_parquet(unfinished, draw_pool(trial), path.stem)
            unfinished.rename(path)


def draw_pool(trial: Trial) -> list[Question]:
    """The questions of a trial's pool, in random order: a pure function of the pool and the seed."""
    rng = np.random.default_rng([trial.seed, 1, trial.share, trial.size])
    kinds = rng.permutation(pool_kinds(trial.share, trial.size, trial.dead))
    return [_draw_dead(rng) if kind == DEAD else draw_question(str(kind), rng) for kind in kinds]


def _draw_dead(rng: np.random.Generator) -> Question:
    question = draw_question(DEAD, rng)
    while int(question.answer) < DEAD_ANSWER:
        question = draw_question(DEAD, rng)
    return question


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; it is free again when the process ends, however that happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def trial_config(trial: Trial, files: TrialFiles, validate_every: int) -> RunConfig:
    """The demo's configuration as this trial changes it.

    No KL term, as in most recipes with a verifiable reward and in the demo task's first trial: a reference would
    double the memory and add a forward pass. Trial seeds run the data order, the draws and the sampling.
    """
    values: dict[str, Any] = {
        "data.train_files": files.pool,
        "data.val_files": files.validation,
        "data.seed": trial.seed,
        "data.rollout_batch_size": BATCH,
        "data.category_key": "category" if trial.categories else "null",
        "data.sampling_strategy": "curriculum" if trial.arm in CURRICULA else "shuffle",
        "data.curriculum_refresh": "online" if trial.arm in TOLD else "full",
        "data.curriculum_update_freq": trial.refresh_every,
        "data.curriculum_rollout_n": REFRESH_RESPONSES,
        "algorithm.disable_kl": True,
        "algorithm.use_kl_loss": False,
        "algorithm.online_filtering": trial.arm == "filtering",
        "trainer.max_try_make_batch": 20,
        "worker.actor.global_batch_size": BATCH // trial.mini_batches,
        "worker.actor.micro_batch_size_per_device_for_update": 64,
        "worker.actor.micro_batch_size_per_device_for_experience": 64,
        "worker.actor.model.model_path": files.model,
        "worker.actor.optim.betas": f"[0.9,{trial.beta2}]",
        "worker.rollout.n": RESPONSES,
        "worker.rollout.seed": trial.seed,
        "worker.reward.num_workers": 1,
        "trainer.max_steps": trial.steps,
        "trainer.n_gpus_per_node": 1,
        "trainer.val_freq": validate_every,
        "trainer.val_generations_to_log": 0,
        "trainer.train_generations_to_log": 0,
        "trainer.save_freq": -1,
        "trainer.resume": False,
    }
    values |= BELIEVING.get(trial.arm, {})
    if trial.arm not in BELIEVING:
        values |= {
            "data.curriculum_draw": "proportional",
            "data.curriculum_mixture_ratio": trial.ratio,
            "data.curriculum_replacement": True,
            "data.curriculum_probe_fraction": trial.probe_fraction,
            "data.curriculum_features": "none",
        }
    config = load_config([f"config={CONFIG}", *(f"{key}={value}" for key, value in values.items())]).config
    check_config(config, world_size=1)
    return config


def trial_record(trial: Trial) -> dict[str, Any]:
    """The trial as the first line of its file has it."""
    return asdict(trial) | {"label": trial.label, "pool": trial.pool, "responses_per_step": BATCH * RESPONSES}
