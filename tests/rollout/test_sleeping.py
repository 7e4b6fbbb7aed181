"""In which order vLLM inside a rank gives memory back and takes it: its own engine core, scheduled as on a GPU."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_vision_model

from mmr1_ds.engine.weights.offloading import states_offloaded
from mmr1_ds.rollout.colocated.sleeping import SleepCycle, zero_what_no_sync_brings

WAKE_WEIGHTS, WAKE_CACHE = "wake_up {'tags': ['weights']}", "wake_up {'tags': ['kv_cache']}"
RELEASE, DISCARD = "discard (('kv_cache',),)", "sleep {'level': 2}"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/programs/sleeping_engine.py wrote: one engine, all tests."""
    folder = tmp_path_factory.mktemp("sleeping")
    run_ranks("sleeping_engine.py", save_vision_model(folder / "model"), folder / "out.json")
    return json.loads((folder / "out.json").read_text())


@pytest.mark.slow
def test_the_cache_is_released_with_a_batch_still_in_flight(found):
    assert (found["scheduler"], found["queue"]) == ("AsyncScheduler", 2)
    assert set(found["left"]) == {1}  # each sampling left a batch ahead in the queue
    assert found["validation"] == found["refresh"] == "" and found["again"] == ["", ""]


@pytest.mark.slow
def test_vllm_refuses_to_release_the_cache_of_a_batch_in_flight(found):
    assert "release_kv_cache_memory() requires a completed pause first" in found["not drained"]


@pytest.mark.slow
def test_each_part_of_the_memory_wakes_when_it_is_needed(found):
    assert found["first step"] == ["load", "sample", DISCARD]  # it had not slept yet
    validated = ["sample", "sample", RELEASE]
    assert found["validation calls"] == ["empty", WAKE_WEIGHTS, "load", "empty", WAKE_CACHE, *validated]
    assert found["refresh calls"] == ["empty", WAKE_CACHE, "sample", "sample", "sample", RELEASE]
    assert found["second step"] == ["empty", WAKE_CACHE, "sample", DISCARD]
    assert found["again calls"] == [RELEASE]
    assert found["never asleep"] == ["sample", "sample"]
    assert found["left awake"] == [0, 0]  # before a sync


@pytest.mark.slow
def test_a_start_logs_its_phases(found):
    begun, ended = found["lines"][::2], found["lines"][1::2]
    assert [line.split()[1] for line in begun] == ["building", "measuring", "warming"]
    assert all(re.fullmatch(re.escape(first) + r" took \d+ s", last) for first, last in zip(begun, ended, strict=True))


@pytest.mark.slow
def test_a_sleep_changes_no_token(found):
    assert all(tokens == found["tokens"][0] for tokens in found["tokens"])
    assert {len(tokens) for tokens in found["tokens"]} == {6}


@pytest.mark.slow
def test_nothing_is_sampled_from_discarded_or_half_loaded_weights(found):
    refused = "RuntimeError: vLLM was asked to sample before a sync brought the weights that it lacks"
    assert found["discarded"] == refused
    assert found["half loaded"][0].endswith("lost") and found["half loaded"][1] == refused
    assert found["refused"] == []
    assert found["third step"] == ["empty", WAKE_WEIGHTS, "load", "empty", WAKE_CACHE, "sample"]


@pytest.mark.slow
def test_sampling_that_is_abandoned_is_not_carried_on_to_its_end(found):
    num_steps, has_requests = found["abandoned"]
    assert num_steps == 3 and has_requests
    assert found["abandoned calls"] == ["empty", DISCARD]  # vLLM had kept its cache, which it refused to release


def test_weights_that_no_sync_brings_wait_in_host_memory():
    calls = []
    core = SimpleNamespace(batch_queue=[], scheduler=SimpleNamespace(has_requests=lambda: False))
    llm = SimpleNamespace(
        sleep=lambda level: calls.append(level),
        wake_up=lambda tags: calls.append(*tags),
        llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core)),
    )
    cycle = SleepCycle(llm, enabled=True, keeps_base=True)
    cycle.sleep(keep_weights=False)
    with pytest.raises(RuntimeError, match="before a sync"):  # they are whole, the adapters are those of before
        cycle.begin_sampling()
    cycle.begin_sync()
    cycle.end_sync()
    cycle.begin_sampling()
    assert calls == [1, "weights", "kv_cache"]


@pytest.mark.slow
def test_rows_that_stand_for_no_token_find_numbers_after_a_sleep(monkeypatch):
    """vLLM's own positions in three axes, of which a batch that is padded reads more than it writes."""
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.mm.rope import RopeState

    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    rope = RopeState(3, 4, 32, 64, torch.device("cpu"))
    rope.positions.fill_(-(2**62))
    embeds = torch.full((5, 3), torch.nan)
    state = SimpleNamespace(rope_state=rope, encoder_runner=SimpleNamespace(inputs_embeds=embeds))
    worker = SimpleNamespace(model_runner=SimpleNamespace(model_state=state), get_model=lambda: None)
    zero_what_no_sync_brings(worker)
    rope.positions[:, :3] = 5
    assert torch.zeros(64, 7)[rope.get_positions(4)].shape == (3, 4, 7) and not embeds.any()


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_for_a_sync_the_weights_stay_and_the_rest_goes(on_gpu, with_weights):
    asked = []
    deepspeed_engine = SimpleNamespace(
        optimizer=SimpleNamespace(module=SimpleNamespace(parameters=lambda: iter(()))),
        offload_states=lambda include, pin_memory: asked.append({state.value for state in include}),
        reload_states=lambda: asked.append("reload"),
        device="cpu",
    )
    with states_offloaded(deepspeed_engine, on_gpu, with_weights):
        pass
    expected = {"lp_grads", "contiguous_grad_buffer"}
    expected |= {"lp_params"} if with_weights else set()
    expected |= {"optim_states", "hp_params"} if on_gpu else set()
    assert asked == [expected, "reload"]
