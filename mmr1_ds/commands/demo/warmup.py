"""The demo's cold start: supervised fine-tuning of the tiny model on answers of a hasty teacher.

The teacher is hasty on purpose. To the learnable questions it often answers with a random digit that it sees,
without reading them (`<think>?</think>`), and otherwise it lists the digits and is right. So the model knows how to
do it, and does not always: what reinforcement learning can mend. On its own data a user starts from a published
model instead, and needs none of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.commands.demo.digits import Question, draw_question, render
from mmr1_ds.commands.demo.model import END_OF_TURN, build_processor

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

# How often the teacher answers without reading.
HASTE: Mapping[str, float] = {"max3": 0.6, "min3": 0.6, "max4": 0.85, "min4": 0.85, "med3": 0.85}
FIRST_KINDS: Mapping[str, int] = {"get1": 4, "max2": 2, "min2": 2}
ALL_KINDS = ("get1", "max2", "min2", "max3", "min3", "max4", "min4", "mul3", "add3", "med3", "add2", "mul4")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class WarmupSettings:
    """The recipe. Its digest names the cached result, so every field that matters stands here."""

    num_steps: int = 450
    batch_size: int = 32  # fresh examples a step
    first_steps: int = 200  # only the easy kinds; without this the plateau before reading lasts 300 steps
    lr: float = 1.5e-3
    warmup_steps: int = 30
    min_lr_ratio: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def teach(question: Question, rng: np.random.Generator) -> str:
    """Return the teacher's answer: hasty and random, or the digits in order and the right result."""
    if rng.random() < HASTE.get(question.kind, 0.0):
        return respond("?", str(rng.choice(question.digits)))
    return respond(" ".join(map(str, question.digits)), question.answer)


def respond(thought: str, answer: str) -> str:
    """Return a response in the format that the math reward asks for."""
    return f"<think>{thought}</think><answer>\\boxed{{{answer}}}</answer>"


def learning_rate(step: int, settings: WarmupSettings) -> float:
    """Return the rate of step 0, 1, ...: a linear rise, then half a cosine down to min_lr_ratio."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)


def draw_lesson(step: int, settings: WarmupSettings, rng: np.random.Generator) -> list[tuple[Question, str]]:
    """Return the questions of a step with the teacher's answers."""
    if step < settings.first_steps:
        weights = np.array(list(FIRST_KINDS.values()), dtype=np.float64)
        kinds = rng.choice(list(FIRST_KINDS), size=settings.batch_size, p=weights / weights.sum())
    else:
        kinds = rng.choice(ALL_KINDS, size=settings.batch_size)
    questions = [draw_question(str(kind), rng) for kind in kinds]
    return [(question, teach(question, rng)) for question in questions]


def encode_prompts(processor: Qwen2_5_VLProcessor, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    """Encode prompts as the ordinary data path does: chat template, then the processor. All have 18 tokens."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.kind}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    return dict(processor(text=texts, images=[render(question) for question in questions], return_tensors="pt"))


def encode_lesson(processor: Qwen2_5_VLProcessor, lesson: Sequence[tuple[Question, str]]) -> dict[str, torch.Tensor]:
    """Return the model's inputs and `labels`: prompt, answer, end of turn, padded right; the loss is on the answer."""
    import torch

    inputs = encode_prompts(processor, [question for question, _ in lesson])
    prompt_ids = inputs["input_ids"]  # (B, 18)
    answers = [
        torch.tensor(processor.tokenizer(answer + END_OF_TURN, add_special_tokens=False)["input_ids"])
        for _, answer in lesson
    ]
    pad_id = processor.tokenizer.pad_token_id
    answer_ids = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad_id)
    answer_labels = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED_LABEL)
    inputs["input_ids"] = torch.cat([prompt_ids, answer_ids], dim=1)
    inputs["labels"] = torch.cat([torch.full_like(prompt_ids, IGNORED_LABEL), answer_labels], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], (answer_labels != IGNORED_LABEL).long()], dim=1)
    text_type = torch.zeros_like(answer_ids, dtype=inputs["mm_token_type_ids"].dtype)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text_type], dim=1)
    return inputs


def warm_up(
    model: Qwen2_5_VLForConditionalGeneration, seed: int, settings: WarmupSettings
) -> Iterator[tuple[int, float]]:
    """Train the model in place; yields (steps done, loss) after each step. Deterministic for a seed and machine."""
    import torch

    processor = build_processor()
    rng = np.random.default_rng([seed, 3])
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
    )
    model.train()
    for step in range(settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = model(**encode_lesson(processor, draw_lesson(step, settings, rng))).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        yield step + 1, loss.item()
    model.eval()
