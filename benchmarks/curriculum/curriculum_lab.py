"""The curriculum laboratory: how well each sampler knows which prompts are learnable, and what that costs in rollouts.

    python benchmarks/curriculum/curriculum_lab.py --quick
    python benchmarks/curriculum/curriculum_lab.py --seeds 0 1 2 3 4 --json lab.json --plots lab/
    python benchmarks/curriculum/curriculum_lab.py --traces benchmarks/curriculum/data/demo_*.npz --batch 16
    python benchmarks/curriculum/curriculum_lab.py --estimators --seeds 0 1 2 3 4

Every policy trains a simulated policy, whose pass rates are known, for 224 steps of 512 prompts, 8 responses each, and
draws by its own rule. v is a prompt's true p(1-p) under the policy that generates the step. Measures, means over the
second half of the run unless said, and in `*_by_quarter`:

spearman: rank correlation of the mean of the belief about each pass rate with the true one; null without a belief.
variance_spearman: the same of the belief about p(1-p), with v.
effective_group_fraction: groups trained on that are neither all right nor all wrong.
effective_response_fraction: responses trained on that belong to such groups; where groups differ in size, another.
mean_variance_share: mean v of the responses trained on, over that of an oracle which draws proportionally to v.
signal_per_rollout: how clearly a rollout of the step shows where to go, 1 at best; see `signal`.
visited_fraction: prompts ever trained on, in the whole run.
extra_rollout_fraction: rollouts besides the trained groups' over theirs, all of the run. A full refresh before step 1
    counts, so N=32, T=35 costs 3.66 in 224 steps, against 3.35 in the long run.
effective_per_rollout: groups trained on that teach, for each eight rollouts of the whole run, whatever these were for.

With --estimators every belief is given the same observations instead, those of batches drawn half by our weights, half
in turn: `log_loss` is what it loses in predicting each group before it is seen, in nats a response above the true pass
rate's own, over the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curriculum_lab_policies import OURS, RESPONSES, Online, Run, Uniform
from curriculum_lab_rivals import RIVALS
from curriculum_lab_worlds import MOSTLY_DEAD, SETTINGS, UNLIKE, RecordedTrace, Setting, SimulatedPolicy

POLICIES = OURS | RIVALS
_ASKED_FOR = (
    "online_sizes", "online_posterior_sizes", "online_half_sizes", "online_no_categories", "online_clusters",
    "online_known_n4", "online_known_n16",
)  # fmt: skip
DEFAULT_POLICIES = tuple(name for name in POLICIES if name not in _ASKED_FOR)
ESTIMATORS = ("online", "online_no_categories", "mopps_geo3k", "mopps_math", "dps", "dps_math", "vade")
_STEP_MEASURES = (
    "effective_group_fraction", "effective_response_fraction", "mean_variance_share", "signal_per_rollout", "spearman",
    "variance_spearman",
)  # fmt: skip


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
    measured: list[dict[str, float]] = []
    visited = np.zeros(run.num_prompts, dtype=bool)
    effective = extra = trained = 0

    for step in range(1, run.num_steps + 1):
        rates = world.pass_rates

        def roll(indices: np.ndarray, num_responses: int, rates: np.ndarray = rates) -> np.ndarray:
            return random.binomial(num_responses, rates[indices]).astype(np.float64)

        extra += policy.refresh(step, roll)
        measures = {"step": step, **(measure_belief(policy, rates) if step % measure_every == 0 else {})}
        batch, num_right, spent = policy.batch(step, roll)
        extra += spent - RESPONSES * len(batch) + policy.learn(batch, num_right, roll)
        sizes = policy.sizes
        teaches = (num_right > 0) & (num_right < sizes)
        teaching = int(np.count_nonzero(teaches))
        effective += teaching
        trained += len(batch)
        visited[batch] = True
        value = rates * (1.0 - rates)
        if len(batch):
            measures["effective_group_fraction"] = teaching / len(batch)
            measures["effective_response_fraction"] = float(sizes[teaches].sum() / sizes.sum())
            mean = np.average(value[batch], weights=sizes)
            measures["mean_variance_share"] = float(mean * value.sum() / (value @ value))
            measures["signal_per_rollout"] = signal(num_right, sizes) / spent
        measured.append(measures)
        world.train(batch, sizes / RESPONSES)
    return {
        "policy": name,
        "seed": run.seed,
        "visited_fraction": float(visited.mean()),
        "extra_rollout_fraction": extra / (RESPONSES * trained),
        "effective_per_rollout": effective / (trained + extra / RESPONSES),
        **_summary(measured, run.num_steps),
    }


def signal(num_right: np.ndarray, sizes: np.ndarray) -> float:
    """How many responses of the best kind would show the direction of the gradient as clearly as these groups.

    If right responses of all prompts pull one way, each response adds noise as its advantage A is large: with GRPO's
    the pull is the sum of (n - 1) s, s the deviation of a group's rewards, and the squared noise that of A^2, n - 1
    in a group that teaches. Pull over noise, squared, of n right half of the time is n / 4 when n is large.
    """
    deviation = np.sqrt(num_right * (sizes - num_right) / (sizes * (sizes - 1)))
    noise = (sizes - 1)[deviation > 0].sum()
    return float(4.0 * ((sizes - 1) * deviation).sum() ** 2 / noise) if noise else 0.0


def measure_belief(policy: Uniform, rates: np.ndarray) -> dict[str, float]:
    """How a policy's belief ranks prompts of true pass rates (P,); nothing without a belief."""
    means, scores = policy.pass_rates(), policy.scores()
    if means is None or scores is None:
        return {}
    return {"spearman": spearman(means, rates), "variance_spearman": spearman(scores, rates * (1.0 - rates))}


