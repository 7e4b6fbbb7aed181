"""The documentation as a site, built offline by `make docs` from the Markdown pages beside this file.

The pages are plain Markdown, so that a code host shows them as they are. Two things are therefore made here: the
site's menu, from the lists of links in index.md, and, of a link that leaves docs/, the name of the file it leads to.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

from pygments.lexers.data import JsonLexer
from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_PAGE = re.compile(r"\[[^\]]+\]\(([\w-]+)\.md\)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")

project = _PROJECT["name"]
version = release = _PROJECT["version"]
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3  # the anchors that a code host makes of headings
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]
html_title = f"{project} {version}"
html_show_sourcelink = False
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False

logger = logging.getLogger(__name__)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_lexer("jsonl", JsonLexer)
    app.connect("source-read", _read)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    text = source[0]
    if docname == "index":
        text += _menu(text)
    source[0] = _OUTSIDE.sub(lambda match: _outside(match, docname), text)


def _menu(index: str) -> str:
    """A hidden table of contents for each section of the index that has links to pages, in their order."""
    parts = []
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        pages = list(dict.fromkeys(_PAGE.findall(text)))
        if pages:
            parts += ["", "```{toctree}", ":hidden:", f":caption: {heading}", "", *pages, "```", ""]
    return "\n".join(parts)


def _outside(match: re.Match[str], docname: str) -> str:
    """What stands for a link to a file of the project that is no page."""
    text, path = match[1], Path(os.path.normpath(DOCS / match[2]))
    if not path.exists():
        logger.warning("the link to %s leads nowhere", match[2], location=docname)
    name = path.relative_to(ROOT).as_posix()
    return f"`{name}`" if text.strip("`") == name else f"{text} (`{name}`)"
