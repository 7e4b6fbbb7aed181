"""Weights from the actor to the servers: what is in a bucket, the shared memory, faults, and vLLM's own engines."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from fixtures.control_server import KEY, control_servers
from fixtures.launching import environment, run_ranks
from fixtures.tiny_models import save_text_model, save_vision_model
from safetensors.torch import load_file

from mmr1_ds.engine.weights.gathering import fill_buckets, layer_groups
from mmr1_ds.rollout.servers.weights.adapters import AdapterTransfer
from mmr1_ds.rollout.servers.weights.control import ServerControl
from mmr1_ds.rollout.servers.weights.shared_memory import BufferAddress, MappedBuffer, SharedBuffer, offsets_of
from mmr1_ds.rollout.servers.weights.shared_memory_transfer import SharedMemoryTransfer
from mmr1_ds.rollout.servers.weights.transfer import WeightTransfer


class Actor:
    """Weights of odd shapes and types in three buckets; they change with `step`."""

    def __init__(self):
        self.step, self.num_given = 0, 0

    def weight_buckets(self):
        return [
            [("embed", torch.bfloat16, (7, 5)), ("norm", torch.float32, (401,))],
            [("layers.0.q", torch.float32, (3, 1, 5)), ("layers.0.scale", torch.float32, ())],
            [("head", torch.bfloat16, (1, 1))],
        ]

    def whole(self):
        generator = torch.Generator().manual_seed(self.step)
        infos = [info for bucket in self.weight_buckets() for info in bucket]
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, dtype, shape in infos}

    def adapter_weights(self):
        generator = torch.Generator().manual_seed(self.step)
        for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
            yield f"{layer}.lora_A.weight", torch.randn(3, 5, generator=generator)
            yield f"{layer}.lora_B.weight", torch.randn(7, 3, generator=generator).to(torch.bfloat16)

    def weights(self):
        for name, tensor in self.whole().items():
            self.num_given += 1
            yield name, tensor


def has_weights(server, actor, version):
    wanted = actor.whole()
    same = server.weights.keys() == wanted.keys() and all(torch.equal(server.weights[n], wanted[n]) for n in wanted)
    return same and server.version == version


def test_the_parameters_of_a_layer_are_one_group():
    names = ["model.embed", "model.visual.blocks.0.a", "model.visual.blocks.0.b", "model.visual.blocks.1.a.2.x"]
    names += ["model.visual.merger.mlp.0.w", "model.visual.merger.mlp.0.b", "model.layers.9.a", "model.layers.10.a"]
    names += ["model.layers.10.b", "model.norm", "head", "0.w", "0.b", "10.w"]
    assert layer_groups(names) == [[0], [1, 2], [3], [4, 5], [6], [7, 8], [9], [10], [11, 12], [13]]


def test_buckets_hold_whole_layers_as_far_as_they_fit():
    groups = [[("a", 3)], [("b", 2), ("c", 2)], [("d", 3)], [("e", 5), ("f", 5), ("g", 1)], [("h", 12)], [("i", 7)]]
    # b and c would not fit beside a, d does beside them; e, f and g are too much for one bucket; h for any.
    assert fill_buckets(groups, 7) == [["a", "b", "c"], ["d"], ["e"], ["f", "g"], ["h"], ["i"]]
    assert fill_buckets(groups, 6) == [["a"], ["b", "c"], ["d"], ["e"], ["f", "g"], ["h"], ["i"]]
    assert fill_buckets(groups, 10) == [["a", "b", "c", "d"], ["e", "f"], ["g"], ["h"], ["i"]]
    assert fill_buckets(groups, 100) == [list("abcdefghi")]
    assert fill_buckets([], 7) == []


WRITER = """
import json, sys
from dataclasses import asdict
import torch
from mmr1_ds.rollout.servers.weights.shared_memory import SharedBuffer, offsets_of
entries = [("a", torch.float32, (3, 7))]
offsets, size = offsets_of(entries)
buffer = SharedBuffer(size)
buffer.write(offsets[0], torch.full((3, 7), 2.0))
print(json.dumps(asdict(buffer.address)), flush=True)
sys.stdin.read()
"""


def test_a_killed_trainer_leaves_nothing_and_its_readers_keep_what_they_mapped():
    command, pipe = [sys.executable, "-c", WRITER], subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as writer:
        address = BufferAddress(**json.loads(writer.stdout.readline()))
        mapped = MappedBuffer(address)
        assert os.stat(address.path).st_mode & 0o077 == 0
        assert address.path.startswith(f"/proc/{writer.pid}/fd/")  # no name that could be left behind
        writer.kill()
    assert not Path(address.path).exists()
    ((_, tensor),) = mapped.read([("a", torch.float32, (3, 7))])
    assert torch.equal(tensor, torch.full((3, 7), 2.0))


def test_every_type_and_shape_survives_the_memory():
    entries = [("a", torch.bfloat16, (401, 1)), ("b", torch.float32, ())]
    entries += [("c", torch.int8, (7,)), ("d", torch.float64, (0, 3))]
    offsets, size = offsets_of(entries)
    assert all(offset % 64 == 0 for offset in offsets) and offsets[1] - offsets[0] >= 802
    buffer = SharedBuffer(size)
    mapped, rounds = MappedBuffer(buffer.address), []
    for scale in (1, 2):
        wanted = [(scale * torch.arange(2 * 401)[::2].reshape(401, 1)).to(torch.bfloat16), torch.tensor(scale / 3)]
        wanted += [torch.full((7,), -scale, dtype=torch.int8), torch.empty(0, 3, dtype=torch.float64)]
        for offset, tensor in zip(offsets, wanted, strict=True):
            buffer.write(offset, tensor)
        rounds.append((list(mapped.read(entries)), wanted))
    buffer.close()
    for found, wanted in rounds:  # what was read is not what was written afterwards
        assert [name for name, _ in found] == list("abcd")
        assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), b in zip(found, wanted, strict=True))


def test_memory_that_is_not_the_trainers_is_refused(tmp_path):
    buffer = SharedBuffer(4096)
    for wrong in (
        replace(buffer.address, token="00" * 16),
        replace(buffer.address, num_bytes=4097),
        replace(buffer.address, path="/proc/self/fd/0"),
    ):
        with pytest.raises(RuntimeError, match=r"not the trainer's weights|cannot be opened"):
            MappedBuffer(wrong)
    path = buffer.address.path
    buffer.close()
    with pytest.raises(RuntimeError, match=r"cannot be opened.*trainer's machine"):
        MappedBuffer(BufferAddress(path, 4096, "00"))


def test_servers_are_asked_together_with_the_key_and_one_that_fails_is_left_out():
    with control_servers(1, 1, 1, 1) as servers:
        servers[1].hook = lambda route, body, count: (500, {"error": {"message": "out of\nmemory"}})
        servers[2].hook = lambda route, body, count: (302, {"location": f"{servers[0].address.url}/stolen"})
        gone = replace(servers[3].address, url="http://127.0.0.1:1")
        control = ServerControl([server.address for server in servers[:3]] + [gone], KEY)
        control.start_weight_update()
        control.update_weights({"a": 1})
        assert control.failed[1] == "start_weight_update: HTTP 500 out of memory"
        assert control.failed[2].startswith("start_weight_update: HTTP 302")
        assert "refused" in control.failed[3]
        assert [address.number for address in control.live] == [0]
        assert servers[0].calls == [("start_weight_update", {}), ("update_weights", {"update_info": {"a": 1}})]
        assert servers[1].routes() == servers[2].routes() == ["start_weight_update"]
        assert set(servers[0].keys) == {f"Bearer {KEY}"}
        assert KEY not in str(control.failed)


def test_a_server_that_hangs_is_given_up_at_the_deadline(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which must never see the key
    release = threading.Event()
    with control_servers(1, 1) as servers:
        servers[0].hook = lambda route, body, count: (200, {}) if release.wait(60) else None
        control = ServerControl([server.address for server in servers], KEY, timeout_seconds=0.3)
        control.start_weight_update()
        assert "start_weight_update" in control.failed[0] and [a.number for a in control.live] == [1]
        release.set()


def test_caches_are_emptied_and_one_that_is_still_held_is_asked_again():
    with control_servers(1) as servers:
        servers[0].hook = lambda route, body, count: (200, {"success": count > 2}) if "prefix" in route else None
        control = ServerControl([servers[0].address], KEY)
        assert control.pause(keep=True) == {} and control.pause(keep=False) == {}
        assert control.forget_and_resume() == {}
        prefix = "reset_prefix_cache?reset_running_requests=true"
        routes = ["pause?mode=keep", "pause?mode=wait", prefix, prefix, prefix]
        assert servers[0].routes() == [*routes, "reset_mm_cache", "reset_encoder_cache", "resume"]


def test_every_server_gets_the_weights_and_a_new_one_maps_the_memory_first():
    actor = Actor()
    transfer = WeightTransfer(actor, backend="shared_memory", rank=0, key=KEY)
    with control_servers(1, 2) as servers:
        addresses = [server.address for server in servers]
        for actor.step in (1, 2):
            assert transfer.send(addresses, actor.step) == {}
            assert all(has_weights(server, actor, str(actor.step)) for server in servers)
        addresses[1] = replace(addresses[1], generation=2)
        actor.step = 3
        assert transfer.send(addresses, 3) == {}
        assert all(has_weights(server, actor, "3") for server in servers)
        assert [server.routes().count("init_weight_transfer_engine") for server in servers] == [1, 2]
        assert [server.routes().count("update_weights") for server in servers] == [9, 9]
        assert servers[0].routes()[-5:] == ["start_weight_update", *["update_weights"] * 3, "finish_weight_update"]
    transfer.close()


def test_a_server_that_fails_in_the_middle_keeps_its_version_and_the_others_go_on():
    actor = Actor()
    transfer = WeightTransfer(actor, backend="shared_memory", rank=0, key=KEY)
    with control_servers(1, 1) as servers:
        servers[0].hook = lambda route, body, count: (500, {}) if (route, count) == ("update_weights", 2) else None
        addresses = [server.address for server in servers]
        failed = transfer.send(addresses, 5)
        assert failed.keys() == {0} and failed[0].startswith("update_weights: HTTP 500")
        assert has_weights(servers[1], actor, "5") and servers[0].version is None
        assert "finish_weight_update" not in servers[0].routes()
        for server in servers:
            server.hook = lambda route, body, count: (500, {})
        actor.num_given = 0
        assert transfer.send(addresses, 6).keys() == {0, 1}
        assert actor.num_given == 5  # the other ranks gather all of them
    transfer.close()


def test_the_next_bucket_is_gathered_while_this_one_is_loaded_but_not_yet_written():
    actor = Actor()
    gathered = threading.Event()

    def weights():
        for name, tensor in actor.whole().items():
            if name == "layers.0.q":
                gathered.set()
            yield name, tensor

    with control_servers(1) as servers:
        # The first bucket is read only when the second has been gathered: it must still be there.
        def hook(route, body, count):
            if (route, count) == ("update_weights", 1) and not gathered.wait(60):
                return 500, {}
            return None

        servers[0].hook = hook
        transfer = SharedMemoryTransfer(actor.weight_buckets())
        control = ServerControl([servers[0].address], KEY)
        transfer.send(weights(), control, "1")
        assert control.failed == {} and has_weights(servers[0], actor, "1")
        transfer.close()


def test_adapters_are_written_for_the_servers_and_every_version_has_a_name(tmp_path):
    actor, read = Actor(), []
    transfer = AdapterTransfer(actor, rank=0, key=KEY, folder=tmp_path, run="ab", lora_rank=3)
    with control_servers(1, 1) as servers:
        addresses = [server.address for server in servers]

        def load(route, body, count):
            if route == "v1/load_lora_adapter":
                folder = Path(body["lora_path"])
                settings = json.loads((folder / "adapter_config.json").read_text())
                read.append((body["lora_name"], settings, load_file(folder / "adapter_model.safetensors")))

        servers[0].hook = load
        servers[1].hook = lambda route, body, count: (500, {}) if count == 2 else None
        for actor.step in (1, 2):
            failed = transfer.send(addresses, actor.step)
        assert failed.keys() == {1} and failed[1].startswith("v1/load_lora_adapter: HTTP 500")
        assert servers[0].bodies("update_weight_version") == [{"new_version": "1"}, {"new_version": "2"}]
        assert servers[1].bodies("update_weight_version") == [{"new_version": "1"}]
        assert [name for name, *_ in read] == [transfer.name(1), transfer.name(2)] == ["policy-ab-1", "policy-ab-2"]
        for (_, settings, found), step in zip(read, (1, 2), strict=True):
            assert (settings["r"], settings["lora_alpha"]) == (3, 3)  # the scale is in B already
            assert settings["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
            actor.step = step
            expected = {f"base_model.model.{name}": tensor for name, tensor in actor.adapter_weights()}
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert transfer.num_bytes == 2 * (3 * 5 * 4 + 7 * 3 * 2)
        assert [path.name for path in tmp_path.iterdir()] == ["policy-ab-2"]
        # A server that has it by an attempt that failed afterwards is asked for no more.
        taken = {"error": {"message": "The lora adapter 'policy-ab-2' has already been loaded."}}
        servers[1].hook = lambda route, body, count: (400, taken) if route.endswith("adapter") else None
        assert transfer.send(addresses[1:], 2) == {}
    transfer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [1, 3])
def test_the_other_ranks_only_gather(rank):
    actor = Actor()
    transfer = WeightTransfer(actor, backend="shared_memory", rank=rank, key=KEY)
    with control_servers(1) as servers:
        assert transfer.send([servers[0].address], 1) == {}
        assert actor.num_given == 5 and servers[0].calls == []
    transfer.close()


def test_vllm_finds_our_engine():
    (found,) = entry_points(group="vllm.general_plugins").select(name="mmr1_ds_weights")
    assert found.value == "mmr1_ds.rollout.servers.weights.shared_memory_transfer:register"
    found.load()


OTHERS = {
    "qwen3_5": save_vision_model,
    "qwen3_5_text": save_text_model,
    "qwen3_5_moe": save_vision_model,
    "qwen3_moe": save_text_model,
    "qwen3_vl_moe": save_vision_model,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "num_ranks"),
    [("vision", 2), *(pytest.param(kind, 1, marks=pytest.mark.nightly) for kind in ("text", *OTHERS))],
)
def test_a_real_server_samples_from_the_actor_after_every_change(tmp_path, kind, num_ranks):
    """The text model has a tied head, and adapters, which are merged.

    Qwen3.5's linear attention is computed in float32 in the server too (fixtures/delta_net.py).
    """
    model = tmp_path / "model"
    if kind == "text":
        save_text_model(model, tied=True)
    elif kind in OTHERS:
        OTHERS[kind](model, family=kind)
    else:
        save_vision_model(model)
    rank = ["4"] if kind == "text" else []
    run_ranks("server_weights.py", model, tmp_path / "out.json", 3, *rank, num_ranks=num_ranks)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["versions"] for row in report["rows"]] == [["default"], ["1"], ["2"], ["3"]]
    assert all(row["difference"] < 1e-4 and row["failed"] == {} for row in report["rows"])
    has_images = OTHERS.get(kind, save_text_model if kind == "text" else save_vision_model) is save_vision_model
    assert all((row["images"] > 0) == has_images for row in report["rows"])
    firsts = torch.tensor([row["first"] for row in report["rows"]])
    assert float((firsts[1:] - firsts[:-1]).abs().amax(dim=1).min()) > 0.01  # each change is one
    assert report["num_buckets"] > 10 and report["shared_memory"] == []


@pytest.fixture
def nccl(monkeypatch):
    """vLLM's trainer engine with a stand-in for its NCCL group; what was broadcast, by name."""
    from vllm.distributed.weight_transfer import nccl_engine

    class Group:
        num_destroyed = 0

        def destroy(self):
            Group.num_destroyed += 1

    sent = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: Group())
    monkeypatch.setattr(
        nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **options: sent.extend(dict(iterator).items())
    )
    return sent, Group


