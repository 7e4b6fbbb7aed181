r"""The dress of an answer: what LaTeX, Markdown and keyboards put around a value without changing it."""

from __future__ import annotations

import re

_MINUS_SIGN = "\N{MINUS SIGN}"
_GREEK = (
    "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega "
    "Gamma Delta Theta Lambda Pi Sigma Phi Omega"
)
_SYMBOLS: dict[str, str] = {
    _MINUS_SIGN: "-", "\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{HYPHEN}": "-", "\N{NON-BREAKING HYPHEN}": "-",
    "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ", "\N{IDEOGRAPHIC SPACE}": " ",
    "\N{MULTIPLICATION SIGN}": r"\times ", "\N{DIVISION SIGN}": r"\div ", "\N{MIDDLE DOT}": r"\cdot ",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots ",
    "\N{INFINITY}": r"\infty ", "\N{UNION}": r"\cup ", "\N{INTERSECTION}": r"\cap ", "\N{ANGLE}": r"\angle ",
    **{char: rf"\{name} " for char, name in zip("αβγδεθλμπρστφωΓΔΘΛΠΣΦΩ", _GREEK.split(), strict=True)},
    "\N{MICRO SIGN}": r"\mu ", "\N{OHM SIGN}": r"\Omega ", "\N{CUBE ROOT}": r"\sqrt[3]",
    "\N{MATHEMATICAL LEFT ANGLE BRACKET}": "(", "\N{MATHEMATICAL RIGHT ANGLE BRACKET}": ")",
    "\N{RIGHTWARDS ARROW}": r"\to ", "\N{NOT SIGN}": r"\neg ",
    "\N{LOGICAL AND}": r"\land ", "\N{LOGICAL OR}": r"\lor ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ", "\N{GREATER-THAN OR EQUAL TO}": r"\ge ", "\N{NOT EQUAL TO}": r"\ne ",
    "\N{DOUBLE-STRUCK CAPITAL R}": r"\mathbb{R}", "\N{CENT SIGN}": " cent",
    "\N{EMPTY SET}": r"\emptyset ", "\N{PLUS-MINUS SIGN}": r"\pm ", "\N{ELEMENT OF}": r"\in ",
    "\N{DEGREE SIGN}": r"^\circ ", "\N{PRIME}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{IDEOGRAPHIC COMMA}": ",", "\N{ALMOST EQUAL TO}": r"\approx ", "\N{RATIO}": ":",
    "\N{WHITE UP-POINTING TRIANGLE}": r"\triangle ", "\N{PARALLEL TO}": r"\parallel ", "\N{UP TACK}": r"\perp ",
    "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}", "\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}",
    "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}", "\N{VULGAR FRACTION ONE THIRD}": r"\frac{1}{3}",
    "\N{VULGAR FRACTION TWO THIRDS}": r"\frac{2}{3}",
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width ASCII
}  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")
_SCRIPTS = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)|([₀₁₂₃₄₅₆₇₈₉ₙ]+)")
_CHARACTERS = str.maketrans(_SYMBOLS)
_COMMANDS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "nicefrac": r"\frac", "sfrac": r"\frac",
    "dbinom": r"\binom", "tbinom": r"\binom",
    "leq": r"\le", "leqslant": r"\le", "geq": r"\ge", "geqslant": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">",
    "varnothing": r"\emptyset", "lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")", "vert": "|",
    "lvert": "|", "rvert": "|", "dots": r"\ldots", "cdots": r"\ldots", "colon": ":", "degree": r"^\circ",
    "quad": " ", "qquad": " ", "iff": r"\iff", "lor": r"\text{ or }",
    "rightarrow": r"\to", "lnot": r"\neg", "mid": "|", "lg": r"\log_{10}",
    "bigcup": r"\cup", "backslash": r"\setminus", "cent": " cent ", "overrightarrow": r"\vec", "bar": r"\overline",
}  # fmt: skip
_COMMAND = re.compile(rf"\\({'|'.join(_COMMANDS)})(?![a-zA-Z])")
_SIZES = re.compile(
    r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|displaystyle|textstyle|limits|tiny|small|normalsize|large|Large"
    r"|LARGE|huge|Huge|bf|rm|it|boldmath)(?![a-zA-Z])"
)
_BOLD = re.compile(r"\\(?:boldsymbol|bm|mathbf|mathit|mathsf|underline|emph|boxed|fbox|textbf|textit|textrm|mathrm)\{")
# Commands of one argument, which is braced where it is a single letter or digit: \mathbf i, \vec b, \dot3.
_ONE_LETTER = re.compile(
    r"\\(mathbf|mathit|mathrm|mathsf|boldsymbol|bm|vec|hat|bar|overline|dot) ?([a-zA-Z\d])(?![a-zA-Z])"
)
_PLAIN_NAMES = re.compile(  # typed: sqrt(2), sin x
    r"(?<![\\a-zA-Z])(?:(?:sqrt|sin|cos|tan|ln|log|exp)(?= ?\()"
    r"|(?:sin|cos|tan|ln|log)(?= \d*[a-zA-Z]?(?![a-zA-Z\d]))|pi(?![a-zA-Z]))"
)
_PLAIN_ROOT = re.compile(r"\\sqrt ?(?=\()")
_STAR = re.compile(r"(?<=[\w)}]) ?\* ?(?=[\w(\\])")
_ORDINAL = re.compile(
    r"(?<=\d) ?(?:\^\s*\{\s*\\text\s*\{\s*(st|nd|rd|th)\s*\}\s*\}|\\text\s*\{\s*(st|nd|rd|th)\s*\}"
    r"|\^\s*\{\s*(st|nd|rd|th)\s*\})"
)
_BOLD_SET = re.compile(r"(\\in\s*)\\mathbf\s*\{?([RZNQC])\}?(?![a-zA-Z])")
_MODULO = re.compile(r"\\pmod ?\{? ?(\w+) ?\}?|\(? ?(?:\\bmod|\\text\{ ?mod ?\}|\bmod) ?(\w+) ?\)")
_BARE_BUILDER = re.compile(r"\{( ?[a-zA-Z] ?(?:\||:).*)\}")
_CHINESE = re.compile(r"\\text\s*\{\s*([\u4e00-\u9fff/]+)\s*\}")
_INFINITY = re.compile(r"([+-]?) ?(?:\\text\{ ?)?infinity ?\}?", re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed\s*\{")
_COLOURED = re.compile(r"\\(?:text)?color(?:box)?\s*\{[a-zA-Z!\d]*\}")
_SPACES = re.compile(r"(?P<row>\\\\)|\\[ ,;:>]|~|\s+")
_GROUPED = re.compile(r"(?<![\d.,}])\d{1,3}(?:(?:\{,\}|,\\!|\\,|\\ | )\d{3})+(?![\d,}])")
_OVER = re.compile(r"\{([^{}]*?)\s*\\(over|choose)(?![a-zA-Z])\s*([^{}]*)\}")
_FRACTION_ARGUMENTS = re.compile(
    r"\\(frac|binom)\s*(\d|\\pi(?![a-zA-Z]) ?|\{[^{}]*\})\s*(\d(?![\d])|\{|[a-zA-Z](?![a-zA-Z])|\\pi(?![a-zA-Z]))"
)
_ROOT_ARGUMENT = re.compile(r"\\sqrt\s*(\[\w\])?\s*(\d|[a-zA-Z]|\\pi(?![a-zA-Z]))")
_ROOT = re.compile("\N{SQUARE ROOT}\\s*(?:\\(([^()]*)\\)|\\{([^{}]*)\\}|(\\w+))")
_DOTS = re.compile(r"\.(?: ?\.){2,}")  # none of them is a full stop
_ANGLE = re.compile(r"(\\angle) ?\{? ?([A-Z]) ?([A-Z]) ?([A-Z])(?![a-zA-Z]) ?\}?")
_CODE = re.compile(r"\*\*([^*]+)\*\*|`([^`]+)`")


def undress(text: str) -> str:
    r"""Return the text with one spelling for each thing: no sizes, fonts or colours, `\frac{1}{2}`, `1{,}000`, `\le`.

    Commas inside `{,}` belong to a number; a bare comma may also part two values.
    """
    text = text.rstrip("。\\ \t\r\n")  # the full stop of Chinese, and what LaTeX breaks lines with
    text = _DOTS.sub(r"\\ldots ", _SCRIPTS.sub(_script, text).translate(_CHARACTERS)).strip()
    while (box := _BOX.match(text)) and closing(text, box.end() - 1, "{}") == len(text) - 1:
        text = text[box.end() : -1].strip()
    text = _CODE.sub(lambda code: code[1] or code[2], text)
    text = _strip_dollars(text).replace(r"\(", "").replace(r"\)", "").replace(r"\[", "").replace(r"\]", "")
    text = _COLOURED.sub("", _SIZES.sub(" ", text))
    text = _COMMAND.sub(lambda command: _COMMANDS[command[1]], text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ").replace("==", "=")
    text = re.sub(r"\\text\{\s*(\\\$|-|:)\s*\}", r"\1", text).replace("{:}", ":").replace("{-}", "-")
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}", r"^\\circ ", text)
    text = re.sub(r"\^\s*\{?((?:\s*\\prime)+)\s*\}?", lambda primes: "'" * primes[1].count("p"), text)
    text = re.sub(r"\\log\s*_\s*\{?e\}?", r"\\ln", text)
    text = _ORDINAL.sub(lambda found: found[1] or found[2] or found[3], _BOLD_SET.sub(r"\1\\mathbb{\2}", text))
    text = re.sub(r"\\mathbb\s*(\w)", r"\\mathbb{\1}", text)
    text = _ONE_LETTER.sub(r"\\\1{\2}", text)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2] or root[3]}}}", text)
    text = _braced_roots(_PLAIN_NAMES.sub(lambda name: rf"\{name[0]}", text))
    text = _MODULO.sub(lambda modulus: rf"\pmod{{{modulus[1] or modulus[2]}}}", _STAR.sub(r"\\cdot ", text))
    text = _CHINESE.sub(r"\1", text)
    text = _GROUPED.sub(lambda digits: "{,}".join(re.findall(r"\d+", digits[0])), text).replace(r"\!", "")
    text = _BOLD.sub(lambda wrapper: r"\text{" if "text" in wrapper[0] or "rm" in wrapper[0] else "{", text)
    text = re.sub(r"^([^{}]+\\over(?![a-zA-Z])[^{}]+)$", r"{\1}", text)
    text = _OVER.sub(lambda over: rf"\{'frac' if over[2] == 'over' else 'binom'}{{{over[1]}}}{{{over[3]}}}", text)
    text = _FRACTION_ARGUMENTS.sub(lambda found: rf"\{found[1]}{_braced(found[2])}{_braced(found[3])}", text)
    text = _ROOT_ARGUMENT.sub(lambda root: rf"\sqrt{root[1] or ''}{{{root[2]}}}", text)
    text = _SPACES.sub(lambda space: space["row"] or " ", text).strip()
    text = _ANGLE.sub(lambda angle: rf"{angle[1]} {min(angle[2], angle[4])}{angle[3]}{max(angle[2], angle[4])}", text)
    text = text.removesuffix(".").strip()
    if (infinity := _INFINITY.fullmatch(text)) is not None:
        return rf"{infinity[1]}\infty"
    if (builder := _BARE_BUILDER.fullmatch(text)) is not None:
        return rf"\{{{builder[1]}\}}"
    return _without_outer_braces(text)


