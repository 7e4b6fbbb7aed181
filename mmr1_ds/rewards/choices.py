"""Multiple choice: the letter that an answer commits to."""

from __future__ import annotations

import re

# (A) | A) | A. | A: | A, and what the option says after a mark
_LABELLED = re.compile(r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[).:])\s*(.*)", re.DOTALL)
_SINGLE = re.compile(r"[A-Za-z]")
_OPTIONS = "ABCDEFGHabcdfgh"  # e is a number, as x is a variable: those are not E and X
_RATIO = re.compile(r"[A-Za-z](?: ?: ?[A-Za-z])+(?: ?=.*:.*)?")  # a:b = 2:3 is no option a
_OTHER_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Z](?![A-Za-z])")
_OTHER_LABEL = re.compile(r"(?:^|[\s,;])\(?(?:[a-zA-Z]|[ivxIVX]{2,4})[).:]")
_LABELS = "ABCDEFGHIJabcdefgh"  # x: 5 is no option X
_OTHER_WORDS = re.compile(r"\b(?:or|and|not|nor|neither|either)\b", re.IGNORECASE)
_OTHERS = (_OTHER_LETTER, _OTHER_LABEL, _OTHER_WORDS)
_LIST = re.compile(r"(?:\([A-Z]\) ?){2,}|\(?[A-Z]\)?(?:(?:\s*[,;&和]\s*|\s+and\s+|\s*,\s*and\s+)\(?[A-Z]\)?)+")
_CIRCLED = str.maketrans({chr(0x2460 + place): f"({place + 1})" for place in range(20)})
_JUDGEMENT = re.compile(
    r"true|false|yes|no|(?:in)?correct|right|wrong|(?:in|de)creas(?:es?|ing)|positive|negative|odd|even|always|never"
    r"|sometimes|正确|错误|对|错|是|否|不是|不对|[√✓✔✗✘>=<+-]|\\(?:times|surd|checkmark|le|ge|ne)",
    re.IGNORECASE,
)
_TEXT = re.compile(r"\\(?:text|mbox)\s*\{([^{}]*)\}")
_STATEMENTS = re.compile(r"[①-⑳]|(?:[①-⑳]|\(\d\))(?: ?(?:[,;和]|and)? ?(?:[①-⑳]|\(\d\)))+")


def choice(text: str) -> str | None:
    """Return the one letter, as a capital, of `A`, `(A)`, `A.`, `(A) 12` or `A: an apple`; None for anything else.

    What follows the mark must name no other option: "(A) or (B)" and "A. B" commit to none.
    """
    if _SINGLE.fullmatch(text):
        return text.upper() if text in _OPTIONS else text
    match = _LABELLED.fullmatch(text)
    if match is None or _RATIO.fullmatch(text):
        return None
    letter, rest = match[1] or match[2] or match[3], match[4]
    if rest and (letter not in _LABELS or any(other.search(rest) for other in _OTHERS)):
        return None
    return letter.upper()


def choices(text: str) -> str | None:
    """Return the letters of a list like `A, C` or `(A) and (C)`, in its order: AC. None for anything else."""
    return re.sub(r"and|[^A-Z]", "", text) if _LIST.fullmatch(text) else None


def same_letters(one: str, other: str) -> bool:
    """Return whether two lists of letters choose the same: in any order, but for one that may rank all options.

    Such a ranking has every letter from A on, not in the alphabet's order: CAB. Nor does an answer to several questions
    change its order, in which a letter comes twice, or all are T and F.
    """
    letters = sorted(other)
    if len(set(letters)) < len(letters) or letters == ["F", "T"]:
        return one == other
    is_ranking = "".join(letters) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)] and letters != list(other)
    return one == other if is_ranking else sorted(one) == letters


def chooses(answer: str, letters: str) -> bool:
    """Return whether an answer lists the letters of a truth like `ABD`.

    Of a segment AB it would be the points A, B, which no one answers; options are listed so every day.
    """
    return same_letters(choices(answer) or "", letters)


def judgement(text: str) -> str | None:
    """Return a judgement of a statement, or a sign of comparison, in small letters; None for anything else."""
    text = _TEXT.sub(r"\1", text).strip()
    return text.casefold() if _JUDGEMENT.fullmatch(text) else None


def keep_order(items: tuple[str, ...]) -> bool:
    """Return whether values answer several questions: all are judgements, or words of which one comes twice."""
    words = [_TEXT.sub(r"\1", item).strip().casefold() for item in items]
    are_words = all(re.fullmatch(r"[^\W\d_]{2,}", word) for word in words)
    return all(map(judgement, items)) or (are_words and len(set(words)) < len(words))


def statements(text: str) -> list[str] | None:
    """Return the numbers of statements side by side: `①③`, `①、③` and `(1), (3)`; None for anything else."""
    return re.findall(r"\d+", text.translate(_CIRCLED)) if _STATEMENTS.fullmatch(text) else None


def joined(text: str) -> bool:
    """Return whether the letters of several options stand side by side, as `ABD`; not `BAD`, which may be a word."""
    return re.fullmatch(r"[A-H]{2,}", text) is not None and list(text) == sorted(set(text))