@pytest.mark.slow  # imports vLLM
def test_nccl_counts_the_workers_of_all_servers_into_one_group(nccl):
    actor, (sent, group) = Actor(), nccl
    with control_servers(2, 1, 3) as servers:
        addresses = [server.address for server in servers]
        transfer = WeightTransfer(actor, backend="nccl", rank=0, key=KEY)
        assert transfer.send(addresses, 7) == {}
        infos = [server.bodies("init_weight_transfer_engine")[0]["init_info"] for server in servers]
        assert [info["rank_offset"] for info in infos] == [1, 3, 4]
        assert {info["world_size"] for info in infos} == {7} and len({info["master_port"] for info in infos}) == 1
        assert {info["master_address"] for info in infos} == {"127.0.0.1"}
        update = servers[2].bodies("update_weights")[0]["update_info"]
        assert update["names"] == [name for name, _ in sent] == list(actor.whole())
        assert update["dtype_names"][0] == "bfloat16" and update["shapes"][:2] == [[7, 5], [401]]
        assert all(server.version == "7" for server in servers)
        assert transfer.send(addresses, 8) == {}  # in the same group
        assert all(server.routes().count("init_weight_transfer_engine") == 1 for server in servers)
        addresses[1] = replace(addresses[1], generation=2)
        servers[0].hook = lambda route, body, count: (500, {}) if "shutdown" in route else None
        assert transfer.send(addresses, 9).keys() == {0}  # out before the group is made anew
        assert group.num_destroyed == 1
        infos = [server.bodies("init_weight_transfer_engine")[-1]["init_info"] for server in servers[1:]]
        assert [info["rank_offset"] for info in infos] == [1, 2] and infos[0]["world_size"] == 5
        assert servers[1].version == servers[2].version == "9"
        for server in servers:
            server.hook = lambda route, body, count: (500, {})
        assert transfer.send([replace(address, generation=5) for address in addresses], 10).keys() == {0, 1, 2}


