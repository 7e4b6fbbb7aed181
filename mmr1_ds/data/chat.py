"""Turning a cell of the prompt column into chat messages: system prompt, format prompt, image markers.

The conventions are EasyR1's: `<image>` in the text marks where an image goes (`<image1>`, `<image_2>` which one), and
`data.format_prompt` is a jinja template over `content`, the user's text.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmr1_ds.data.images import as_reference
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
_CARRIED = ("\ufdd0", "\ufdd1")  # no characters of any text: around the number of an image that a message carries
_PLACE = "\ufdd2"  # of an image, in text that is about to become parts
_NUMBERED = r"(?i:<\|?image[ _-]?(?P<number>\d{1,3})\|?>)"
_MARKER = re.compile(rf"{_CARRIED[0]}(?P<carried>\d+){_CARRIED[1]}|{IMAGE_MARKER}|{_NUMBERED}")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_ASSISTANTS = ("assistant", "model", "gpt", "bot")  # roles that answer
_TEXT_TYPES = (None, "text", "input_text")
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")

# What a template may raise on some text; jinja's own errors, its sandbox's among them, are TemplateErrors.
_RENDER_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)

Turn = tuple[str, str]  # role, text
Message = dict[str, Any]  # {"role": str, "content": str | list of parts}, what apply_chat_template takes


@dataclass(frozen=True)
class FormatPrompt:
    """A jinja template over `content`, kept as text because compiled templates cannot be sent to other processes."""

    source: str

    def render(self, content: str, where: str) -> str:
        """Fill in the template. Args: where: names the row in errors. Raises: UserError when that fails."""
        from jinja2 import TemplateError

        try:
            return _compile(self.source).render(content=content)
        except (TemplateError, *_RENDER_ERRORS) as error:
            raise UserError(f"{where}: data.format_prompt cannot be rendered: {error}; it is given content") from error


@dataclass(frozen=True)
class Chat:
    """One prompt as the chat template takes it."""

    messages: list[Message]  # content is a list of parts when the row has images, a string otherwise
    image_order: tuple[int, ...]  # which of the row's images stands at each place; one may stand at several
    prefill: str = ""  # what the response begins with, behind the generation prompt
    has_answer: bool = False  # whether the assistant's last turn was taken off


@dataclass(frozen=True)
class ChatFormat:
    """The settings by which the user's text becomes messages."""

    system_prompt: str | None
    format_prompt: FormatPrompt | None
    continues_assistant: bool  # whether a last turn of the assistant begins the response, or is the answer
    is_multimodal: bool  # whether <image> means an image; for a text model it is only text

    def chat(self, cell: object, num_images: int, where: str) -> Chat:
        """Return one row as the chat template takes it.

        Args: cell: a string or a list of {role, content}; num_images: of the row, first those of its column, then those
            that the messages carry, in their order; where: names the row in errors.
        Raises: UserError when the cell is no prompt, or its markers do not fit `num_images`.
        """
        turns = _turns(cell, where)
        turns, prefill, has_answer = self._without_answer(turns, where)
        if any(VIDEO_MARKER in text for _, text in turns):
            raise UserError(f"{where}: the text has {VIDEO_MARKER}, and videos are not supported; remove the row")
        if self.system_prompt and all(role != "system" for role, _ in turns):
            turns.insert(0, ("system", self.system_prompt))
        user_turns = [position for position, (role, _) in enumerate(turns) if role == "user"]
        if not user_turns:
            raise UserError(f"{where}: the prompt has no message with role 'user'; add one")
        if self.format_prompt is not None:
            last = user_turns[-1]
            turns[last] = ("user", self.format_prompt.render(turns[last][1], where))
        if not self.is_multimodal:
            return Chat([{"role": role, "content": text} for role, text in turns], (), prefill, has_answer)
        messages, order = _place_images(turns, user_turns[0], num_images, num_images - len(carried_images(cell)), where)
        return Chat(messages, order, prefill, has_answer)

    def _without_answer(self, turns: list[Turn], where: str) -> tuple[list[Turn], str, bool]:
        """Take off what the assistant says at the end. Returns: the other turns, the prefill, whether it is an answer.

        A turn that leaves a tag of reasoning open is a beginning, whatever the settings say.
        """
        asked = len(turns)
        while asked and turns[asked - 1][0].lower() in _ASSISTANTS:
            asked -= 1
        last = "".join(text for _, text in turns[asked:])
        if asked == len(turns) or not last.strip():
            return turns[:asked], "", False
        if not (self.continues_assistant or _opens_tag(last)):
            return turns[:asked], "", True
        if asked < len(turns) - 1 or _MARKER.search(last):
            raise UserError(f"{where}: a prefill is one message of the assistant without images; remove the others")
        return turns[:asked], last, False


