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

MANY_BYTES = 5_000_000
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


@pytest.fixture
def opened(browser, reports) -> Iterator:
    """Opens a report; what went wrong on its page is collected, and must be nothing."""
    contexts, wrong = [], []

    def note_request(request) -> None:
        if not request.url.startswith(("file:", "data:")):
            wrong.append(f"request: {request.url[:100]}")

    def open_page(name: str, **options):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:100]}"))
        page.on("request", note_request)
        page.goto(reports[name].as_uri())
        page.wait_for_load_state("load")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("name", ["one", pytest.param("several", marks=pytest.mark.nightly)])
def test_page_is_readable(opened, reports, name):
    page = opened(name)
    for closed in page.query_selector_all("details:not([open])"):
        closed.evaluate("e => e.open = true")
    assert reports[name].stat().st_size < MANY_BYTES
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        figures = page.evaluate(FIGURES)
        assert len(figures) == page.evaluate("document.querySelectorAll('.plot:not(.by-rollouts, .by-seconds)').length")
        assert len(figures) > 25
        assert [figure for figure in figures if figure[1] < 150 or figure[2] < 40 or not figure[3]] == []
        upright = [size for size in page.evaluate(TEXT_SIZES) if size[2] == 0]
        assert len(upright) > 300
        if width == 400:  # a phone; the narrowest column of the page is as wide at any width
            assert [text for text in upright if text[0] < SMALLEST_TEXT] == []
        assert page.evaluate(CLASHES) == []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > 300
            assert sorted(found for found in contrasts if found[0] < 4.5)[:10] == []


def test_schemes_differ(opened):
    page = opened("one")
    shown = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        line = "getComputedStyle(document.querySelector('.plot path[style*=\"--series-1\"]')).stroke"
        shown.append((background, page.evaluate(line)))
    assert all(light != dark for light, dark in zip(*shown, strict=True))


def test_curves_change_their_axis(opened):
    page = opened("several")

    def shown() -> list[str]:
        return [name for name, *_ in page.evaluate(FIGURES) if name.startswith("validation_accuracy")]

    assert shown() == ["validation_accuracy"]
    page.get_by_text("rollouts", exact=True).first.click()
    assert shown() == ["validation_accuracy_by_rollouts"]
    page.keyboard.press("ArrowRight")  # the keyboard does it too
    assert shown() == ["validation_accuracy_by_seconds"]
    page.get_by_text("steps", exact=True).first.click()
    assert shown() == ["validation_accuracy"]
    targets = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert len(targets) == 7
    assert [target for target in targets if page.query_selector(target) is None] == []


def test_without_scripts_curves_stand_against_steps(opened):
    page = opened("one", java_script_enabled=False)
    assert page.locator("[data-figure=validation_accuracy]").is_visible()
    assert not page.locator("[data-figure=validation_accuracy_by_rollouts]").is_visible()
    assert not page.locator(".axes").is_visible()