def _summary(measured: Sequence[dict[str, float]], num_steps: int) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in _STEP_MEASURES:
        steps = np.array([row["step"] for row in measured if name in row])
        values = np.array([row[name] for row in measured if name in row])
        quarter = np.minimum(3, (steps - 1) * 4 // num_steps)
        known = len(steps) > 0
        summary[name] = float(values[quarter >= 2].mean()) if known else None
        summary[f"{name}_by_quarter"] = [float(values[quarter == k].mean()) for k in range(4)] if known else None
    return summary


def compare_estimators(
    world: SimulatedPolicy | RecordedTrace, names: Sequence[str], run: Run, measure_every: int = 4
) -> list[dict[str, Any]]:
    """Give each policy's belief the same observations. Returns: a row for each."""
    random = np.random.default_rng([run.seed, 4])
    beliefs = {name: _without_probes(name, run) for name in names}
    drawing = Online(run, "proportional", ratio=0.5)
    losses = dict.fromkeys(names, 0.0)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    num_groups = 0
    for step in range(1, run.num_steps + 1):
        rates = world.pass_rates
        batch = drawing.draw(step)
        _, first = np.unique(batch, return_index=True)
        batch = batch[np.sort(first)]  # a belief that keeps one group a prompt and step is not to lose by that
        num_right = random.binomial(RESPONSES, rates[batch]).astype(np.float64)
        num_groups += len(batch)
        for name, belief in beliefs.items():
            means = belief.pass_rates()
            assert means is not None, name
            losses[name] += float((_loss(means[batch], num_right) - _loss(rates[batch], num_right)).sum())
            if step % measure_every == 0:
                measured[name].append({"step": step, **measure_belief(belief, rates)})
        for belief in (*beliefs.values(), drawing):
            belief.learn(batch, num_right, lambda indices, _: np.zeros(len(indices)))
        world.train(batch)
    rows = []
    for name in names:
        summary = _summary(measured[name], run.num_steps)
        kept = {key: value for key, value in summary.items() if "spearman" in key}
        rows.append({"estimator": name, "seed": run.seed, "log_loss": losses[name] / num_groups / RESPONSES, **kept})
    return rows


def _without_probes(name: str, run: Run) -> Uniform:
    policy = POLICIES[name](run)
    if isinstance(policy, Online):
        policy.probe_fraction = 0.0
    return policy


def _loss(rates: np.ndarray, num_right: np.ndarray) -> np.ndarray:
    """Nats that groups cost under these pass rates; one a hundredth from certainty at the most, for all alike."""
    rates = np.clip(rates, 0.001, 0.999)
    return -(num_right * np.log(rates) + (RESPONSES - num_right) * np.log1p(-rates))


def run_setting(
    setting: Setting | Path,
    names: Sequence[str],
    num_prompts: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    estimators: bool = False,
) -> list[dict[str, Any]]:
    """Every policy on one world. Each meets the same world, moved by what it trains on itself.

    With `estimators` the names' beliefs are compared instead, on one stream of observations.
    """

    def new_world() -> tuple[SimulatedPolicy | RecordedTrace, Run]:
        world: SimulatedPolicy | RecordedTrace
        if isinstance(setting, Path):
            world = RecordedTrace(setting)
            # The share of the pool that a step draws from 15,000 prompts would be 17 prompts of 512: too few to filter.
            size = max(8, min(batch_size, world.num_prompts // 16))
        else:
            world, size = SimulatedPolicy(setting, num_prompts, num_steps, seed), batch_size
        return world, Run(world.num_prompts, world.categories, world.clusters, size, world.num_steps, seed)

    world, run = new_world()
    measure_every = 4 if world.num_prompts <= 100_000 else 16
    if estimators:
        rows = compare_estimators(world, names, run, measure_every)
    else:
        rows = []
        for name in names:
            world, run = new_world()
            rows.append(run_policy(world, name, POLICIES[name](run), run, measure_every))
    name = world.name if isinstance(world, RecordedTrace) else world.setting.name
    return [{"setting": name, "num_prompts": world.num_prompts, **row} for row in rows]


_MEASURES = (
    "effective_per_rollout", "effective_group_fraction", "effective_response_fraction", "mean_variance_share",
    "signal_per_rollout", "visited_fraction", "extra_rollout_fraction", "log_loss", "spearman", "variance_spearman",
)  # fmt: skip


def mean_over_settings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each policy: means over settings and seeds, and `*_error`, the standard error over the seeds."""
    means = []
    label = "policy" if "policy" in rows[0] else "estimator"
    for name in dict.fromkeys(row[label] for row in rows):
        own = [row for row in rows if row[label] == name]
        mean: dict[str, Any] = {"setting": "mean", label: name}
        for measure in _MEASURES:
            if own[0].get(measure) is None:
                continue
            by_seed = [
                np.mean([row[measure] for row in own if row["seed"] == seed]) for seed in {row["seed"] for row in own}
            ]
            mean[measure] = float(np.mean(by_seed))
            mean[f"{measure}_error"] = float(np.std(by_seed, ddof=1) / len(by_seed) ** 0.5) if by_seed[1:] else 0.0
            if f"{measure}_by_quarter" in own[0]:
                mean[f"{measure}_by_quarter"] = np.mean([row[f"{measure}_by_quarter"] for row in own], axis=0).tolist()
        means.append(mean)
    return means


def mean_by_setting(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each setting and policy: the mean of its seeds."""
    means = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = mean_over_settings([row for row in rows if row["setting"] == setting])
        means += [{**row, "setting": setting} for row in own]
    return means


def table(means: Sequence[dict[str, Any]]) -> str:
    """Plain text, one line a setting and policy, with the standard error over seeds."""
    shown = [measure for measure in _MEASURES if any(measure in row for row in means)]
    heads = {measure: measure.replace("_fraction", "").replace("effective_", "eff_")[:15] for measure in shown}
    lines = [f"{'setting':<18}{'policy':<22}" + "".join(f"{heads[measure]:>17}" for measure in shown)]
    for row in means:
        cells = [f"{row[measure]:.3f} +-{row[f'{measure}_error']:.3f}" if measure in row else "-" for measure in shown]
        name = row.get("policy") or row["estimator"]
        lines.append(f"{row['setting']:<18}{name:<22}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines) + "\n"


def leads(means: Sequence[dict[str, Any]]) -> str:
    """In how many settings ours, as it ships, has more groups that teach a rollout than each rival, and where not."""
    found = {(row["setting"], row["policy"]): row["effective_per_rollout"] for row in means}
    settings = list(dict.fromkeys(setting for setting, _ in found))
    lines = []
    for rival in [name for name in POLICIES if not name.startswith("online")]:
        if any((setting, name) not in found for setting in settings for name in ("online", rival)):
            continue
        margins = {setting: found[setting, "online"] - found[setting, rival] for setting in settings}
        behind = [f"{setting} {margin:+.3f}" for setting, margin in margins.items() if margin <= 0.0]
        lines.append(
            f"online against {rival}, groups that teach a rollout: ahead in {len(settings) - len(behind)} of "
            f"{len(settings)}, mean {np.mean(list(margins.values())):+.3f}"
            + (f"; not in {', '.join(behind)}" if behind else "")
        )
    return "".join(f"{line}\n" for line in lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare curriculum samplers on simulated policies and recorded traces."
    )
    everywhere = [*SETTINGS, UNLIKE.name]
    parser.add_argument("--settings", nargs="+", choices=[*everywhere, *MOSTLY_DEAD])
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES))
    parser.add_argument("--estimators", action="store_true", help="compare beliefs on the same observations")
    parser.add_argument("--prompts", type=int, default=15_000, help="in the simulated data set")
    parser.add_argument("--steps", type=int, default=224)
    parser.add_argument("--batch", type=int, default=512, help="prompts a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--traces", type=Path, nargs="+", default=[], help=".npz files to replay instead of simulations"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the prompts and of the batch; minutes")
    parser.add_argument("--json", type=Path, help="write all rows, one for each seed")
    parser.add_argument("--plots", type=Path, help="folder for PNG files")
    options = parser.parse_args(arguments)
    options.policies = options.policies or (ESTIMATORS if options.estimators else DEFAULT_POLICIES)
    if options.quick:
        options.settings, options.prompts, options.batch = options.settings or everywhere, 3_750, 128
    options.settings = options.settings or list(SETTINGS)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    settings: list[Setting | Path] = list(options.traces)
    if not settings:
        known = SETTINGS | MOSTLY_DEAD | {UNLIKE.name: UNLIKE}
        settings = [known[name] for name in options.settings]
    rows = []
    for setting in settings:
        of_setting = []
        for seed in options.seeds:
            sizes = (options.prompts, options.steps, options.batch)
            of_setting += run_setting(setting, options.policies, *sizes, seed, options.estimators)
        sys.stdout.write(table(mean_by_setting(of_setting)))
        sys.stdout.flush()
        rows += of_setting
        if options.json:  # after each setting: a long run that is stopped keeps what it found
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    means = mean_by_setting(rows)
    sys.stdout.write(table(mean_over_settings(rows)) + ("" if options.estimators else leads(means)))
    if options.plots and not options.estimators:
        from curriculum_lab_plots import plot

        options.plots.mkdir(parents=True, exist_ok=True)
        plot(means, options.plots)


if __name__ == "__main__":
    main()
