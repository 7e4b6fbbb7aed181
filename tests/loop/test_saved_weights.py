"""A run that saves weights alone: what is exported is the policy of a run that saves all, and nothing resumes."""

import pytest
import torch
import yaml
from fixtures.launching import run_training
from fixtures.tiny_run import write_run
from transformers import AutoModelForCausalLM

from mmr1_ds.commands import cli

pytestmark = pytest.mark.slow


def test_weights_alone_are_exported_and_not_resumed(tmp_path):
    config = write_run(tmp_path / "assets", num_steps=2)
    settings = [f"config={config}", "trainer.n_gpus_per_node=1", "trainer.save_limit=1"]
    for name, alone in (("all", "false"), ("alone", "true")):
        done = run_training(*settings, f"trainer.run_dir={tmp_path / name}", f"trainer.save_model_only={alone}")
        assert done.returncode == 0, done.stderr[-6000:]
        words = [f"config={tmp_path / name / 'config.yaml'}", str(tmp_path / f"{name}_out"), "--dtype", "bf16"]
        assert cli.main(["export", *words]) == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}_out") for name in ("all", "alone")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    folder = tmp_path / "alone" / "checkpoints" / "global_step_2"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"actor/weights-00000.safetensors", "config.yaml", "manifest.json"}
    num_bytes = (folder / "actor" / "weights-00000.safetensors").stat().st_size
    assert 0 <= num_bytes - 2 * sum(weight.numel() for weight in models[0].parameters()) < 10_000

    assert yaml.safe_load((tmp_path / "alone" / "config.yaml").read_text())["trainer"]["save_model_only"]
    done = run_training(*settings, f"trainer.run_dir={tmp_path / 'alone'}", "trainer.max_steps=3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{folder} has weights alone (trainer.save_model_only), no run resumes from it" in done.stderr
