"""The source of named functions, in the pages that show it.

A Python block whose first line is `# from PATH: NAME, NAME` holds the text of these functions of that file. A test
compares the two; after a change to a function, `python docs/excerpts.py` writes its new text into the pages, and the
table of families into models.md.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from mmr1_ds.config.families import table

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"```python\n# from (?P<path>[\w./]+): (?P<names>[\w., ]+)\n.*?```", re.DOTALL)


def filled(page: str) -> str:
    """The page's text with every excerpt as the source has it. Raises: KeyError that lists functions of that name."""
    return _BLOCK.sub(lambda block: excerpt(block["path"], block["names"].split(", ")), page)


def excerpt(path: str, names: list[str]) -> str:
    """The fenced block of these functions, named as `function` or `Class.method`."""
    source = (DOCS.parent / path).read_text(encoding="utf-8")
    functions = {}
    for node in ast.parse(source).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                name = f"{node.name}.{part.name}" if isinstance(node, ast.ClassDef) else part.name
                functions[name] = textwrap.dedent(ast.get_source_segment(source, part, padded=True) or "")
    missing = [name for name in names if name not in functions]
    if missing:
        raise KeyError(f"{path} has no function {', '.join(missing)}; it has {', '.join(functions)}")
    texts = "\n\n\n".join(functions[name] for name in names)
    return f"```python\n# from {path}: {', '.join(names)}\n{texts}\n```"


def with_families(page: str) -> str:
    """The page on models with the table of families as the program has it."""
    start = page.index("| family |")
    return page[:start] + table() + page[page.index("\n\n", start) :]


if __name__ == "__main__":
    models = DOCS / "models.md"
    models.write_text(with_families(models.read_text(encoding="utf-8")), encoding="utf-8")
    for page in DOCS.glob("*.md"):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
