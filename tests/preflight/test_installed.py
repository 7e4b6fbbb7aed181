"""Packages that a run's keys need, named by the dry run and before training loads anything."""

from __future__ import annotations

import importlib.util

import pytest
from fixtures.configs import load
from fixtures.dry_runs import valid_run

from mmr1_ds import train
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.installed import check_installed

VLLM, GPU = r"pip install 'mmr1_ds\[vllm\]'", r"pip install 'mmr1_ds\[gpu\]'"


@pytest.fixture
def without(monkeypatch):
    """Have packages count as not installed."""
    find_spec = importlib.util.find_spec

    def hide(*packages):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in packages else find_spec(name, *rest)
        )

    return hide


@pytest.mark.parametrize(
    ("package", "argument", "message"),
    [
        ("peft", "worker.actor.model.lora.rank=8", rf"model.lora.rank=8 but peft is not installed; {GPU} or set it to"),
        ("vllm", "worker.rollout.engine=vllm", rf"rollout.engine=vllm but vllm is not installed; {VLLM} or set engine"),
        ("vllm", "worker.rollout.engine=server", rf"rollout.engine=server but vllm is not installed; {VLLM}"),
        ("vllm", "worker.actor.model.fp32_lm_head=true", rf"fp32_lm_head=true but vllm is not installed; {VLLM}"),
        ("vllm", "worker.rollout.shared_queue=true", rf"shared_queue=true but vllm is not installed; {VLLM}"),
        ("vllm", "worker.rollout.lora_sync=adapters", rf"lora_sync=adapters but vllm is not installed; {VLLM}"),
        ("vllm", "worker.actor.offload_states=true", rf"offload_states=true but vllm is not installed; {VLLM}"),
        ("vllm", "worker.actor.ulysses_size=2", rf"ulysses_size=2 but vllm is not installed; {VLLM} or set it to 1"),
        ("vllm", "worker.actor.router_replay.mode=R3", rf"mode=R3 but vllm is not installed; {VLLM} or set it to R2"),
        ("math_verify", "worker.reward.reward_function=math", rf"the reward math needs math_verify, .*: {GPU}"),
        ("aiohttp", "worker.rollout.engine=server", rf"engine=server needs aiohttp, not installed here: {GPU}"),
    ],
)
def test_a_package_that_a_key_needs_is_named(tmp_path, without, package, argument, message):
    config = load(*valid_run(tmp_path), argument)
    check_installed(config)
    without(package)
    with pytest.raises(UserError, match=message) as refused:
        check_installed(config)
    assert "\n" not in str(refused.value)


def test_a_run_that_needs_none_of_them_passes(tmp_path, without):
    without("vllm", "peft", "aiohttp", "msgspec")
    check_installed(load(*valid_run(tmp_path)))


@pytest.mark.parametrize("packages", [("vllm",), ("vllm", "deepspeed")])
def test_the_dry_run_looks_where_training_is_possible(tmp_path, monkeypatch, capfd, without, packages):
    """Without DeepSpeed only a dry run is done here, and the packages are those of another machine."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    without(*packages)
    code = train.main([*valid_run(tmp_path), "worker.rollout.engine=vllm", "trainer.dry_run=true"])
    told = capfd.readouterr().err
    if packages == ("vllm",):
        assert code == 2 and "worker.rollout.engine=vllm but vllm is not installed" in told
    else:
        assert code == 0 and "deepspeed is not installed here" in told
