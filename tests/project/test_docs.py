"""The documentation: the site builds without a warning, links lead somewhere, and what pages say of keys, metrics,
messages and figures is what the source says."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from fixtures.doc_blocks import DOCS, PAGES, anchors, blocks, code_spans, occurs, prose, rows, source_texts
from fixtures.launching import ROOT, environment

from mmr1_ds.commands import cli
from mmr1_ds.commands.plan.hardware import Assumptions
from mmr1_ds.config import families
from mmr1_ds.config.reference import sections
from mmr1_ds.config.upstream import translate
from mmr1_ds.curriculum.group_sizes import SizeRange, group_sizes
from mmr1_ds.errors import UserError

KEYS = {key.name: key.default for section in sections() for key in section.keys}
SECTIONS = {name.rsplit(".", depth)[0] for name in KEYS for depth in range(1, name.count(".") + 1)}
KEY = re.compile(r"(?:data|algorithm|worker|trainer)\.[a-z_][\w.*]*")
STAGES = "gen|reward|curriculum|draw|old|ref|values|adv|update_critic|update_actor|sync|testing|refresh|save_checkpoint"
OUR_FOLDERS = ("tests", "benchmarks", "launch", "configs", "mmr1_ds", "kernels", "requirements")
METRIC = re.compile(
    r"(actor|critic|reward|val|rollout|curriculum|partial|checkpoint|online_filtering|global_seqlen|perf|timing_s|"
    r"memory_gb|response_length|prompt_length)/[\w/]+"
)
FOREIGN = {  # words of others that troubleshooting.md quotes -> whose
    "Triton is installed, but doesn't include CPU backend": "vLLM's",
    "CUDA out of memory": "torch's",
    "Free memory on device": "vLLM's",
    "is less than desired GPU memory utilization": "vLLM's",
}


# --- the site -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    built = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *"-q -W --keep-going -b html -d".split(), tmp_path / "trees", DOCS, built],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in built.glob("*.html")} - {"genindex", "search"}
    assert pages == {path.stem for path in DOCS.glob("*.md")}
    for path in built.glob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]+src=\"([^\"]+)\"|<link[^>]+href=\"([^\"]+)\"", path.read_text()
        )
        assert [url for pair in loaded for url in pair if url.startswith(("http", "//"))] == []
    menu = (built / "index.html").read_text()
    assert all(f'href="{page}.html"' in menu for page in pages - {"index"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            assert re.fullmatch(r"https://[\w.-]+(/[\w./#%+-]*)?", target), target
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else Path(os.path.normpath(page.parent / path))
        assert found.exists(), f"{page.name}: [{text}]({target})"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: [{text}]({target})"


# --- names --------------------------------------------------------------------------------------------------------


def is_key(name: str) -> bool:
    """A key or a section, `*` standing for any part."""
    pattern = re.compile(re.escape(name.rstrip(".")).replace(r"\*", r"[\w.]+"))
    return any(pattern.fullmatch(known) for known in {*KEYS, *SECTIONS})


def keys_in(text: str) -> set[str]:
    """Names in code that begin as ours do; those of files and modules are others."""
    found = set()
    for span in code_spans(text):
        found |= {name for name in re.findall(rf"(?<![\w./-]){KEY.pattern}", span) if not name.endswith((".py", ".md"))}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page):
    text = prose(page)
    if page.name == "coming_from.md":
        text = text.replace(text[text.index("| EasyR1 or MMR1 |") : text.index("The same names with another")], "")
        text = text.replace(text[text.index("| upstream's key |") : text.index("## TRL")], "")
    upstream = {"worker.reward.compute_score"}  # rewards.md names it as such
    assert {name for name in keys_in(text) - upstream if not is_key(name)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_exist(page):
    texts = source_texts("mmr1_ds")
    known = {text for text in texts if METRIC.fullmatch(text)} | _made_of_parts()
    shown = {span for span in code_spans(prose(page)) if METRIC.fullmatch(span)}
    for block in blocks(page):
        if block.language in ("jsonl", "python"):
            shown |= {match[0] for match in METRIC.finditer(block.text)}
    shown.discard("reward/brevity")  # your_own.md's own
    assert {name for name in shown if name not in known and not name.endswith("/")} == set()


def _made_of_parts() -> set[str]:
    """Metrics whose names the source puts together."""
    spreads = ("critic/score", "critic/rewards", "critic/advantages", "critic/values", "critic/returns")
    made = {"actor/num_bad_updates", "critic/num_bad_updates"} | {
        f"{name}/{part}" for name in (*spreads, "response_length", "prompt_length") for part in ("mean", "max", "min")
    }
    made |= {f"timing_s/{stage}" for stage in f"{STAGES}|step".split("|")}
    made |= {f"memory_gb/{stage}" for stage in STAGES.split("|")}
    made |= {f"actor/{name}" for name in ("pg_clipfrac_higher", "pg_clipfrac_lower", "ppo_kl", "ref_kl")}
    drift = ("logprob_diff_mean", "kl", "is_weight_mean", "is_truncated_fraction", "is_masked_fraction")
    made |= {f"rollout/{name}" for name in (*drift, "num_repeated_requests")}
    made |= {"reward/overlong", "val/accuracy_std_over_prompts", "val/accuracy_standard_error"}
    return made


def test_metrics_that_are_put_together_are_in_the_source():
    """The last parts of those names, so that the list above does not outlive them."""
    texts = set(source_texts("mmr1_ds"))
    for name in _made_of_parts():
        assert any(name.rpartition("/")[2] in text for text in texts), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_files_in_the_text_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for span in code_spans(prose(page)):
        words = span.split()
        if words[0] == "make" and len(words) > 1:
            targets = [word for word in words[1:] if "=" not in word]
            assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets), span
        if words[0] == "mmr1-ds" and len(words) > 1 and not words[1].endswith(":"):
            assert words[1] in cli.COMMANDS, span
        for word in words:
            named = re.fullmatch(r"((?:tests|benchmarks|launch|configs|mmr1_ds|kernels|requirements)/[\w./]*\w)", word)
            assert not named or (ROOT / word).exists(), span
        if re.fullmatch(r"\w+/[\w/]+\.py", span) and not span.startswith(("path/", "verl/", "examples/")):
            assert (ROOT / span).exists() or (ROOT / "mmr1_ds" / span).exists(), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    """In the text and in the blocks; `*` stands for any part of a name, braces are not looked into."""
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(OUR_FOLDERS)})/[\w./*-]*[\w*/])(?![\w{{])", page.read_text())
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/")))] == []


# --- the architecture -----------------------------------------------------------------------------------------------


def floors_of_the_test() -> list[set[str]]:
    """The list that test_layers checks the imports against, top floor first, read without importing another test."""
    tree = ast.parse((ROOT / "tests" / "project" / "test_layers.py").read_text())
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    return found


def test_the_rooms_are_those_of_the_layer_test():
    floors: dict[int, list[str]] = {}
    for floor, room, _, _ in table("architecture.md", "floor"):
        floors.setdefault(int(floor), []).append(room.strip("`"))
    expected = {floor: sorted(names) for floor, names in enumerate(reversed(floors_of_the_test()), 1)}
    assert expected.pop(9) == ["benchmarks"]  # beside the package
    assert {floor: sorted(rooms) for floor, rooms in sorted(floors.items())} == expected


def test_rooms_hold_what_the_table_says():
    for _, room, _, holds in table("architecture.md", "floor"):
        name = room.strip("`")
        folder = ROOT / "kernels" / name if name == "mmr1_kernels" else ROOT / "mmr1_ds" / name
        missing = [held for held in code_spans(holds) if not list(folder.glob(held)) + list(folder.glob(f"{held}.py"))]
        assert missing == [], name


def test_excerpts_are_the_source_s_text():
    excerpts = docs_module("excerpts")
    pages = [page for page in DOCS.glob("*.md") if "# from mmr1_ds/" in page.read_text()]
    assert pages != []
    for page in pages:
        assert excerpts.filled(page.read_text()) == page.read_text(), "python docs/excerpts.py writes it anew"


def docs_module(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- messages -----------------------------------------------------------------------------------------------------


def quoted_messages() -> list[str]:
    """The code of the first columns of troubleshooting.md that is no metric, stage, key or exit code."""
    found = []
    for cells in rows((DOCS / "troubleshooting.md").read_text()):
        for span in code_spans(cells[0]):
            if " " in span and not span.startswith("mmr1-ds plan"):
                found.append(span)
    return found


def test_quoted_messages_are_the_source_s_words():
    messages = quoted_messages()
    assert len(messages) > 60
    texts = source_texts("mmr1_ds", "kernels")
    assert [message for message in messages if message not in FOREIGN and not occurs(message, texts)] == []


def test_a_message_that_nobody_says_is_found_out():
    texts = source_texts("mmr1_ds")
    assert occurs("checkpoint ... is damaged (...); going back to the one before", texts)
    assert not occurs("checkpoint ... is damaged (...); going on to the next one", texts)


# --- coming from elsewhere ----------------------------------------------------------------------------------------


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first heading is `heading`."""
    text = (DOCS / page).read_text()
    start = text.index(f"| {heading} |")
    return rows(f"{text}\n\n"[start:].partition("\n\n")[0])


