r"""Responses of the form `<think>...</think><answer>...</answer>`, which r1v and the openr1 rewards ask for."""

from __future__ import annotations

import re

from mmr1_ds.rewards.boxes import last_boxed

_TAG = re.compile(r"<\s*(?:(/)\s*)?(think|answer)\s*>")  # some models write `< think >`
# Tags at the prompt's very end, whatever stands before them.
_OPENING = re.compile(
    r"<\s*(?:think\s*>\s*(?:<\s*/\s*think\s*>\s*(?:<\s*answer\s*>\s*)?)?|answer\s*>\s*)$"
)
# What chat templates write before a turn of the assistant; its special tokens may be left out of the text.
_ASSISTANT = re.compile(r"(?:^|[>|\uff5c\n])[ \t]*(?:assistant|model)[ \t]*(?=[\n:<|\uff5c])", re.IGNORECASE)


def with_opening(response: str, prompt: str) -> str:
    """Return the response behind the tags that the prompt opens for it: a chat template, or a prefill, may begin it.

    Tags at the prompt's end, or anywhere in what the assistant's last turn says already. Where that is `<answer>`
    alone, the reasoning is left out by the prompt, and so an empty one is put before it.
    """
    turns = [*_ASSISTANT.finditer(prompt)]
    tag = _TAG.search(prompt, turns[-1].end()) if turns else None
    opening = _OPENING.search(prompt) if tag is None else tag
    if opening is None:
        return response
    begun = prompt[opening.start() :]
    return ("<think></think>" if clean_tags(begun).startswith("<answer>") else "") + begun + response


def clean_tags(response: str) -> str:
    """Remove the spaces inside the tags."""
    return _TAG.sub(lambda tag: f"<{tag[1] or ''}{tag[2]}>", response)


def tag_format(response: str) -> float:
    """Return 1 for one think block and one answer block in this order, with nothing but space around them.

    Upstream's pattern lets tags repeat inside a block; each must occur once here, because nested and repeated ones
    are how a policy games the format.
    """
    tags = [(match.start(), match.end(), match[0]) for match in _TAG.finditer(response)]
    if [re.sub(r"\s", "", tag) for _, _, tag in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return 0.0
    outside = response[: tags[0][0]], response[tags[1][1] : tags[2][0]], response[tags[3][1] :]
    return 0.0 if any(text.strip() for text in outside) else 1.0


def tagged_answer(response: str) -> str | None:
    r"""The committed answer: the last `\boxed{...}` of the answer block, or all of its text where nothing is boxed.

    Returns: None without exactly one closed answer block after the reasoning, since no answer was given then.
    """
    _, closed, final = clean_tags(response).rpartition("</think>")
    if not closed and "<think>" in final:
        return None
    if final.count("<answer>") != 1 or final.count("</answer>") != 1:
        return None
    _, _, rest = final.partition("<answer>")
    block, closed, _ = rest.partition("</answer>")
    if not closed:
        return None
    answer = last_boxed(block) if r"\boxed" in block else block
    return answer.strip() or None if answer is not None else None