@pytest.mark.slow
def test_an_nccl_group_that_loses_a_server_is_aborted_and_made_anew(nccl):
    actor, (_, group) = Actor(), nccl
    with control_servers(1, 1) as servers:
        addresses = [server.address for server in servers]
        transfer = WeightTransfer(actor, backend="nccl", rank=0, key=KEY)
        servers[1].hook = lambda route, body, count: (500, {}) if (route, count) == ("update_weights", 1) else None
        failed = transfer.send(addresses, 1)
        assert failed[1].startswith("update_weights: HTTP 500") and "NCCL group failed" in failed[0]
        assert group.num_destroyed >= 1 and actor.num_given == 5
        servers[0].hook = lambda route, body, count: (500, {}) if (route, count) == ("start_weight_update", 3) else None
        assert transfer.send(addresses, 2) == {}
        actor.num_given = 0
        assert transfer.send(addresses, 3).keys() == {0, 1}
        assert actor.num_given == 5  # nothing was broadcast, but the other ranks have gathered


@pytest.mark.slow
def test_the_other_ranks_of_nccl_only_gather(nccl):
    actor, (sent, _) = Actor(), nccl
    with control_servers(1) as servers:
        transfer = WeightTransfer(actor, backend="nccl", rank=2, key=KEY)
        assert transfer.send([servers[0].address], 1) == {}
        assert actor.num_given == 5 and servers[0].calls == [] and sent == []


