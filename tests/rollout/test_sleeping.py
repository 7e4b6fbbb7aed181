"""In which order vLLM inside a rank gives memory back and takes it, against a recorder in its place."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.engine.weights.offloading import states_offloaded
from mmr1_ds.records import Prompt, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.colocated.engine import VllmRollout
from mmr1_ds.rollout.colocated.sleeping import SleepCycle

REQUEST = RolloutRequest(Prompt(0, "0", (5, 6), (), "1"), 2, 7)
SETTINGS = SamplingSettings(1.0, 1.0, -1, 3)


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    """Its import alone takes seconds."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)


class RecordedLLM:
    """vLLM's calls, in order; a sync that is told to fails in the middle."""

    def __init__(self):
        self.calls, self.fails = [], False
        self.llm_engine = SimpleNamespace(
            reset_mm_cache=lambda: self.calls.append("forget processed images"),
            reset_encoder_cache=lambda: self.calls.append("forget encoded images"),
            step=lambda: self.calls.append("step"),
        )

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def release_kv_cache_memory(self):
        self.calls.append("release kv_cache")

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self):
        self.calls.append("forget prefixes")

    def collective_rpc(self, function, args):
        list(args[0])
        if self.fails:
            raise OSError("lost")
        self.calls.append("load")

    def generate(self, inputs, parameters, use_tqdm):
        self.calls.append("sample")
        return [SimpleNamespace(outputs=[]) for _ in inputs]


class RecordedActor:
    def __init__(self, calls):
        self._calls, self.num_updates_done = calls, 0

    def weights(self):
        self._calls.append("gather")
        yield "weight", None

    @contextmanager
    def offloaded(self, with_weights=True):
        self._calls.append("offload all" if with_weights else "offload optimizer")
        yield
        self._calls.append("reload")

    def update(self):
        self._calls.append("update")
        self.num_updates_done += 1


def engine(enabled=True):
    """A rollout engine around a recorder, as if vLLM had started."""
    rollout = object.__new__(VllmRollout)
    llm = RecordedLLM()
    rollout._llm, rollout._cycle = llm, SleepCycle(llm, enabled)
    rollout._tensor_parallel_size, rollout._version, rollout._head_is_tied = 1, 0, False
    rollout._forbidden, rollout._encoder = {}, SimpleNamespace(eos_token_ids=(2,))
    rollout._preemption, rollout._ranks = Preemption(60.0, None), SimpleNamespace(any=lambda flag, stage: flag)
    return rollout, llm, RecordedActor(llm.calls)


SYNC = ["gather", "load", "forget prefixes", "forget processed images", "forget encoded images"]
SAMPLE = ["forget prefixes", "sample"]


def test_two_steps_with_a_validation_between(monkeypatch):
    rollout, llm, actor = engine()
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: llm.calls.append("empty"))

    def sampling(keep_weights, times=1):
        with actor.offloaded():
            for _ in range(times):
                rollout.generate([REQUEST], SETTINGS)
            rollout.sleep(keep_weights)

    def sync():
        with actor.offloaded(with_weights=False):
            rollout.sync_weights(actor)

    sync()
    sampling(keep_weights=False)
    actor.update()
    sync()
    sampling(keep_weights=True, times=2)  # a validation in two chunks
    sampling(keep_weights=False)
    actor.update()
    sync()
    rollout.generate([REQUEST], SETTINGS)

    woken_sync = ["offload optimizer", "empty", "wake weights", *SYNC, "reload"]
    assert llm.calls == [
        *("offload optimizer", *SYNC, "reload"),  # it has not slept yet
        *("offload all", *SAMPLE, "sleep 2", "reload", "update"),
        *woken_sync,
        *("offload all", "empty", "wake kv_cache", *SAMPLE, *SAMPLE, "step", "sleep 0", "release kv_cache", "reload"),
        *("offload all", "empty", "wake kv_cache", *SAMPLE, "sleep 2", "reload", "update"),
        *woken_sync,
        *("empty", "wake kv_cache", *SAMPLE),
    ]


def test_nothing_is_sampled_from_discarded_or_half_loaded_weights():
    rollout, llm, actor = engine()
    rollout.sleep(keep_weights=False)
    with pytest.raises(RuntimeError, match="before a sync brought the weights"):
        rollout.generate([REQUEST], SETTINGS)
    llm.fails = True
    with pytest.raises(OSError, match="lost"):
        rollout.sync_weights(actor)
    with pytest.raises(RuntimeError, match="before a sync brought the weights"):
        rollout.generate([REQUEST], SETTINGS)
    assert "sample" not in llm.calls and "wake kv_cache" not in llm.calls
    llm.fails = False
    rollout.sync_weights(actor)
    rollout.generate([REQUEST], SETTINGS)
    assert llm.calls.count("wake weights") == 1 and llm.calls[-3:] == ["wake kv_cache", *SAMPLE]


def test_an_engine_that_cannot_sleep_is_left_alone():
    rollout, llm, actor = engine(enabled=False)
    rollout.sync_weights(actor)
    for keep_weights in (True, False):
        rollout.sleep(keep_weights)
        rollout.generate([REQUEST], SETTINGS)
    assert llm.calls == [*SYNC, *SAMPLE, *SAMPLE]


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
