"""Every command of the user guide runs, as far as a dry run goes."""

import shutil
from pathlib import Path

import pytest
from fixtures.dry_runs import GUIDE, dry_run, linked_checkout, paragraphs, write_rows

from mmr1_ds.config.loading import load_config

COMMANDS = paragraphs((GUIDE / "commands.txt").read_text())
SHUFFLE, OVS, MULTI_METRIC, YAML = COMMANDS


def guide_run(command: str, folder: Path) -> str:
    data = write_rows(folder)
    shutil.copy(GUIDE / "custom_curriculum.yaml", folder)
    return dry_run(command, linked_checkout(folder), f"data.train_files={data}")


def test_shuffle(tmp_path):
    output = guide_run(SHUFFLE, tmp_path)
    assert "plan of my_training" in output
    assert "Qwen/Qwen2.5-VL-3B-Instruct" in output
    assert "sampling    shuffle" in output and "refresh" not in output
    assert "10 episodes = 10 steps" in output


def test_outcome_variance(tmp_path):
    output = guide_run(OVS, tmp_path)
    assert "256 of 512 prompts a step by score (1 learnability)" in output
    assert "online: from the training responses" in output and "without effect" not in output


def test_several_metrics(tmp_path):
    output = guide_run(MULTI_METRIC, tmp_path)
    assert "409 of 512 prompts a step by score (0.8 learnability + 0.2 self-bleu)" in output
    assert "keys without effect: data.curriculum_update_freq (data.curriculum_refresh=online)" in output


def test_custom_yaml(tmp_path):
    output = guide_run(YAML, tmp_path)
    assert "1228 of 2048 prompts a step by score (0.7 learnability + 0.3 self-bleu)" in output
    keys = "data.curriculum_update_freq, data.curriculum_rollout_n (data.curriculum_refresh=online)"
    assert f"keys without effect: {keys}" in output


def test_custom_yaml_with_the_paper_s_refresh(tmp_path):
    output = guide_run(f"{YAML} data.curriculum_refresh=full", tmp_path)
    assert "every 10 steps: 7 prompts x 12 = 84 responses" in output


def test_custom_yaml_as_it_stands(tmp_path):
    shutil.copy(GUIDE / "custom_curriculum.yaml", tmp_path)
    output = dry_run(YAML, tmp_path)  # no checkout around it, no data of one's own
    assert "MMR1/MMR1-RL@train" in output and "not looked at" in output


@pytest.mark.parametrize(
    "key, default",
    [
        ("curriculum_metrics", ["learnability"]),
        ("curriculum_metric_weights", [1.0]),
        ("curriculum_mixture_ratio", 0.5),
        ("curriculum_update_freq", 4),
        ("curriculum_rollout_n", 8),
        ("curriculum_momentum", 0.0),
    ],
)
def test_defaults_of_the_guide(key, default):
    assert load_config([]).config.data.__dict__[key] == default
    assert load_config(["config=mmr1"]).config.data.__dict__[key] == default


def test_quick_experimentation_settings():
    data = load_config(
        ["data.curriculum_metrics=[learnability]", "data.curriculum_mixture_ratio=0.5", "data.curriculum_rollout_n=4"]
    ).config.data
    assert (data.curriculum_metrics, data.curriculum_mixture_ratio, data.curriculum_rollout_n) == (
        ["learnability"],
        0.5,
        4,
    )
