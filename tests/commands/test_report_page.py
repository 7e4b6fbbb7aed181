"""The report's file: nothing in it can run or be fetched, and what a run lacks is left out."""

import base64
import hashlib
import json
import re
import shutil
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
def runs(tmp_path_factory) -> Path:
    """One with variance-aware sampling, one without."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "vas_1")
    write_run(root / "shuffle_1", strategy="shuffle")
    return root


@pytest.fixture(scope="module")
def page(runs) -> str:
    return write_report([runs / "vas_1"], runs / "single" / "report.html", pngs=False).read_text(encoding="utf-8")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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


def test_hostile_texts_stay_texts(page):
    found = _Page(page)
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{}]  # the one for the axes
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(
        attributes["src"].startswith("data:image/webp;base64,") for tag, attributes in found.tags if tag == "img"
    )
    shown = "".join(found.texts)
    for text in HOSTILE:
        assert text.replace("\ud83d", "?") in shown
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy


def test_page_asks_for_nothing_and_shows_no_credential(page, runs):
    found = _Page(page)
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    (run,) = load_runs([runs / "vas_1"])
    assert run.setting("worker.reward.api_key") == "***" and "sk-not-to-be-shown" not in page


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


def test_pngs_lie_beside_the_page(tmp_path, runs):
    small = tmp_path / "small"
    small.mkdir()
    kept = ("step", "val/accuracy_reward", "timing_s/step", "timing_s/gen", "perf/num_rollouts")
    for kind in ("metrics", "curriculum", "observations"):
        lines = [
            row if kind != "metrics" else {name: row[name] for name in kept if name in row}
            for row in rows(runs / "vas_1" / f"{kind}.jsonl")[:20]
        ]
        (small / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([small], tmp_path / "report.html", pngs=True)
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "report").iterdir()}
    for name in ("validation_accuracy", "validation_accuracy_by_rollouts", "weights", "calibration", "time_by_stage"):
        width, height = sizes[f"{name}.png"]
        assert width == 760 and height > 500
    assert not [name for name in sizes if not name.endswith(".png")]


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    run, folder = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/overall": 0.5}\n')
    output = write_report([run], folder / "report.html", pngs=False)
    before = output.read_bytes()
    (run / "metrics.jsonl").write_text('{"step": 2, "reward/overall": 0.5}\n')
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report([run], folder / "report.html", pngs=False)
    assert output.read_bytes() == before and [path.name for path in folder.iterdir()] == ["report.html"]


def test_images_outside_the_run_are_not_shown(tmp_path):
    run = write_run(tmp_path / "run", num_steps=11, batch=100)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG not for this page")
    lines = rows(run / "samples.jsonl")
    (run / "samples.jsonl").write_text("".join(json.dumps(row | {"images": ["../secret.png"]}) + "\n" for row in lines))
    html = write_report([run], tmp_path / "report.html", pngs=False).read_text()
    assert "<img" not in html and 'class="prompts"' in html


def test_an_old_run_with_metrics_alone_gets_its_curves(tmp_path, runs):
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(runs / "shuffle_1" / "metrics.jsonl", old)
    html = write_report([old], tmp_path / "report.html", pngs=False).read_text()
    assert 'data-figure="validation_accuracy"' in html and 'data-figure="run_times"' in html
    assert 'data-figure="weights"' not in html and 'id="prompts"' not in html
    assert "data.sampling_strategy=curriculum turns it on" in html and "trainer.val_generations_to_log" in html


def test_a_first_step_is_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/overall": 0.5, "timing_s/step": 1.0}\n')
    html = write_report([tmp_path], tmp_path / "report.html", pngs=False).read_text()
    figure = re.search(r'data-figure="reward">(.*?)</svg>', html, re.DOTALL)[1]
    assert "<use " in figure  # a dot: one value makes no line
    assert {"0", "1", "2"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", figure))


def test_torn_files_are_got_over(tmp_path):
    run = write_run(tmp_path / "run", num_steps=11)
    for kind in ("observations", "curriculum", "samples", "generations", "metrics"):
        with (run / f"{kind}.jsonl").open("a") as file:
            file.write('{"step": 24, "prompts": [1, 2], "predi')
    (run / "environment.json").write_text('{"versions"')
    (run / "config.yaml").write_text("data: {seed: [")
    html = write_report([run], tmp_path / "report.html", pngs=False).read_text()
    assert "could not be read" not in html and 'data-figure="calibration"' in html


def test_command_prints_the_path_and_loads_no_engine(tmp_path):
    program = (
        "import sys, runpy; sys.argv = ['report', sys.argv[1], '--no-png', '--output', sys.argv[2]]\n"
        "try: runpy.run_module('mmr1_ds.commands.report', run_name='__main__')\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'deepspeed', 'vllm', 'transformers', 'datasets', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    output = tmp_path / "new" / "page.html"
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/overall": 0.5}\n')
    call = [sys.executable, "-c", program, str(run), str(output)]
    done = subprocess.run(call, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n" and done.stderr == "" and output.is_file()


def test_command_is_light_to_import():
    program = (
        "import sys, mmr1_ds.commands.report.command; "
        "sys.exit(bool({'torch', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT).returncode == 0


def test_matrix_on_the_page_holds_the_counts(page, runs):
    last = rows(runs / "vas_1" / "curriculum.jsonl")[-1]["weight_transitions"]
    svg = re.search(r'data-figure="weight_moves_60">(.*?)</svg>', page, re.DOTALL)[1]
    ticks = ["0", "0.2", "0.4", "0.6", "0.8", "1"] * 2
    shown = sorted(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    expected = [str(count) for row in last for count in row if count]
    assert shown == sorted([*expected, *ticks, "after step 60", "after step 45"])
