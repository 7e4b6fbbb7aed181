"""`mmr1-ds score FILE`: the scores of given responses, without a model: the scoring kernel as a tool of its own."""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import mmr1_kernels
import numpy as np

from mmr1_ds.cluster.exits import EXIT_INTERRUPTED, tell
from mmr1_ds.commands.score.files import ResponseGroup, open_output, open_responses, read_groups, shown_name
from mmr1_ds.commands.score.tokens import Tokenize, open_tokenizer
from mmr1_ds.curriculum.metric_names import (
    LEARNABILITY,
    OUTCOME_METRICS,
    SELF_BLEU,
    canonical_metric,
    check_metrics,
    needs_edit_distance,
)
from mmr1_ds.curriculum.scores import metric_value, variance_promotion_score
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.errors import UserError

EXIT_BROKEN_PIPE = 141  # the shell's number for a reader that went away
BATCH_SIZE = 2**20  # tokens, or characters of text, of one call of the kernel; a larger group goes alone
DEFAULT_METRICS = f"{LEARNABILITY},{SELF_BLEU}"
DEFAULT_WEIGHTS = ".8,.2"

DESCRIPTION = """Score groups of responses: how much the outcomes of a prompt vary (OVS), how much the words of its
responses do (TDS), and both together (VPS), by which the curriculum draws prompts. Needs no GPU and no model."""
FORMAT = """FILE holds one JSON object a line, a prompt with its responses; groups may differ in size:

  {"prompt_id": "a", "responses": ["It is 3", "It is 4"], "accuracies": [1, 0]}
  {"prompt_id": "b", "responses": [[11, 5, 7], [11, 5], []], "accuracies": [0.5, null, 1], "rewards": [0.9, 0.1, 1]}

  prompt_id   a string or a whole number; default: the number of the line
  responses   text, split by --tokenizer, or lists of token ids: without prompt, padding and end-of-sequence
  accuracies  a number in [0, 1] a response, null where unknown; may be missing where --metrics ask for diversity alone
  rewards     a number a response; default: the accuracies
Other keys are passed over.

  OVS  P(1 - P) of the mean accuracy P
  TDS  1 - self-BLEU over 1-, 2- and 3-grams; 0 for a single response
  VPS  sum of --weights times --metrics; higher = sample it more

With --output one JSON object a prompt: these three in lower case, prompt_id, num_responses, num_tokens, pass_rate,
reward_mean, reward_variance, self_bleu, self_bleu_by_order and distinct (1-, 2-, 3-grams), edit_distance; null is
unknown. Without it a table of the highest VPS."""


@dataclass(frozen=True)
class PromptScore:
    """What is told of one prompt. NaN = unknown."""

    prompt_id: str | int
    num_responses: int
    num_tokens: int
    vps: float
    ovs: float  # [0, 0.25]
    tds: float  # [0, 1]
    pass_rate: float  # [0, 1]
    reward_mean: float
    reward_variance: float  # exactly 0 if and only if all rewards are equal
    self_bleu: float  # [0, 1]
    self_bleu_by_order: list[float]  # 3
    distinct: list[float]  # 3
    edit_distance: float  # [0, 1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command, and its help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, FORMAT
    parser.add_argument("file", metavar="FILE", help="JSON lines, gzip or not; - reads the standard input")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="a model's folder or hub name, or sacrebleu:13a (intl, zh, char)"
    )
    parser.add_argument("--metrics", help=f"as data.curriculum_metrics; default: {DEFAULT_METRICS}")
    parser.add_argument("--weights", help=f"one a metric; default: {DEFAULT_WEIGHTS}, or 1 each for --metrics")
    parser.add_argument("--output", metavar="FILE", help="JSON lines, gzip if it ends in .gz; - is the standard output")
    parser.add_argument("--force", action="store_true", help="overwrite the file that --output names")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows of the table; default: 20")


def main(arguments: argparse.Namespace) -> int:
    """Returns: the exit code; 2 after a user's mistake, told in one line on stderr."""
    try:
        _run(arguments)
    except UserError as error:
        return tell(error)
    except OSError as error:  # stdout's: all others are UserErrors. What it still holds would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # ... | head
            return EXIT_BROKEN_PIPE
        return tell(UserError(f"stdout: cannot be written: {error.strerror or error}"))
    except KeyboardInterrupt:
        sys.stderr.write("mmr1-ds: interrupted\n")
        return EXIT_INTERRUPTED
    return 0


