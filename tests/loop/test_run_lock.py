"""The lock of a run directory: a living holder is named, a dead one is not obeyed, here or on another machine."""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading

import pytest
from fixtures.launching import wait_until

from mmr1_ds.errors import UserError
from mmr1_ds.loop.run_lock import NAME, RunLock


def lock(folder, silence_seconds=0.3):
    return RunLock(folder, "trainer.run_dir", beat_seconds=0.01, silence_seconds=silence_seconds)


def change(folder, **names):
    """Writes other names into the lock of a folder."""
    path = folder / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | names))


@pytest.fixture
def left_by_the_dead(tmp_path):
    """A lock whose holder was killed."""
    program = (
        "import os, sys; from pathlib import Path; from mmr1_ds.loop.run_lock import RunLock\n"
        "RunLock(Path(sys.argv[1]), 'trainer.run_dir').__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert (tmp_path / NAME).exists()
    return tmp_path


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    folder = tmp_path / "runs" / "mine"
    with lock(folder):
        words = rf"trainer.run_dir={folder} is in use by process {os.getpid()} on {socket.gethostname()}; wait"
        with pytest.raises(UserError, match=words) as refused, lock(folder):
            pass
        assert "\n" not in str(refused.value)
    with lock(folder):  # released
        pass
    assert list(folder.iterdir()) == []


def test_a_process_that_is_gone_holds_nothing(left_by_the_dead, caplog):
    with caplog.at_level(logging.WARNING), lock(left_by_the_dead):
        assert "it is gone" in caplog.text


def test_a_process_with_the_number_of_one_that_is_gone_holds_nothing(tmp_path, left_by_the_dead):
    change(left_by_the_dead, pid=os.getpid())
    with lock(left_by_the_dead):
        pass


@pytest.mark.parametrize("names", [{"host": "elsewhere"}, {"boot": "another"}, {"processes": "pid:[1]"}])
def test_another_machine_that_counts_on_is_obeyed(tmp_path, names):
    with lock(tmp_path):
        change(tmp_path, **names)
        with pytest.raises(UserError, match="is in use by process"), lock(tmp_path, silence_seconds=60):
            pass


@pytest.mark.parametrize("names", [{"host": "elsewhere"}, {"boot": "another"}, {"processes": "pid:[1]"}])
def test_another_machine_that_is_silent_is_not_obeyed(left_by_the_dead, names):
    change(left_by_the_dead, **names)
    with lock(left_by_the_dead):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"beat": 1}'])
def test_a_damaged_lock_is_not_obeyed_for_ever(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("killed", [0, 2])  # while they replaced the lock of one before them
def test_of_many_at_once_one_gets_the_lock(left_by_the_dead, killed):
    last = left_by_the_dead / NAME
    for one in range(killed):
        content = last.read_text()
        last = last.with_name(f"{last.name}.{hashlib.sha256(content.encode()).hexdigest()[:16]}")
        last.write_text(json.dumps(json.loads(content) | {"token": f"{one}"}))
    together, taken, refused = threading.Barrier(8), [], []

    def take():
        mine = lock(left_by_the_dead)
        together.wait()
        try:
            taken.append(mine.__enter__())
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].__exit__(None, None, None)
    assert list(left_by_the_dead.iterdir()) == []


def test_a_holder_whose_lock_was_taken_says_so_and_leaves_the_new_one(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        first = lock(tmp_path).__enter__()
        change(tmp_path, token="another's")
        wait_until(lambda: "is no longer this run's" in caplog.text, 30, "the holder notices")
        first.__exit__(None, None, None)
    assert (tmp_path / NAME).exists()
