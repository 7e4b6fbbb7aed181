"""What a GPU machine lacks, from facts made up, and how the facts are found."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.dry_runs import valid_run

from mmr1_ds import train
from mmr1_ds.config.loading import load_config
from mmr1_ds.preflight import machine
from mmr1_ds.preflight.deepspeed import resolve_deepspeed
from mmr1_ds.preflight.machine import (
    Gpu,
    Machine,
    MachineError,
    Needs,
    check_machine,
    doubts,
    gather,
    lacking,
    needs_of,
    use_own_nvcc,
    visible,
)

GIB = 2**30
GPUS = tuple(Gpu(str(i), f"GPU-{i}a", "580.65.06", 79 * GIB, 80 * GIB) for i in range(3))
GOOD = Machine("n7", GPUS, "13.0", "13.5", has_ninja=True, has_gxx=True, memlock_bytes=None, memory_bytes=1000 * GIB)
NEEDS = Needs(gpu_fraction=0.55, compiles=True, pins_memory=False)


def test_a_machine_with_everything_lacks_nothing():
    assert lacking(GOOD, NEEDS) == [] and doubts(GOOD, NEEDS) == ()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"gpus": ()}, "nvidia-smi lists no GPU"),
        ({"gpus": (replace(GPUS[0], driver="570.124.06"),)}, "its driver is 570.124.06 and CUDA 13.0 needs 580"),
        ({"nvcc": ""}, "nvcc is missing: install the CUDA toolkit 13.0"),
        ({"nvcc": "12.8"}, "nvcc is of CUDA 12.8 and torch of 13.0"),
        ({"has_gxx": False}, "g++ is missing"),
        ({"has_ninja": False}, "ninja is missing"),
        (
            {"gpus": (GPUS[0], replace(GPUS[1], free_bytes=11 * GIB))},
            "GPU 1 has 11 of 80 GiB free, and vLLM takes 0.55 (worker.rollout.gpu_memory_utilization)",
        ),
    ],
)
def test_each_thing_missing_is_named_with_its_remedy(facts, message):
    (problem,) = lacking(replace(GOOD, **facts), NEEDS)
    assert message in problem


def test_memory_that_an_ended_process_still_holds_is_waited_for(monkeypatch):
    config = load_config(["config=mmr1_h100"]).config
    actor = resolve_deepspeed(config, 8, on_gpu=True)
    full = replace(GOOD, gpus=(replace(GPUS[0], free_bytes=GIB),))
    seen, slept = [full, full, GOOD], []
    monkeypatch.setattr(machine, "gather", lambda environ: seen.pop(0) if len(seen) > 1 else seen[0])
    monkeypatch.setattr(machine.time, "sleep", slept.append)
    assert check_machine(config, actor) == () and len(slept) == 2
    seen[:] = [replace(full, has_gxx=False)]  # what no waiting mends is told at once
    with pytest.raises(MachineError, match=r"g\+\+ is missing.*GPU 0 has 1 of 80 GiB free"):
        check_machine(config, actor)
    assert len(slept) == 2


def test_what_a_run_does_not_need_is_not_asked_for():
    bare = replace(GOOD, nvcc="", has_ninja=False, gpus=(replace(GPUS[0], free_bytes=GIB),))
    assert lacking(bare, Needs(gpu_fraction=0.0, compiles=False, pins_memory=False)) == []
    limited = replace(GOOD, memlock_bytes=8 * 2**20)
    assert doubts(limited, NEEDS) == ()
    (line,) = doubts(limited, replace(NEEDS, pins_memory=True))
    assert "0.00781 GiB may be locked" in line and "ulimit -l unlimited" in line


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["config=mmr1_h100"], Needs(0.55, False, False)),
        (["config=mmr1_h100_32b", "worker.rollout.engine=hf"], Needs(0.0, True, True)),
        (["config=mmr1_h100", "worker.actor.offload_states=true"], Needs(0.55, True, True)),
        (["config=mmr1_h100", "worker.actor.optim.strategy=adamw_bf16"], Needs(0.55, False, False)),
    ],
)
def test_needs_are_those_of_the_run(settings, expected):
    config = load_config(settings).config
    assert needs_of(config, resolve_deepspeed(config, 8, on_gpu=True)) == expected


def _of_33_billion(tmp_path):
    header = json.dumps({"__metadata__": {}, "a": {"shape": [3 * 10**6, 11 * 10**3]}, "b": {"shape": [7]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return f"worker.actor.model.model_path={tmp_path}"


@pytest.mark.parametrize(
    ("settings", "of_parameter"),
    [
        ([], 0),
        (["worker.actor.offload.offload_optimizer=true", "worker.ref.offload.offload_params=true"], 22),
        (["worker.actor.offload_states=true"], 18),
        (["worker.actor.offload_states=true", "worker.actor.model.lora.rank=8"], 0),
        (["worker.actor.offload.offload_optimizer=true", "trainer.nnodes=4"], 5),
    ],
)
def test_states_in_host_memory_must_have_room_there(tmp_path, settings, of_parameter):
    given = ["config=mmr1_h100", "worker.ref.offload.offload_params=false", _of_33_billion(tmp_path), *settings]
    config = load_config(given).config
    needs = needs_of(config, resolve_deepspeed(config, 8, on_gpu=True))
    assert needs.host_bytes == of_parameter * (33 * 10**9 + 7)
    problems = lacking(replace(GOOD, memory_bytes=600 * GIB), needs)
    assert bool(problems) is (of_parameter == 22)
    if problems:
        assert "offloaded states take 676 GiB of host memory and it has 600: take more nodes" in problems[0]


@pytest.mark.parametrize(
    ("shown", "expected"), [(None, "012"), ("2,0", "20"), ("GPU-1", "1"), ("", ""), ("-1", ""), ("7", "")]
)
def test_the_gpus_looked_at_are_those_that_the_run_sees(shown, expected):
    environ = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert "".join(gpu.name for gpu in visible(GPUS, environ)) == expected


def test_what_nvidia_smi_does_not_say_stops_no_run():
    assert visible(GPUS, {"CUDA_VISIBLE_DEVICES": "MIG-3f,MIG-4f"}) is None
    unknown = replace(GOOD, gpus=None)
    assert lacking(unknown, NEEDS) == []
    (line,) = doubts(unknown, NEEDS)
    assert "driver and memory are not checked" in line


def program(path: Path, prints: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
    path.chmod(0o755)
    return path


def test_the_facts_are_those_that_the_programs_tell(tmp_path, monkeypatch):
    program(tmp_path / "bin" / "nvidia-smi", "0, GPU-0a, 580.65.06, 79000, 81559\\n1, GPU-1a, 580.65.06, [N/A], 5\\n")
    program(tmp_path / "bin" / "nvcc", "Cuda compilation tools, release 13.1, V13.1.80\\n")
    program(tmp_path / "bin" / "ninja", "")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin")
    found = gather({"PATH": f"{tmp_path}/bin"})
    assert found.gpus == (Gpu("0", "GPU-0a", "580.65.06", 79000 * 2**20, 81559 * 2**20),)
    assert (found.nvcc, found.has_ninja, found.has_gxx) == ("13.1", True, False)
    assert found.cuda_of_torch.startswith("13.")


def test_all_that_is_missing_is_one_line_and_nothing_is_loaded(tmp_path, monkeypatch, capfd):
    nothing = Machine("n7", (replace(GPUS[0], driver="550.54"),), "13.0", "", False, False, None, 0)
    monkeypatch.setattr(train, "gpu_is_here", lambda: True)
    monkeypatch.setattr(machine, "gather", lambda environ: nothing)
    monkeypatch.setattr(train, "use_own_nvcc", lambda: None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert train.main([*valid_run(tmp_path), "worker.actor.offload_states=true", "trainer.dry_run=true"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mmr1-ds: error")]
    assert line.startswith("mmr1-ds: error: n7 cannot train: its driver is 550.54")
    assert all(word in line for word in ("nvcc is missing", "g++ is missing", "ninja is missing"))


def test_the_environment_s_own_nvcc_is_exported_and_its_operators_link(tmp_path, monkeypatch):
    """A wheel has libcudart.so.13 and no libcudart.so, which -lcudart asks for."""
    wheel = tmp_path / "nvidia" / "cu13"
    program(wheel / "bin" / "nvcc", "release 13.5, V13.5.37\\n")
    (wheel / "lib").mkdir()
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", wheel / "lib" / "libcudart.so.13"], check=True)
    monkeypatch.setattr(machine, "_toolkits", lambda: [wheel])
    monkeypatch.setattr(machine, "_cuda_of_torch", lambda: "13.0")
    monkeypatch.setattr(machine, "_cuda_home", lambda environ: None)
    environ = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    link = ["g++", "-shared", "-x", "c++", "/dev/null", f"-L{wheel}/lib", "-lcudart", "-o", tmp_path / "op.so"]
    assert subprocess.run(link, env=environ, capture_output=True).returncode != 0
    use_own_nvcc(environ)
    assert environ["CUDA_HOME"] == str(wheel)
    assert environ["DS_SKIP_CUDA_CHECK"] == "1"  # 13.5 beside torch's 13.0, which DeepSpeed refuses
    subprocess.run(link, env=environ, check=True)
    use_own_nvcc(environ)  # another rank


def test_a_toolkit_that_torch_finds_is_left_alone(tmp_path, monkeypatch):
    program(tmp_path / "cuda" / "bin" / "nvcc", "release 13.0, V13.0.1\\n")
    monkeypatch.setattr(machine, "_cuda_of_torch", lambda: "13.0")
    environ = {"CUDA_HOME": str(tmp_path / "cuda")}
    use_own_nvcc(environ)
    assert environ == {"CUDA_HOME": str(tmp_path / "cuda")}
