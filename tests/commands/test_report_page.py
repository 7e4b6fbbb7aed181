"""The report's file: nothing in it can run or be fetched, and what a run lacks is left out."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fixtures.launching import ROOT, environment
from fixtures.report_fixtures import HOSTILE, write_run
from PIL import Image

from mmr1_ds.commands.report.drawing import COLOURS
from mmr1_ds.commands.report.page import write_report
from mmr1_ds.commands.report.runs import load_runs


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose last lines are just being written, beside a file that its samples must not show."""
    run = write_run(tmp_path_factory.mktemp("runs") / "vas_1")
    for kind in ("observations", "curriculum", "samples", "generations", "metrics"):
        with (run / f"{kind}.jsonl").open("a") as file:
            file.write('{"step": 24, "prompts": [1, 2], "predi')
    (run.parent / "secret.png").write_bytes(b"\x89PNG not for this page")
    return run


@pytest.fixture(scope="module")
def page(run) -> str:
    return write_report([run], run.parent / "single" / "report.html", pngs=False).read_text(encoding="utf-8")


class _Page(HTMLParser):
    """Tags, attributes and texts, as a browser would take them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.slow
def test_hostile_texts_stay_texts(page):
    found = _Page(page)
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{}]  # the one for the axes
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    images = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert images and all(source.startswith("data:image/webp;base64,") for source in images)  # and so no secret.png
    shown = "".join(found.texts)
    for text in HOSTILE:
        assert text.replace("\ud83d", "?") in shown
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy


def test_page_asks_for_nothing_and_shows_no_credential(page, run):
    found = _Page(page)
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    (loaded,) = load_runs([run])
    assert loaded.setting("worker.reward.api_key") == "***" and "sk-not-to-be-shown" not in page


def test_ids_are_unique_and_every_reference_has_one(page):
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    references = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    assert references and references <= set(identifiers)


def test_figures_take_all_their_colours_from_the_page(page):
    figures = "".join(re.findall(r'<div class="plot.*?</svg>', page, re.DOTALL))
    assert figures.count("<svg") > 40
    assert re.findall(r"#[0-9a-f]{6}\b", figures) == []
    assert set(re.findall(r"var\(--([\w-]+)\)", figures)) <= set(COLOURS)
    assert "font-family" not in figures


def test_matrix_on_the_page_holds_the_counts(page, run):
    last = json.loads((run / "curriculum.jsonl").read_text().splitlines()[-2])["weight_transitions"]
    svg = re.search(r'data-figure="weight_moves_20">(.*?)</svg>', page, re.DOTALL)[1]
    ticks = ["0", "0.2", "0.4", "0.6", "0.8", "1"] * 2
    shown = sorted(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    expected = [str(count) for row in last for count in row if count]
    assert shown == sorted([*expected, *ticks, "after step 20", "after step 15"])


def test_lines_that_are_being_written_are_got_over(page):
    assert "could not be read" not in page
    for figure in ("calibration", "weights", "validation_accuracy", "time_by_stage", "way"):
        assert f'data-figure="{figure}"' in page


def test_a_first_step_is_enough_and_pngs_lie_beside_the_page(tmp_path, monkeypatch):
    """Of metrics alone. And a report that fails leaves the old one."""
    values = '"reward/overall": 0.5, "val/accuracy_reward": 0.5, "timing_s/step": 1.0, "perf/num_rollouts": 3'
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, {values}}}\n')
    (tmp_path / "environment.json").write_text('{"versions"')
    (tmp_path / "config.yaml").write_text("data: {seed: [")
    output = write_report([tmp_path], tmp_path / "out" / "report.html", pngs=True)
    html = output.read_text()
    figure = re.search(r'data-figure="training_reward">(.*?)</svg>', html, re.DOTALL)[1]
    assert "<use " in figure  # a dot: one value makes no line
    assert {"0", "1", "2"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", figure))
    assert 'data-figure="weights"' not in html and 'id="prompts"' not in html
    assert "data.sampling_strategy=curriculum turns it on" in html and "trainer.val_generations_to_log" in html

    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out" / "report").iterdir()}
    for name in ("validation_accuracy", "validation_accuracy_by_rollouts", "training_reward", "time_by_stage"):
        width, height = sizes[f"{name}.png"]
        assert width == 760 and height > 500
    assert not [name for name in sizes if not name.endswith(".png")]

    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report([tmp_path], output, pngs=False)
    assert output.read_text() == html
    assert sorted(path.name for path in output.parent.iterdir()) == ["report", "report.html"]


def test_the_program_prints_the_path_and_loads_no_engine(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/overall": 0.5}\n')
    output = tmp_path / "new" / "page.html"
    program = (
        "import sys, runpy; sys.argv = ['report', sys.argv[1], '--no-png', '--output', sys.argv[2]]\n"
        "try: runpy.run_module('mmr1_ds.commands.report', run_name='__main__')\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'deepspeed', 'vllm', 'transformers', 'datasets', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    call = [sys.executable, "-c", program, str(tmp_path), str(output)]
    done = subprocess.run(call, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n" and done.stderr == "" and output.is_file()
