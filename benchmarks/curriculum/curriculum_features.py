"""What the online refresh gains from the prompts' texts (data.curriculum_features=text), and what that costs.

    python benchmarks/curriculum/curriculum_features.py [--setting u_shaped_slow] [--prompts 100000] [--seeds 0 1 2]
        [--share 0.5] [--no-categories] [--draw posterior] [--kinds none text full] [--json FILE]
    python benchmarks/curriculum/curriculum_features.py --trace benchmarks/curriculum/data/real_text.npz --batch 8
        [--states FILE.npz]
    python benchmarks/curriculum/curriculum_features.py --table step_0.jsonl --states FILE.npz --batch 8 --seeds 0 1 2
    python benchmarks/curriculum/curriculum_features.py --cost [--prompts 1000000]

The first trains a simulated policy (224 steps of 512 prompts, 8 responses each, drawn as online ships) on prompts whose
difficulty is partly in their texts: without features, with those of the texts, with the same shuffled over the prompts,
which then say nothing, and beside them the published method, N = 16 and T = 56, with its half of a batch by score
(`full`) and with online's four fifths (`full_80`). With --trace the prompts, their texts and pass rates are those
recorded of a real model's training (benchmarks/real_model/traces.py), which the draws do not change. With --states
(what prompt_states.py wrote) features of the model's hidden states are judged as well: of the last token
(data.curriculum_features=model), and of the mean over the tokens. v is a prompt's true p(1-p).
Means over the second half:

spearman: rank correlation of the weights with v, over all prompts.
never_visited: the same over the prompts that no batch and no refresh has held so far; nan where there are few.
rate_never_visited: rank correlation of the predicted pass rates of these prompts with the true ones.
effective: groups trained on that are neither all right nor all wrong, mean over the run.
*_first_quarter: these over the first quarter of the run.
weight, explained: the metrics curriculum/feature_weight and feature_explained_fraction of the last step.

With --table the policy stands still, with the pass rates that one measurement found (mmr1-ds eval --pass-rates): the
beliefs learn from simulated groups of a random third of the prompts, and are judged by the others. `rate` is the rank
correlation of the predicted pass rates with the measured ones, `v` that of the weights with p(1-p), `less_none` by how
much `rate` is above that without features, `deviation` the standard error of that over the seeds.

The last measures bytes a prompt, and rank 0's time a step with and without features: weights, learning, the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from curriculum_lab import spearman
from curriculum_lab_policies import RESPONSES, FullRefresh, Online, Run
from curriculum_lab_texts import TextWorld, make_texts
from curriculum_lab_worlds import SETTINGS, UNLIKE, RecordedTrace

from mmr1_ds.curriculum.estimator import LogitFilter
from mmr1_ds.curriculum.metric_names import FEATURE_EXPLAINED_FRACTION, FEATURE_WEIGHT
from mmr1_ds.data.model_features import compress_states, projected
from mmr1_ds.data.text_features import SKETCH_BYTES, compress, sketch

_STEPS, _BATCH = 224, 512
_ROWS = 256  # sketched at a time
_FULL = {"full": 0.5, "full_80": 0.8}  # lambda


def features_of(texts: list[str]) -> np.ndarray:
    """(P, D) int8."""
    return compress(np.frombuffer(b"".join(_sketches(texts)), dtype=np.uint8).reshape(-1, SKETCH_BYTES))


def _sketches(texts: list[str]) -> Iterator[bytes]:
    for start in range(0, len(texts), _ROWS):
        part = texts[start : start + _ROWS]
        yield from sketch(part, [len(text) // 4 for text in part], [()] * len(part))


def run(
    world: TextWorld | RecordedTrace,
    batch_size: int,
    seed: int,
    kind: str,
    features: np.ndarray | None,
    told: bool,
    rule: str = "proportional",
) -> dict[str, float]:
    """Train for the world's steps. Args: told: the categories. Returns: what the module's docstring lists."""
    num_steps, every = world.num_steps, max(1, world.num_steps // 28)
    given = world.categories if told else np.zeros(world.num_prompts, dtype=np.int64)
    sizes = Run(world.num_prompts, given, given, batch_size, num_steps, seed)
    policy: FullRefresh | Online
    if kind in _FULL:
        policy = FullRefresh(sizes, 16, 56, _FULL[kind])
    else:
        policy = Online(sizes, rule)
        policy.filter = LogitFilter(world.num_prompts, given, RESPONSES, features=features)
    random = np.random.default_rng([seed, 4])
    unseen = np.ones(world.num_prompts, dtype=bool)
    found, effective = [], []
    for step in range(1, num_steps + 1):
        rates = world.pass_rates

        def roll(indices: np.ndarray, num_responses: int, rates: np.ndarray = rates) -> np.ndarray:
            unseen[indices] = False
            return random.binomial(num_responses, rates[indices]).astype(np.float64)

        policy.refresh(step, roll)
        if step % every == 0:
            value, weights = rates * (1.0 - rates), policy.scores()
            of_unseen = rate_of_unseen = np.nan
            if np.count_nonzero(unseen) > 50:
                of_unseen = spearman(weights[unseen], value[unseen])
                rate_of_unseen = spearman(policy.pass_rates()[unseen], rates[unseen])
            found.append((spearman(weights, value), of_unseen, rate_of_unseen))
        batch, num_right, _ = policy.batch(step, roll)
        effective.append(float(((num_right > 0) & (num_right < RESPONSES)).mean()))
        policy.learn(batch, num_right, roll)
        world.train(batch)
    late, early = np.array(found)[len(found) // 2 :].mean(axis=0), np.array(found)[: len(found) // 4].mean(axis=0)
    metrics = policy.filter.metrics() if isinstance(policy, Online) else {}
    return {
        "spearman": float(late[0]),
        "never_visited": float(late[1]),
        "rate_never_visited": float(late[2]),
        "effective": float(np.mean(effective)),
        "spearman_first_quarter": float(early[0]),
        "never_visited_first_quarter": float(early[1]),
        "rate_never_visited_first_quarter": float(early[2]),
        "effective_first_quarter": float(np.mean(effective[: num_steps // 4])),
        "weight": metrics.get(FEATURE_WEIGHT, 0.0),
        "explained": metrics.get(FEATURE_EXPLAINED_FRACTION, 0.0),
    }


def features_by_kind(
    texts: list[str], prompt_ids: list[str], states: Path | None, seed: int
) -> dict[str, np.ndarray | None]:
    """The features to compare, (P, D) int8 each. Args: states: a file of prompt_states.py, or None."""
    found: dict[str, np.ndarray | None] = {"none": None, "text": features_of(texts)}
    if states is not None:
        with np.load(states) as file:
            places = {name: place for place, name in enumerate(file["prompt_ids"].tolist())}
            rows = [places[name] for name in prompt_ids]
            for kind, name in (("model", "last"), ("model_mean", "mean")):
                found[kind] = compress_states(projected(file[name][rows], len(rows)))
    for kind in [kind for kind in ("text", "model") if kind in found]:
        shuffled = np.random.default_rng([seed, 7]).permutation(found[kind])
        found["shuffled" if kind == "text" else f"shuffled_{kind}"] = shuffled
    return found


def write_row(row: dict) -> None:
    cells = [f"{name} {cell:.3f}" if isinstance(cell, float) else str(cell) for name, cell in row.items()]
    sys.stdout.write("  ".join(cells) + "\n")
    sys.stdout.flush()


def compare(arguments: argparse.Namespace) -> None:
    setting = UNLIKE if arguments.setting == UNLIKE.name else SETTINGS[arguments.setting]
    name = setting.name if arguments.trace is None else arguments.trace.stem
    rows = []
    for seed in arguments.seeds:

        def world(seed: int = seed) -> TextWorld | RecordedTrace:
            if arguments.trace is not None:
                return RecordedTrace(arguments.trace)
            return TextWorld(setting, arguments.prompts, _STEPS, seed, arguments.share)

        first = world()
        ids = first.prompt_ids if isinstance(first, RecordedTrace) else []
        kinds = features_by_kind(first.texts, ids, arguments.states, seed) | dict.fromkeys(_FULL)
        unknown = set(arguments.kinds or ()) - kinds.keys()
        if unknown:
            sys.exit(f"--kinds {' '.join(sorted(unknown))}: unknown here; there are {' '.join(kinds)}")
        for kind in arguments.kinds or kinds:
            given = kinds[kind]
            row = {"setting": name, "seed": seed, "features": kind}
            row |= run(world(), arguments.batch, seed, kind, given, not arguments.no_categories, arguments.draw)
            write_row(row)
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def judge_table(arguments: argparse.Namespace) -> None:
    """Of a policy that stands still: what features say of the two thirds of the prompts that no group was of."""
    with np.load(arguments.states) as file:
        texts = dict(zip(file["prompt_ids"].tolist(), file["texts"].tolist(), strict=True))
    table = {row["prompt_id"]: row for row in map(json.loads, arguments.table.read_text().splitlines())}
    ids = [name for name in table if name in texts]
    rates = np.array([table[name]["pass_rate"] for name in ids])
    names = [table[name]["category"] if arguments.families is None else "" for name in ids]
    if arguments.families is not None:
        family = {row["id"]: row["family"] for row in json.loads(arguments.families.read_text())}
        names = [family[name] for name in ids]
    _, categories = np.unique(names, return_inverse=True)
    if arguments.no_categories:
        categories = np.zeros(len(ids), dtype=np.int64)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        kinds = features_by_kind([texts[name] for name in ids], ids, arguments.states, seed)
        for kind, given in kinds.items():
            row = judge(rates, categories, given, arguments.batch, seed)
            found.setdefault(kind, []).append(row | {"less_none": 0.0})
            found[kind][-1]["less_none"] = row["rate"] - found["none"][-1]["rate"]
    rows = []
    for kind, of_seeds in found.items():
        less = [row["less_none"] for row in of_seeds]
        row = {"features": kind} | {name: float(np.mean([one[name] for one in of_seeds])) for name in of_seeds[0]}
        rows.append(row | {"deviation": float(np.std(less) / np.sqrt(len(less)))})
        write_row(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def judge(
    rates: np.ndarray, categories: np.ndarray, features: np.ndarray | None, batch_size: int, seed: int
) -> dict[str, float]:
    """Learn from a third of the prompts, predict the others."""
    random = np.random.default_rng([seed, 1])
    order = random.permutation(len(rates))
    asked, others = np.split(order, [len(rates) // 3])
    belief = LogitFilter(len(rates), categories, RESPONSES, features=features)
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        right = random.binomial(RESPONSES, rates[batch]).astype(np.float64)
        belief.observe(batch, right, np.full(len(batch), RESPONSES))
        belief.predict_step(np.empty(0, dtype=np.int64))
    true, metrics = rates[others], belief.metrics()
    return {
        "rate": spearman(belief.predicted_pass_rates(others), true),
        "v": spearman(belief.weights("learnability")[others], true * (1.0 - true)),
        "weight": metrics.get(FEATURE_WEIGHT, 0.0),
        "explained": metrics.get(FEATURE_EXPLAINED_FRACTION, 0.0),
    }


def cost(num_prompts: int) -> None:
    random = np.random.default_rng(0)
    texts, _ = make_texts(min(num_prompts, 20_000), random)
    start = time.perf_counter()
    rows = np.frombuffer(b"".join(_sketches(texts)), dtype=np.uint8).reshape(-1, SKETCH_BYTES)
    sketching = (time.perf_counter() - start) / len(texts)
    rows = np.resize(rows, (num_prompts, SKETCH_BYTES))
    start = time.perf_counter()
    features = compress(rows)
    compressing = time.perf_counter() - start
    del rows
    sys.stdout.write(f"in the scan {1e3 * sketching:.3f} ms a prompt; compressing, once, {compressing:.1f} s\n")
    categories = random.integers(8, size=num_prompts)
    for name, given in (("none", None), ("text", features)):
        belief = LogitFilter(num_prompts, categories, RESPONSES, features=given)
        arrays = belief.arrays().values()
        size = sum(array.nbytes for array in arrays if len(array) == num_prompts) / num_prompts + 2  # the category
        times = []
        for _ in range(7):
            batch = random.integers(num_prompts, size=_BATCH)
            right = random.binomial(RESPONSES, 0.4, size=_BATCH).astype(np.float64)
            begin = time.perf_counter()
            belief.weights("learnability")
            weighed = time.perf_counter()
            belief.observe(batch, right, np.full(_BATCH, RESPONSES))
            belief.predict_step(batch)
            learned = time.perf_counter()
            belief.metrics()
            times.append([weighed - begin, learned - weighed, time.perf_counter() - learned])
        parts = [1e3 * statistics.median(column) for column in zip(*times[1:], strict=True)]
        sys.stdout.write(
            f"{name:<6}{size:6.0f} bytes a prompt;  weights {parts[0]:7.1f} ms  learning {parts[1]:6.1f} ms  "
            f"metrics {parts[2]:5.1f} ms  a step {sum(parts):7.1f} ms\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--setting", choices=[*SETTINGS, UNLIKE.name], default="u_shaped_slow")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--trace", type=Path, help="an .npz of pass rates with texts, in place of a simulation")
    parser.add_argument("--states", type=Path, help="hidden states of the prompts, by prompt_states.py")
    parser.add_argument("--table", type=Path, help="pass rates of one policy, in place of a training; needs --states")
    parser.add_argument("--families", type=Path, help="with --table: the data, whose `family` is the category")
    parser.add_argument("--batch", type=int, default=_BATCH, help="prompts a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=0.5, help="of the logits' variance that is in the texts")
    parser.add_argument("--no-categories", action="store_true")
    parser.add_argument("--kinds", nargs="+", help="rows to make, for example: none text full; all unless given")
    parser.add_argument("--draw", choices=["proportional", "posterior"], default="proportional", help="online's rule")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.cost:
        cost(arguments.prompts or 1_000_000)
    elif arguments.table is not None:
        judge_table(arguments)
    else:
        arguments.prompts = arguments.prompts or 100_000
        compare(arguments)


if __name__ == "__main__":
    main()