def _braced_roots(text: str) -> str:
    r"""The text with the roots that keyboards type, sqrt(2), as `\sqrt{2}`."""
    while (root := _PLAIN_ROOT.search(text)) is not None and (end := closing(text, root.end())) is not None:
        text = rf"{text[: root.start()]}\sqrt{{{text[root.end() + 1 : end]}}}{text[end + 1 :]}"
    return text


def _strip_dollars(text: str) -> str:
    """Without the dollars of mathematics; a single one at the front is money."""
    if len(text) > 1 and text[0] == "$" == text[-1] and text[-2] != "\\":
        return text.strip("$").strip()
    return text


def _script(signs: re.Match[str]) -> str:
    raised = (signs[1] or "").translate(_RAISED)
    if not raised:
        return f"_{{{signs[2].translate(_LOWERED)}}}"
    is_alone = len(raised) == 1 and not signs.string[signs.end() : signs.end() + 1].isdigit()
    return f"^{raised}" if is_alone else f"^{{{raised}}}"


def _braced(text: str) -> str:
    return text if text.startswith("{") else f"{{{text}}}"


def _without_outer_braces(text: str) -> str:
    while len(text) > 2 and text[0] == "{" and closing(text, 0) == len(text) - 1 and not _parted(text[1:-1]):
        text = text[1:-1].strip()
    return text


def _parted(text: str) -> bool:
    return bool(split(text, ",")[1:])


def closing(text: str, start: int, brackets: str = "({[)}]") -> int | None:
    """Return the place of the bracket that closes the one at `start`, of whatever kind: `[0, 1)` is one pair."""
    half = len(brackets) // 2
    depth = 0
    for place in range(start, len(text)):
        character = text[place]
        if character in brackets[:half]:
            depth += 1
        elif character in brackets[half:]:
            depth -= 1
            if depth == 0:
                return place
    return None


def split(text: str, marks: str) -> list[str]:
    """Split the text at any of the marks that stands outside of all brackets."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        if character in "({[":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif depth == 0 and character in marks:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, text[start:])]
