r"""Ground truths as data sets write them: the answer alone, or inside a wrapper or a whole solution."""

from __future__ import annotations

import re
from collections.abc import Callable

from mmr1_ds.rewards.boxes import last_boxed, last_boxes

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?:^|[.!:,;\n]\s*|\b(?:so|thus|hence|therefore),? )\**(?:the )?(?:final |correct )?answer\**"
    r"(?:\s*[:=]|\s+is:?)\**(?!\s*the final answer is)\s*([^\n]+?)\s*(?:I hope it is correct\.?\s*)?$",  # Minerva's
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:correct |right )?(?:option|choice)(?: is:?|:) *"
    r"\**(\(?[A-Z]\)?)\**\.?",
    re.IGNORECASE,
)
_COLON = "[:\N{FULLWIDTH COLON}]"
_LABELLED = re.compile(
    rf"\**(?:ans\.?\**\s*[:=]|(?:故|所以)?(?:最终)?答案(?:(?:是|为)?\s*{_COLON}|(?:是|为)(?=\s*[-\d$\\A-Z]))|#{{2,3}}\s|=(?!=))\**\s*([^\n]+)",
    re.IGNORECASE,
)
_TAGS = re.compile(
    r"<(?P<tag>answer|solution|final[_ ]answer)>(?P<inside>.*?)</(?P=tag)>"
    r"|<\|begin_of_box\|>(?P<box>.*?)<\|end_of_box\|>|\[answer\](?P<marked>.*?)\[/answer\]",
    re.DOTALL | re.IGNORECASE,
)
_END = re.compile(r"(?:<\|(?:im_end|endoftext|eot_id|end)\|>|</s>)\s*$")
_TAG_LEFT = re.compile(r"</?(?:[a-zA-Z][a-zA-Z_ ]{2,}|[bip])>|<\|\w+\|>|\[/?[a-zA-Z_]{3,}\]")
_NO_WORDS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|usd|eur|gbp|sin|cos|tan|log|ln|max|min|gcd|lcm"
_WORDS_AHEAD = re.compile(
    rf"(?!(?:{_NO_WORDS}))(?:[^\W\d_]{{2,}}[ ,:=]+)+(?:[a-zA-Z] ?= ?)?[-$\\(]*\d[^a-zA-Z]*", re.IGNORECASE
)
_SAYS = re.compile(
    r"(?<![\\\w])(?:is|are|thus|hence|therefore|answer|result|approx|approximately|desired|required)\b", re.IGNORECASE
)
_NO_ANSWER = re.compile(r"None|null|NULL|nan|NaN|\d+[.)]\s+\S.*|.*(?:[\x00-\x08\x0b-\x1f\x7f]|\s#\s).*", re.DOTALL)
_DATA = re.compile(r"[\[{]\s*[\"'].*[\]}]", re.DOTALL)
_HASHES = re.compile(r"(?:^|\s)####[ \t]*([^\n]+?)\s*$")


def read_truth(text: str) -> str:
    r"""Return the answer in a wrapper, behind a label or in a sentence, `The answer is 42.`; else the text itself.

    Every built-in reward reads truths by this function, and so does `mmr1-ds data`; a reward file gets them as they
    are.
    """
    text = _END.sub("", text)
    tags = list(_TAGS.finditer(text))
    inside = {next(part for part in (tag["inside"], tag["box"], tag["marked"]) if part is not None) for tag in tags}
    if len(inside) == 1:  # two different ones are no answer
        text = inside.pop()
    found = unwrapped(text, last_boxes)
    if found != text.strip():
        return found
    sentence = _CHOSEN.fullmatch(found) or _LABELLED.fullmatch(found) or _SENTENCE.search(found)
    return found if sentence is None else sentence[1].removesuffix(".").strip()


def is_unclear(truth: str) -> bool:
    """Return whether a truth, as `read_truth` reads it, still has tags or words around a number, or is none at all.

    Such are a literal of a program, an item with its number, text that says null, characters that no one can type. A
    response matches them by the same tags or words alone.
    """
    patterns = (_TAG_LEFT.search, _WORDS_AHEAD.fullmatch, _DATA.fullmatch, _NO_ANSWER.fullmatch)
    says = any(map(str.isdigit, truth)) and _SAYS.search(truth) is not None
    return says or any(found(truth) for found in patterns)


def unwrapped(text: str, boxed_in: Callable[[str], str | None] = last_boxed) -> str:
    r"""Return the answer in `<answer> 2 </answer>`, `... #### 72` or a solution with `\boxed{}`, else all of it.

    Args: boxed_in: what the boxes of a text say; a response commits to its last.
    """
    blocks = _ANSWER.findall(text)
    if len(blocks) == 1:
        text = blocks[0]
    hashes = _HASHES.search(text)
    if hashes is not None:
        return hashes[1].strip()
    boxed = boxed_in(text)
    return text.strip() if boxed is None or not boxed.strip() else boxed.strip()
