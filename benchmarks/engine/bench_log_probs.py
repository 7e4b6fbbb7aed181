"""Log-probabilities of response tokens: the vocabulary in blocks (ours) beside the logits in one piece (plain).

    python benchmarks/engine/bench_log_probs.py [--json FILE] [--tokens T] [--time-tokens T] [--hidden H] [--rounds R]

Both take random hidden states, an output layer of the vocabulary and targets, with three forbidden tokens at
temperature 0.9, and give log-probabilities and entropies; float32 on the CPU. Passes: `forward` without a graph, as for
reference and old log-probabilities, and `forward_backward`.

Memory: each way and pass in a process of its own, which first runs it on two tokens so that what is loaded once is
there; then the peak of resident memory (VmHWM, set back by writing 5 to /proc/self/clear_refs) less what was resident
before the call: the weight and the inputs do not count, the gradients do. Linux only. The plain way takes some five
times tokens x vocabulary x 4 bytes; the program stops before it starts where that is not free.

Time: in one process, rounds in which each way runs once after the other; the ratio is the median over rounds of ours
over plain of the same round. Few tokens (--time-tokens) are enough for it: both grow in proportion to them.

The JSON file holds
  environment  threads, torch; settings: tokens, time_tokens, vocabulary, hidden, rounds
  memory       list of {pass, way, tokens, peak_bytes}
  time         list of {pass, way, tokens, seconds (median), rounds (seconds of each)}
  ratios       list of {what, pass, ratio (ours over plain), wanted, holds}; wanted and holds are null for no bar
  agreement    largest differences at --time-tokens: logprobs, entropies, grad_hidden, grad_weight (of its largest)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmr1_ds.engine.model.log_probs import plain_log_probs, token_log_probs

WAYS = {"plain": plain_log_probs, "ours": token_log_probs}
PASSES = ("forward", "forward_backward")
FORBIDDEN, TEMPERATURE = (7, 100, 101), 0.9
MEMORY_BAR, TIME_BAR = 0.25, 1.2
PLAIN_COPIES = 5.5  # of the logits, at the plain way's peak, with some room
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def make_inputs(num_tokens: int, vocabulary: int, hidden_size: int) -> list[torch.Tensor]:
    """Hidden states, weight, targets, and the gradient that comes from the loss."""
    random = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(num_tokens, hidden_size, generator=random)
    weight_VH = torch.randn(vocabulary, hidden_size, generator=random) / hidden_size**0.5
    targets_T = torch.randint(200, vocabulary, (num_tokens,), generator=random)
    return [hidden_TH, weight_VH, targets_T, torch.randn(num_tokens, generator=random)]


def run(way: str, which: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities, entropies, and for the pass with a backward the gradients of hidden states and weight."""
    hidden_TH, weight_VH, targets_T, gradient_T = inputs
    backward = which == "forward_backward"
    leaves = [hidden_TH.detach().requires_grad_(backward), weight_VH.detach().requires_grad_(backward)]
    logprobs_T, entropies_T = WAYS[way](*leaves, None, targets_T, FORBIDDEN, TEMPERATURE)
    if not backward:
        return [logprobs_T, entropies_T]
    logprobs_T.backward(gradient_T)
    return [logprobs_T.detach(), entropies_T, *(leaf.grad for leaf in leaves)]


def resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM: the peak since it was set back."""
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def measure_memory(way: str, which: str, num_tokens: int, vocabulary: int, hidden_size: int) -> int:
    """Peak bytes beyond what is resident before the call. For a fresh process."""
    inputs = make_inputs(num_tokens, vocabulary, hidden_size)
    run(way, which, [inputs[0][:2], inputs[1][:500], inputs[2][:2] % 200 + 200, inputs[3][:2]])
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is still resident would hide what the call takes
    CLEAR.write_text("5")
    before = resident_bytes("VmRSS")
    run(way, which, inputs)
    return resident_bytes("VmHWM") - before


def memory_rows(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    needed = PLAIN_COPIES * 4 * arguments.tokens * arguments.vocabulary
    for which in PASSES:
        for way in WAYS:
            available = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
            if way == "plain" and available < needed:
                sys.exit(
                    f"--tokens {arguments.tokens}: the plain way takes about {needed / 1e9:.1f} GB and "
                    f"{available / 1e9:.1f} GB are free; give fewer tokens"
                )
            command = [sys.executable, __file__, "--child", way, which]
            for name in ("tokens", "vocabulary", "hidden", "threads"):
                command += [f"--{name}", str(getattr(arguments, name))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"measuring the memory of {way}, {which}, failed:\n{done.stderr[-2000:]}")
            row = {"pass": which, "way": way, "tokens": arguments.tokens, "peak_bytes": int(done.stdout)}
            sys.stderr.write(f"memory {which} {way}: {row['peak_bytes'] / 1e9:.2f} GB\n")
            rows.append(row)
    return rows


def time_rows(arguments: argparse.Namespace) -> tuple[list[dict], dict[str, float]]:
    """Rows of seconds, and how far the two ways are apart."""
    inputs = make_inputs(arguments.time_tokens, arguments.vocabulary, arguments.hidden)
    seconds: dict[tuple[str, str], list[float]] = {(which, way): [] for which in PASSES for way in WAYS}
    results = {}
    for _ in range(arguments.rounds):
        for which, way in seconds:
            started = time.perf_counter()
            results[way] = run(way, which, inputs)
            seconds[which, way].append(time.perf_counter() - started)
    names = ("logprobs", "entropies", "grad_hidden", "grad_weight")
    agreement = {
        name: float((ours - plain).abs().max() / (plain.abs().max() if name.startswith("grad") else 1))
        for name, ours, plain in zip(names, results["ours"], results["plain"], strict=True)
    }
    rows = [
        {"pass": which, "way": way, "tokens": arguments.time_tokens, "seconds": statistics.median(all_), "rounds": all_}
        for (which, way), all_ in seconds.items()
    ]
    return rows, agreement


def ratio_rows(memory: list[dict], times: list[dict]) -> list[dict]:
    """Ours over plain, against the bars: a quarter of the memory, 1.2 times the time of forward and backward."""
    rows = []
    for what, table, wanted in (("peak memory", memory, MEMORY_BAR), ("time", times, TIME_BAR)):
        for which in PASSES:
            of_pass = {row["way"]: row for row in table if row["pass"] == which}
            if not of_pass:
                continue
            ours, plain = of_pass["ours"], of_pass["plain"]
            if what == "time":
                ratio = statistics.median(a / b for a, b in zip(ours["rounds"], plain["rounds"], strict=True))
            else:
                ratio = ours["peak_bytes"] / plain["peak_bytes"]
            rows.append({"what": what, "pass": which, "ratio": ratio, "wanted": wanted, "holds": ratio <= wanted})
    return rows


def report(result: dict) -> str:
    """The table that is printed."""
    settings = result["settings"]
    lines = [
        f"{settings['vocabulary']} tokens of vocabulary, hidden size {settings['hidden']}, float32, "
        f"{result['environment']['threads']} thread(s)"
    ]
    lines.append(f"{'':<36}{'tokens':>8}{'plain':>12}{'ours':>12}{'ours/plain':>12}{'wanted':>9}")
    for ratio in result["ratios"]:
        field, unit, table = ("seconds", 1, "time") if ratio["what"] == "time" else ("peak_bytes", 1e9, "memory")
        found = {row["way"]: row for row in result[table] if row["pass"] == ratio["pass"]}
        values = "".join(f"{found[way][field] / unit:>12.3f}" for way in WAYS)
        name = f"{ratio['what']} ({'s' if unit == 1 else 'GB'}), {ratio['pass']}"
        verdict = "holds" if ratio["holds"] else "MISSED"
        head = f"{name:<36}{found['ours']['tokens']:>8}{values}"
        lines.append(f"{head}{ratio['ratio']:>12.3f}{'<= ' + format(ratio['wanted'], 'g'):>9}  {verdict}")
    lines.append("differences: " + ", ".join(f"{name} {value:.1e}" for name, value in result["agreement"].items()))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="for memory; 0 leaves it out")
    parser.add_argument("--time-tokens", type=int, default=1024, help="for time; 0 leaves it out")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "PASS"), help="print one peak and end: used by the program")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        peak = measure_memory(*arguments.child, arguments.tokens, arguments.vocabulary, arguments.hidden)
        sys.stdout.write(f"{peak}\n")
        return
    times, agreement = time_rows(arguments) if arguments.time_tokens else ([], {})
    memory = memory_rows(arguments) if arguments.tokens else []
    settings = {name: getattr(arguments, name) for name in ("tokens", "time_tokens", "vocabulary", "hidden", "rounds")}
    result = {
        "environment": {"threads": arguments.threads, "torch": torch.__version__},
        "settings": settings,
        "memory": memory,
        "time": times,
        "ratios": ratio_rows(memory, times),
        "agreement": agreement,
    }
    sys.stdout.write(report(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
