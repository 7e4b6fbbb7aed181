"""Send the actor's weights to workers of vLLM by its own nccl and ipc engines; compare what arrives, byte for byte.

Usage: device_transfer.py MODEL OUT.json

On every rank runs one of the tensor-parallel workers of a single server, behind a stand-in for its HTTP routes.
What a GPU would do is done by fixtures/stand_in_devices.py.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from fixtures.control_server import KEY, ControlServer
from fixtures.stand_in_devices import NcclOverGloo, put_in_place
from settings import deepspeed_configs, end, make_actor, small_config, start_ranks

from mmr1_ds import io
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.weights import gathering
from mmr1_ds.rollout.colocated.engine import _unlink_shared_memory
from mmr1_ds.rollout.options import engine_environment, engine_options, image_bounds
from mmr1_ds.rollout.servers.weights import transfer
from mmr1_ds.rollout.tied_head import head_is_tied

gathering.BUCKET_BYTES = 40_000  # several buckets, layers cut, and parameters larger than one
transfer._CHUNK_BYTES = 30_000  # chunks that end inside of buckets

model, out = sys.argv[1:]
ranks = start_ranks(300)
config = small_config(model, 2, 2, micro_batch=2)
rollout = config.worker.rollout
rollout.tensor_parallel_size, rollout.dtype = ranks.size, "bf16"
encoder = PromptEncoder(config.worker.actor.model, config.data)
deepspeed = deepspeed_configs(config, ranks.size)[0] | {"bf16": {"enabled": True}}
actor = make_actor(config, deepspeed, ranks, encoder)

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ |= {name: value for part in engine_environment(rollout, on_gpu=False) for name, value in part.items()}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
from vllm.config import WeightTransferConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed.weight_transfer import WeightTransferEngineFactory  # noqa: E402
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # noqa: E402
from vllm.v1.worker.cpu_worker import CPUWorker  # noqa: E402

# As on a GPU; the CPU build packs a copy of the output layer, which our own transfer renews.
UnquantizedEmbeddingMethod.process_weights_after_loading = lambda self, layer: None
options = engine_options(rollout, config.worker.actor.model, config.data, on_gpu=False, images=image_bounds(encoder, 1))
vllm_config = EngineArgs(distributed_executor_backend="external_launcher", **options).create_engine_config()
_unlink_shared_memory(ranks, ranks.size)  # vLLM's, of an earlier run
with set_current_vllm_config(vllm_config):
    worker = CPUWorker(vllm_config, ranks.rank, ranks.rank, "env://", is_driver_worker=True)
    worker.init_device()
    worker.load_model()
_unlink_shared_memory(ranks, ranks.size)
put_in_place()
theirs = worker.model_runner.get_model()
arrived: list[tuple[str, torch.Tensor]] = []
load_weights = theirs.load_weights


def load_and_note(weights):
    weights = list(weights)
    arrived.extend((name, tensor.clone()) for name, tensor in weights)
    return load_weights(weights)


theirs.load_weights = load_and_note


def work(route: str, body: dict, count: int) -> tuple[int, dict]:
    """What vLLM's server asks of its worker on this rank."""
    try:
        getattr(worker, route)(**{name: body[name] for name in ("init_info", "update_info") if name in body})
    except Exception as error:
        return 500, {"error": {"message": repr(error)}}
    return 200, {}


own = ControlServer(0)
own.hook = work
workers = ranks.all_gather_objects(own.address.url, "share")
server = ControlServer(0, len(workers))


def ask_workers(route: str, body: dict, count: int) -> tuple[int, dict]:
    """As vLLM's server: all workers at once."""

    def ask(url: str) -> tuple[int, dict]:
        found = io.ask("POST", f"{url}/{route}", KEY, body, timeout_seconds=100)
        return found.status, json.loads(found.content)

    with ThreadPoolExecutor(len(workers)) as pool:
        return max(pool.map(ask, workers), key=lambda answer: answer[0])


server.hook = ask_workers
addresses = [replace(server.address, num_workers=len(workers))]


def change(number: int) -> None:
    """Other weights in every shard."""
    generator = torch.Generator().manual_seed(1000 * number + ranks.rank)
    for parameter in actor.model.parameters():
        shard = parameter.ds_tensor.data
        shard.add_(torch.randn(shard.shape, generator=generator).to(shard.dtype), alpha=0.02)


def parameters() -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in theirs.named_parameters(remove_duplicate=False)}


def addresses_of(module: torch.nn.Module) -> dict[str, int]:
    """Where the parameters lie, which CUDA graphs remember."""
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters(remove_duplicate=False)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    def is_same(name: str) -> bool:
        one, other = first[name], second[name]
        return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    return first.keys() == second.keys() and all(is_same(name) for name in first)


rows = []
trainer_init = WeightTransferTrainerFactory.trainer_init
for backend, packed in [("nccl", True), ("nccl", False), ("ipc", True), ("ipc", False)]:
    worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=backend), vllm_config, worker.device, theirs
    )
    # Ours are packed; what the receiving side does with others is vLLM's own affair, but one of its two ways.
    WeightTransferTrainerFactory.trainer_init = lambda info, _packed=packed, **kwargs: trainer_init(
        replace(info, packed=_packed), **kwargs
    )
    sender = transfer.WeightTransfer(actor, backend=backend, rank=ranks.rank, key=KEY)
    for _ in range(2):  # the second in the same group
        change(len(rows))
        before, places, num_broadcasts = parameters(), addresses_of(theirs), NcclOverGloo.num_broadcasts
        num_updates = len(own.bodies("update_weights"))
        arrived.clear()
        ranks.barrier("send")
        failed = sender.send(addresses, len(rows))
        ranks.barrier("sent")
        received, num_broadcasts = list(arrived), NcclOverGloo.num_broadcasts - num_broadcasts
        whole = {name: tensor.clone() for name, tensor in actor.weights()}
        after = parameters()
        worker.reload_weights(weights_iterator=iter(whole.items()))
        rows.append(
            {
                "backend": backend,
                "packed": packed,
                "failed": failed,
                "arrived": same(dict(received), whole) and len(received) == len(whole),
                "loaded": same(after, parameters()),
                # Where the CPU has its own form of a weight, vLLM's build leaves the parameter empty.
                "held": sum(tensor.numel() > 0 for tensor in before.values()) / len(before),
                "changed": all(not torch.equal(before[name], after[name]) for name in before if before[name].numel()),
                "addresses": addresses_of(theirs) == places,
                "broadcasts": num_broadcasts,
                "updates": len(own.bodies("update_weights")) - num_updates,
                "types": sorted({str(tensor.dtype) for tensor in whole.values()}),
            }
        )
    sender.close()
report = {"rows": rows, "tied": head_is_tied(theirs), "size": vllm_config.parallel_config.world_size}
report |= {"weights": len(whole), "buckets": len(actor.weight_buckets())}
Path(f"{out}.{ranks.rank}").write_text(json.dumps(report))
ranks.barrier("end")
server.close()
own.close()
end(ranks)
