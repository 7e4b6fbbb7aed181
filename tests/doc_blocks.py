"""The pages of the documentation as the tests read them: fenced blocks, links, code in the text, tables."""

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from launching import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w{}]*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str  # relative to the repository
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text()
    return [
        Block(
            page.relative_to(ROOT).as_posix(),
            text[: match.start()].count("\n") + 1,
            match["language"],
            re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE),
        )
        for match in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def code_spans(text: str) -> list[str]:
    """What is in backticks, line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows but those of headings and rules."""
    lines = text.splitlines()
    found = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|") and before.startswith("|") and not re.match(r"\|[-|]+$", line):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def anchors(page: Path) -> set[str]:
    """What a code host makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def source_texts(*folders: str) -> list[str]:
    """Every text of the source, docstrings too, with \\0 where a value is filled in."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[-.\d]*[dsrf]", "\0", node.value))
    return found


def occurs(message: str, texts: list[str]) -> bool:
    """Whether a text says the message, in which ... stands for anything."""
    parts = [part.strip() for part in message.split("...") if part.strip()]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in texts)
