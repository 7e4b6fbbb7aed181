"""The lock around DeepSpeed's builds: one process at a time, and none for ever."""

import signal
import subprocess
import sys
import threading

import pytest
from fixtures.launching import ROOT, environment
from torch.utils import cpp_extension

from mmr1_ds.engine.build_lock import KernelLock, lock_builds_by_kernel

HOLDER = """
import sys
from mmr1_ds.engine.build_lock import KernelLock
lock = KernelLock(sys.argv[1])  # kept, as torch keeps its own: filelock releases one that is dropped
assert lock.try_acquire()
print("held", flush=True)
sys.stdin.read()
"""


def holder(path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], env=environment(), cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_killed_builder_locks_nobody_out(tmp_path):
    path = tmp_path / "lock"
    logs = [tmp_path / name for name in (".ninja_deps", ".ninja_log")]
    process = holder(path)
    for log in logs:
        log.touch()
    waits = threading.Thread(target=KernelLock(str(path)).wait)
    waits.start()
    assert not KernelLock(str(path)).try_acquire() and waits.is_alive()
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    waits.join(30)
    assert not waits.is_alive()
    assert all(log.exists() for log in logs)
    mine = KernelLock(str(path))
    assert mine.try_acquire()
    assert not any(log.exists() for log in logs)  # torn, for all that anybody knows
    logs[0].touch()
    assert not KernelLock(str(path)).try_acquire()
    mine.release()
    assert mine.try_acquire() and logs[0].exists()  # a whole build's are kept
    mine.release()
    assert not path.exists()  # which torch's own kind would wait for


def test_a_file_that_torch_s_own_lock_left_is_no_lock(tmp_path):
    (tmp_path / "lock").touch()
    assert KernelLock(str(tmp_path / "lock")).try_acquire()


def test_torch_builds_with_it(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)  # put back afterwards
    lock_builds_by_kernel()
    monkeypatch.setattr(KernelLock, "try_acquire", lambda self: used.append(self._path) or True)
    monkeypatch.setattr(KernelLock, "release", lambda self: None)
    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", lambda **_: None)
    monkeypatch.setattr(cpp_extension, "_import_module_from_library", lambda *_: "module")
    source = tmp_path / "a.cpp"
    source.write_text("// nothing")
    assert cpp_extension.load("mmr1_ds_nothing", [str(source)], build_directory=str(tmp_path)) == "module"
    assert used == [tmp_path / "lock"]
