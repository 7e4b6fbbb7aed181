"""Checkpoints: whole or not there, damaged ones passed over, the limit kept."""

import json
import os
from unittest import mock

import pytest

from mmr1_ds.checkpoint import MANIFEST, Checkpoints
from mmr1_ds.distributed import Ranks
from mmr1_ds.errors import UserError
from mmr1_ds.launch_environment import LaunchEnvironment


@pytest.fixture(scope="module")
def ranks():
    with mock.patch.dict(os.environ):  # it exports its rank, as vLLM wants it; later tests must not inherit that
        found = Ranks(LaunchEnvironment(0, 1, 0, "none"), timeout_seconds=20)
        yield found
        found.close()


def write(folder):
    (folder / "actor").mkdir()
    (folder / "actor" / "weights.bin").write_bytes(bytes(range(251)))
    (folder / "state.json").write_text("{}")


def test_the_newest_is_found_and_old_ones_go(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, 2, ranks)
    assert checkpoints.newest() is None
    for step in (1, 9, 10, 101):
        checkpoints.save(step, write)
    assert checkpoints.newest() == (101, tmp_path / "global_step_101")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_10", "global_step_101", "latest"]
    assert (tmp_path / "latest").read_text() == "global_step_101\n"


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no manifest", "torn manifest"])
def test_a_damaged_one_is_named_and_passed_over(tmp_path, ranks, caplog, damage):
    checkpoints = Checkpoints(tmp_path, -1, ranks)
    checkpoints.save(3, write)
    checkpoints.save(5, write)
    file, manifest = tmp_path / "global_step_5/actor/weights.bin", tmp_path / "global_step_5" / MANIFEST
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "changed":
        file.write_bytes(bytes(251))
    elif damage == "missing":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:20])
    with caplog.at_level("WARNING", logger="mmr1_ds"):
        assert checkpoints.newest() == (3, tmp_path / "global_step_3")
    assert "global_step_5" in caplog.text
    with pytest.raises(UserError, match="global_step_5"):
        checkpoints.require(tmp_path / "global_step_5")
    assert checkpoints.require(tmp_path / "global_step_3") == 3


def test_an_interrupted_save_leaves_the_last_one(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, -1, ranks)
    checkpoints.save(2, write)

    def interrupted(folder):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(4, interrupted)
    assert checkpoints.newest() == (2, tmp_path / "global_step_2")
    assert (tmp_path / "latest").read_text() == "global_step_2\n"
    checkpoints.save(4, write)  # over what the interrupted one left
    assert checkpoints.newest() == (4, tmp_path / "global_step_4")
    assert not list(tmp_path.glob(".*"))


def test_a_fresh_run_is_not_outlived_by_an_older_one(tmp_path, ranks):
    older = Checkpoints(tmp_path, 2, ranks)
    older.save(40, write)
    older.save(60, write)
    fresh = Checkpoints(tmp_path, 2, ranks)
    fresh.save(20, write)
    assert fresh.newest() == (20, tmp_path / "global_step_20")
    assert sorted(path.name for path in tmp_path.glob("stale_*")) == [
        "stale_global_step_40.1",
        "stale_global_step_60.1",
    ]
    fresh.save(30, write)
    fresh.save(40, write)
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == ["global_step_30", "global_step_40"]
    Checkpoints(tmp_path, 1, ranks).save(50, write)
    assert [path.name for path in tmp_path.glob("global_step_*")] == ["global_step_50"]


def test_a_step_is_saved_again(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, -1, ranks)
    checkpoints.save(2, write)
    resumed = Checkpoints(tmp_path, -1, ranks)
    assert resumed.newest() == (2, tmp_path / "global_step_2")
    (tmp_path / "global_step_2" / "old").touch()
    resumed.save(2, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_2", "latest"]
    assert not (tmp_path / "global_step_2" / "old").exists()
    (tmp_path / "global_step_2").rename(tmp_path / ".global_step_2.replaced")  # killed between the two renames
    assert resumed.newest() == (2, tmp_path / "global_step_2")


def test_another_number_of_ranks_is_refused(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, -1, ranks)
    folder = checkpoints.save(2, write)
    checkpoints.check_ranks(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"ranks": 8}))
    with pytest.raises(UserError, match="written by 8 ranks and this run has 1"):
        checkpoints.check_ranks(folder)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, ranks):
    with pytest.raises(UserError, match="not a checkpoint"):
        Checkpoints(tmp_path, -1, ranks).require(tmp_path / "elsewhere")
