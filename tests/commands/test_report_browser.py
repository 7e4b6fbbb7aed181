"""The report in a real browser: no errors, no requests, readable at two widths and in both colour schemes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.report_fixtures import write_run

from mmr1_ds.commands.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]

WIDTHS, SCHEMES, MANY_BYTES = (1280, 400), ("light", "dark"), 5_000_000
SMALLEST_TEXT = 10.0  # CSS pixels, in figures
# The text's colour against what is painted behind it. Boxes are opaque or see-through; in a figure the cell counts.
CONTRASTS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  canvas.canvas.width = canvas.canvas.height = 1;
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgb(getComputedStyle(document.body).backgroundColor);
  };
  const inCell = (text) => {  // of a heat map: the path drawn before the text that covers its middle
    const box = text.getBoundingClientRect(), svg = text.closest("svg");
    const middle = new DOMPoint(box.x + box.width / 2, box.y + box.height / 2);
    let colour = behind(text);
    for (const path of svg.querySelectorAll("path")) {
      const style = getComputedStyle(path);
      if (style.fill === "none" || !path.isPointInFill(middle.matrixTransform(path.getScreenCTM().inverse()))) continue;
      const paint = rgb(style.fill), alpha = style.opacity * style.fillOpacity;
      colour = colour.map((c, k) => alpha * paint[k] + (1 - alpha) * c);
    }
    return colour;
  };
  const found = [];
  const seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(element) || !element.checkVisibility()) continue;
    seen.add(element);
    const inFigure = element.tagName === "text";
    const colour = rgb(inFigure ? getComputedStyle(element).fill : getComputedStyle(element).color);
    const back = inFigure ? inCell(element) : behind(element);
    const [low, high] = [luminance(colour), luminance(back)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.tagName + " " + element.textContent.slice(0, 40)]);
  }
  return found;
}
"""
FIGURES = """
() => [...document.querySelectorAll(".plot")].filter((plot) => plot.checkVisibility()).map((plot) => {
  const box = plot.querySelector("svg").getBoundingClientRect();
  const paths = [...plot.querySelectorAll("path, use")].filter((path) => path.getBoundingClientRect().width > 0);
  return [plot.dataset.figure, box.width, box.height, paths.length];
})
"""
TEXT_SIZES = """
() => [...document.querySelectorAll(".plot svg text")].filter((text) => text.checkVisibility()).map((text) =>
  [parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a || 0, text.textContent, text.getScreenCTM().b])
"""
# Texts of a figure that lie on one another, by more than a line's leading, and those that leave it.
CLASHES = """
() => {
  const found = [];
  for (const svg of document.querySelectorAll(".plot svg")) {
    if (!svg.checkVisibility()) continue;
    const name = svg.parentElement.dataset.figure, whole = svg.closest(".card").getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((text) => [text.getBoundingClientRect(), text.textContent]);
    texts.forEach(([a, first], k) => {
      if (a.left < whole.left || a.right > whole.right) found.push([name, "leaves the card", first]);
      for (const [b, second] of texts.slice(k + 1)) {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 4) found.push([name, first, second]);
      }
    });
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Of one run, and of two setups with two seeds each."""
    root = tmp_path_factory.mktemp("reports")
    for seed in (1, 2):
        write_run(root / f"vas_{seed}", seed=seed)
        write_run(root / f"shuffle_{seed}", strategy="shuffle", seed=seed)
    several = [root / f"{name}_{seed}" for name in ("vas", "shuffle") for seed in (1, 2)]
    return {
        "one": write_report(several[:1], root / "one" / "report.html", pngs=False),
        "several": write_report(several, root / "several" / "report.html", pngs=False),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        # Without the sandbox: as root, as in containers, Chromium does not start with it.
        with started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as found:
            yield found


class Tab:
    """A page that is open, and what went wrong on it."""

    def __init__(self, browser, path: Path, width: int, scheme: str, **options) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("requestfailed", lambda request: self.wrong.append(f"failed: {request.url[:100]}"))
        self.page.on("request", self._saw)
        self.page.goto(path.as_uri())
        self.page.wait_for_load_state("load")

    def _saw(self, request) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.wrong.append(f"request: {request.url[:100]}")


@pytest.fixture
def opened(browser, reports) -> Iterator:
    tabs = []

    def open_tab(name: str, width: int = 1280, scheme: str = "light", **options) -> Tab:
        tabs.append(Tab(browser, reports[name], width, scheme, **options))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.context.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "several"])
def test_page_is_readable(opened, reports, name, width, scheme):
    tab = opened(name, width, scheme)
    page = tab.page
    for closed in page.query_selector_all("details:not([open])"):
        closed.evaluate("e => e.open = true")
    assert tab.wrong == []
    assert reports[name].stat().st_size < MANY_BYTES

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    figures = page.evaluate(FIGURES)
    assert len(figures) == page.evaluate("document.querySelectorAll('.plot:not(.by-rollouts, .by-seconds)').length")
    assert len(figures) > 30
    assert [figure for figure in figures if figure[1] < 150 or figure[2] < 40 or not figure[3]] == []

    upright = [size for size in page.evaluate(TEXT_SIZES) if size[2] == 0]
    assert len(upright) > 300
    if width == 400:  # a phone; the narrowest column of the page is as wide at any width
        assert [text for text in upright if text[0] < SMALLEST_TEXT] == []
    assert page.evaluate(CLASHES) == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 300
    assert sorted(found for found in contrasts if found[0] < 4.5)[:10] == []


def test_schemes_differ(opened):
    backgrounds = [
        opened("one", scheme=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in SCHEMES
    ]
    lines = [
        opened("one", scheme=scheme).page.evaluate(
            "getComputedStyle(document.querySelector('.plot path[style*=\"--series-1\"]')).stroke"
        )
        for scheme in SCHEMES
    ]
    assert len(set(backgrounds)) == len(set(lines)) == 2


def test_curves_change_their_axis(opened):
    tab = opened("several")

    def shown() -> list[str]:
        return [name for name, *_ in tab.page.evaluate(FIGURES) if name.startswith("validation_accuracy")]

    assert shown() == ["validation_accuracy"]
    tab.page.get_by_text("rollouts", exact=True).first.click()
    assert shown() == ["validation_accuracy_by_rollouts"]
    tab.page.keyboard.press("ArrowRight")  # the keyboard does it too
    assert shown() == ["validation_accuracy_by_seconds"]
    tab.page.get_by_text("steps", exact=True).first.click()
    assert shown() == ["validation_accuracy"]
    assert tab.wrong == []


def test_without_scripts_curves_stand_against_steps(opened):
    page = opened("one", java_script_enabled=False).page
    assert page.locator("[data-figure=validation_accuracy]").is_visible()
    assert not page.locator("[data-figure=validation_accuracy_by_rollouts]").is_visible()
    assert not page.locator(".axes").is_visible()


def test_every_link_of_the_page_leads_somewhere(opened):
    page = opened("several").page
    targets = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert len(targets) == 7
    assert [target for target in targets if page.query_selector(target) is None] == []