def _run(arguments: argparse.Namespace) -> None:
    metrics, weights = _metrics(arguments.metrics, arguments.weights)
    if arguments.top < 1:
        raise UserError(f"--top must be at least 1, got {arguments.top}")
    started = time.perf_counter()
    with open_responses(arguments.file) as file:
        with open_output(arguments.output, arguments.file, arguments.force) as write:
            tokenize = None if arguments.tokenizer is None else open_tokenizer(arguments.tokenizer)
            summary = Summary(arguments.top)
            needs_accuracies = any(metric in OUTCOME_METRICS for metric in metrics)
            groups = read_groups(file, shown_name(arguments.file), needs_accuracies, tokenize is not None)
            for batch in _batches(groups):
                packed = _pack(batch, tokenize)
                kernel_started = time.perf_counter()
                scores = score_groups(batch, *packed, metrics, weights)
                summary.kernel_seconds += time.perf_counter() - kernel_started
                for score in scores:
                    write(_json_line(score))
                    summary.add(score)
            if summary.num_prompts == 0:
                raise UserError(f"{shown_name(arguments.file)}: holds no groups of responses")
    told = summary.text(time.perf_counter() - started)
    if arguments.output == "-":
        sys.stderr.write(told)
    else:
        sys.stdout.write(told if arguments.output is not None else f"{summary.table()}\n{told}")
    sys.stdout.flush()


def _metrics(names: str | None, weights: str | None) -> tuple[list[str], list[float]]:
    """Names, in the guide's spelling, and weights. Raises: UserError."""
    chosen = [name.strip() for name in (DEFAULT_METRICS if names is None else names).split(",")]
    if weights is None:
        weights = DEFAULT_WEIGHTS if names is None else ",".join("1" * len(chosen))
    numbers = []
    for word in weights.split(","):
        try:
            numbers.append(float(word))
        except ValueError as error:
            raise UserError(f"--weights: {word.strip()!r} is no number; give one a metric, as in .8,.2") from error
    try:
        check_metrics(chosen, numbers)
    except UserError as error:
        told = str(error).replace("data.curriculum_metric_weights", "--weights")
        raise UserError(told.replace("data.curriculum_metrics", "--metrics")) from error
    return [canonical_metric(name) for name in chosen], numbers


def _batches(groups: Iterable[ResponseGroup]) -> Iterator[list[ResponseGroup]]:
    """Groups in order, as many at a time as BATCH_SIZE allows, one at least."""
    batch: list[ResponseGroup] = []
    size = 0
    for group in groups:
        if batch and size + group.size > BATCH_SIZE:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += group.size
    if batch:
        yield batch


