"""A real SLURM of two nodes on this machine: slurmctld, a slurmd for each node, and munge, all of their own.

Everything lies in one folder, on ports of its own, so that two clusters do not meet. Needs root, as slurmd does.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from launching import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")


def missing() -> str:
    """Why there can be no cluster here; empty when there can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed (packages slurmctld, slurmd, slurm-client, munge)" if absent else ""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def write_config(folder: Path) -> None:
    """SLURM's. bf_interval: seconds between looks at jobs of several components."""
    host = socket.gethostname().partition(".")[0]
    control, *daemons = free_ports(1 + len(NODES))
    lines = f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1
MpiDefault=none
JobRequeue=1
KillWait=20
ReturnToService=2
SlurmdParameters=config_overrides
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
""".lstrip()
    for name, port in zip(NODES, daemons, strict=True):
        lines += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN\n"
    (folder / "slurm.conf").write_text(lines)


class Cluster:
    """Its commands, run with its configuration."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def run(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, env=self.environment | more, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def num_requeued(self, job: str = r"\d+") -> int:
        """Jobs, or components of one, that have ended to start again; until then no start can be asked for."""
        log = (self.folder / "slurmctld.log").read_text()
        return len(re.findall(rf"Requeuing JobId={job}\b", log))

    def state(self, job: str) -> dict[str, str]:
        """The fields that scontrol tells of a job."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        return "".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start it in a folder that exists; after, nothing of it is left running."""
    for name in ("state", *NODES):
        (folder / name).mkdir()
    write_config(folder)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    # A folder that others can write to is a warning for munged, which --force lets pass, as being root.
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.out", f"--seed-file={folder}/munge.seed"]
    commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    daemons: list[subprocess.Popen] = []
    cluster = Cluster(folder, environment)
    try:
        for command in commands:
            with (folder / f"{command[0]}.{len(daemons)}.err").open("wb") as errors:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=errors, stderr=errors, start_new_session=True)
                )
            if command is munge:
                wait_until((folder / "munge.socket").exists, 20, "munge's socket")

        def is_up() -> bool:
            found = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True, timeout=30
            )
            return found.stdout.split() == ["idle"] * len(NODES)

        try:
            wait_until(is_up, 60, "both nodes idle")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{cluster.logs()}") from None
        yield cluster
        subprocess.run(["scancel", "--state=RUNNING"], env=environment, timeout=30, check=False)
    finally:
        for daemon in reversed(daemons):  # munge last: the others need it to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait(15)
