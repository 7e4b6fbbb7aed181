"""`mmr1-ds launch`: the command it prints, what it refuses, and a job of ranks and servers on a real SLURM."""

import json
import shlex
import sys
import time
import uuid
from pathlib import Path

import pytest
from fixtures.dry_runs import valid_run
from fixtures.launching import PROGRAMS, ROOT, processes_with, wait_until
from fixtures.slurm_cluster import NODES, missing, slurm_cluster

from mmr1_ds.commands import cli

KEY = "sk-7f3a91c04be2d855"


@pytest.fixture
def valid(tmp_path, monkeypatch):
    for name in ("DS_ACCELERATOR", "PYTHON"):
        monkeypatch.delenv(name, raising=False)
    return [*valid_run(tmp_path), "trainer.nnodes=3", "worker.actor.micro_batch_size_per_device_for_update=5"]


def launch(capfd, *words: str) -> tuple[int, list[str], str]:
    code = cli.main(["launch", *words])
    said = capfd.readouterr()
    return code, shlex.split(said.out.replace("\\\n", " ")), said.err


def test_what_loading_warns_of_is_told_beside_the_command(valid, capfd):
    code, words, error = launch(capfd, "--time=1:00:00", *valid, "worker.actor.tau_positive=2")
    assert code == 0 and words and error.startswith("mmr1-ds: keys without effect: worker.actor.tau_positive (")
    assert launch(capfd, "--time=1:00:00", *valid)[2] == ""


def test_nodes_and_gpus_are_the_config_s(valid, capfd):
    code, words, _ = launch(
        capfd, "--time=1-12", "--partition=h100", "--account=lab", "--sbatch=--qos=high -x n7", *valid
    )
    assert code == 0
    assert words == [
        f"MMR1_DS_ROOT={ROOT}", f"PYTHON={sys.executable}", "sbatch",
        "--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=8", "--gpus-per-node=2", "--time=1-12",
        "--partition=h100", "--account=lab", "--qos=high", "-x", "n7", "--job-name=default",
        str(ROOT / "launch" / "slurm.sbatch"), *valid,
    ]  # fmt: skip


def test_server_nodes_are_a_second_component_of_a_task_for_each_server(valid, capfd):
    wanted = [*valid, "trainer.n_gpus_per_node=6", "worker.rollout.tensor_parallel_size=3", "trainer.nnodes=1"]
    code, words, _ = launch(capfd, "--time=90", "--server-nodes=5", "--partition=b200", "--cpus-per-task=7", *wanted)
    assert code == 0
    first, second = words[: words.index(":")], words[words.index(":") + 1 :]
    assert first[3:5] == ["--nodes=1", "--ntasks-per-node=6"]
    assert second[:2] == ["--nodes=5", "--ntasks-per-node=2"]
    for component in (first, second):
        assert {"--gpus-per-node=6", "--cpus-per-task=7", "--time=90", "--partition=b200"} <= set(component)


