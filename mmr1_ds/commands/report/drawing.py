"""One way to draw: a matplotlib figure becomes an SVG that takes its colours from the page, and a PNG in light colours.

Figures are drawn in the light colours. In the SVG each of them is replaced by a variable of the page's style, so that
light and dark need one drawing. Sizes are in CSS pixels (an inch is 72 of them): figures are about as wide as a column
of the page, and text in them about as large as text beside them. Text stays text.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH, HEIGHT = 380, 236  # pixels
_INCH = 72
_PNG_SCALE = 2
_TITLE_HEIGHT, _LEGEND_ROW_HEIGHT = 19, 19  # pixels of a line above and below a PNG

# Light and dark. After Okabe and Ito, darkened and brightened until each has 3:1 against its background (text 4.5:1).
COLOURS = {
    "card": ("#ffffff", "#181d26"),
    "ink": ("#1a2230", "#e9edf3"),
    "muted": ("#566172", "#a6b0bf"),
    "grid": ("#e4e8ee", "#2d3542"),
    "series-1": ("#0068b2", "#5aaef2"),
    "series-2": ("#cb4b00", "#ff8f4d"),
    "series-3": ("#007f5c", "#35c795"),
    "series-4": ("#ab4a8b", "#e69aca"),
    "series-5": ("#a87200", "#f2c14e"),
    "series-6": ("#3a8fc7", "#a5dcff"),
    "series-7": ("#7d7a00", "#e6dd4a"),
    "series-8": ("#7b8594", "#8792a3"),
    "heat": ("#084b8a", "#8cc8ff"),
    "on-heat": ("#fefefe", "#0b0e13"),
}
INK, MUTED, GRID, HEAT, ON_HEAT = (COLOURS[name][0] for name in ("ink", "muted", "grid", "heat", "on-heat"))
SERIES = [COLOURS[f"series-{number}"][0] for number in range(1, 9)]
OTHER = SERIES[7]  # grey
VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}

DASHES: list[Any] = ["solid", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), (0, (1, 1)), (0, (10, 3))]

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own; wider than what the page takes, so nothing overlaps there
    "font.size": 11.0,
    "text.parse_math": False,  # labels hold what users wrote
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.0,
    "legend.handlelength": 2.1,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "legend.labelcolor": INK,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "mmr1-ds report",  # the same figure gives the same file
    "path.simplify_threshold": 0.5,  # pixels: no spike is lost, and a long run makes no long file
}


@dataclass(frozen=True)
class Picture:
    """A finished figure, as SVG and as PNG."""

    name: str  # of its PNG, and of its element on the page
    svg: str
    png: bytes | None


@dataclass(frozen=True)
class Card:
    """A figure on the page."""

    title: str
    last: str  # a value to show beside the title
    caption: str
    pictures: Mapping[str, Picture]  # by axis; "" where there is one


def canvas(height: float = HEIGHT, width: float = WIDTH) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _INCH, height / _INCH), facecolor="none")


def axes(figure: Figure, left: float, top: float, right: float, bottom: float) -> Axes:
    """Return axes with these margins, in pixels."""
    width, height = (size * _INCH for size in figure.get_size_inches())
    rectangle = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    found = figure.add_axes(rectangle)
    found.patch.set_visible(False)
    found.tick_params(pad=5)
    return found


def compact(value: float) -> str:
    """Return a number as a tick shows it: 0.25, 1,500, 20k, 2e-5."""
    size = abs(value)
    if size >= 999_950:
        return f"{value / 1e6:.3g}M"
    if size >= 10_000:
        return f"{value / 1e3:.4g}k"
    if size >= 1_000:
        return f"{value:,.0f}"
    if size < 1e-12:
        return "0"
    if size < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """Return a fraction as a tick shows it, in percent."""
    return f"{compact(round(100 * value, 6))}%"


def time_unit(longest: float) -> tuple[float, str]:
    """Return the seconds of the unit that suits durations up to `longest` seconds, and its name."""
    units = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))
    return next(((size, name) for size, name in units if longest >= 2 * size), (1.0, "s"))


def duration(seconds: float) -> str:
    """Return a duration like 57.4 s, 15.9 min, 9.2 h or 3.1 days."""
    size, unit = time_unit(seconds)
    return f"{seconds:.3g} s" if size == 1 else f"{seconds / size:,.1f} {unit}"


def count_ticks(axis: Axis, most: int = 6) -> None:
    """Put ticks at whole numbers, `most` intervals of them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def picture(
    figure: Figure, name: str, title: str, description: str, png: bool, legend: Sequence[Line2D] = ()
) -> Picture:
    """Finish a figure. Call within `drawing()`.

    Args: title: a line or two; on the page the figure's place shows it; legend: the PNG's, on the page one legend
        serves all figures; description: for screen readers.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = _page_svg(stream.getvalue(), name, f"{' '.join(title.split())}: {description}")
    return Picture(name, svg, _png(figure, title, legend) if png else None)


def drawing() -> Any:
    """A context in which the figures have the report's style."""
    import matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return matplotlib.rc_context(STYLE)


def _png(figure: Figure, title: str, legend: Sequence[Line2D]) -> bytes:
    from matplotlib.transforms import Bbox

    width, height = figure.get_size_inches()
    gap = 10 / _INCH
    figure.text(gap / width, 1 + gap / height, title, fontsize=13, fontweight="bold")
    above = 2 * gap + len(title.splitlines()) * _TITLE_HEIGHT / _INCH
    below = 0.0
    if legend:
        below = (len(legend) * _LEGEND_ROW_HEIGHT + 8) / _INCH
        figure.legend(handles=legend, loc="upper left", bbox_to_anchor=(gap / width, 0.0))
    stream = io.BytesIO()
    box = Bbox([[0, -below], [width, height + above]])
    figure.savefig(stream, format="png", dpi=_PNG_SCALE * _INCH, bbox_inches=box, facecolor=COLOURS["card"][0])
    return stream.getvalue()


_TAG = re.compile(r"<[^>]*>")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font-family: [^;\"]*;? ?")
_UNTURNED = re.compile(r' transform="rotate\(-0 [^"]*"')
_ID = re.compile(r'(?<= id=")[^"]*')


def _page_svg(svg: str, name: str, description: str) -> str:
    """Matplotlib's file as an element of the page: half as long, its ids its own, its colours the page's."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :].strip()
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None, "matplotlib wrote no viewBox"
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", body))
    body = _TAG.sub(lambda tag: _page_tag(tag[0], used, name), body)
    body = re.sub(r">\s+<", "><", body)
    while (shorter := re.sub(r"<g/>|<g></g>|<defs></defs>", "", body)) != body:
        body = shorter
    return (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view[1]}" role="img" '
        f'aria-label="{escape(description)}">{body}'
    )


def _page_tag(tag: str, used: set[str], name: str) -> str:
    found = _ID.search(tag)
    if found and found[0] not in used:
        tag = tag.replace(f' id="{found[0]}"', "")
    elif found:
        tag = _ID.sub(lambda own: f"{name}-{own[0]}", tag)
    tag = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", tag)
    tag = _UNTURNED.sub("", _FONT.sub("", tag))
    tag = _COLOUR.sub(lambda colour: VARIABLES.get(colour[0], colour[0]), tag)
    tag = _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)
    return re.sub(r"\s+", " ", tag).replace(" L ", "L").replace(' "', '"')
