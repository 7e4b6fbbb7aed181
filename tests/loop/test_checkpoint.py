"""Checkpoints: whole or not there, damaged ones passed over, the limit kept."""

import errno
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import RunConfig
from mmr1_ds.engine.weights.zero_checkpoint import CONVERTED
from mmr1_ds.errors import UserError
from mmr1_ds.io import PendingFile, digest, write_whole
from mmr1_ds.loop import checkpoint
from mmr1_ds.loop.checkpoint import MANIFEST, VALIDATION, Checkpoints
from mmr1_ds.loop.starting import starting_point


@pytest.fixture(scope="module")
def ranks():
    with mock.patch.dict(os.environ):  # it exports its rank, as vLLM wants it; later tests must not inherit that
        found = Ranks(LaunchEnvironment(0, 1, 0, "none"), timeout_seconds=20)
        yield found
        found.close()


def write(folder):
    (folder / "actor").mkdir()
    (folder / "actor" / "weights.bin").write_bytes(bytes(range(251)))
    (folder / "actor" / "weights.bin").chmod(0o600)  # as safetensors leaves its files
    (folder / "state.json").write_text("{}")


def test_the_newest_is_found_and_old_ones_go(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, 2, ranks)
    assert checkpoints.newest() is None
    for step in (1, 9, 10, 101):
        checkpoints.save(step, write)
    assert checkpoints.newest() == (101, tmp_path / "global_step_101")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_10", "global_step_101", "latest"]
    assert (tmp_path / "latest").read_text() == "global_step_101\n"
    folder, file = tmp_path / "global_step_101", tmp_path / "global_step_101" / "actor" / "weights.bin"
    assert file.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


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


def test_a_run_killed_between_a_checkpoint_and_its_names_names_it_when_it_goes_on(tmp_path, ranks, monkeypatch):
    """Also when nothing is left to train, so that no later save would."""
    checkpoints = Checkpoints(tmp_path, -1, ranks, "val/accuracy_reward")
    checkpoints.save(1, write_validated(0.25))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", killed_at("latest"))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, write_validated(0.5))
    assert (tmp_path / "latest").read_text() == "global_step_1\n" and (tmp_path / "global_step_2").is_dir()
    config = RunConfig()
    resumed = Checkpoints(tmp_path, -1, ranks, "val/accuracy_reward")
    assert starting_point(config, resumed) == (2, tmp_path / "global_step_2")
    assert (tmp_path / "latest").read_text() == (tmp_path / "best").read_text() == "global_step_2\n"


def killed_at(name):
    def write_or_die(path, content):
        if path.name == name:
            raise KeyboardInterrupt
        write_whole(path, content)

    return write_or_die


def write_validated(figure):
    def write_both(folder):
        write(folder)
        (folder / VALIDATION).write_text(json.dumps({"val/accuracy_reward": figure}))

    return write_both