def test_without_gpus_none_is_asked_for(valid, capfd, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not [word for word in launch(capfd, "--time=90", *valid)[1] if "gpu" in word and word.startswith("--")]


def test_a_container_runs_its_own_python(valid, capfd):
    words = launch(capfd, "--time=90", "--container=a b.sqsh", "--mounts=/data:/data,/x:/y", *valid)[1]
    assert {"CONTAINER_IMAGE=a b.sqsh", "CONTAINER_MOUNTS=/data:/data,/x:/y", "PYTHON=python3"} <= set(words)


def test_a_container_sees_the_folders_of_the_run_and_its_data(valid, capfd, tmp_path):
    (tmp_path / "out").mkdir()
    words = launch(capfd, "--time=90", "--container=a.sif", *valid, f"trainer.run_dir={tmp_path}/out/new/run")[1]
    (mounts,) = (word.partition("=")[2].split(",") for word in words if word.startswith("CONTAINER_MOUNTS="))
    assert {f"{path}:{path}" for path in (ROOT, tmp_path, tmp_path / "out")} == set(mounts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--time=tomorrow"], "--time tomorrow: expected minutes"),
        (["--time=90", "--server-nodes=-1"], "--server-nodes must be >= 0, got -1"),
        (["--time=90", "--cpus-per-task=0"], "--cpus-per-task must be >= 1, got 0"),
        (["--time=90", "--mounts=/a:/a"], "--mounts is for a container"),
        (["--time=90", "trainer.nnodes=7"], "6 % 14"),
        (["--time=90", "data.sede=1"], "did you mean data.seed?"),
        (["--time=90", "--server-nodes=1", "worker.rollout.tensor_parallel_size=4"], "does not divide the 2 GPUs"),
    ],
)
def test_what_would_not_run_is_not_printed(valid, capfd, words, message):
    options = [word for word in words if word.startswith("--")]
    code, printed, error = launch(capfd, *options, *valid, *words[len(options) :])
    assert (code, printed) == (2, [])
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("key", ["worker.reward.reward_function_kwargs.api_key", "trainer.experiment_name"])
def test_a_credential_is_refused_and_not_repeated(valid, capfd, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    code, printed, error = launch(capfd, "--time=90", *valid, f"{key}={KEY}")
    assert (code, printed) == (2, [])
    assert "is a credential" in error and key in error and KEY not in error


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_job_of_ranks_and_servers_is_submitted_warned_and_requeued(tmp_path, monkeypatch, capfd):
    marker = uuid.uuid4().hex
    (tmp_path / "slurm").mkdir()
    monkeypatch.chdir(tmp_path)
    with slurm_cluster(tmp_path / "slurm") as cluster:
        added = {
            "MMR1_TEST_FOLDER": str(tmp_path), "MMR1_TEST_MARKER": marker, "DS_ACCELERATOR": "cpu",
            "PYTHON": str(PROGRAMS / "launched.py"), "OUR_CREDENTIAL": KEY,
            "CUDA_VISIBLE_DEVICES": "4,5", "SLURM_GPUS_ON_NODE": "2",  # as a node's with two
        }  # fmt: skip
        cluster.environment |= added
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        options = ["--time=10", "--server-nodes=1", "--cpus-per-task=1", "--submit", "--sbatch=--output=job.out"]
        assert cli.main(["launch", *options, *valid_run(tmp_path), "data.seed=5"]) == 0
        job = capfd.readouterr().out.split()[-1]

        def told(name: str) -> dict:
            path = tmp_path / f"{name}.json"
            wait_until(path.exists, 90, f"{path.name}; {said(tmp_path)}{cluster.logs()}")
            return json.loads(path.read_text())

        ranks, servers = [told(f"rank{i}.0") for i in range(2)], [told(f"server{i}.0") for i in range(2)]
        # The script alone is told, as by --signal=B:USR1.
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        wait_until(lambda: cluster.num_requeued() == 2, 60, "both components requeued")
        asked = [time.monotonic()]  # in the second of its end SLURM would refuse the job as revoked

        def goes_on() -> bool:
            # SLURM looks at such jobs after a change, noted in whole seconds: one of the same second is missed.
            if time.monotonic() - asked[0] > 2 and not (tmp_path / "rank1.1.json").exists():
                asked[0] = time.monotonic()
                cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
            return (tmp_path / "rank1.1.json").exists()

        wait_until(goes_on, 40, "the job's second start")
        states = ["squeue", "--noheader", f"--job={job}", "--states=all", "--format=%T"]
        wait_until(lambda: cluster.run(*states).split() == ["COMPLETED"] * 2, 60, "its end")
        wait_until(lambda: not processes_with(marker), 30, "no process of the job left")
    first = ranks[0]["variables"]
    assert int(first["MASTER_PORT"]) > 20000 and int(first["SLURM_JOB_END_TIME"]) > 0
    assert first["MASTER_ADDR"] in NODES
    other = NODES[1 - NODES.index(first["MASTER_ADDR"])]
    assert [rank["variables"]["SLURM_STEP_NUM_TASKS"] for rank in ranks] == ["2", "2"]
    urls = next(word for word in ranks[1]["arguments"] if word.startswith("worker.rollout.server_urls="))
    assert urls == f"worker.rollout.server_urls=[http://{other}:8000,http://{other}:8001]"
    assert "worker.rollout.engine=server" in ranks[0]["arguments"]
    for number, server in enumerate(servers):
        assert server["arguments"][-2:] == ["--port", str(8000 + number)] and "data.seed=5" in server["arguments"]
        assert server["variables"]["CUDA_VISIBLE_DEVICES"] == "45"[number]
    keys = {process["variables"]["MMR1_DS_SERVER_KEY"] for process in ranks + servers}
    assert len(keys) == 1 and len(keys.pop()) > 30
    for process in ranks + servers:
        assert not [word for word in process["arguments"] if KEY in word or first["MMR1_DS_SERVER_KEY"] in word]
        assert process["variables"]["OUR_CREDENTIAL"] == KEY
    assert "requeued as job" in said(tmp_path) and KEY not in said(tmp_path)


def said(folder: Path) -> str:
    path = folder / "job.out"
    return path.read_text()[-4000:] if path.exists() else ""