def _pack(batch: Sequence[ResponseGroup], tokenize: Tokenize | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids (total,) int32 of all responses, offsets (B + 1,) int64, group offsets (G + 1,) int64."""
    texts = [text for group in batch if group.texts is not None for text in group.texts]
    # Text without a tokenizer was refused when it was read.
    of_texts = iter(tokenize(texts) if tokenize is not None and texts else [])
    responses = []
    for group in batch:
        responses += [next(of_texts) for _ in group.texts] if group.texts is not None else group.token_ids or []
    token_ids = np.concatenate(responses)
    offsets = np.cumsum([0, *map(len, responses)], dtype=np.int64)
    return token_ids, offsets, np.cumsum([0, *(group.num_responses for group in batch)], dtype=np.int64)


def score_groups(
    batch: Sequence[ResponseGroup],
    token_ids: np.ndarray,
    offsets: np.ndarray,
    group_offsets: np.ndarray,
    metrics: Sequence[str],
    weights: Sequence[float],
) -> list[PromptScore]:
    """Scores of each group, in order, by one call of the kernel. Args: as `_pack` and `_metrics` give them."""
    rewards = np.concatenate([group.rewards for group in batch])
    accuracies = np.concatenate([group.accuracies for group in batch])
    # The kernel wants every reward; a group with an unknown one is told as unknown below.
    found = mmr1_kernels.group_statistics(
        token_ids, offsets, np.nan_to_num(rewards), accuracies, None, group_offsets=group_offsets
    )
    edit_distances = np.full(len(batch), np.nan)
    if needs_edit_distance(metrics):
        try:
            edit_distances = mmr1_kernels.mean_edit_distance(token_ids, offsets, None, group_offsets=group_offsets)
        except ImportError as error:
            raise UserError(f"--metrics: edit-distance does not import ({error}); install rapidfuzz") from error
    scores = []
    for g, group in enumerate(batch):
        knows_rewards = not np.isnan(group.rewards).any()
        statistics = PromptStatistics(
            index=g,
            num_responses=group.num_responses,
            pass_rate=float(found.pass_rate[g]),
            reward_mean=float(found.reward_mean[g]) if knows_rewards else math.nan,
            reward_variance=float(found.reward_variance[g]) if knows_rewards else math.nan,
            self_bleu=float(found.self_bleu[g]),
            distinct_3=float(found.distinct[g, 2]),
            edit_distance=float(edit_distances[g]),
        )
        scores.append(
            PromptScore(
                prompt_id=group.prompt_id,
                num_responses=group.num_responses,
                num_tokens=int(offsets[group_offsets[g + 1]] - offsets[group_offsets[g]]),
                vps=variance_promotion_score(statistics, metrics, weights),
                ovs=float(found.outcome_variance[g]),
                tds=metric_value(statistics, SELF_BLEU),
                pass_rate=statistics.pass_rate,
                reward_mean=statistics.reward_mean,
                reward_variance=statistics.reward_variance,
                self_bleu=statistics.self_bleu,
                self_bleu_by_order=found.self_bleu_by_order[g].tolist(),
                distinct=found.distinct[g].tolist(),
                edit_distance=statistics.edit_distance,
            )
        )
    return scores


class Summary:
    """Totals of all prompts, and the highest few."""

    def __init__(self, num_rows: int) -> None:
        self.num_prompts = self.num_responses = self.num_tokens = 0
        self.kernel_seconds = 0.0
        self._sums = {"ovs": 0.0, "tds": 0.0, "vps": 0.0}
        self._known = dict.fromkeys(self._sums, 0)
        self._known_rewards = self._varied_rewards = 0
        self._num_rows = num_rows
        self._highest: list[tuple[float, int, PromptScore]] = []  # a heap, the lowest first

    def add(self, score: PromptScore) -> None:
        self.num_prompts += 1
        self.num_responses += score.num_responses
        self.num_tokens += score.num_tokens
        for name in self._sums:
            value = getattr(score, name)
            if not math.isnan(value):
                self._sums[name] += value
                self._known[name] += 1
        if not math.isnan(score.reward_variance):
            self._known_rewards += 1
            self._varied_rewards += score.reward_variance > 0
        # Of equal scores the earlier one is shown; an unknown score comes last.
        entry = (-math.inf if math.isnan(score.vps) else score.vps, -self.num_prompts, score)
        if len(self._highest) < self._num_rows:
            heapq.heappush(self._highest, entry)
        else:
            heapq.heappushpop(self._highest, entry)

    def table(self) -> str:
        """The rows of the highest VPS, highest first."""
        rows: list[tuple[str, ...]] = [("prompt_id", "responses", "tokens", "pass rate", "OVS", "TDS", "VPS")]
        for _, _, score in sorted(self._highest, reverse=True):
            numbers = (score.pass_rate, score.ovs, score.tds, score.vps)
            counts = f"{score.num_responses:,}", f"{score.num_tokens:,}"
            rows.append((_printable(score.prompt_id), *counts, *map(_decimal, numbers)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *others in rows:
            cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
            lines.append("  ".join(cells) + "\n")
        if self.num_prompts > len(self._highest):
            lines.append(f"({len(self._highest):,} of {self.num_prompts:,}, the highest VPS; --output has all)\n")
        return "".join(lines)

    def text(self, seconds: float) -> str:
        """Totals, one thing a line."""
        means = []
        for name, total in self._sums.items():
            known = self._known[name]
            unknown = self.num_prompts - known
            noted = f" ({unknown:,} unknown)" if 0 < unknown < self.num_prompts else ""
            means.append(f"{name.upper()} {_decimal(total / known if known else math.nan)}{noted}")
        share = f"{self._varied_rewards / self._known_rewards:.1%}" if self._known_rewards else "-"
        speed = self.num_tokens / max(seconds, 1e-9)
        kernel_speed = self.num_tokens / max(self.kernel_seconds, 1e-9)
        return (
            f"{self.num_prompts:,} prompts, {self.num_responses:,} responses, {self.num_tokens:,} tokens\n"
            f"mean {', '.join(means)}\n"
            f"groups with reward variance: {share}\n"
            f"{seconds:.2f} s, {speed:,.0f} tokens/s; scoring alone {self.kernel_seconds:.2f} s, "
            f"{kernel_speed:,.0f} tokens/s\n"
        )


def _decimal(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _printable(prompt_id: str | int) -> str:
    text = "".join(character if character.isprintable() else "?" for character in str(prompt_id))
    return text if len(text) <= 40 else f"{text[:37]}..."


def _json_line(score: PromptScore) -> str:
    """JSON has no NaN: null. Half an emoji in an id stays escaped, as it came."""
    values = {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(score).items()
    }
    return json.dumps(values) + "\n"
