"""Real ZeRO-3 checkpoints: with a disk that fails one rank, on another number of ranks, and damaged file by file."""

import json
import logging
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.engine.weights.zero_checkpoint import CONVERTED
from mmr1_ds.loop.checkpoint import MANIFEST, Checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks():
    with mock.patch.dict(os.environ):
        found = Ranks(LaunchEnvironment(0, 1, 0, "none"), timeout_seconds=20)
        yield found
        found.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four steps on two ranks, saved after each; the third again on one rank, the fourth again on three."""
    folder = tmp_path_factory.mktemp("a (b) c+")  # signs that patterns are made of
    model = save_text_model(folder / "model")
    runs = {}
    for name, num_ranks, steps, saved, parts in (
        ("two", 2, (1, 4), "-", "actor,critic,adapted"),
        ("one", 1, (3, 3), "two/global_step_2", "actor,critic,adapted"),
        ("three", 3, (4, 4), "one/global_step_3", "actor"),
    ):
        out = folder / f"{name}.pt"
        arguments = [folder / saved, *map(str, steps), folder / name, parts]
        run_ranks("resharding.py", model, out, *arguments, num_ranks=num_ranks)
        runs[name] = torch.load(out, weights_only=False)
    return folder, runs


def test_a_disk_that_fails_one_rank_fails_the_save_and_not_the_run(trained):
    folder, runs = trained
    assert runs["two"]["failed"] is False
    assert "the checkpoint of step 1 was not saved" in runs["two"]["failure"]
    assert "rank 1: File too large: " in runs["two"]["failure"]
    assert "zero_pp_rank_1_mp_rank_00" in runs["two"]["failure"]
    assert runs["two"]["left"] == []
    assert (folder / "two" / "latest").read_text() == "global_step_4\n"  # later saves worked


@pytest.mark.parametrize(("name", "before"), [("one", 2), ("three", 3)])
def test_what_is_loaded_on_other_ranks_is_what_was_saved(trained, name, before):
    _, runs = trained
    saved = runs["two" if before == 2 else "one"]["states"][before]
    loaded = runs[name]["loaded"]
    assert len(loaded) > 10
    for key, tensor in loaded.items():
        assert torch.equal(tensor, saved[key]), key


@pytest.mark.parametrize(("name", "step"), [("one", 3), ("three", 4)])
def test_the_next_update_is_that_of_a_run_that_was_never_stopped(trained, name, step):
    _, runs = trained
    straight = runs["two"]
    for key, tensor in runs[name]["states"][step].items():
        moved = (straight["states"][step][key] - straight["states"][step - 1][key]).abs().max()
        assert moved > 0 or "moment" in key, key
        torch.testing.assert_close(tensor, straight["states"][step][key], rtol=1e-4, atol=2e-6, msg=key)
    for part, figures in runs[name]["metrics"][step].items():
        for figure, value in figures.items():
            assert value == pytest.approx(straight["metrics"][step][part][figure], rel=1e-4, abs=1e-6), figure


def test_conversion_leaves_only_its_folder(trained, ranks):
    folder, _ = trained
    left = {path.name for path in (folder / "two" / "global_step_2" / "actor").iterdir()}
    assert left == {"zero3", CONVERTED}
    checkpoints = Checkpoints(folder / "two", -1, ranks)
    assert checkpoints.damage(folder / "two" / "global_step_2") == ""


def test_every_damaged_file_is_named_and_the_one_before_is_used(trained, ranks, tmp_path, caplog):
    folder, _ = trained
    for step in (3, 4):
        shutil.copytree(folder / "two" / f"global_step_{step}", tmp_path / f"global_step_{step}")
    (tmp_path / "latest").write_text("global_step_4\n")
    newest = tmp_path / "global_step_4"
    names = [str(path.relative_to(newest)) for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(names) == 1 + 3 * 4 + 1  # manifest; model and optimizer states of two ranks, thrice; the adapters' name
    assert set(json.loads((newest / MANIFEST).read_text())["files"]) == set(names) - {MANIFEST}
    for name in names:
        for damage in (_truncate, _flip_a_bit, Path.unlink):
            kept = (newest / name).read_bytes()
            damage(newest / name)
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="mmr1_ds"):
                assert Checkpoints(tmp_path, -1, ranks).newest() == (3, tmp_path / "global_step_3"), (name, damage)
            assert "global_step_4 is damaged" in caplog.text and name in caplog.text, (name, damage)
            (newest / name).write_bytes(kept)
    for damage in (_truncate, _flip_a_bit, Path.unlink):
        damage(tmp_path / "latest")
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mmr1_ds"):
            assert Checkpoints(tmp_path, -1, ranks).newest() == (4, newest)  # it is found without
        assert "latest is damaged" in caplog.text
        (tmp_path / "latest").write_text("global_step_4\n")


def _truncate(path):
    path.write_bytes(path.read_bytes()[: -max(2, path.stat().st_size // 3)])


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(bytes(content))
