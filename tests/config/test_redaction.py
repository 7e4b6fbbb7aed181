"""Planted credentials, and a search for them in all that a run writes and says."""

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from fixtures.chat_server import serve
from fixtures.dry_runs import valid_run
from fixtures.launching import ROOT, environment
from fixtures.tiny_models import save_text_model

from mmr1_ds.config import RunConfig, redaction
from mmr1_ds.config.loading import dump_config
from mmr1_ds.config.redaction import redacted, remember, without_secrets
from mmr1_ds.rewards.chat_client import MAX_REASON_CHARS, ChatClient, ChatFailure

VARIABLES = {
    "WANDB_API_KEY": "3f9c" * 10,  # as long as wandb wants it
    "HF_TOKEN": "hf_PlantedHubToken",
    "JUDGE_KEY": "sk-planted-judge-key-0123456789",
    "MMR1_DS_SERVER_KEY": "planted-server-key-0123456789",
}
LITERAL = "sk-planted-in-the-configuration"
PLANTED = (*VARIABLES.values(), LITERAL)


def leaks(where: Path, said: str = "") -> list[str]:
    """Where planted values are found: in files under a folder, their names, and what was said."""
    found = [f"said: {value}" for value in PLANTED if value in said]
    for path in where.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [f"{path}: {v}" for v in PLANTED if v.encode() in content or v in str(path.relative_to(where))]
    return found


def test_the_search_finds_what_is_planted(tmp_path):
    assert leaks(tmp_path) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"\x00\xff" + LITERAL.encode() + b"\x00")
    (tmp_path / VARIABLES["HF_TOKEN"]).touch()
    assert len(leaks(tmp_path)) == 2
    assert leaks(tmp_path / "a", f"x{VARIABLES['JUDGE_KEY']}y")[0].startswith("said")


def test_texts_are_written_without_credentials(monkeypatch, tmp_path):
    (tmp_path / "id_file").touch()
    values = {"A_KEY": "planted-one", "B_TOKEN": "planted-one-and-more", "C_PASSWORD": "short", "D_KEY": "a-name-alone"}
    for name, value in {**values, "PLAIN": "planted-no-secret", "E_KEY": str(tmp_path / "id_file")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mmr1_ds.config.redaction._remembered", set())
    text = f"planted-one-and-more planted-one, short; planted-no-secret {tmp_path}/id_file in-the-configuration"
    assert redacted(text) == f"*** ***, short; planted-no-secret {tmp_path}/id_file in-the-configuration"
    remember({"kwargs": {"deep": {"api_key": "in-the-configuration", "name": "planted-no-secret"}}})
    remember({"api_keys": ["first-of-two"], "judges": [{"api_key": "second-of-two"}], "names": ["harmless-one"]})
    assert redacted("first-of-two second-of-two harmless-one") == "*** *** harmless-one"
    assert redacted(text) == f"*** ***, short; planted-no-secret {tmp_path}/id_file ***"
    assert redacted("at https://user:pw@host/x and http://host/a@b") == "at https://***@host/x and http://host/a@b"


def test_a_configuration_is_written_without_credentials_in_addresses():
    config = RunConfig()
    config.worker.reward.judge.base_urls = [f"https://user:{LITERAL}@host/v1", "http://host/v1"]
    config.worker.actor.model.model_path = f"https://{LITERAL}@host/model"
    config.worker.reward.reward_function_kwargs = {"list": [{"api_key": LITERAL}], "places": [["s3://a:b@c"]]}
    text = dump_config(config)
    assert LITERAL not in text
    read = yaml.safe_load(text)["worker"]
    assert read["reward"]["judge"]["base_urls"] == ["https://***@host/v1", "http://host/v1"]
    assert read["reward"]["reward_function_kwargs"] == {"list": [{"api_key": "***"}], "places": [["s3://***@c"]]}


# --- what is told of mistakes and crashes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        [f"worker.reward.judge.key_variable={LITERAL}"],
        ["worker.reward.judge.key_variable=hf_PlantedHubToken"],  # could be a variable's name
        [f"worker.rollout.server_key_variable={LITERAL}"],
        ["worker.reward.reward_function=openr1", f"worker.reward.judge.base_urls=['http://me:{LITERAL}@host/v1']"],
        ["worker.reward.reward_function=openr1", f"worker.reward.judge.base_urls=['me:{LITERAL}@host/v1']"],
        ["worker.reward.reward_function=openr1", f"worker.reward.judge.base_urls=['http://h/v1?key={LITERAL}']"],
        ["worker.rollout.engine=server", f"worker.rollout.server_urls=['http://me:{LITERAL}@host:8000']"],
        ["worker.rollout.engine=server", f"worker.rollout.server_urls=['me:{LITERAL}@host:8000']"],
        [f"--wandb_api_key={LITERAL}"],
        [f"WANDB_API_KEY={LITERAL}"],
        [f"worker.reward.judge.api_key={LITERAL}"],
        [f"worker.reward.reward_function_kwargs={{api_key: {LITERAL}"],
        [f"worker.reward.reward_function_kwargs={{token: '{LITERAL}}}"],
        [f"worker.actor.model.model_path=https://me:{LITERAL}@host/model"],
    ],
)
def test_a_mistake_is_told_without_the_credential_in_it(tmp_path, monkeypatch, own_logging, capfd, settings):
    from mmr1_ds.train import main

    monkeypatch.setattr("mmr1_ds.config.redaction._remembered", set())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    if "worker.reward.reward_function=openr1" in settings:
        settings = [*settings, "worker.reward.judge.model=m"]
    assert main([*valid_run(tmp_path), "trainer.dry_run=true", *settings]) == 2
    told = "".join(capfd.readouterr())
    assert told.splitlines()[-1].startswith("mmr1-ds: error: ") and leaks(tmp_path, told) == []


