"""A reference that follows the actor: the average it must be, kept whatever the ranks, exact through a resume."""

import json
import shutil

import pytest
import torch
from fixtures.launching import run_ranks, run_training
from fixtures.tiny_models import save_text_model
from fixtures.tiny_run import write_run

pytestmark = pytest.mark.slow


def test_the_average_is_saved_and_read_on_other_ranks(tmp_path):
    model = save_text_model(tmp_path / "model")
    found = {}
    for name, mode, num_ranks in (("two", "write", 2), ("again", "read", 2), ("one", "read", 1)):
        arguments = (model, tmp_path / "reference", tmp_path / name, mode)
        run_ranks("moving_reference.py", *arguments, num_ranks=num_ranks)
        found[name] = torch.load(tmp_path / name)
    for name, weight in found["two"]["weights"].items():
        torch.testing.assert_close(weight, found["two"]["expected"][name], rtol=1e-6, atol=1e-7)
        assert all(torch.equal(weight, found[other]["weights"][name]) for other in ("again", "one"))
    assert torch.equal(found["two"]["log_probs"], found["again"]["log_probs"])


def figures(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in ("actor/ref_kl", "actor/pg_loss", "actor/grad_norm")}


def test_a_run_s_reference_follows_and_resumes_exactly(tmp_path):
    config = write_run(tmp_path / "assets", num_steps=4)

    def train(name, *settings):
        own = [f"config={config}", "trainer.n_gpus_per_node=1", f"trainer.run_dir={tmp_path / name}"]
        done = run_training(*own, "trainer.save_limit=-1", "algorithm.kl_penalty=mse", *settings)
        assert done.returncode == 0, done.stderr[-6000:]
        return figures(tmp_path / name)

    averaged = ["worker.ref.update_freq=2", "worker.ref.ema_decay=0.5"]
    straight = train("straight", *averaged)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "global_step_4")  # the reference moved after 2
    assert train("resumed", *averaged) == straight
    fixed = train("fixed")
    assert fixed["actor/ref_kl"][:2] == straight["actor/ref_kl"][:2]
    assert 0 < straight["actor/ref_kl"][2] < fixed["actor/ref_kl"][2]
    each = train("each", "worker.ref.update_freq=1")  # one update a step: the reference is the actor before it
    assert max(each["actor/ref_kl"]) < 1e-10
