"""New weights from two ZeRO-3 ranks to a consumer: ours beside one parameter at a time and the whole model at once.

    python benchmarks/weights/bench_weight_sync.py [--json FILE] [--quick] [--sizes NAME ...] [--rounds R]
        [--bucket-mib M]

Two ranks hold the halves of a Qwen2 with random bfloat16 weights on the CPU. Rank 0 puts whole weights into shared
memory and asks a consumer by HTTP to load them, as it asks a vLLM server; the consumer is a process of its own that
maps the memory and copies every tensor into its own. Methods:

  buckets        ours: engine/weights/gathering.py and rollout/servers/weights/shared_memory_transfer.py as a run uses
                 them. A bucket's parameters take half of --bucket-mib; one all-gather and one request a bucket
  per_parameter  one GatheredParameters, one all-gather and one request a parameter
  whole_model    one GatheredParameters around all parameters (DeepSpeed calls an all-gather for each), one request

All hand over through the same code, which gathers the next part while the consumer loads the last.

Time: rank 0's, from a barrier of the ranks until the consumer has all. The methods take turns in every round; the
first round warms up and is the one in which memory is measured, of all models before any is timed.

Memory: what is resident (VmHWM, set back by writing 5 to /proc/self/clear_refs) at the peak less what was before,
shared memory included, of each rank; the method's shared memory is made in that round. The shards, which are there all
the time, do not count. Linux only. It is measured with glibc's MALLOC_MMAP_THRESHOLD_ at 256 KiB: else freed blocks of
up to 32 MB stay in the heap, in holes that the next do not fit, and what is resident says little of what is in use.
Time is measured with what glibc's own threshold grows to, 32 MB, so that nobody pays for fresh pages. Beside it, "in
use": the bytes that the allocator has handed out (mallinfo2), sampled every millisecond: a lower bound of their peak,
without the shared memory.

Afterwards the consumer's weights are compared with the model's, by a digest.

The JSON file holds a list of rows: method, model (1M ...), num_parameters, bytes, seconds (median), bytes_per_second,
num_collectives (all-gathers of rank 0), num_requests (that carry weights), peak_extra_bytes (of the rank that takes
more), peak_extra_bytes_by_rank, peak_live_bytes_by_rank, bucket_bytes, rounds (seconds of each).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmr1_ds.cluster.launch import free_port

ROOT = Path(__file__).resolve().parents[2]
CONSUMER = Path(__file__).with_name("bench_weight_sync_consumer.py")
METHODS = ("buckets", "per_parameter", "whole_model")
# Qwen2: hidden size, layers, size of the MLP, vocabulary; heads of 64.
SIZES = {
    "1M": (128, 4, 352, 1024),
    "10M": (256, 8, 704, 8192),
    "100M": (768, 12, 2048, 16384),
    "500M": (1280, 22, 3456, 32768),
}
QUICK = ("1M", "10M")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PATIENCE_SECONDS = 1200


def count_collectives() -> list[str]:
    """Names of the all-gathers called from now on, as they come. Before DeepSpeed chooses the one that it calls."""
    import torch.distributed as dist

    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*arguments, **options)

        return call

    for name in ("all_gather_into_tensor", "all_gather"):
        setattr(dist, name, counted(name, getattr(dist, name)))
    return calls


def build_model(size: str) -> Any:
    """Partitioned from the start, so that no rank ever holds it whole."""
    import deepspeed
    import torch
    import transformers

    hidden, layers, mlp, vocabulary = SIZES[size]
    config = transformers.Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(5)
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
        return transformers.Qwen2ForCausalLM(config)


class Method:
    """One way to sync, with its shared memory and its consumer."""

    def __init__(self, name: str, model: Any, port: int, is_sender: bool) -> None:
        from mmr1_ds.engine.weights.gathering import weight_buckets
        from mmr1_ds.rollout.servers.address import ServerAddress
        from mmr1_ds.rollout.servers.weights.shared_memory_transfer import SharedMemoryTransfer

        self.name, self._model = name, model
        infos = [info for bucket in weight_buckets(model) for info in bucket]
        self.parts = {
            "buckets": lambda: weight_buckets(model),
            "per_parameter": lambda: [[info] for info in infos],
            "whole_model": lambda: [infos],
        }[name]()
        self._address = ServerAddress(0, f"http://127.0.0.1:{port}", 1, 1)
        self._transfer = SharedMemoryTransfer(self.parts) if is_sender else None

    def sync(self) -> None:
        """Collective."""
        from mmr1_ds.rollout.servers.weights.control import ServerControl

        stream = self._weights()
        if self._transfer is not None:
            control = ServerControl([self._address], "no key")
            self._transfer.send(stream, control, "1")
            assert control.failed == {}, control.failed
        for _ in stream:
            pass

    def _weights(self) -> Iterator[tuple[str, Any]]:
        import deepspeed

        from mmr1_ds.engine.weights.gathering import whole_parameters

        if self.name == "buckets":
            yield from whole_parameters(self._model)
        elif self.name == "per_parameter":
            for name, parameter in self._model.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.data
        else:
            with deepspeed.zero.GatheredParameters(list(self._model.parameters())):
                for name, parameter in self._model.named_parameters():
                    yield name, parameter.data

    def agrees(self) -> bool:
        """Whether the consumer has the weights. Not timed. Collective."""
        from mmr1_ds.engine.weights.gathering import weights_digest, whole_parameters

        own = weights_digest(whole_parameters(self._model))
        return self._transfer is None or own == post(self._address.url, "digest")["digest"]

    def close(self) -> None:
        if self._transfer is not None:
            post(self._address.url, "forget")
            self._transfer.close()


def post(url: str, route: str) -> dict[str, Any]:
    import urllib.request

    request = urllib.request.Request(f"{url}/{route}", b"{}", {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


class Malloc(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@contextmanager
def live_peak() -> Iterator[list[int]]:
    """Yields a list that holds, after it, the most bytes that were in use more than before."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Malloc

    def live() -> int:
        found = library.mallinfo2()
        return int(found.uordblks + found.hblkhd)

    before, peak, done = live(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], live() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM: the peak since it was set back."""
    return int(STATUS.read_text().split(f"{field}:")[1].split()[0]) * 1024


def run_rank(options: argparse.Namespace) -> None:
    """One of the two ranks; rank 0 writes the rows."""
    calls = count_collectives()
    import torch

    from mmr1_ds.cluster.exits import leave
    from mmr1_ds.cluster.launch import launch_environment
    from mmr1_ds.cluster.ranks import Ranks
    from mmr1_ds.engine.weights import gathering as weights
    from mmr1_ds.engine.zero_engine import start_deepspeed

    torch.set_num_threads(1)
    ranks = Ranks(launch_environment(), timeout_seconds=600)
    start_deepspeed(ranks)
    weights.BUCKET_BYTES = weights.CPU_BUCKET_BYTES = int(options.bucket_mib * 2**20)
    rows: list[dict[str, Any]] = []
    measured: list[tuple[list[Method], dict[str, dict[str, Any]]]] = []
    ports = iter(options.ports)  # a consumer a model and method
    for size in options.sizes:
        model = build_model(size)
        infos = [info for bucket in weights.weight_buckets(model) for info in bucket]
        num_parameters = sum(parameter.ds_numel for parameter in model.parameters())
        num_bytes = sum(parameter.ds_numel * parameter.element_size() for parameter in model.parameters())
        methods: list[Method] = []
        found: dict[str, dict[str, Any]] = {}
        for name in METHODS:  # the warm-up
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            ranks.barrier("before")
            CLEAR.write_text("5")
            before = resident_bytes("VmRSS")
            calls.clear()
            methods.append(Method(name, model, next(ports), ranks.rank == 0))
            with live_peak() as live:
                methods[-1].sync()
            num_collectives = len(calls)
            peak = resident_bytes("VmHWM") - before
            found[name] = {
                "method": name,
                "model": size,
                "num_parameters": num_parameters,
                "bytes": num_bytes,
                "seconds": 0.0,
                "bytes_per_second": 0.0,
                "num_collectives": num_collectives,
                "num_requests": len(methods[-1].parts),
                "peak_extra_bytes_by_rank": ranks.all_gather_objects(peak, "share the peaks"),
                "peak_live_bytes_by_rank": ranks.all_gather_objects(live[0], "share the peaks in use"),
                "bucket_bytes": weights.BUCKET_BYTES,
                "rounds": [],
            }
        assert len(infos) == found["per_parameter"]["num_collectives"], "not every all-gather is counted"
        measured.append((methods, found))
    library = ctypes.CDLL(None)
    for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20)):
        assert library.mallopt(option, value) == 1
    for methods, found in measured:
        for turn in range(options.rounds):
            for method in methods if turn % 2 else reversed(methods):
                ranks.barrier("start")
                began = time.perf_counter()
                method.sync()
                found[method.name]["rounds"].append(time.perf_counter() - began)
        for method in methods:
            assert method.agrees(), f"{found[method.name]['model']}, {method.name}: the consumer has other weights"
            method.close()
        for row in found.values():
            row["seconds"] = statistics.median(row["rounds"])
            row["bytes_per_second"] = row["bytes"] / row["seconds"]
            row["peak_extra_bytes"] = max(row["peak_extra_bytes_by_rank"])
            rows.append(row)
    if ranks.rank == 0:
        Path(options.rows).write_text(json.dumps(rows))
    ranks.barrier("end")
    ranks.close()
    leave(0)


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Start the consumers and the two ranks; the rows."""
    program = [sys.executable, __file__]
    processes: list[subprocess.Popen[Any]] = []
    try:
        consumer = subprocess.Popen(
            [sys.executable, CONSUMER, str(len(METHODS) * len(options.sizes))],
            env=environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        processes.append(consumer)
        assert consumer.stdout is not None
        ports = json.loads(consumer.stdout.readline() or sys.exit("the consumer did not start"))
        shared = ["--rounds", str(options.rounds), "--bucket-mib", str(options.bucket_mib), "--sizes", *options.sizes]
        shared += ["--ports", *map(str, ports), "--rows", str(folder / "rows.json")]
        master = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in ("0", "1"):
            own = environment(master | {"MALLOC_MMAP_THRESHOLD_": "262144", "RANK": rank, "LOCAL_RANK": rank})
            with (folder / f"rank{rank}.log").open("wb") as log:
                command = [*program, "--role", "rank", *shared]
                processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + PATIENCE_SECONDS
        ranks = processes[1:]
        while any(process.poll() is None for process in ranks):
            if any(process.poll() for process in ranks) or time.monotonic() > end:
                break
            time.sleep(0.05)
        if any(process.poll() != 0 for process in ranks):
            logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in (0, 1))
            sys.exit(f"a rank failed:\n{logs}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    return rows


def environment(own: dict[str, str]) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        **own,
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The table. The last two columns are of ours over that method, of the same model."""
    lines = [
        f"two ranks, bfloat16, buckets of {rows[0]['bucket_bytes'] / 2**20:g} MiB\n"
        f"{'model':>6}{'MB':>8}  {'method':14}{'seconds':>9}{'MB/s':>8}{'all-gathers':>13}{'requests':>10}"
        f"{'peak MB, ranks 0 and 1':>25}{'in use':>16}{'ours: time':>12}{'memory':>9}"
    ]
    for row in rows:
        ours = next(r for r in rows if r["method"] == "buckets" and r["model"] == row["model"])
        peaks = " ".join(f"{peak / 1e6:9.1f}" for peak in row["peak_extra_bytes_by_rank"])
        live = " ".join(f"{peak / 1e6:7.1f}" for peak in row["peak_live_bytes_by_rank"])
        time_ratio = statistics.median(a / b for a, b in zip(ours["rounds"], row["rounds"], strict=True))
        memory_ratio = ours["peak_extra_bytes"] / max(1, row["peak_extra_bytes"])
        lines.append(
            f"{row['model']:>6}{row['bytes'] / 1e6:8.1f}  {row['method']:14}{row['seconds']:9.4f}"
            f"{row['bytes_per_second'] / 1e6:8.0f}{row['num_collectives']:13}{row['num_requests']:10}{peaks:>25}"
            f"{live:>16}{time_ratio:12.2f}{memory_ratio:9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help=f"models of {' and '.join(QUICK)} alone")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="models; all without it")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one that warms up")
    parser.add_argument("--bucket-mib", type=float, default=64, help="64 is what a run takes on CPU")
    parser.add_argument("--role", choices=["rank"], help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = options.sizes or list(QUICK if options.quick else SIZES)
    if options.role == "rank":
        run_rank(options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes and the folder go then too
    with tempfile.TemporaryDirectory(prefix="bench_weight_sync_") as folder:
        rows = measure(options, Path(folder))
    sys.stdout.write(report(rows) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
