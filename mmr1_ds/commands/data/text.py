"""The report as plain text, WIDTH columns wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping

from mmr1_ds.commands.data.figures import AnswerSummary, ImageSummary, RewardCheck, Spread
from mmr1_ds.commands.data.findings import Finding
from mmr1_ds.commands.data.rows import WHEN_DRAWN
from mmr1_ds.commands.data.summary import NEAR_LIMIT, DataReport, DataSetSummary, Lengths, Sample
from mmr1_ds.preflight.plan import counted

WIDTH = 100
BAR_WIDTH = 40
MOST_LINES = 12  # of categories
_INDENT = "  "


def in_words(report: DataReport) -> str:
    """Return the whole report, whose last line says whether these rows would stop a run."""
    takes = "text and images" if report.takes_images else "text alone"
    lines = [*_wrapped(f"model: {report.model}, takes {takes}; rows are counted from 0", ""), ""]
    for data_set in report.data_sets:
        lines += [*_data_set(data_set), ""]
    if report.num_shared is not None:
        lines += _wrapped(
            f"{counted(report.num_shared, 'validation row')} with the prompt, answer and images of a training row", ""
        )
    for note in report.notes:
        lines += _wrapped(f"note: {note}", "")
    if report.num_shared is not None or report.notes:
        lines.append("")
    for data_set in report.data_sets:
        for sample in data_set.samples:
            lines += [*_sample(data_set, sample), ""]
    verdict = "these rows would stop a run: see above" if report.stops_run else "no row would stop a run"
    return "\n".join([*lines, verdict]) + "\n"


def _data_set(found: DataSetSummary) -> Iterator[str]:
    yield f"{found.key}: {counted(found.num_rows, 'row')}, {found.num_usable:,} usable"
    for name, count in found.num_rows_by_file.items():
        yield from _wrapped(f"{_printable(name)}: {counted(count, 'row')}", _INDENT)
    for finding in found.findings:
        yield from _finding(finding, found.num_rows)
    for section in (
        _lengths(found.lengths, found.images is not None),
        _images(found.images),
        [f"{_INDENT}videos: {found.num_videos:,}"] if found.num_videos else [],
        _categories(found.categories, found.num_usable),
        _answers(found.answers, found.reward_check, found.num_usable),
    ):
        if lines := list(section):
            yield from ["", *lines]


def _finding(finding: Finding, num_rows: int) -> Iterator[str]:
    share = f"{counted(finding.num_rows, 'row')} ({_percent(finding.num_rows, num_rows)})"
    yield from _wrapped(f"{share} {finding.effect}: {_printable(finding.reason)}", _INDENT)
    more = finding.num_rows - len(finding.examples)
    ending = [f"{more:,} more"] if more else []
    if "..." in finding.reason:  # each row's own words say more
        for words in [*(f"{example.row}: {example.detail}" for example in finding.examples), *ending]:
            yield from _wrapped(words, _INDENT * 3)
        return
    details = ["" if example.detail == finding.reason else f" ({example.detail})" for example in finding.examples]
    shown = [example.row + detail for example, detail in zip(finding.examples, details, strict=True)]
    yield from _wrapped(f"in {', '.join(shown + ending)}", _INDENT * 3)


def _lengths(found: Lengths | None, has_images: bool) -> Iterator[str]:
    if found is None:
        return
    included = ", images included" if has_images else ""
    yield f"  tokens of a prompt{included} (data.max_prompt_length={found.limit})"
    near = f"{found.num_near_limit:,} ({found.near_limit_fraction:.1%}) over {NEAR_LIMIT:.0%} of the limit"
    yield f"    {_spread(found.spread)}; {near}"
    labels = [f"{bar.low:,}" if bar.low == bar.high else f"{bar.low:,} to {bar.high:,}" for bar in found.histogram]
    width = max(map(len, labels))
    most = max(bar.count for bar in found.histogram)
    for label, bar in zip(labels, found.histogram, strict=True):
        marks = "#" * math.ceil(bar.count * BAR_WIDTH / most)  # rounded up, so that a single prompt shows
        beyond = "  over the limit" if bar.low > found.limit else ""
        yield f"    {label:>{width}}  {marks:<{BAR_WIDTH}}  {bar.count:,}{beyond}"


def _images(found: ImageSummary | None) -> Iterator[str]:
    if found is None:
        return
    per_prompt = ", ".join(
        f"{prompts:,} with {number or 'none'}" for number, prompts in found.num_prompts_by_images.items()
    )
    prompts = counted(sum(found.num_prompts_by_images.values()), "prompt")
    yield from _wrapped(f"images: {found.num_images:,} in {prompts}: {per_prompt}", _INDENT)
    if found.width is None or found.height is None or found.tokens is None:
        return
    yield f"    width   {_spread(found.width)} pixels"
    yield f"    height  {_spread(found.height)} pixels"
    yield f"    tokens  {_spread(found.tokens)}; {found.token_fraction:.1%} of all tokens of the prompts"
    kinds = (
        (found.num_enlarged, "enlarged"),
        (found.num_shrunk, f"shrunk, a side by up to {found.strongest_shrinking:.1f} times"),
        (found.num_rounded, "only rounded to the multiples"),
        (found.num_unchanged, "left as they came"),
    )
    yield from _wrapped(
        f"brought to {found.min_pixels:,} to {found.max_pixels:,} pixels (data.min_pixels and max_pixels, inside the "
        f"processor's own), sides in multiples of {found.factor}: "
        + "; ".join(f"{count:,} ({_percent(count, found.num_images)}) {words}" for count, words in kinds if count),
        _INDENT * 2,
    )


def _categories(found: Mapping[str, int], num_usable: int) -> Iterator[str]:
    if not found:
        return
    yield f"  categories: {len(found):,}"
    names = {name: _printable(name, 60) or "(none)" for name in list(found)[:MOST_LINES]}
    width = max(map(len, names.values()))
    for name, shown in names.items():
        yield f"    {shown:<{width}}  {found[name]:>9,}  {_percent(found[name], num_usable)}"
    if len(found) > len(names):
        rest = sum(list(found.values())[MOST_LINES:])
        yield f"    and {len(found) - len(names):,} more with {counted(rest, 'row')}"


def _answers(found: AnswerSummary | None, check: RewardCheck | None, num_usable: int) -> Iterator[str]:
    if found is None:
        return
    yield from _wrapped(
        f"answers: {found.num_distinct:,} different, the longest of {counted(found.longest, 'character')}; "
        f"giving always the most frequent one is right for {found.majority_fraction:.1%} of rows",
        _INDENT,
    )
    for answer, count in found.most_frequent:
        yield f"    {count:>9,}  {_percent(count, num_usable):>6}  {_printable(answer, 70)}"
    if check is None:
        return
    asked = f"{check.num_answers:,} different answers, boxed as they are, given to the reward {check.reward_function}"
    verdict = "all are right"
    if check.num_refused:
        shown = ", ".join(repr(answer[:60]) for answer in check.refused)
        more = check.num_refused - len(check.refused)
        verdict = (
            f"{check.num_refused:,} of them wrong, so that no response to their prompts can be right: {shown}"
            + (f", {more:,} more" if more else "")
        )
    yield from _wrapped(f"{asked}: {verdict}", _INDENT * 2)
    if check.num_wrapped:
        shown = ", ".join(f"{_printable(one, 60)!r} as {_printable(inside, 40)!r}" for one, inside in check.wrapped)
        yield from _wrapped(
            f"{check.num_wrapped:,} of them stand in <answer>, behind #### or 'the answer is', or in a "
            f"solution with a \\boxed{{}}, and are read by what is inside: {shown}",
            _INDENT * 2,
        )
    if check.num_prose:
        shown = ", ".join(repr(_printable(answer, 60)) for answer in check.prose)
        yield from _wrapped(
            f"warning: {check.num_prose:,} of them are whole texts, which hardly a response can match: {shown}",
            _INDENT * 2,
        )
    if check.num_unclear:
        shown = ", ".join(repr(_printable(answer, 60)) for answer in check.unclear)
        yield from _wrapped(
            f"warning: {check.num_unclear:,} of them have tags or words around the answer, without which a response "
            f"does not match them: {shown}",
            _INDENT * 2,
        )


def _sample(data_set: DataSetSummary, sample: Sample) -> Iterator[str]:
    category = f", category {_printable(sample.category, 40)}" if sample.category else ""
    yield from _wrapped(
        f"{data_set.key} {_printable(sample.row)}: {counted(sample.num_tokens, 'token')}, "
        f"id {_printable(sample.prompt_id, 60)}{category}",
        "",
    )
    if sample.prompt is None:
        yield from _wrapped(f"{WHEN_DRAWN}: {_printable(sample.problem or '')}", _INDENT)
        return
    yield from _quoted(sample.prompt)
    yield f"  ground truth: {_printable(sample.ground_truth, 80)}"


def _quoted(text: str) -> Iterator[str]:
    """Put every line behind a bar; one that is too long continues behind a colon."""
    for line in text.split("\n"):
        first, *rest = textwrap.wrap(_printable(line), WIDTH - 4, drop_whitespace=False) or [""]
        yield f"  | {first}".rstrip()
        yield from (f"  : {part}".rstrip() for part in rest)


# --- words --------------------------------------------------------------------------------------------------------


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + _INDENT * 2,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _spread(found: Spread) -> str:
    if found.minimum == found.maximum:
        return f"all {found.minimum:,}"
    named = {"min": found.minimum, "median": found.median, "p90": found.p90, "p99": found.p99, "max": found.maximum}
    return ", ".join(f"{name} {value:,}" for name, value in named.items())


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _printable(text: str, most: int | None = None) -> str:
    """Escape control characters, which could rewrite the terminal, and cut the text to `most` characters."""
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return shown if most is None or len(shown) <= most else f"{shown[: most - 3]}..."
