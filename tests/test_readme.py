"""Every training command of the README runs, as far as a dry run goes, on the files that the README shows."""

import json
import re
from pathlib import Path

import pytest
from dry_runs import dry_run, linked_checkout, paragraphs
from launching import ROOT

README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"(\w+=\S+ )*(python -m mmr1_ds\.train|mmr1-ds|bash launch/)")
COMMANDS = [command for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for command in paragraphs(block)]
RUNS = [command for command in COMMANDS if COMMAND.match(command)]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return found


def reader_s_folder(folder: Path) -> Path:
    """What a reader has beside a checkout: the files that the README shows, and a model."""
    linked_checkout(folder)
    (folder / "custom_curriculum.yaml").write_text(block("yaml"))
    (folder / "my_reward.py").write_text(block("python"))
    (folder / "train.json").write_text(block("json"))
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"hidden_size": 64}))
    (model / "model.safetensors").write_bytes(b"")
    return folder


def test_all_runs_of_the_readme_are_found():
    others = [command for command in COMMANDS if command not in RUNS]
    assert len(RUNS) == 6
    assert all(command.startswith("make ") for command in others)


@pytest.mark.parametrize("command", RUNS)
def test_command(command, tmp_path):
    folder = reader_s_folder(tmp_path)
    command = command.replace("mmr1-ds", "python -m mmr1_ds.cli")
    command = command.replace("/path/to/model", str(folder / "model"))
    command = re.sub(r"/path/to/(training/data|train.parquet|test.json)", str(folder / "train.json"), command)
    command = command.replace("data.sampling_strategy=", "data.prompt_key=question data.sampling_strategy=")
    output = dry_run(command, folder)
    assert "dry run: everything checked" in output


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_reward_shown_scores(tmp_path):
    scope: dict = {}
    exec(block("python"), scope)
    items = [{"response": f"It is {k}", "response_length": 3, "ground_truth": "3"} for k in (3, 4)]
    assert [reward["accuracy"] for reward in scope["score"](items)] == [1.0, 0.0]
