"""Turning a cell of the prompt column into chat messages: system prompt, format prompt, markers of images and videos.

The conventions are EasyR1's: `<image>` in the text marks where an image goes (`<image1>`, `<image_2>` which one),
`<video>` a video, and `data.format_prompt` is a jinja template over `content`, the user's text.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmr1_ds.data.images import as_reference
from mmr1_ds.data.videos import video_references
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template

_PARTS = re.compile("([\ufdd2\ufdd3])")


class Kind:
    """What stands in a prompt beside its text: images, or videos."""

    def __init__(self, name: str, carried: Callable[[Any], list[Any]], place: str) -> None:
        """carried: what a part of a message carries; place: a character of no text, of one in text to become parts."""
        self.name, self.carried, self.place = name, carried, place
        self.marker = f"<{name}>"
        self.types = (name, f"{name}_url", f"input_{name}")
        # Around the number of one that a message carries stand characters of no text, too.
        numbered = rf"(?i:<\|?{name}[ _-]?(?P<number>\d{{1,3}})\|?>)"
        self.pattern = re.compile(rf"\ufdd0{name}(?P<carried>\d+)\ufdd1|(?i:{self.marker})|{numbered}")

    def is_part(self, part: object) -> bool:
        """Return whether a part of a message is one."""
        if not isinstance(part, dict):
            return False
        kind = part.get("type")
        return kind in self.types or (kind is None and any(part.get(name) is not None for name in self.types))

    def in_messages(self, cell: object) -> list[Any]:
        """Return what the parts of a prompt's messages carry (path, bytes, URL, frames), in their order."""
        turns = [turn for turn in cell if isinstance(turn, dict)] if isinstance(cell, list) else []
        parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
        return [found for part in parts if self.is_part(part) for found in self.carried(part)]


IMAGES = Kind("image", lambda part: [] if (found := as_reference(part)) is None else [found], "\ufdd2")
VIDEOS = Kind("video", video_references, "\ufdd3")
KINDS = (IMAGES, VIDEOS)
_ASSISTANTS = ("assistant", "model", "gpt", "bot", "ai", "chatbot")  # the roles that answer, in any case of letters
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation", "ipython")
# Whole, as JSON or as Python prints it: a column that went through CSV, say. The model would be shown the brackets.
_MESSAGES_AS_TEXT = re.compile(
    r"\s*\[\s*\{(?=.*[\"']role[\"']\s*:)(?=.*[\"']content[\"']\s*:).*\}\s*\]\s*", re.DOTALL
)
_TEXT_TYPES = (None, "text", "input_text")
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")

# What a template may raise on some text; jinja's own errors, its sandbox's among them, are TemplateErrors.
_RENDER_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)

Turn = tuple[str, str]  # role, text
Message = dict[str, Any]  # {"role": str, "content": str | list of parts}, what apply_chat_template takes


