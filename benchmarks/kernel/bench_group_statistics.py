"""Self-BLEU of groups of responses: our backends beside NLTK, sacrebleu, fast-bleu and plain torch, in one run.

    python benchmarks/kernel/bench_group_statistics.py [--json FILE] [--plot FILE.png] [--quick]

Responses are Zipf-distributed tokens over 150,000 ids (probability proportional to 1 / rank), their lengths spread by a
quarter around T. Every contender first scores some groups untimed, and must agree with our numpy reference: to 1e-9
(NLTK, sacrebleu, torch), 1e-6 (fast-bleu, which keeps its weights in float32), 1e-5 (Triton). Then rounds follow one
another, in each of which everyone is timed once: a ratio is the median over rounds of one contender's time over ours
of the same round. Slow contenders take fewer groups, and are left out where one group would take longer than
--rival-seconds; times are per group.

The JSON file holds
  environment   CPU model, cores, versions; load: the machine's one-minute load when the run began
  settings      seed, vocabulary, tokens_per_batch, rounds
  contenders    name -> description; absent: name -> why it could not run; ours: whom ratios compare with
  agreement     name -> largest difference of a group's self-BLEU from the reference
  sizes         list of {responses: N, tokens: T, groups, results: name -> {groups, seconds_per_group (median),
                rounds (seconds per group of each), tokens_per_second, slower_than_ours (median of ratios)}}
  exponents     name -> {responses, tokens}: b and c of seconds per group = a N^b T^c, least squares over all sizes
  memory        list of {contender, responses, tokens, groups, bytes_per_token}: peak resident memory over what lay
                there before the call, a process each
  verdicts      list of {bar, value, wanted, holds}; holds is null where the sizes were not run, and where nothing
                was wanted (null too): the ratio core for core, one thread of ours against one process of NLTK's
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import bench_group_statistics_report as report
import numpy as np
from bench_group_statistics_rivals import Contender, Groups, contenders, cpu_name

SEED = 0
VOCABULARY = 150_000
RESPONSES = (4, 8, 16, 32, 64)
TOKENS = (256, 1024, 2048, 4096, 8192, 32_768)
TOKENS_PER_BATCH = 2**21  # the largest group is one batch
ROUNDS = 5
RIVAL_SECONDS = 10.0  # a contender's single group may take this long
ROUND_SECONDS = 0.5  # a slow contender takes as many groups as fit in this
SHORTEST_TIMED_SECONDS = 0.05  # calls are repeated up to this, so that a clock tick or one interruption weighs little
VERSIONS = ("numpy", "torch", "nltk", "sacrebleu", "fast-bleu", "triton")


def zipf_groups(group_size: int, num_tokens: int, num_groups: int, seed: int = SEED) -> Groups:
    """Groups whose lengths are T - d and T + d by turns, d up to T / 4: G N T tokens, exactly for an even number."""
    random = np.random.default_rng(seed)
    num_responses = group_size * num_groups
    spread = random.integers(0, num_tokens // 4 + 1, (num_responses + 1) // 2)
    lengths = (num_tokens + np.stack([-spread, spread], axis=1)).reshape(-1)[:num_responses]
    lengths = random.permutation(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    cumulative = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    ranks = np.searchsorted(cumulative, random.random(offsets[-1]) * cumulative[-1])
    ids = random.permutation(VOCABULARY).astype(np.int32)  # frequent tokens lie anywhere among the ids
    return Groups(ids[np.minimum(ranks, VOCABULARY - 1)], offsets, group_size)


def seconds_of(work: Callable[[], Any], shortest: float) -> float:
    """Seconds of one call, of as many as fill `shortest`."""
    calls, started = 0, time.perf_counter()
    while True:
        work()
        calls += 1
        elapsed = time.perf_counter() - started
        if elapsed >= shortest:
            return elapsed / calls


class SizeRun:
    """All contenders on the groups of one size."""

    def __init__(self, everyone: list[Contender], ours: str, groups: Groups, oracle: np.ndarray) -> None:
        """`oracle`: self-BLEU of the first groups, by the reference."""
        self._everyone, self._ours, self._groups, self._oracle = everyone, ours, groups, oracle
        self.agreement: dict[str, float] = {}  # largest difference from the oracle

    def run(self, num_rounds: int, shortest: float) -> dict[str, Any]:
        """Check, warm up and time. Returns: name -> result, as in the JSON file."""
        work = {contender.name: self._checked(contender) for contender in self._everyone}
        rounds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(num_rounds):
            for name, (num_groups, call) in work.items():
                rounds[name].append(seconds_of(call, shortest) / num_groups)
        tokens_per_group = len(self._groups.token_ids) / self._groups.num_groups
        results = {}
        for name, seconds in rounds.items():
            ratios = [own / ours for own, ours in zip(seconds, rounds[self._ours], strict=True)]
            results[name] = {
                "groups": work[name][0],
                "seconds_per_group": statistics.median(seconds),
                "rounds": seconds,
                "tokens_per_second": tokens_per_group / statistics.median(seconds),
                "slower_than_ours": statistics.median(ratios),
            }
        return results

    def _checked(self, contender: Contender) -> tuple[int, Callable[[], np.ndarray]]:
        """Compare with the oracle, which warms up too. Returns: how many groups to time, and the call."""
        num_checked = len(self._oracle) if not contender.is_quadratic else 1
        sample = contender.prepare(self._groups.first(num_checked))
        started = time.perf_counter()
        found = contender.self_bleu(sample)
        seconds_per_group = (time.perf_counter() - started) / num_checked
        difference = float(np.abs(found - self._oracle[:num_checked]).max())
        if not difference <= contender.tolerance:
            raise SystemExit(f"{contender.name} differs from the reference by {difference:.2g}: nothing timed")
        self.agreement[contender.name] = difference
        num_groups = self._groups.num_groups
        if not contender.takes_all_groups:
            num_groups = max(1, min(num_groups, int(ROUND_SECONDS / seconds_per_group)))
        prepared = contender.prepare(self._groups.first(num_groups))
        if contender.takes_all_groups:
            contender.self_bleu(prepared)  # the sample was too small to warm up memory and threads
        return num_groups, lambda: contender.self_bleu(prepared)


class Predictor:
    """Guesses how long one group takes a contender, from what it took before: a group too slow is never begun."""

    def __init__(self) -> None:
        self._seconds_a_step: dict[str, float] = {}

    @staticmethod
    def _steps(contender: Contender, group_size: int, num_tokens: int) -> int:
        return group_size ** (2 if contender.is_quadratic else 1) * num_tokens

    def seconds(self, contender: Contender, group_size: int, num_tokens: int) -> float:
        return self._seconds_a_step.get(contender.name, 0.0) * self._steps(contender, group_size, num_tokens)

    def learn(self, contender: Contender, group_size: int, num_tokens: int, seconds: float) -> None:
        self._seconds_a_step[contender.name] = seconds / self._steps(contender, group_size, num_tokens)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark. Returns: what the JSON file holds."""
    num_threads = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    everyone, absent = contenders(num_threads)
    names = [contender.name for contender in everyone]
    ours = cpu_name(num_threads) if cpu_name(num_threads) in names else "reference"
    (reference,) = (contender for contender in everyone if contender.name == "reference")
    results: dict[str, Any] = {
        "environment": environment(num_threads, load),
        "settings": {
            "seed": SEED, "vocabulary": VOCABULARY, "tokens_per_batch": arguments.tokens_per_batch,
            "rounds": arguments.rounds,
        },
        "contenders": {contender.name: contender.description for contender in everyone},
        "absent": absent,
        "ours": ours,
        "agreement": dict.fromkeys(names, 0.0),
        "sizes": [],
    }  # fmt: skip
    sys.stdout.write(report.heading(results))
    predictor = Predictor()
    for group_size, num_tokens in sorted(product(arguments.responses, arguments.tokens), key=lambda s: s[0] * s[1]):
        groups = zipf_groups(group_size, num_tokens, max(1, arguments.tokens_per_batch // (group_size * num_tokens)))
        oracle = reference.self_bleu(groups.first(min(8, groups.num_groups)))
        able = [c for c in everyone if predictor.seconds(c, group_size, num_tokens) <= arguments.rival_seconds]
        size_run = SizeRun(able, ours, groups, oracle)
        timed = size_run.run(arguments.rounds, arguments.shortest)
        for contender in able:
            predictor.learn(contender, group_size, num_tokens, timed[contender.name]["seconds_per_group"])
        for name, difference in size_run.agreement.items():
            results["agreement"][name] = max(results["agreement"][name], difference)
        size = {"responses": group_size, "tokens": num_tokens, "groups": groups.num_groups, "results": timed}
        results["sizes"].append(size)
        sys.stdout.write(report.size_row(size, results))
        sys.stdout.flush()
    results["exponents"] = {name: fit for name in names if (fit := report.exponents(results["sizes"], name))}
    results["memory"] = [
        {"contender": name, "responses": n, "tokens": t, "groups": g, "bytes_per_token": bytes_per_token}
        for name, (n, t, g) in product([n for n in names if n != "reference"], arguments.memory_sizes)
        if (bytes_per_token := peak_memory(name, num_threads, n, t, g)) is not None
    ]
    results["verdicts"] = report.verdicts(results)
    return results


def peak_memory(name: str, num_threads: int, group_size: int, num_tokens: int, num_groups: int) -> float | None:
    """Bytes a token beyond the input, None for those measured elsewhere: GPUs, and libraries too slow to matter."""
    if not name.startswith("cpu_") and name != "torch":
        return None
    script = Path(__file__).with_name("bench_group_statistics_memory.py")
    words = [name, num_threads, group_size, num_tokens, num_groups]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # larger blocks come anew, from no free memory
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def environment(num_threads: int, load: float) -> dict[str, Any]:
    """The machine, without its name."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")
    return {
        "cpu": model[1].strip() if model else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None,
        "threads": num_threads,
        "python": platform.python_version(),
        "versions": versions,
        "load": round(load, 2),
    }


def main() -> None:
    words, _, keys = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=words, epilog=keys, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds: for tests of this program")
    parser.add_argument("--responses", type=_sizes, default=RESPONSES, metavar="N,N", help=f"default: {RESPONSES}")
    parser.add_argument("--tokens", type=_sizes, default=TOKENS, metavar="T,T", help=f"default: {TOKENS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument(
        "--rival-seconds", type=float, default=RIVAL_SECONDS, help=f"longest time of one group; default {RIVAL_SECONDS}"
    )
    arguments = parser.parse_args()
    arguments.tokens_per_batch, arguments.shortest = TOKENS_PER_BATCH, SHORTEST_TIMED_SECONDS
    arguments.memory_sizes = [(8, 2048, 128), (64, 32_768, 1)]
    if arguments.quick:
        arguments.responses, arguments.tokens, arguments.rounds = (4, 8), (32, 128), 2
        arguments.tokens_per_batch, arguments.shortest = 4096, 0.0
        arguments.memory_sizes = [(8, 2048, 2)]
    results = measure(arguments)
    sys.stdout.write(report.closing(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        report.plot(results, arguments.plot)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    main()