def test_the_page_of_models_has_the_families_that_the_program_knows():
    assert f"\n{families.table()}\n\n" in (DOCS / "models.md").read_text()


def test_easyr1_s_keys_become_what_the_table_says():
    samples = {"worker.reward.model_name": "judge", "worker.reward.base_url": "http://judge/v1"}
    for theirs, mine, _ in table("coming_from.md", "EasyR1 or MMR1"):
        key = theirs.strip("`")
        value = True if "offload" in key else samples.get(key, "x")
        assert mine.strip("`") in translate({key: value}, "a test").values, theirs


def test_easyr1_s_other_keys_are_passed_over():
    text = (DOCS / "coming_from.md").read_text()
    start = text.index("These are passed over")
    sentence = text[start : text.index("`worker.reward.api_key` is not read")]
    for key in code_spans(sentence):
        assert translate({key: 1}, "a test").ignored == [key]


def test_defaults_beside_easyr1_s_are_ours():
    compared = 0
    for key, _, here in table("coming_from.md", "key"):
        said = re.split(r"[:;,] |$", here.strip("`"), maxsplit=1)[0].strip("`")
        default = json.loads(KEYS[key.strip("`")])
        if isinstance(default, bool | int | float) or said == default:
            assert yaml.safe_load(said.replace("e", ".0e") if "e-" in said else said) == default, key
            compared += 1
    assert compared >= 7


