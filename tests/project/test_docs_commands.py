"""Every command and every block of configuration of the documentation is executed or loaded; README's dry runs, as
processes, are in test_readme."""

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.doc_blocks import PAGES, blocks
from fixtures.dry_runs import GUIDE, commands, linked_checkout, planned, training_arguments, write_rows
from fixtures.launching import ROOT, environment

from mmr1_ds.commands import cli, serve
from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.config.loading import dump_config, load_config
from mmr1_ds.preflight.checks import check_config
from mmr1_ds.preflight.data import check_data
from mmr1_ds.preflight.deepspeed import resolve_deepspeed

sys.path.insert(0, str(ROOT / "benchmarks" / "throughput"))
import throughput

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = {
    command: str(block) for block in reversed(BLOCKS) if block.language == "bash" for command in commands(block.text)
}
NOT_EXECUTED = {  # what a command begins with -> why it is only looked at by bash -n
    "kill -USR2 ": "asks a running rank for its stacks, which test_watch does",
    "pip install ": "needs an index; test_packaging installs a wheel, holds the extras' bounds and the constraints",
    "export ": "sets a variable of the reader's shell",
    "source .venv/bin/activate": "changes the reader's shell",
    "tensorboard ": "serves until it is stopped, and is not ours",
}
LANGUAGES = {"bash", "yaml", "json", "jsonl", "python", "text"}


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A folder with what the pages' commands name: data, a model, and the files that the pages show."""
    folder = linked_checkout(tmp_path_factory.mktemp("reader"))
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    (folder / "docs").symlink_to(ROOT / "docs")
    rows = [
        {"prompt": text, "problem": text, "question": text, "answer": str(2 * k), "images": [], "source": "sums"}
        for k in range(7)
        for text in [f"What is {k} + {k}?"]
    ]
    write_rows(folder, rows=rows)
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([{**row, "images": None} for row in rows]), folder / "train.parquet")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 64}))
    (folder / "model" / "model.safetensors").write_bytes(b"")
    (folder / "rates.jsonl").write_text('{"prompt_id": "a", "pass_rate": 0.25, "num_answers": 16}\n')
    (folder / "hosts").write_text("node7 slots=8\nnode8 slots=8\n")
    shutil.copy(GUIDE / "every_upstream_key.yaml", folder / "easyr1.yaml")
    for name in ("first", "my_run", "demo"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.yaml").write_text(dump_config(load_config(["config=mmr1_h100"]).config))
    (folder / "runs" / "demo" / "metrics.jsonl").write_text('{"step": 0, "val/accuracy_reward": 0.357}\n')
    for block in BLOCKS:
        if named := re.match(r"# (\w+\.(?:py|yaml))\b", block.text):
            (folder / named[1]).write_text(with_paths(block.text, folder))
        if block.language == "jsonl" and "responses" in block.text:
            (folder / "responses.jsonl").write_text(block.text)
    return folder


def with_paths(text: str, folder: Path) -> str:
    """The text with the pages' stand-ins for the reader's own paths filled in."""
    names = {"training/data": "train.json", "train.parquet": "train.parquet", "test.json": "train.json"}
    names |= {"data": "train.json", "model": "model"}
    filled = re.sub(r"/path/to/(training/data|[\w.]+)", lambda match: str(folder / names[match[1]]), text)
    return filled.replace("10.0.0.7", "127.0.0.1")


def test_every_block_has_a_language_that_the_tests_know():
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


def test_no_block_is_made_by_indentation():
    """They would go untested."""
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text()).splitlines()
        for before, line in zip(["", *text], text, strict=False):
            assert not (before == "" and re.match(r" {4,}\S", line)), f"{page.name}: {line}"


def test_no_text_block_is_a_command():
    begins = re.compile(r"(make|mmr1-ds (?!\w+:)|bash|python|git|pip|sbatch) ?\w")
    for block in BLOCKS:
        if block.language == "text":
            assert not begins.match(block.text) or block.text.startswith("mmr1-ds: "), str(block)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=str)
