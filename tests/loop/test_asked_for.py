"""A run with what is written or drawn only on request, stopped and resumed, with a dip after its best validation."""

import gzip
import json
import shutil

import pandas
import pytest
from fixtures.launching import run_ranks, run_training
from fixtures.tiny_run import NUM_PROMPTS, write_run

from mmr1_ds.commands import cli

pytestmark = pytest.mark.slow

# The third validation is the best, whatever the policy says.
REWARD = """
from pathlib import Path

CALLS = Path(__file__).with_name("validations")


def score(reward_inputs):
    accuracy = 0.0
    if reward_inputs[0]["ground_truth"] == "val":
        calls = CALLS.read_text() if CALLS.exists() else ""
        CALLS.write_text(calls + "x")
        accuracy = [0.0, 0.25, 0.75, 0.5, 0.5, 0.25][len(calls)]
    return [{"overall": len(item["response"]) % 3 / 2, "accuracy": accuracy} for item in reward_inputs]
"""


REWARD_BY_TEXT = """
def score(reward_inputs):
    return [{"overall": 0.0, "accuracy": float(sum(map(ord, item["response"])) % 2)} for item in reward_inputs]
"""


def test_what_a_run_writes_on_request(tmp_path):
    config = write_run(tmp_path / "assets", num_steps=5)
    (tmp_path / "assets" / "reward.py").write_text(REWARD)
    (tmp_path / "assets" / "val.jsonl").write_text(json.dumps({"prompt": "what is 1?", "answer": "val"}) + "\n")
    run_dir = tmp_path / "run"
    settings = [f"config={config}", "trainer.n_gpus_per_node=1", "trainer.save_limit=1", f"trainer.run_dir={run_dir}"]
    settings += [f"data.val_files={tmp_path / 'assets' / 'val.jsonl'}", "trainer.val_freq=1", "trainer.save_freq=2"]
    more = tmp_path / "assets" / "more.jsonl"
    more.write_text((tmp_path / "assets" / "data.jsonl").read_text())
    settings += [f"data.train_files=[{more},{more.with_name('data.jsonl')}]", "data.train_weights=[3,1]"]
    settings += ["trainer.peak_tflops=0.01", "trainer.rollout_log=parquet", "trainer.profile_steps=[2]"]
    for num_steps in (3, 5):
        done = run_training(*settings, f"trainer.max_steps={num_steps}")
        assert done.returncode == 0, done.stderr[-6000:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["val/accuracy_reward"] for line in lines] == [0.0, 0.25, 0.75, 0.5, 0.5, 0.25]
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["best", "global_step_2", "global_step_5", "latest", "prompt_ids.safetensors"]
    assert (run_dir / "checkpoints" / "best").read_text() == "global_step_2\n"
    assert cli.main(["export", f"config={run_dir / 'config.yaml'}", str(tmp_path / "out"), "--best"]) == 0

    assert all(line["perf/mfu_actor"] > 0 and line["perf/throughput"] > 0 for line in lines[1:])
    assert all((line["source/more/share"], line["source/data/share"]) == (0.75, 0.25) for line in lines[1:])
    table = pandas.read_parquet(run_dir / "rollouts")
    assert table.groupby("step").size().to_dict() == dict.fromkeys(range(1, 6), 16)
    for line in lines[1:]:
        of_step = table[table["step"] == line["step"]]
        assert of_step["reward"].mean() == pytest.approx(line["critic/score/mean"], abs=1e-6)
        assert of_step["num_tokens"].mean() == pytest.approx(line["response_length/mean"])

    (trace,) = (run_dir / "profiles").iterdir()
    with gzip.open(trace, "rt") as file:
        found = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"gen", "update_actor", "sync"} <= found


def test_a_validation_alone_answers_as_the_one_of_the_run_without_optimiser(tmp_path):
    """On another number of ranks than wrote the checkpoint as well."""
    config = write_run(tmp_path / "assets", num_steps=2)
    data, run_dir = tmp_path / "assets" / "data.jsonl", tmp_path / "run"
    settings = [f"config={config}", f"data.val_files={data}", f"trainer.run_dir={run_dir}", "trainer.val_freq=2"]
    settings += ["worker.rollout.val_override_config.n=2", "worker.rollout.val_override_config.temperature=1.0"]
    settings += ["trainer.val_before_train=false"]
    done = run_training(*settings, "trainer.n_gpus_per_node=1")
    assert done.returncode == 0, done.stderr[-6000:]
    answers = run_dir / "eval" / "step_2" / "answers.jsonl"
    of_run, lines = answers.read_bytes(), (run_dir / "metrics.jsonl").read_text().splitlines()
    for num_ranks in (1, 2):
        answers.unlink()
        own = f"trainer.n_gpus_per_node={num_ranks}"
        run_ranks("train.py", *settings, "trainer.val_only=true", own, num_ranks=num_ranks)
        assert answers.read_bytes() == of_run
        (line,) = (answers.parent / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["val/pass_at_2"] == json.loads(lines[-1])["val/pass_at_2"]
    shutil.rmtree(run_dir / "checkpoints")  # the model as it is answers otherwise
    run_ranks("train.py", *settings, "trainer.val_only=true", "trainer.n_gpus_per_node=1")
    assert (run_dir / "eval" / "step_0" / "answers.jsonl").read_bytes() != of_run


def test_pass_rates_of_a_data_set_without_training_data(tmp_path):
    """A table that was begun by one rank and is continued by two is the table of one call."""
    config = write_run(tmp_path / "assets", num_steps=5)
    data, run_dir = tmp_path / "assets" / "data.jsonl", tmp_path / "run"
    data.rename(data.with_name("val.jsonl"))  # nothing is left to train on
    (tmp_path / "assets" / "reward.py").write_text(REWARD_BY_TEXT)
    table, answers = tmp_path / "rates.jsonl", run_dir / "eval" / "step_0" / "answers.jsonl"
    settings = [f"config={config}", f"data.val_files={data.with_name('val.jsonl')}", f"trainer.run_dir={run_dir}"]
    settings += ["trainer.val_only=true", f"trainer.pass_rates={table}", "worker.rollout.val_override_config.n=3"]
    settings += ["worker.rollout.val_override_config.temperature=1.0", "data.val_batch_size=4"]
    done = run_training(*settings, "trainer.n_gpus_per_node=1")
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"pass rates of {NUM_PROMPTS} prompts by 3 answers each" in done.stderr
    whole, of_answers = table.read_bytes(), answers.read_bytes()
    rates = [json.loads(line) for line in whole.splitlines()]
    rows = [json.loads(line) for line in of_answers.splitlines()]
    assert len(rates) == NUM_PROMPTS and len(rows) == 3 * NUM_PROMPTS
    for place, rate in enumerate(rates):
        of_prompt = rows[3 * place : 3 * place + 3]
        assert {row["prompt_id"] for row in of_prompt} == {rate["prompt_id"]}
        assert rate["pass_rate"] == pytest.approx(sum(row["accuracy"] for row in of_prompt) / 3)
    (line,) = [json.loads(line) for line in (run_dir / "eval" / "step_0" / "metrics.jsonl").read_text().splitlines()]
    assert line["val/pass_at_1"] == pytest.approx(line["val/accuracy_reward"])
    assert line["val/pass_at_1"] < line["val/pass_at_2"] < line["val/pass_at_3"]

    table.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]) + b'{"prompt_id": "torn')
    answers.write_bytes(b"".join(of_answers.splitlines(keepends=True)[:15]))
    run_ranks("train.py", *settings, num_ranks=2)
    assert table.read_bytes() == whole and answers.read_bytes() == of_answers
