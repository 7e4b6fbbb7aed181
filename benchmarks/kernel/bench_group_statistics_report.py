"""Tables, fits, verdicts and the plot of `bench_group_statistics.py`, from the dictionary that its JSON file holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLUMN = 18
MARKERS = {
    "cpu": ("#1b6ca8", "o"),
    "reference": ("#7fb3d5", "s"),
    "triton": ("#117a65", "D"),
    "torch": ("#8e44ad", "v"),
    "nltk": ("#c0392b", "^"),
    "sacrebleu": ("#d68910", "<"),
    "fast_bleu": ("#7d6608", ">"),
}
LARGEST_EXPONENT, LARGEST_BYTES_PER_TOKEN, LEAST_TOKENS_PER_SECOND = 1.1, 40.0, 20e6
LEAST_SPEED_UPS = {(8, 2048): 1000.0, (32, 2048): 3000.0}  # (N, T) -> times one NLTK process, with all threads
RIVAL = "against one NLTK process, as upstream calls it (a Ray task a prompt)"
NUMBER_WORDS = {1: "one thread", 2: "two threads"}


# --- numbers -----------------------------------------------------------------------------------------------------


def exponents(sizes: Sequence[dict[str, Any]], name: str) -> dict[str, float] | None:
    """Least squares of log seconds per group = log a + b log N + c log T; None with too few sizes to tell."""
    points = [
        (size["responses"], size["tokens"], size["results"][name]["seconds_per_group"])
        for size in sizes
        if name in size["results"]
    ]
    logs = np.log(np.array(points, dtype=np.float64).reshape(-1, 3))
    if len(np.unique(logs[:, 0])) < 2 or len(np.unique(logs[:, 1])) < 2:
        return None
    unknowns = np.column_stack([np.ones(len(logs)), logs[:, :2]])
    fitted = np.linalg.lstsq(unknowns, logs[:, 2], rcond=None)[0]
    return {"responses": float(fitted[1]), "tokens": float(fitted[2])}


def verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked of the CPU backend, and what was measured; core for core nothing was asked."""
    timed = {(size["responses"], size["tokens"]): size["results"] for size in results["sizes"]}
    ours = results["ours"]
    found = []
    for (responses, tokens), wanted in LEAST_SPEED_UPS.items():
        at_size = timed.get((responses, tokens), {})
        threads = results["environment"]["threads"]
        threads_words = NUMBER_WORDS.get(threads, f"{threads} threads")
        bar = f"times faster at N={responses}, T={tokens:,}, {threads_words} {RIVAL}"
        found.append(_verdict(bar, at_size.get("nltk", {}).get("slower_than_ours"), wanted, at_least=True))
        bar = f"times faster at N={responses}, T={tokens:,}, core for core: one thread against one NLTK process"
        found.append({"bar": bar, "value": _times_slower("nltk", "cpu_1", at_size), "wanted": None, "holds": None})
    speed = timed.get((8, 2048), {}).get("cpu_1", {}).get("tokens_per_second")
    found.append(_verdict("tokens/s of one core at N=8, T=2,048", speed, LEAST_TOKENS_PER_SECOND, at_least=True))
    for axis, letter in (("responses", "N"), ("tokens", "T")):
        for name in sorted({"cpu_1", ours}):
            exponent = results["exponents"].get(name, {}).get(axis)
            found.append(_verdict(f"exponent of {letter}, {name}", exponent, LARGEST_EXPONENT, at_least=False))
    used = [entry["bytes_per_token"] for entry in results["memory"] if entry["contender"].startswith("cpu_")]
    found.append(_verdict("extra bytes a token, most", max(used, default=None), LARGEST_BYTES_PER_TOKEN, False))
    return found


def _times_slower(name: str, other: str, at_size: dict[str, Any]) -> float | None:
    """Median over rounds of the ratio of their times in the same round; None where one of them was not run."""
    if name not in at_size or other not in at_size:
        return None
    pairs = zip(at_size[name]["rounds"], at_size[other]["rounds"], strict=True)
    return statistics.median(own / others for own, others in pairs)


def _verdict(bar: str, value: float | None, wanted: float, at_least: bool) -> dict[str, Any]:
    holds = None if value is None else bool(value >= wanted if at_least else value < wanted)
    return {"bar": bar, "value": value, "wanted": f"{'>=' if at_least else '<'} {wanted:,g}", "holds": holds}


# --- text --------------------------------------------------------------------------------------------------------


def heading(results: dict[str, Any]) -> str:
    """Who runs on what, and the head of the table."""
    machine = results["environment"]
    lines = [f"{machine['cpu']}, {machine['threads']} threads; GPU: {machine['gpu'] or 'none'}; load {machine['load']}"]
    lines += [f"  {name:<10} {description}" for name, description in results["contenders"].items()]
    lines += [f"  {name:<10} absent: {reason}" for name, reason in results["absent"].items()]
    lines += ["", f"time a group, and how many times slower than {results['ours']} in the same rounds", ""]
    names = "".join(name.rjust(COLUMN) for name in results["contenders"])
    return "\n".join(lines) + f"\n{'N':>3}{'T':>7}{'groups':>7}{names}\n"


def size_row(size: dict[str, Any], results: dict[str, Any]) -> str:
    cells = []
    for name in results["contenders"]:
        found = size["results"].get(name)
        times = "" if found is None or name == results["ours"] else f" x{_short(found['slower_than_ours'])}"
        cells.append("-" if found is None else duration(found["seconds_per_group"]) + times)
    row = "".join(cell.rjust(COLUMN) for cell in cells)
    return f"{size['responses']:>3}{size['tokens']:>7}{size['groups']:>7}{row}\n"