def texts_of(cell: object) -> list[str]:
    """Return the texts of a prompt, a string or messages, without judging it."""
    turns = [turn.get("content") for turn in cell if isinstance(turn, dict)] if isinstance(cell, list) else [cell]
    parts = [part for content in turns for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def no_videos(where: str) -> str:
    """Say that a model takes no videos. Args: where: names the row that has one."""
    return f"{where}: the row has a video and the model takes none; remove the row, or take one like Qwen2.5-VL"


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

    messages: list[Message]  # content is a list of parts when the row has images or videos, a string otherwise
    image_order: tuple[int, ...]  # which of the row's images stands at each place; one may stand at several
    video_order: tuple[int, ...]  # the same of its videos
    prefill: str = ""  # what the response begins with, behind the generation prompt
    has_answer: bool = False  # whether the assistant's last turn was taken off


@dataclass(frozen=True)
class ChatFormat:
    """The settings by which the user's text becomes messages."""

    system_prompt: str | None
    format_prompt: FormatPrompt | None
    continues_assistant: bool  # whether a last turn of the assistant begins the response, or is the answer
    is_multimodal: bool  # whether <image> means an image; for a text model it is only text
    takes_videos: bool = False  # whether the model does

    def chat(self, cell: object, num_images: int, num_videos: int, where: str) -> Chat:
        """Return one row as the chat template takes it.

        Args: cell: a string or a list of {role, content}; num_images, num_videos: of the row, first those of its
            column, then those that the messages carry, in their order; where: names the row in errors.
        Raises: UserError when the cell is no prompt, its markers do not fit the numbers, or the model takes no videos.
        """
        turns = _turns(cell, where)
        turns, prefill, has_answer = self._without_answer(turns, where)
        if not self.takes_videos and (num_videos or any(VIDEOS.pattern.search(text) for _, text in turns)):
            raise UserError(no_videos(where))
        if self.system_prompt and all(role != "system" for role, _ in turns):
            turns.insert(0, ("system", self.system_prompt))
        user_turns = [position for position, (role, _) in enumerate(turns) if role == "user"]
        if not user_turns:
            raise UserError(f"{where}: the prompt has no message with role 'user'; add one")
        if self.format_prompt is not None:
            last = user_turns[-1]
            turns[last] = ("user", self.format_prompt.render(turns[last][1], where))
        images: tuple[int, ...] = ()
        videos: tuple[int, ...] = ()
        if self.takes_videos:
            in_column = num_videos - len(VIDEOS.in_messages(cell))
            turns, videos = _place(VIDEOS, turns, user_turns[0], num_videos, in_column, where)
        if self.is_multimodal:
            in_column = num_images - len(IMAGES.in_messages(cell))
            turns, images = _place(IMAGES, turns, user_turns[0], num_images, in_column, where)
        messages: list[Message] = [{"role": role, "content": text} for role, text in turns]
        if images or videos:
            messages = [{"role": role, "content": _parts(text)} for role, text in turns]
        return Chat(messages, images, videos, prefill, has_answer)

    def messages(self, cell: object, where: str) -> list[Message]:
        """Return the messages of a cell without an answer, a prefill included; none where the cell is a text.

        Args: cell, where: as of `chat`. Raises: UserError when the cell is no prompt.
        """
        if not isinstance(cell, list):
            return []
        turns, prefill, _ = self._without_answer(_turns(cell, where), where)
        asked = cell[: len(turns) + bool(prefill)]
        return [turn | {"role": _role(turn["role"], where)} for turn in asked]

    def _without_answer(self, turns: list[Turn], where: str) -> tuple[list[Turn], str, bool]:
        """Take off what the assistant says at the end. Returns: the other turns, the prefill, whether it is an answer.

        A turn that leaves a tag of reasoning open is a beginning, whatever the settings say.
        """
        asked = len(turns)
        while asked and turns[asked - 1][0] == "assistant":
            asked -= 1
        last = "".join(text for _, text in turns[asked:])
        if asked == len(turns) or not last.strip():
            return turns[:asked], "", False
        if not (self.continues_assistant or _opens_tag(last)):
            return turns[:asked], "", True
        if asked < len(turns) - 1 or any(kind.pattern.search(last) for kind in KINDS):
            raise UserError(f"{where}: a prefill is one message of the assistant without images or video; remove them")
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
    """(role, text) pairs; parts of a structured content that are images or videos become markers."""
    if isinstance(cell, str) and cell.strip():
        if _MESSAGES_AS_TEXT.fullmatch(cell):
            raise UserError(f"{where}: the prompt is a list of messages as text, {cell!r:.60}; give the list itself")
        return [("user", cell)]
    if isinstance(cell, list) and cell and all(isinstance(turn, dict) and turn.get("role") for turn in cell):
        numbers = {kind.name: itertools.count() for kind in KINDS}
        return [(_role(turn["role"], where), _content_text(turn.get("content"), where, numbers)) for turn in cell]
    shown = "nothing" if cell is None or cell == "" or cell == [] else repr(cell)[:80]
    raise UserError(f"{where}: the prompt is {shown}; give a string or a list of {{role, content}}")


def _role(role: object, where: str) -> str:
    """Return the role as chat templates have it. Raises: UserError for another: a solution's turn would be shown."""
    if isinstance(role, str) and role.lower() in _ASSISTANTS:
        return "assistant"
    if role not in _ROLES:
        raise UserError(f"{where}: a message has the role {role!r:.40}; known are {', '.join(_ROLES)}: rename it")
    return str(role)


def _content_text(content: object, where: str, numbers: Mapping[str, Iterator[int]]) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part, where, numbers) for part in content)
    raise UserError(f"{where}: a message's content is {content!r:.80}; give a string or a list of parts")


def _part_text(part: object, where: str, numbers: Mapping[str, Iterator[int]]) -> str:
    """Return a part as text. numbers: of what parts carry, for each kind."""
    for kind in KINDS:
        if kind.is_part(part):
            is_carried = bool(kind.carried(part))
            return f"\ufdd0{kind.name}{next(numbers[kind.name])}\ufdd1" if is_carried else kind.marker
    if isinstance(part, dict) and part.get("type") in _TEXT_TYPES and isinstance(part.get("text"), str):
        return part["text"]
    raise UserError(f"{where}: a message holds the part {part!r:.80}; only text, image and video parts are known")


def _place(
    kind: Kind, turns: Sequence[Turn], first_user: int, number: int, num_column: int, where: str
) -> tuple[list[Turn], tuple[int, ...]]:
    """Put images, or videos, at their markers. num_column: of `number` ones, those that no message carries.

    Returns: the turns with a character in place of each, and which of them stands at each place.
    Raises: UserError when the markers do not fit.
    """
    turns = list(turns)
    name, marked = kind.name, kind.marker
    markers = [marker for _, text in turns for marker in kind.pattern.finditer(text)]
    plain = sum(marker["carried"] is None and marker["number"] is None for marker in markers)
    numbers = [int(marker["number"]) for marker in markers if marker["number"] is not None]
    # Where other markers place all images, <image1> is a word about one of them.
    has_numbers = bool(numbers) and not (plain == num_column and number > 0)
    if has_numbers:
        first = min(1, *numbers)  # some data count from 0
        if plain or {number - first for number in numbers} != set(range(num_column)):
            named = ", ".join(dict.fromkeys(marker[0] for marker in markers if marker["carried"] is None))
            raise UserError(
                f"{where}: the prompt marks {name}s by {named} and the row has {num_column}; mark each of them by its "
                f"number, or all by {marked}"
            )
    elif plain == 0 and num_column > 0:  # unmarked ones come first
        role, text = turns[first_user]
        turns[first_user] = (role, marked * num_column + text)
    elif plain != num_column:
        raise UserError(
            f"{where}: the prompt has {plain} {marked} markers and the row {num_column} {name}s; make them equal"
            + ("" if num_column else f": does data.{name}_key name the column of the {name}s?")
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
        return kind.place

    placed = [(role, kind.pattern.sub(place, text)) for role, text in turns]
    return placed, tuple(order)


def _parts(text: str) -> list[dict[str, str]]:
    names = {kind.place: kind.name for kind in KINDS}
    return [
        {"type": names[piece]} if piece in names else {"type": "text", "text": piece}
        for piece in _PARTS.split(text)
        if piece
    ]