def test_a_crash_is_told_without_the_credential_in_it(tmp_path):
    program = (
        "import logging, os, sys\n"
        "from mmr1_ds.monitoring.logger import configure_logging\n"
        "configure_logging(True)\n"
        "log = logging.getLogger('mmr1_ds.x')\n"
        "log.warning('header %s', os.environ['JUDGE_KEY'])\n"
        "try:\n"
        "    raise OSError('Bearer ' + os.environ['HF_TOKEN'])\n"
        "except OSError:\n"
        "    log.exception('caught')\n"
        "def fail(key):\n"
        "    raise ValueError(f'bad key {key} at http://me:sk-planted-in-the-configuration@host')\n"
        "fail(os.environ['MMR1_DS_SERVER_KEY'])\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(**VARIABLES), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("***") == 4 and "Traceback" in done.stderr and "in fail" in done.stderr
    assert leaks(tmp_path / "nothing", done.stdout + done.stderr) == []


@pytest.mark.parametrize("padding", [0, MAX_REASON_CHARS - 30, 470])
def test_a_key_that_a_judge_s_server_quotes_is_hidden_where_the_quote_is_cut_too(padding):
    key = VARIABLES["JUDGE_KEY"]
    with serve(lambda body, number: (401, f" {'x' * padding}Bearer {key}", {})) as server:
        limits = {"timeout_seconds": 9.0, "request_timeout_seconds": 9.0, "max_retries": 0, "max_tokens": 9}
        with pytest.raises(ChatFailure) as raised:
            ChatClient([server.url], "model", key, **limits).complete("x")
    told = str(raised.value)
    assert "HTTP 401" in told and len(told) <= MAX_REASON_CHARS
    assert not any(key[:length] in told for length in range(6, len(key) + 1))


# --- whole runs ---------------------------------------------------------------------------------------------------

REWARD = """
import os


def score(reward_inputs, api_key):
    kind = int(reward_inputs[0]["ground_truth"])  # two prompts of nine: three failures in four would end the run
    if kind == 0:
        raise RuntimeError("refused: Bearer " + os.environ["JUDGE_KEY"] + " and " + api_key)
    if kind == 1:
        return "x" * 190 + os.environ["HF_TOKEN"]
    return [{"overall": kind % 2, "accuracy": kind % 2}]
"""


@pytest.mark.slow
def test_a_run_keeps_no_credential(tmp_path):
    save_text_model(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"question": f"what is {i}?", "answer": str(i)} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data": {
            "train_files": str(tmp_path / "data.jsonl"), "val_files": str(tmp_path / "data.jsonl"),
            "prompt_key": "question", "max_prompt_length": 64, "max_response_length": 10, "rollout_batch_size": 4,
        },
        "algorithm": {"disable_kl": True},
        "worker": {
            "actor": {
                "model": {"model_path": str(tmp_path / "model")},
                "global_batch_size": 4, "micro_batch_size_per_device_for_update": 4,
            },
            "rollout": {"engine": "hf", "n": 3},
            "reward": {
                "reward_function": f"{tmp_path / 'reward.py'}:score",
                "reward_function_kwargs": {"api_key": LITERAL},
                "num_workers": 1,
            },
        },
        "trainer": {
            "n_gpus_per_node": 1, "max_steps": 1, "run_dir": str(tmp_path / "run"), "val_generations_to_log": 2,
            "save_freq": 1, "logger": ["console", "jsonl", "tensorboard", "wandb"], "val_before_train": False,
            "val_freq": 1,
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-m", "mmr1_ds.train", f"config={tmp_path / 'run.yaml'}"],
        env=environment(**VARIABLES, WANDB_MODE="offline"), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert "refused: Bearer *** and ***" in said and "reward invalid" in said  # both did happen
    files = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "generations.jsonl", "manifest.json"} <= files
    assert any(name.endswith(".wandb") for name in files)
    assert leaks(tmp_path / "run", said) == []
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["worker"]["reward"]
    assert kept["reward_function_kwargs"] == {"api_key": "***"}


def test_names_that_mean_a_secret_and_names_that_do_not():
    hidden = ["api_key", "key", "openai_key", "access_key", "auth", "Authorization", "passwd", "password", "tokens"]
    hidden += ["OPENAI_APIKEY", "hf_token", "token"]
    assert set(without_secrets(dict.fromkeys(hidden, "x")).values()) == {"***"}

    def names(config):
        for name, value in config.items():
            yield from names(value) if isinstance(value, dict) else [(name, value)]

    settings = dataclasses.asdict(RunConfig())
    for (name, shown), (_, value) in zip(names(without_secrets(settings)), names(settings), strict=True):
        assert shown == value, name


def test_an_error_that_ends_a_thread_is_told_without_them(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setenv("JUDGE_KEY", "sk-of-this-thread")
    redaction.hide_in_tracebacks()

    def fail():
        raise ValueError("cannot use sk-of-this-thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    told = capsys.readouterr().err
    assert "ValueError: cannot use ***" in told and "sk-of-this-thread" not in told
