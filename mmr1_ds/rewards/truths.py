r"""Ground truths as data sets write them: the answer alone, or inside a wrapper or a whole solution."""

from __future__ import annotations

import re

from mmr1_ds.rewards.boxes import last_boxed

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?:^|[.!:,;\n]\s*|\b(?:so|thus|hence|therefore),? )\**(?:the )?(?:final |correct )?answer\**"
    r"(?:\s*[:=]|\s+is:?)\**\s*([^\n]+?)\s*$",
    re.IGNORECASE,
)
_HASHES = re.compile(r"(?:^|\s)####[ \t]*([^\n]+?)\s*$")


def read_truth(text: str) -> str:
    r"""Return the answer in a wrapper or in a sentence, `The answer is 42.`; without any of them it is the text itself.

    Every built-in reward reads truths by this function, and so does `mmr1-ds data`; a reward file gets them as they
    are.
    """
    found = unwrapped(text)
    sentence = _SENTENCE.search(found) if found == text.strip() else None
    return found if sentence is None else sentence[1].removesuffix(".").strip()


def unwrapped(text: str) -> str:
    r"""Return the answer in `<answer> 2 </answer>`, `... #### 72` or a solution with `\boxed{}`, else all of it."""
    blocks = _ANSWER.findall(text)
    if len(blocks) == 1:
        text = blocks[0]
    hashes = _HASHES.search(text)
    if hashes is not None:
        return hashes[1].strip()
    boxed = last_boxed(text)
    return text.strip() if boxed is None or not boxed.strip() else boxed.strip()