@pytest.mark.slow
def test_ipc_sends_pickled_handles_and_leaves_out_a_server_that_fails(monkeypatch):
    import base64
    import pickle
    from types import SimpleNamespace

    from vllm.distributed.weight_transfer import ipc_engine
    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

    def producer(iterator, gpu_uuid, post_iter_func, buffer_size_bytes):
        assert buffer_size_bytes == 2**28
        for name, tensor in iterator:
            yield PackedIpcChunk([name], [list(tensor.shape)], [str(tensor.dtype)], [1], {gpu_uuid: (b"handle", name)})

    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", producer)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    actor = Actor()
    with control_servers(1, 1) as servers:
        servers[0].hook = lambda route, body, count: (500, {}) if (route, count) == ("update_weights", 2) else None
        transfer = WeightTransfer(actor, backend="ipc", rank=0, key=KEY)
        assert transfer.send([server.address for server in servers], 4).keys() == {0}
        assert servers[1].version == "4" and servers[0].version is None
        assert servers[1].bodies("init_weight_transfer_engine") == [{"init_info": {"packed": True}}]
        handles = [body["update_info"]["ipc_handles_pickled"] for body in servers[1].bodies("update_weights")]
        found = [pickle.loads(base64.b64decode(handle)) for handle in handles]
        assert found == [{"GPU-1": (b"handle", name)} for name in actor.whole()]