def test_every_row_about_others_names_a_key_of_ours_or_none():
    for heading in ("TRL's `GRPOConfig`", "OpenRLHF, now and before"):
        for theirs, mine, differs in table("coming_from.md", heading):
            keys = [span.partition("=")[0] for span in code_spans(mine)]
            assert mine == "-" or (keys and all(key in KEYS for key in keys)), (theirs, mine)
            if mine == "-":
                continue
            for span in code_spans(mine):  # a value is one that the key takes
                key, equals, value = span.partition("=")
                assert not equals or value in KEYS[key] or _accepts(key, value), span
            assert differs.count("`") % 2 == 0


def _accepts(key: str, value: str) -> bool:
    from mmr1_ds.config.loading import load_config
    from mmr1_ds.config.ranges import check_choices

    try:
        check_choices(load_config([f"{key}={value}"]).config)
    except UserError:
        return False
    return True


# --- figures ------------------------------------------------------------------------------------------------------


def test_the_plan_s_assumptions_are_all_there():
    listed = {span for cells in table("presets.md", "`--assume`") for span in code_spans(cells[0])}
    assert listed == {field.name for field in dataclasses.fields(Assumptions)}


def test_the_figures_of_the_recorded_runs():
    printed = docs_module("pass_rates").table()
    page = " ".join((DOCS / "variance_aware_sampling.md").read_text().split())
    sentence = page[page.index("In the upper run") : page.index("The picture and these figures")]
    figures = re.findall(r"(?<!\d)\.\d{3}", sentence)
    assert len(figures) == 8
    assert all(f"0{figure}" in printed for figure in figures)


def test_the_example_by_hand_is_what_the_kernel_says(tmp_path, capsys):
    page = DOCS / "variance_aware_sampling.md"
    (shown,) = [block.text for block in blocks(page) if block.language == "jsonl"]
    (tmp_path / "responses.jsonl").write_text(shown)
    assert cli.main(["score", str(tmp_path / "responses.jsonl"), "--tokenizer", "sacrebleu:13a"]) == 0
    apples, pears = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    text = page.read_text()
    assert [f"0{figure}" for figure in (".2222", ".7450", ".3268")] == apples[-3:]
    assert pears[-3:] == ["0.0000"] * 3
    for figure in (".2222", ".7450", ".3268"):
        assert figure in text
    # The three BLEUs, from the fractions of the page's own table.
    bleus = [(1 * 0.5 * 0.1) ** (1 / 3), (0.25 * 0.1 / 3 * 0.05) ** (1 / 3), (2 / 3 * 0.5 * 0.1) ** (1 / 3)]
    assert re.findall(r"\^\(1/3\) = (\.\d{4})", text) == [f"{bleu:.4f}"[1:] for bleu in bleus]
    assert f"{1 - sum(bleus) / 3:.4f}" == apples[-2]


def test_the_sizes_of_groups():
    rates, sizes = (
        [float(cell) for cell in line.split("|")[2:-1]]
        for line in re.findall(r"^\| (?:pass rate p|responses) \| *[.\d].*$", _vas(), re.MULTILINE)
    )
    logits = np.log(np.array(rates) / (1 - np.array(rates)))
    found = group_sizes(logits, np.full(len(rates), 1e-4), 8, SizeRange(2, 16))
    assert found.tolist() == sizes


def test_the_chances_that_a_group_teaches():
    header, teaches, variance = (
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in re.findall(r"^\| (?:p|the group teaches|p\(1-p\)) \|.*$", _vas(), re.MULTILINE)
    )
    for p_text, chance, product in zip(header, teaches, variance, strict=True):
        p = float(p_text)
        assert float(chance) == round(1 - p**8 - (1 - p) ** 8, 2)
        assert float(product) == round(p * (1 - p), 2)


def test_the_advantages_of_the_example():
    rewards = [1.0] * 2 + [0.0] * 6
    mean = sum(rewards) / 8
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / 7) ** 0.5
    assert f"over the standard deviation, {deviation:.3f}"[:-5] in _vas() and f"{deviation:.3f}"[1:] in _vas()
    assert f"**{(1 - mean) / deviation:.2f}**" in _vas()
    assert f"**-{mean / deviation:.2f}**".replace("-0.", "-.") in _vas()


def _vas() -> str:
    return (DOCS / "variance_aware_sampling.md").read_text()