def load_format_prompt(value: str | None) -> FormatPrompt | None:
    """Read `data.format_prompt`, which is the path of a jinja file or the template itself.

    Raises: UserError when the file is missing or no text, the template does not compile or render, or it drops the
        question.
    """
    if not value:
        return None
    from jinja2 import TemplateError

    prompt = FormatPrompt(_read_template(value))
    try:
        _compile(prompt.source)
    except TemplateError as error:
        raise UserError(f"data.format_prompt {value!r:.80} is not a jinja template: {error}") from error
    if "content" not in _variables(prompt.source):
        # Without `content` every row would ask the same empty question and training would continue for hours.
        raise UserError(
            f"data.format_prompt {value!r:.80} is neither a file nor a template that uses {{{{ content }}}}"
        )
    prompt.render("How many apples?", f"{value!r:.80}")
    return prompt


def _read_template(value: str) -> str:
    path = os.path.expanduser(value)
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.format_prompt: cannot read {value!r}: {error}") from error
    if value.strip().endswith(TEMPLATE_SUFFIXES):
        raise UserError(f"data.format_prompt: no such file {value!r}; give the path of a jinja template")
    return value


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> Template:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Strict: a misspelt variable would otherwise read as nothing, in every prompt.
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(source.strip())


def _variables(source: str) -> set[str]:
    from jinja2 import Environment, meta

    return meta.find_undeclared_variables(Environment().parse(source))


def _opens_tag(text: str) -> bool:
    return any(text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>") for tag in ("think", "answer"))


def _turns(cell: object, where: str) -> list[Turn]:
    """(role, text) pairs; image parts of a structured content become markers."""
    if isinstance(cell, str) and cell.strip():
        return [("user", cell)]
    if isinstance(cell, list) and cell and all(isinstance(turn, dict) and turn.get("role") for turn in cell):
        numbers = itertools.count()
        return [(turn["role"], _content_text(turn.get("content"), where, numbers)) for turn in cell]
    shown = "nothing" if cell is None or cell == "" or cell == [] else repr(cell)[:80]
    raise UserError(f"{where}: the prompt is {shown}; give a string or a list of {{role, content}}")


def carried_images(cell: object) -> list[Any]:
    """Return what the image parts of a prompt's messages carry (path, bytes, URL), in their order."""
    turns = [turn for turn in cell if isinstance(turn, dict)] if isinstance(cell, list) else []
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    return [carried for part in parts if _is_image(part) and (carried := as_reference(part)) is not None]


def _content_text(content: object, where: str, numbers: Iterator[int]) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part, where, numbers) for part in content)
    raise UserError(f"{where}: a message's content is {content!r:.80}; give a string or a list of parts")


def _part_text(part: object, where: str, numbers: Iterator[int]) -> str:
    """Return a part as text. numbers: of the images that parts carry."""
    if _is_image(part):
        return IMAGE_MARKER if as_reference(part) is None else f"{_CARRIED[0]}{next(numbers)}{_CARRIED[1]}"
    if isinstance(part, dict) and part.get("type") in _TEXT_TYPES and isinstance(part.get("text"), str):
        return part["text"]
    raise UserError(f"{where}: a message holds the part {part!r:.80}; only text and image parts are known")


def _is_image(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    return kind in _IMAGE_TYPES or (kind is None and any(part.get(name) is not None for name in _IMAGE_TYPES))


def _place_images(
    turns: list[Turn], first_user: int, num_images: int, num_column: int, where: str
) -> tuple[list[Message], tuple[int, ...]]:
    """Put images at their markers. num_column: of the images, those that no message carries.

    Returns: the messages, and which image stands at each place.
    Raises: UserError when the markers do not fit.
    """
    markers = [marker for _, text in turns for marker in _MARKER.finditer(text)]
    plain = sum(marker[0] == IMAGE_MARKER for marker in markers)
    numbers = [int(marker["number"]) for marker in markers if marker["number"] is not None]
    # Where other markers place all images, <image1> is a word about one of them.
    has_numbers = bool(numbers) and not (plain == num_column and num_images > 0)
    if has_numbers:
        first = min(1, *numbers)  # some data count from 0
        if plain or {number - first for number in numbers} != set(range(num_column)):
            named = ", ".join(dict.fromkeys(marker[0] for marker in markers if marker["carried"] is None))
            raise UserError(
                f"{where}: the prompt marks images by {named} and the row has {num_column}; mark each of them by its "
                "number, or all by <image>"
            )
    elif plain == 0 and num_column > 0:  # unmarked images come first
        role, text = turns[first_user]
        turns[first_user] = (role, IMAGE_MARKER * num_column + text)
    elif plain != num_column:
        raise UserError(
            f"{where}: the prompt has {plain} {IMAGE_MARKER} markers and the row {num_column} images; make them equal"
            + ("" if num_column else ": does data.image_key name the column of the images?")
        )
    order: list[int] = []
    column = iter(range(max(num_column, 0)))

    def place(marker: re.Match[str]) -> str:
        if marker["carried"] is not None:
            order.append(num_column + int(marker["carried"]))
        elif marker["number"] is None:
            order.append(next(column))
        elif has_numbers:
            order.append(int(marker["number"]) - first)
        else:
            return marker[0]
        return _PLACE

    placed = [(role, _MARKER.sub(place, text)) for role, text in turns]
    if not order:
        return [{"role": role, "content": text} for role, text in placed], ()
    return [{"role": role, "content": _image_parts(text)} for role, text in placed], tuple(order)


def _image_parts(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for position, piece in enumerate(text.split(_PLACE)):
        if position > 0:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