def test_the_best_stays_through_later_ones_and_a_resume(tmp_path, ranks, caplog):
    def started():
        return Checkpoints(tmp_path, 1, ranks, "val/accuracy_reward")

    run = started()
    assert run.is_best({"val/accuracy_reward": 0.0}) and not run.is_best({})
    for step, figure in ((2, 0.5), (4, 0.75), (6, 0.75), (8, 0.25)):
        assert run.is_best({"val/accuracy_reward": figure}) == (step in (2, 4))
        run.save(step, write_validated(figure))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "global_step_4", "global_step_8", "latest"]
    run = started()
    assert run.newest() == (8, tmp_path / "global_step_8")
    assert not run.is_best({"val/accuracy_reward": 0.5})
    run.save(9, write)  # was not validated
    assert run.named_best() == tmp_path / "global_step_4" and run.newest()[0] == 9
    run.save(10, write_validated(0.875))
    assert (tmp_path / "best").read_text() == "global_step_10\n" and not (tmp_path / "global_step_4").exists()
    with caplog.at_level("WARNING", logger="mmr1_ds"):
        assert not run.is_best({"val/overall_reward": 1.0})
    assert "the validation has no trainer.best_metric=val/accuracy_reward, but val/overall_reward" in caplog.text

    other = started()  # begins anew in the same folder: what an earlier run left is not its best
    assert other.is_best({"val/accuracy_reward": 0.125})
    other.save(3, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_3", "latest", "stale_global_step_10.1"]
    with pytest.raises(UserError, match="has no best checkpoint"):
        other.named_best()


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


def test_another_number_of_ranks_is_told(tmp_path, ranks, caplog, monkeypatch):
    assert Checkpoints(tmp_path, -1, ranks).save(2, write)
    folder = tmp_path / "global_step_2"
    with caplog.at_level("INFO", logger="mmr1_ds"):
        Checkpoints(tmp_path, -1, ranks).check_ranks(folder)
        assert caplog.text == ""
        monkeypatch.setattr(ranks, "size", 8)
        Checkpoints(tmp_path, -1, ranks).check_ranks(folder)
    assert "was written by 1 ranks, this run has 8" in caplog.text


def test_every_bit_of_a_manifest_counts(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, -1, ranks)
    assert checkpoints.save(5, write)
    folder = tmp_path / "global_step_5"
    manifest = (folder / MANIFEST).read_bytes()
    content = json.loads(manifest)
    for place in range(0, len(manifest), 7):
        changed = bytearray(manifest)
        changed[place] ^= 1 << place % 8
        (folder / MANIFEST).write_bytes(changed)
        assert checkpoints.damage(folder).startswith(MANIFEST), bytes(changed)
    for key in ("step", "ranks"):
        (folder / MANIFEST).write_text(json.dumps(content | {key: 7}))
        assert "has another content" in checkpoints.damage(folder)
    del content["sha256"]  # as earlier versions wrote it
    (folder / MANIFEST).write_text(json.dumps(content))
    assert checkpoints.damage(folder) == ""


def test_one_in_the_background_is_there_once_it_is_finished(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, -1, ranks)
    checkpoints.save(3, write)
    goes_on = threading.Event()

    def write_later(folder):
        write(folder)

        def write_shard():
            assert goes_on.wait(20)
            (folder / "actor" / "shard").write_bytes(b"shard")
            return {"bytes": 5, "sha256": digest(folder / "actor" / "shard")}

        return [PendingFile(folder / "actor" / "shard", write_shard)]

    assert checkpoints.save(5, write_later, in_background=True)
    assert checkpoints.is_writing and not checkpoints.has_written()
    assert Checkpoints(tmp_path, -1, ranks).newest() == (3, tmp_path / "global_step_3")
    goes_on.set()
    assert checkpoints.finish() and not checkpoints.is_writing
    assert Checkpoints(tmp_path, -1, ranks).newest() == (5, tmp_path / "global_step_5")
    files = json.loads((tmp_path / "global_step_5" / MANIFEST).read_text())["files"]
    assert sorted(files) == ["actor/shard", "actor/weights.bin", "state.json"]

    def fail_later(folder):
        def fail():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "shard"))

        return [PendingFile(folder / "shard", fail)]

    assert checkpoints.save(7, fail_later, in_background=True)
    assert not checkpoints.finish() and "No space left on device" in checkpoints.failure
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_3", "global_step_5", "latest"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_fails_the_save_and_not_the_run(small_disk, ranks, caplog):
    checkpoints = Checkpoints(small_disk / "run", 2, ranks)
    assert checkpoints.save(3, write) and checkpoints.failure == ""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(40_000))

    def write_much(folder):
        write(folder)
        (folder / "large").write_bytes(bytes(50_000))

    def write_arrays(folder):  # whose library has an error of its own
        write(folder)
        save_file({"large": np.zeros(50_000, dtype=np.uint8)}, folder / "large")

    for attempt in (write_much, write_arrays):
        caplog.clear()
        assert not checkpoints.save(5, attempt)
        assert "the checkpoint of step 5 was not saved in " in checkpoints.failure
        assert "rank 0: " in checkpoints.failure and "No space left on device" in checkpoints.failure
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
            f"{checkpoints.failure}; the run goes on, earlier checkpoints are as they were"
        ]
        assert sorted(path.name for path in (small_disk / "run").iterdir()) == ["global_step_3", "latest"]
        assert Checkpoints(small_disk / "run", 2, ranks).newest() == (3, small_disk / "run" / "global_step_3")
    filler.unlink()
    assert checkpoints.save(7, write) and checkpoints.failure == ""
    assert checkpoints.newest() == (7, small_disk / "run" / "global_step_7")


@pytest.mark.parametrize("broken", ["mkdir", "fsync", "rename", "open"])
def test_a_disk_that_goes_away_fails_the_save_at_any_point(tmp_path, ranks, monkeypatch, broken):
    checkpoints = Checkpoints(tmp_path, 1, ranks)
    checkpoints.save(3, write)

    def fail(*arguments, **_settings):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(arguments[0]))

    with monkeypatch.context() as patch:
        if broken == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, {"open": "write_bytes"}.get(broken, broken), fail)
        assert not checkpoints.save(5, write)
    assert "Stale file handle" in checkpoints.failure
    assert Checkpoints(tmp_path, 1, ranks).newest() == (3, tmp_path / "global_step_3")
    assert not list(tmp_path.glob(".*"))
    checkpoints.save(7, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_7", "latest"]


def test_the_limit_takes_damaged_ones_before_good_ones(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, -1, ranks)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, write)
    (tmp_path / "global_step_3" / "state.json").unlink()
    content = tmp_path / "global_step_4" / "actor" / "weights.bin"
    content.write_bytes(bytes(251))  # as long as before
    resumed = Checkpoints(tmp_path, 2, ranks)
    assert resumed.newest() == (2, tmp_path / "global_step_2")
    for step in (4, 3):  # the run that goes on from 2 puts them aside when it comes by
        assert not resumed.save(step, lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert resumed.newest() == (2, tmp_path / "global_step_2")
    limited = Checkpoints(tmp_path, 2, ranks)
    limited.newest()
    limited.save(9, write)
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == ["global_step_2", "global_step_9"]


def test_what_was_converted_goes_when_a_newer_one_is_there(tmp_path, ranks):
    checkpoints = Checkpoints(tmp_path, -1, ranks)
    assert checkpoints.save(2, write)
    folder = tmp_path / "global_step_2"
    (folder / "actor" / CONVERTED).mkdir()
    assert checkpoints.damage(folder) == ""
    checkpoints.save(3, write)
    assert not (folder / "actor" / CONVERTED).exists() and checkpoints.damage(folder) == ""


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, ranks):
    with pytest.raises(UserError, match="not a checkpoint"):
        Checkpoints(tmp_path, -1, ranks).require(tmp_path / "elsewhere")
