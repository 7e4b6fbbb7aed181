"""The README's training commands run, as far as a dry run goes, on the files that it shows; so do the commands of other
pages that test_docs_commands only parses."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
from fixtures.data_fixtures import image, write_vision_model
from fixtures.doc_blocks import DOCS, blocks
from fixtures.dry_runs import commands, dry_run, linked_checkout
from fixtures.launching import ROOT
from fixtures.report_fixtures import write_run

from mmr1_ds.commands import cli
from mmr1_ds.config import ModelConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.data.encoding import PromptEncoder

README = ROOT / "README.md"


def commands_of(page: Path) -> list[str]:
    """All shell commands of a page."""
    return [command for block in blocks(page) if block.language == "bash" for command in commands(block.text)]


COMMANDS = commands_of(README)
RUNS = [command for command in COMMANDS if re.match(r"(\w+=\S+ )*bash launch/train", command)]
LAUNCHERS = [command for command in COMMANDS if re.match(r"HOSTFILE=hosts bash launch/(deepspeed|mpi)\.sh ", command)]


def block(language: str, page: Path = README) -> str:
    """The page's only block of a language."""
    (found,) = [block.text for block in blocks(page) if block.language == language]
    return found


def with_paths(command: str, folder: Path) -> str:
    """The command with the reader's own paths filled in."""
    command = command.replace("/path/to/model", str(folder / "model"))
    return re.sub(r"/path/to/(training/data|train.parquet|test.json)", str(folder / "train.json"), command)


def reader_s_folder(folder: Path) -> Path:
    """What a reader has beside a checkout: the files that the README shows, and a model."""
    linked_checkout(folder)
    (folder / "my_reward.py").write_text(block("python"))
    (folder / "train.json").write_text(block("json"))
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 64}))
    (model / "model.safetensors").write_bytes(b"")
    return folder


def test_the_readme_takes_two_screens():
    assert len(README.read_text().splitlines()) <= 130


def test_all_runs_of_the_readme_are_found():
    others = [command for command in COMMANDS if command not in RUNS]
    assert len(RUNS) == 3
    # the launchers: test_docs_commands; pip: test_packaging, which installs a wheel
    assert {command for command in others if not command.startswith(("make ", "mmr1-ds ", "pip install "))} == {
        *LAUNCHERS
    }
    assert len(LAUNCHERS) == 2


@pytest.mark.parametrize(("page", "name", "said"), [(DOCS / "start.md", "plan", "fits"), (README, "launch", "sbatch ")])
def test_commands_before_a_run(tmp_path, capsys, monkeypatch, page, name, said):
    (command,) = (command for command in commands_of(page) if command.startswith(f"mmr1-ds {name} "))
    words = shlex.split(with_paths(command, reader_s_folder(tmp_path)))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert cli.main([*words[1:], "data.prompt_key=question"]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reports = [shlex.split(command)[1:] for command in commands_of(DOCS / "report.md")]
    assert len(reports) == 2
    for name in {Path(word).name for words in reports for word in words if word.startswith("runs/")}:
        write_run(tmp_path / "runs" / name, num_steps=7)
    for words in reports:
        assert cli.main([*words, "--no-png"]) == 0
        assert Path(capsys.readouterr().out.splitlines()[-1]).stat().st_size > 10_000


def test_the_look_at_the_data(tmp_path, capsys):
    (words,) = (shlex.split(command)[1:] for command in commands_of(DOCS / "data.md") if "config=mmr1 " in command)
    (tmp_path / "train.json").write_text(block("json"))
    image(56, 28).save(tmp_path / "apples.png")
    write_vision_model(tmp_path / "model")
    words = [with_paths(word, tmp_path) for word in words]
    assert cli.main([*words, "data.prompt_key=question", "data.val_files=null"]) == 0
    assert "1 row, 1 usable" in capsys.readouterr().out


@pytest.mark.parametrize("command", RUNS)
def test_command(command, tmp_path):
    command = with_paths(command, reader_s_folder(tmp_path))
    if "data.prompt_key=" not in command:
        command += " data.prompt_key=question"
    assert "dry run: settings and columns checked" in dry_run(command, tmp_path)


def test_validation_is_of_the_run_above_it(tmp_path):
    page = DOCS / "your_own.md"
    validation, measuring = (command for command in commands_of(page) if "trainer.val_only=true" in command)
    training = validation.replace(" trainer.val_only=true", "")
    assert training in commands_of(page)
    reader_s_folder(tmp_path)
    (tmp_path / "mine.yaml").write_text(with_paths(block("yaml", page), tmp_path))
    folder = re.search(r"checkpoints in (\S+)", dry_run(training, tmp_path))[1]
    (shown,) = re.findall(r"results are written to `(\S+)`", page.read_text().replace("\n", " "))
    assert f"output      {shown}, N steps done by the newest checkpoint in {folder}," in dry_run(validation, tmp_path)
    assert "pass rates in rates.jsonl" in dry_run(with_paths(measuring, tmp_path), tmp_path)


def test_the_data_shown_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = ModelConfig(model_path=write_vision_model(tmp_path / "model"))
    (tmp_path / "train.json").write_text(block("json"))
    image(56, 28).save(tmp_path / "apples.png")
    (command,) = (command for command in RUNS if "data.prompt_key" in command)
    keys = [word for word in shlex.split(command) if re.match(r"data\.\w+_key=", word)]
    data = load_config(keys).config.data
    prompt = load_dataset(str(tmp_path / "train.json"), data, PromptEncoder(model, data))[0]
    assert len(prompt.images) == 1 and prompt.ground_truth == "3"
