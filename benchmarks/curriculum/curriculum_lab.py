"""The curriculum laboratory: how well each sampler knows which prompts are learnable, and what that costs in rollouts.

    python benchmarks/curriculum/curriculum_lab.py --quick
    python benchmarks/curriculum/curriculum_lab.py --seeds 0 1 2 --json lab.json --plots lab/
    python benchmarks/curriculum/curriculum_lab.py --traces benchmarks/curriculum/data/demo_*.npz

Every policy trains a simulated policy, whose pass rates are known, for 224 steps of 512 prompts, 8 responses each, half
of them drawn by weight (lambda = 0.5). v is a prompt's true p(1-p) under the policy that generates the step. Measures:

spearman: rank correlation of the weights with v, mean over the second half; a constant ranking counts 0.
effective_group_fraction: groups trained on that are neither all right nor all wrong, mean over the run.
extra_rollout_fraction: rollouts besides the trained groups' over theirs, all of the run. A full refresh before step 1
    counts, so N=32, T=35 costs 3.66 in 224 steps, against 3.35 in the long run.
ovs_share: expected v of a draw by the weights, over that of the oracle, who draws proportionally to v: mean over the
    second half. For DAPO, the mean v of the groups trained on.
effective_sample_size: (sum w)^2 / (sum w^2 P): how evenly the draws are spread; the oracle's is `oracle_sample_size`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curriculum_lab_policies import DEFAULT_POLICIES, POLICIES, RESPONSES, DynamicSampling, Run, Uniform
from curriculum_lab_worlds import SETTINGS, UNLIKE, RecordedTrace, Setting, SimulatedPolicy

from mmr1_ds.curriculum.sampler import PromptSampler

_MIXTURE = 0.5
_MAX_ROUNDS = 20  # of DAPO's draws for one batch


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, (P,) float64; equal values share the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.concatenate([first, [len(values)]]))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(first + (sizes - 1) / 2.0, sizes)
    return ranks


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; 0 if either is constant."""
    a, b = average_ranks(a), average_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0.0 else 0.0


def run_policy(
    world: SimulatedPolicy | RecordedTrace, name: str, policy: Uniform, run: Run, measure_every: int = 4
) -> dict[str, Any]:
    """Train for the run's steps. Returns: the row of the results."""
    random = np.random.default_rng([run.seed, 4])
    strategy = "shuffle" if isinstance(policy, DynamicSampling) else "curriculum"
    sampler = PromptSampler(run.num_prompts, run.batch_size, run.seed, strategy, _MIXTURE)
    measured: list[dict[str, float]] = []
    effective = extra = trained = 0
    draws = 0

    for step in range(1, run.num_steps + 1):
        rates = world.pass_rates

        def roll(indices: np.ndarray, num_responses: int, rates: np.ndarray = rates) -> np.ndarray:
            return random.binomial(num_responses, rates[indices]).astype(np.float64)

        extra += policy.refresh(step, roll)
        weights = policy.weights()
        if strategy == "shuffle":
            batch, num_right, rounds = _draw_effective(sampler, draws, run.batch_size, roll)
            draws += rounds
            extra += RESPONSES * (rounds * run.batch_size - len(batch))
        else:
            batch = sampler.draw(step, weights)
            num_right = roll(batch, RESPONSES)
            extra += policy.learn(batch, num_right, roll)
        effective += int(np.count_nonzero((num_right > 0) & (num_right < RESPONSES)))
        trained += len(batch)
        if step % measure_every == 0:
            measured.append({"step": step, **measure(weights, rates, batch if strategy == "shuffle" else None)})
        world.train(batch)
    return {
        "policy": name,
        "seed": run.seed,
        "effective_group_fraction": effective / trained,
        "extra_rollout_fraction": extra / (RESPONSES * trained),
        **_summary(measured, run.num_steps),
    }


