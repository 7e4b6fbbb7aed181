"""The figures of data sets: the records that both the text and the JSON are written from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.commands.data.figures import (
    AnswerSummary,
    Bin,
    ImageSummary,
    RewardCheck,
    Spread,
    check_reward,
    histogram,
    spread,
    summarise_answers,
    summarise_images,
)
from mmr1_ds.commands.data.findings import Finding, SurveyedRows, find
from mmr1_ds.config import RunConfig
from mmr1_ds.data.rows import RowReader
from mmr1_ds.data.sources import list_names
from mmr1_ds.errors import UserError
from mmr1_ds.rewards.tagged import with_opening

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

TRAIN, VALIDATION = "data.train_files", "data.val_files"
NEAR_LIMIT = 0.9  # share of data.max_prompt_length
_ASKED_FOR = {"math": "\\boxed", "r1v": "<answer>", "openr1_wo_LMM": "<answer>"}  # reward -> what it looks for


@dataclass(frozen=True)
class Lengths:
    """The tokens of the prompts that could be measured, over-long ones included."""

    limit: int  # data.max_prompt_length
    spread: Spread
    num_near_limit: int  # over NEAR_LIMIT of it, and not over it
    near_limit_fraction: float  # of all measured, [0, 1]
    histogram: list[Bin]


@dataclass(frozen=True)
class Sample:
    """One prompt."""

    row: str  # names it
    prompt_id: str
    category: str
    num_tokens: int
    prompt: str | None  # from its token ids; the placeholder of an image reads <image 448x448, 256 tokens>
    problem: str | None  # why there is no prompt: what stops a run that draws it
    ground_truth: str


@dataclass(frozen=True)
class DataSetSummary:
    """The summary of data.train_files or of data.val_files."""

    key: str
    num_rows_by_file: dict[str, int]
    num_rows: int
    num_usable: int  # rows that are neither dropped nor stop the run
    findings: list[Finding]
    lengths: Lengths | None  # None where nothing could be measured
    images: ImageSummary | None  # images of the same prompts; None for a text model
    num_videos: int  # of the same prompts
    categories: dict[str, int]  # counts over usable rows, most frequent first; empty without data.category_key
    answers: AnswerSummary | None  # summary over usable rows; None without any
    reward_check: RewardCheck | None  # None where the check cannot be done
    samples: list[Sample]


@dataclass(frozen=True)
class DataReport:
    """The whole report."""

    model: str
    takes_images: bool
    data_sets: list[DataSetSummary]
    num_shared: int | None  # validation rows that training has too, by content; None = not looked for
    notes: list[str]  # what may be intended, and may be a mistake

    @property
    def stops_run(self) -> bool:
        """Return whether a row that was looked at would end a training run."""
        return any(
            any(finding.stops_run for finding in data_set.findings)
            or any(sample.problem is not None for sample in data_set.samples)
            for data_set in self.data_sets
        )


def summarise(
    key: str, rows: SurveyedRows, config: RunConfig, encoder: PromptEncoder, num_samples: int
) -> DataSetSummary:
    """Summarise a data set. Args: key: TRAIN or VALIDATION; num_samples: prompts to render, at most."""
    measured = rows.lengths[rows.is_measured]
    answers = rows.texts("answer", rows.usable)
    return DataSetSummary(
        key=key,
        num_rows_by_file={reader.name: len(reader) for reader in rows.readers},
        num_rows=len(rows.table),
        num_usable=len(rows.usable),
        findings=find(rows, config),
        lengths=_lengths(measured, config.data.max_prompt_length),
        images=summarise_images(
            rows.flat("widths"), rows.flat("heights"), rows.num_images[rows.is_measured], int(measured.sum()), encoder
        ),
        num_videos=int(rows.table["num_videos"].fill_null(0).to_numpy().sum()),
        categories=dict(Counter(rows.texts("category", rows.usable)).most_common()) if config.data.category_key else {},
        answers=summarise_answers(answers),
        reward_check=check_reward(answers, config.worker.reward, config.data.seed),
        samples=_samples(rows, encoder, num_samples, config.data.seed),
    )


def count_shared(train: SurveyedRows, validation: SurveyedRows) -> int:
    """Count usable rows of the validation data whose prompt, answer and images training has too."""
    known = set(train.texts("prompt_id", train.usable))
    return sum(prompt_id in known for prompt_id in validation.texts("prompt_id", validation.usable))


def notes(data_sets: Sequence[DataSetSummary], config: RunConfig, encoder: PromptEncoder) -> list[str]:
    """Return what may be intended and may be a mistake, one line each."""
    found = []
    if len(data_sets) == 2:
        trained = list_names(config.data.train_files)
        found += [
            f"{VALIDATION}: {name} is {TRAIN} too: its accuracy says what was learned by heart"
            for name in list_names(config.data.val_files, VALIDATION)
            if name in trained
        ]
    for data_set in data_sets:
        if data_set.key == TRAIN and 0 < data_set.num_usable < config.data.rollout_batch_size:
            noun = "prompt" if data_set.num_usable == 1 else "prompts"
            found.append(
                f"{TRAIN}: {data_set.num_usable} usable {noun}, and a step takes data.rollout_batch_size="
                f"{config.data.rollout_batch_size}: each step repeats prompts"
            )
    if encoder.is_multimodal and any(data_set.images and data_set.images.num_images for data_set in data_sets):
        limits = encoder.pixel_limits
        most = limits.max_pixels // limits.factor**2
        if most > config.data.max_prompt_length:
            found.append(
                f"an image may take up to {most:,} tokens ({limits.max_pixels:,} pixels), and a prompt "
                f"data.max_prompt_length={config.data.max_prompt_length}: a smaller data.max_pixels shrinks large "
                "images instead of dropping their prompts"
            )
    if any(_opens_reasoning(sample.prompt or "") for data_set in data_sets for sample in data_set.samples):
        found.append(
            "the chat template opens <think> at the end of the prompt: the built-in rewards read it as the "
            "beginning of the response; a reward file finds it at the end of its 'prompt'"
        )
    asked_for = _ASKED_FOR.get(config.worker.reward.reward_function)
    prompts = [sample.prompt or "" for data_set in data_sets for sample in data_set.samples]
    if asked_for is not None and prompts and not any(asked_for in prompt for prompt in prompts):
        found.append(
            f"no prompt shown below asks for {asked_for}, where worker.reward.reward_function="
            f"{config.worker.reward.reward_function} looks for the answer; data.format_prompt or data.system_prompt "
            "can ask, unless the model does it by itself"
        )
    return found


def _opens_reasoning(prompt: str) -> bool:
    return with_opening("", prompt) != ""


def _lengths(lengths: np.ndarray, limit: int) -> Lengths | None:
    found = spread(lengths)
    if found is None:
        return None
    num_near = int(((lengths > NEAR_LIMIT * limit) & (lengths <= limit)).sum())
    return Lengths(limit, found, num_near, num_near / len(lengths), histogram(lengths, limit))


def _samples(rows: SurveyedRows, encoder: PromptEncoder, num_samples: int, seed: int) -> list[Sample]:
    samples = []
    chosen = rows.usable
    if len(chosen) > num_samples:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, num_samples, replace=False))
    for row in chosen:
        (prompt_id,), (category,), (answer,) = (
            rows.texts(column, np.array([row])) for column in ("prompt_id", "category", "answer")
        )
        prompt, problem = _rendered(*rows.place(row), encoder)
        samples.append(Sample(rows.name(row), prompt_id, category, int(rows.lengths[row]), prompt, problem, answer))
    return samples


def _rendered(reader: RowReader, row: int, encoder: PromptEncoder) -> tuple[str | None, str | None]:
    """The prompt of a row, by the way that it takes to the model; None, and why, when what it shows cannot be read."""
    where = reader.where(row)
    try:
        content = reader.read(row)
        token_ids, images, videos = encoder.encode(content.prompt, content.images, where, content.videos)
    except UserError as error:
        return None, " ".join(str(error).split()).removeprefix(f"{where}: ")

    def decoded(token_ids: Sequence[int]) -> str:
        text: str = encoder.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    words = [f"<image {one.width}x{one.height}, {encoder.num_image_tokens(*one.size, where)} tokens>" for one in images]
    shown = {encoder.image_token_id: iter(words)} if images or videos else {}
    if videos:
        shapes = [(encoder.num_tokens_of(video), *video.frames.shape) for video in videos]
        words = [f"<video {count} frames of {w}x{h}, {tokens} tokens>" for tokens, count, h, w, _ in shapes]
        shown[encoder.video_token_id] = iter(words)
    text, start = "", 0
    for place, token in enumerate(token_ids):
        if token in shown:
            text += decoded(token_ids[start:place]) + next(shown[token])
            start = place + 1
    return text + decoded(token_ids[start:]), None