def closing(results: dict[str, Any]) -> str:
    """Speeds, fits, memory, agreement and verdicts."""
    lines = ["", "million tokens/s of one core, ours (T across, N down)"]
    tokens = sorted({size["tokens"] for size in results["sizes"]})
    lines.append(" " * 4 + "".join(f"{count:>8}" for count in tokens))
    for responses in sorted({size["responses"] for size in results["sizes"]}):
        speeds = {
            size["tokens"]: size["results"]["cpu_1"]["tokens_per_second"] / 1e6
            for size in results["sizes"]
            if size["responses"] == responses and "cpu_1" in size["results"]
        }
        lines.append(f"{responses:>4}" + "".join(f"{speeds.get(count, math.nan):>8.1f}" for count in tokens))
    lines += ["", "seconds a group = a N^b T^c"]
    lines += [
        f"  {name:<10} b {fit['responses']:5.2f}  c {fit['tokens']:5.2f}" for name, fit in results["exponents"].items()
    ]
    lines += ["", "peak extra memory, bytes a token"]
    for entry in results["memory"]:
        size = f"N={entry['responses']} T={entry['tokens']:,} {entry['groups']} groups"
        lines.append(f"  {entry['contender']:<10} {entry['bytes_per_token']:7.1f}  {size}")
    lines += ["", "largest difference from the reference"]
    lines += [f"  {name:<10} {difference:.1e}" for name, difference in results["agreement"].items()]
    lines += [""]
    words = {True: "yes", False: "NO", None: "not run"}
    for verdict in results["verdicts"]:
        value = "-" if verdict["value"] is None else _short(verdict["value"])
        if verdict["wanted"] is None:
            lines.append(f"{'no bar':<8}{verdict['bar']}: {value}")
        else:
            lines.append(f"{words[verdict['holds']]:<8}{verdict['bar']}: {value} (wanted {verdict['wanted']})")
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- plot --------------------------------------------------------------------------------------------------------


def plot(results: dict[str, Any], path: Path) -> None:
    """Time against T and against N, both logarithmic, with fitted exponents; how many times slower each rival is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_tokens, by_responses, bars) = pyplot.subplots(
        1, 3, figsize=(16, 6), width_ratios=(1, 1, 1.1), layout="constrained"
    )
    by_responses.sharey(by_tokens)
    responses, tokens = _middle(results, "responses", 8), _middle(results, "tokens", 2048)
    _lines(by_tokens, results, "tokens", "responses", responses)
    by_tokens.set(xlabel="T, tokens a response", ylabel="seconds a group", title=f"N = {responses} responses")
    _lines(by_responses, results, "responses", "tokens", tokens)
    by_responses.set(xlabel="N, responses a group", title=f"T = {tokens:,} tokens")
    figure.legend(
        *by_tokens.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9,
        title="time fitted over all N and T", title_fontsize=9,
    )  # fmt: skip
    _bars(bars, results, tokens)
    machine = results["environment"]
    figure.suptitle(
        f"Self-BLEU-123 of groups of responses, exact; {machine['cpu']}, {machine['threads']} cores", fontsize=11
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _middle(results: dict[str, Any], axis: str, wanted: int) -> int:
    """The size wanted where it was run, else the largest."""
    run = sorted({size[axis] for size in results["sizes"]})
    return wanted if wanted in run else run[-1]


def _style(name: str) -> dict[str, Any]:
    color, marker = MARKERS[name.partition("_")[0] if name not in MARKERS else name]
    dashed = name == "cpu_1" or name.endswith("_gpu")
    return {"color": color, "marker": marker, "linestyle": "--" if dashed else "-"}


def _lines(axes: Any, results: dict[str, Any], axis: str, fixed_axis: str, fixed: int) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    ticks = set()
    for name in results["contenders"]:
        points = sorted(
            (size[axis], size["results"][name]["seconds_per_group"])
            for size in results["sizes"]
            if size[fixed_axis] == fixed and name in size["results"]
        )
        if not points:
            continue
        fit = results["exponents"].get(name)
        slope = "" if fit is None else f", N^{fit['responses']:.2f} T^{fit['tokens']:.2f}"
        axes.plot(*zip(*points, strict=True), label=f"{name}{slope}", markersize=5, **_style(name))
        ticks |= {point[0] for point in points}
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, alpha=0.3)


def _bars(axes: Any, results: dict[str, Any], tokens: int) -> None:
    """One group of bars a rival, one bar a number of responses."""
    sizes = sorted((s for s in results["sizes"] if s["tokens"] == tokens), key=lambda size: size["responses"])
    rivals = [name for name in results["contenders"] if not name.startswith("cpu_")]
    width = 0.8 / len(sizes)
    for at, size in enumerate(sizes):
        shade = 0.35 + 0.6 * at / max(1, len(sizes) - 1)
        for place, name in enumerate(rivals):
            if name not in size["results"]:
                continue
            ratio = size["results"][name]["slower_than_ours"]
            position = place + (at - (len(sizes) - 1) / 2) * width
            label = f"N = {size['responses']}" if place == 0 else None
            axes.bar(position, ratio, width, color=str(1 - shade), label=label)
            axes.text(position, ratio * 1.08, _short(ratio), ha="center", va="bottom", fontsize=7, rotation=90)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rivals)), rivals, fontsize=9)
    axes.set_ylim(1, axes.get_ylim()[1] * 3)  # from equal on, with room for the figures on the bars
    axes.set(title=f"times slower than {results['ours']} at T = {tokens:,}")
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(True, axis="y", alpha=0.3)