def _draw_effective(sampler: PromptSampler, draws: int, size: int, roll: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Rounds of uniform draws until `size` groups are effective; as many as there are after the last round."""
    batches, counts = [], []
    found = 0
    for rounds in range(1, _MAX_ROUNDS + 1):
        batch = sampler.draw(draws + rounds, np.empty(0))
        num_right = roll(batch, RESPONSES)
        kept = (num_right > 0) & (num_right < RESPONSES)
        batches.append(batch[kept])
        counts.append(num_right[kept])
        found += int(np.count_nonzero(kept))
        if found >= size:
            break
    return np.concatenate(batches)[:size], np.concatenate(counts)[:size], rounds


def measure(weights: np.ndarray, rates: np.ndarray, trained: np.ndarray | None) -> dict[str, float]:
    """What weights (P,) know of true pass rates (P,). trained: prompts of a batch that was drawn without them."""
    value = rates * (1.0 - rates)
    oracle = float(value @ value / value.sum())
    weights = weights.astype(np.float64)
    total = weights.sum()
    collected = float(value[trained].mean()) if trained is not None else float(weights @ value / total)
    return {
        "spearman": spearman(weights, value),
        "ovs_share": collected / oracle,
        "effective_sample_size": float(total**2 / (weights @ weights) / len(weights)),
        "oracle_sample_size": float(value.sum() ** 2 / (value @ value) / len(value)),
    }


def _summary(measured: Sequence[dict[str, float]], num_steps: int) -> dict[str, Any]:
    steps = np.array([row["step"] for row in measured])
    quarter = np.minimum(3, (steps - 1) * 4 // num_steps)
    columns = {name: np.array([row[name] for row in measured]) for name in measured[0] if name != "step"}
    summary: dict[str, Any] = {}
    for name, column in columns.items():
        summary[name] = float(column[quarter >= 2].mean())
        summary[f"{name}_by_quarter"] = [float(column[quarter == number].mean()) for number in range(4)]
    return summary


def run_setting(
    setting: Setting | Path, names: Sequence[str], num_prompts: int, num_steps: int, batch_size: int, seed: int
) -> list[dict[str, Any]]:
    """Every policy on one world. Each meets the same world, moved by what it trains on itself."""
    rows = []
    for name in names:
        world: SimulatedPolicy | RecordedTrace
        if isinstance(setting, Path):
            world = RecordedTrace(setting)
            # The share of the pool that a step draws from 15,000 prompts would be 17 prompts of 512: too few to filter.
            size = max(8, min(batch_size, world.num_prompts // 16))
        else:
            world, size = SimulatedPolicy(setting, num_prompts, num_steps, seed), batch_size
        run = Run(world.num_prompts, world.categories, world.clusters, size, world.num_steps, seed)
        measure_every = 4 if world.num_prompts <= 100_000 else 16
        setting_name = world.name if isinstance(world, RecordedTrace) else world.setting.name
        row = run_policy(world, name, POLICIES[name](run), run, measure_every)
        rows.append({"setting": setting_name, "num_prompts": world.num_prompts, **row})
    return rows


_MEASURES = ("spearman", "ovs_share", "effective_group_fraction", "extra_rollout_fraction", "effective_sample_size")


def mean_over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each setting and policy, in order of appearance."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["policy"]), []).append(row)
    return [_mean_row(setting, policy, group) for (setting, policy), group in groups.items()]


def _mean_row(setting: str, policy: str, group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {"setting": setting, "policy": policy}
    for name, value in group[0].items():
        if isinstance(value, list):
            mean[name] = np.mean([row[name] for row in group], axis=0).tolist()
        elif isinstance(value, float):
            mean[name] = float(np.mean([row[name] for row in group]))
    return mean


def mean_over_settings(means: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each policy: the mean of its settings."""
    policies = list(dict.fromkeys(row["policy"] for row in means))
    return [_mean_row("mean", policy, [row for row in means if row["policy"] == policy]) for policy in policies]


def table(means: Sequence[dict[str, Any]]) -> str:
    """Plain text, one line a setting and policy."""
    lines = [
        f"{'setting':<22}{'policy':<22}{'spearman':>9}{'  by quarter':<25}{'ovs':>6}{'  by quarter':<25}"
        f"{'effective':>9}{'extra':>7}{'sample':>8}{'oracle':>8}"
    ]
    for row in means:
        quarters = [
            "  " + " ".join(f"{value:.3f}".lstrip("0") for value in row[f"{name}_by_quarter"])
            for name in ("spearman", "ovs_share")
        ]
        lines.append(
            f"{row['setting']:<22}{row['policy']:<22}{row['spearman']:>9.3f}{quarters[0]:<25}{row['ovs_share']:>6.3f}"
            f"{quarters[1]:<25}{row['effective_group_fraction']:>9.3f}{row['extra_rollout_fraction']:>7.2f}"
            f"{row['effective_sample_size']:>8.3f}{row['oracle_sample_size']:>8.3f}"
        )
    return "\n".join(lines) + "\n"


def bars(means: Sequence[dict[str, Any]]) -> str:
    """Where our policies stand against full refresh; what the project promises."""
    by_policy: dict[str, dict[str, dict[str, Any]]] = {}
    for row in means:
        by_policy.setdefault(row["policy"], {})[row["setting"]] = row
    if not {"online", "online_free", "full_n16_t56", "full_n32_t35"} <= set(by_policy):
        return ""
    free, ours, n16, n32 = (by_policy[name] for name in ("online_free", "online", "full_n16_t56", "full_n32_t35"))
    margins = {setting: free[setting]["spearman"] - n16[setting]["spearman"] for setting in n16}
    worst = min(margins, key=lambda setting: margins[setting])
    lines = [f"online_free - full_n16_t56, spearman, second half: worst {margins[worst]:+.3f} ({worst})"]
    for quarter in range(4):
        margins = {
            setting: ours[setting]["spearman_by_quarter"][quarter] - n16[setting]["spearman_by_quarter"][quarter]
            for setting in n16
        }
        worst = min(margins, key=lambda setting: margins[setting])
        mean = float(np.mean(list(margins.values())))
        lines.append(
            f"online - full_n16_t56, quarter {quarter + 1}: mean {mean:+.3f}, worst {margins[worst]:+.3f} ({worst})"
        )
    difference = float(np.mean([ours[setting]["spearman"] - n32[setting]["spearman"] for setting in n32]))
    lines.append(f"online - full_n32_t35, spearman, second half: mean of settings {difference:+.3f}")
    for name, rows in (("online_free", free), ("online", ours)):
        worst = min(rows, key=lambda setting: rows[setting]["ovs_share"])
        lines.append(f"{name} ovs_share, second half: worst {rows[worst]['ovs_share']:.3f} ({worst})")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare curriculum samplers on simulated policies and recorded traces."
    )
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, UNLIKE.name], default=list(SETTINGS))
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(DEFAULT_POLICIES))
    parser.add_argument("--prompts", type=int, default=15_000, help="in the simulated data set")
    parser.add_argument("--steps", type=int, default=224)
    parser.add_argument("--batch", type=int, default=512, help="prompts a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--traces", type=Path, nargs="+", default=[], help=".npz files to replay instead of simulations"
    )
    parser.add_argument("--quick", action="store_true", help="three settings and a smaller data set, within a minute")
    parser.add_argument("--json", type=Path, help="write all rows, one for each seed")
    parser.add_argument("--plots", type=Path, help="folder for PNG files")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.quick:
        options.settings = ["u_shaped_slow", "u_shaped_sudden", "hard_fast"]
        options.prompts, options.batch = 3_750, 128
    settings: list[Setting | Path] = list(options.traces)
    if not settings:
        settings = [UNLIKE if name == UNLIKE.name else SETTINGS[name] for name in options.settings]
    rows = []
    for setting in settings:
        of_setting = []
        for seed in options.seeds:
            of_setting += run_setting(setting, options.policies, options.prompts, options.steps, options.batch, seed)
        sys.stdout.write(table(mean_over_seeds(of_setting)))
        sys.stdout.flush()
        rows += of_setting
        if options.json:  # after each setting: a long run that is stopped keeps what it found
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    means = mean_over_seeds(rows)
    sys.stdout.write(table(mean_over_settings(means)) + bars(means))
    if options.plots:
        from curriculum_lab_plots import plot

        options.plots.mkdir(parents=True, exist_ok=True)
        plot(means, options.plots)


if __name__ == "__main__":
    main()