def test_bash_reads_the_block(block):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- commands, by kind --------------------------------------------------------------------------------------------


def train(command: str, folder: Path) -> None:
    arguments = training_arguments(command, folder)
    assert "plan of" in planned(arguments)


def train_module(command: str, folder: Path) -> None:
    assert "plan of" in planned(shlex.split(command.partition("mmr1_ds.train")[2]))


def make(command: str, folder: Path) -> None:
    done = subprocess.run(["bash", "-c", f"{command} -n"], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    for word in shlex.split(command):
        if word.startswith("ARGS="):  # of the demo's training
            load_config(["config=demo", *shlex.split(word.removeprefix("ARGS="))])


def ours(command: str, folder: Path) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "export":  # run for real on a checkpoint by test_export
        settings = [word for word in parsed(words).source if "=" in word]
        load_config(settings)
    elif words[0] == "serve":  # its servers are started by test_server_process
        arguments = parsed(words)
        assert arguments.port == 8000 and serve.read(arguments.settings, arguments.port)
    elif words[0] in ("report", "data"):  # run for real by tests of their own
        load_config([word for word in getattr(parsed(words), "settings", []) if "=" in word])
    elif words[0] == "eval":
        assert cli.main([*words, "trainer.dry_run=true"]) == 0
    else:
        assert cli.main(words) in (0, 1)


def parsed(words: list[str]) -> argparse.Namespace:
    return cli.parse(words)


def script(command: str, folder: Path) -> None:
    """Too long to run: the script is there, and has every option that is used."""
    words = shlex.split(command)[1:]
    path = ROOT / words[0]
    used = {word for word in words if word.startswith("--")}
    assert used <= options(path), f"{path} has no {used - options(path)}"


def options(path: Path) -> set[str]:
    """Of a script, and of the modules beside it that carry its name."""
    trees = [ast.parse(part.read_text()) for part in path.parent.glob(f"{path.stem}*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        argument.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


def throughput_run(command: str, folder: Path) -> None:
    """Of minutes; test_throughput runs a small one. Also as a job: what it would call."""
    words = shlex.split(re.split(r"throughput\.(?:py|sbatch)", command)[1])
    options = throughput.parser().parse_args(words)
    for name in [] if options.compare else options.sampling:
        load_config([f"config={options.config}", *options.settings, *throughput.SAMPLING[name]])


def pytest_run(command: str, folder: Path) -> None:
    words = shlex.split(command.partition("pytest")[2])
    files = [word for word in words if word.endswith(".py")]
    assert files and all((ROOT / file).is_file() for file in files)
    if "-k" in words:
        names = re.findall(r"^def (test_\w+)", (ROOT / files[0]).read_text(), re.MULTILINE)
        assert any(words[words.index("-k") + 1] in name for name in names)


def not_executed(command: str, folder: Path) -> None:
    assert any(command.startswith(start) for start in NOT_EXECUTED)


KINDS: list[tuple[str, Callable[[str, Path], None]]] = [
    (r"(\w+=\S+ )*bash launch/(train\w*|deepspeed|mpi)\.sh\b", train),
    (r"python -m mmr1_ds\.train ", train_module),
    (r"(\w+=\S+ )*make ", make),
    (r"mmr1-ds ", ours),
    (r"(\.venv/bin/)?python -m pytest |pytest ", pytest_run),
    (r"python (benchmarks|docs|examples)/(?!throughput/)[\w/]+\.py", script),
    (r"(python benchmarks/throughput/throughput\.py|sbatch .* launch/throughput\.sbatch)", throughput_run),
    ("|".join(map(re.escape, NOT_EXECUTED)), not_executed),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, reader, monkeypatch, capfd):
    found = [run for pattern, run in KINDS if re.match(pattern, command)]
    assert len(found) == 1, f"{COMMANDS[command]}: no kind of command that the tests know: {command}"
    monkeypatch.chdir(reader)
    monkeypatch.setenv("MMR1_DS_SERVER_KEY", "a-key-of-this-test")
    monkeypatch.setenv("JUDGE_API_KEY", "another")
    for name in ("scores.jsonl", "plan.json"):
        Path(name).unlink(missing_ok=True)
    found[0](with_paths(command, reader), reader)


# --- configuration and code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_is_a_valid_run(block, reader, monkeypatch):
    """By itself, or on top of mmr1 where it names no defaults."""
    monkeypatch.chdir(reader)
    monkeypatch.setenv("JUDGE_API_KEY", "a-key-of-this-test")
    (reader / "block.yaml").write_text(with_paths(block.text, reader))
    base = [] if "defaults:" in block.text else ["config=mmr1"]
    config = load_config([*base, "config=block.yaml"]).config
    check_config(config, config.trainer.nnodes * config.trainer.n_gpus_per_node)


def test_a_reward_of_one_s_own_has_a_prompt_that_asks_for_its_form(reader, monkeypatch):
    """The presets' prompt asks for a box, which such rewards do not read; their validation data has other columns."""
    monkeypatch.chdir(reader)
    preset = load_config(["config=mmr1_h100"]).config
    configs = []
    for block in BLOCKS:
        if block.language == "yaml" and "defaults:" in block.text and "reward_function:" in block.text:
            (reader / "block.yaml").write_text(with_paths(block.text, reader))
            configs.append(load_config(["config=block.yaml"]).config)
    for command in COMMANDS:
        if "reward_function=" in command and ".py:" in command:
            configs.append(load_config(training_arguments(with_paths(command, reader), reader)).config)
    assert len(configs) >= 5
    for config in configs:
        assert config.data.system_prompt != preset.data.system_prompt
        assert config.data.val_files != preset.data.val_files
        assert config.trainer.experiment_name != preset.trainer.experiment_name


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("json", "jsonl")], ids=str)
def test_json_is_of_a_known_kind(block, tmp_path):
    lines = block.text.splitlines() if block.language == "jsonl" else [block.text]
    values = [json.loads(line) for line in lines if line.strip()]
    values = values[0] if isinstance(values[0], list) else values
    keys = set.intersection(*(set(value) for value in values))
    if {"question", "answer"} <= keys or {"problem", "answer"} <= keys:  # rows of a data set
        (tmp_path / "rows.json").write_text(json.dumps(values))
        prompt_key = "question" if "question" in keys else "problem"
        data = DataConfig(train_files=str(tmp_path / "rows.json"), prompt_key=prompt_key)
        check_data(data, "train_files", ModelConfig())
    elif "zero_optimization" in keys:
        config = load_config(["config=mmr1_h100"]).config
        config.worker.actor.deepspeed = values[0]
        resolve_deepspeed(config, 8, on_gpu=True)
    else:  # responses to score, which test_command scores, or lines of a run's files, whose names test_docs looks up
        assert {"responses", "accuracies"} <= keys or "step" in keys, f"{block}: a kind that the tests do not know"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_runs(block, reader, monkeypatch):
    if block.text.startswith("# from "):
        return  # the source's own text, which test_docs compares
    monkeypatch.chdir(reader)
    monkeypatch.syspath_prepend(str(reader))
    scope: dict = {}
    exec(compile(block.text, str(block), "exec"), scope)
    if "score" in scope and block.text.startswith("# "):
        check_reward(scope["score"])


def check_reward(score: Callable) -> None:
    """As a reward process calls it: one response at a time."""
    for answer, expected in (("12", 1.0), ("13", 0.0)):
        item = {
            "response": f"It is\n{answer}",
            "response_length": 5,
            "ground_truth": "12",
            "prompt": "7 + 5?",
        }
        (reward,) = score([item])
        assert reward["accuracy"] == expected and isinstance(reward["overall"], float)
