"""Every training command of the README runs, as far as a dry run goes, on the files that the README shows."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
from fixtures.data_fixtures import image, write_vision_model
from fixtures.dry_runs import dry_run, linked_checkout, paragraphs
from fixtures.launching import ROOT
from fixtures.report_fixtures import write_run

from mmr1_ds.commands import cli
from mmr1_ds.config import ModelConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.data.encoding import PromptEncoder

README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"(\w+=\S+ )*(python -m mmr1_ds\.train|bash launch/)")
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
    assert len(RUNS) == 11
    # score: test_score_command; pip: test_packaging, which installs a wheel
    assert all(command.startswith(("make ", "mmr1-ds ", "pip install ")) for command in others)
    assert len([command for command in others if command.startswith("mmr1-ds score ")]) == 2


@pytest.mark.parametrize(("name", "said"), [("plan", "fits"), ("launch", "sbatch ")])
def test_commands_before_a_run(tmp_path, capsys, monkeypatch, name, said):
    (command,) = (command for command in COMMANDS if command.startswith(f"mmr1-ds {name} "))
    (tmp_path / "train.json").write_text(block("json"))
    words = shlex.split(command.replace("/path/to/training/data", str(tmp_path / "train.json")))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert cli.main([*words[1:], "data.prompt_key=question"]) == 0
    assert said in capsys.readouterr().out


def test_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("mmr1-ds report ")]
    for name in {Path(word).name for words in commands for word in words if word.startswith("runs/")}:
        write_run(tmp_path / "runs" / name, num_steps=7, total_steps=7)
    for words in commands:
        assert cli.main([*words, "--no-png"]) == 0
        assert Path(capsys.readouterr().out.splitlines()[-1]).stat().st_size > 10_000


def test_the_look_at_the_data(tmp_path, capsys):
    (words,) = (shlex.split(command)[1:] for command in COMMANDS if command.startswith("mmr1-ds data "))
    (tmp_path / "train.json").write_text(block("json"))
    image(56, 28).save(tmp_path / "apples.png")
    paths = {"/path/to/training/data": tmp_path / "train.json", "/path/to/model": write_vision_model(tmp_path / "m")}
    for path, own in paths.items():
        words = [word.replace(path, str(own)) for word in words]
    assert cli.main([*words, "data.prompt_key=question", "data.val_files=null"]) == 0
    assert "1 row, 1 usable" in capsys.readouterr().out


@pytest.mark.parametrize("command", RUNS)
def test_command(command, tmp_path):
    folder = reader_s_folder(tmp_path)
    command = command.replace("/path/to/model", str(folder / "model"))
    command = re.sub(r"/path/to/(training/data|train.parquet|test.json)", str(folder / "train.json"), command)
    command = command.replace("data.sampling_strategy=", "data.prompt_key=question data.sampling_strategy=")
    output = dry_run(command, folder)
    assert "dry run: everything checked" in output


def test_validation_is_of_the_run_above_it(tmp_path):
    validation = next(command for command in RUNS if "trainer.val_only=true" in command)
    training = validation.replace(" trainer.val_only=true", "")
    assert training in RUNS
    reader_s_folder(tmp_path)
    folder = re.search(r"checkpoints in (\S+)", dry_run(training, tmp_path))[1]
    (shown,) = re.findall(r"writes to `(\S+)`", README.replace("\n", " "))
    assert f"output      {shown}, N steps done by the newest checkpoint in {folder}," in dry_run(validation, tmp_path)


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


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_reward_shown_scores(tmp_path):
    scope: dict = {}
    exec(block("python"), scope)
    items = [{"response": f"It is {k}", "response_length": 3, "ground_truth": "3"} for k in (3, 4)]
    assert [reward["accuracy"] for reward in scope["score"](items)] == [1.0, 0.0]
