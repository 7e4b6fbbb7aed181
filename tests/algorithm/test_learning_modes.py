"""The whole program with other estimators, losses and places of the KL than the default, stopped and resumed."""

import json
import shutil

import pytest
from fixtures.launching import run_training
from fixtures.tiny_models import save_text_model

pytestmark = pytest.mark.slow

REWARD = """
def score(reward_inputs):
    return [
        {
            "overall": (item["response_length"] * 7 + len(item["response"])) % 5 / 4,
            "accuracy": float(item["response_length"] % 2),
        }
        for item in reward_inputs
    ]
"""
KL_OFF_THE_REWARD = ["algorithm.use_kl_loss=false", "algorithm.kl_penalty=k2", "algorithm.kl_coef=0.1"]
ADAPTIVE = ["algorithm.kl_type=adaptive", "algorithm.kl_target=0.01", "algorithm.kl_horizon=60"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    save_text_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"question": f"what is {i}?", "answer": str(i)} for i in range(9)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"data.train_files={folder / 'data.jsonl'}",
        "data.prompt_key=question",
        "data.max_prompt_length=64",
        "data.max_response_length=10",
        "data.rollout_batch_size=4",
        f"worker.actor.model.model_path={folder / 'model'}",
        "worker.actor.global_batch_size=2",
        "worker.actor.micro_batch_size_per_device_for_update=3",
        "worker.actor.optim.lr=1e-3",
        "worker.rollout.engine=hf",
        "worker.rollout.n=3",
        f"worker.reward.reward_function={folder / 'reward.py'}:score",
        "worker.reward.num_workers=1",
        "trainer.n_gpus_per_node=1",
        "trainer.val_before_train=false",
    ]


def start(arguments, run_dir, num_steps, *overrides):
    own = [f"trainer.run_dir={run_dir}", f"trainer.max_steps={num_steps}", "trainer.report_freq=null"]
    return run_training(*arguments, *own, *overrides)


def run(arguments, run_dir, num_steps, *overrides):
    """Returns: a line of metrics a step."""
    done = start(arguments, run_dir, num_steps, *overrides)
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] <= num_steps and "timing_s/step" in line]


def test_the_coefficient_of_the_kl_goes_on_where_it_was(arguments, tmp_path):
    settings = ["algorithm.adv_estimator=reinforce_plus_plus", "worker.actor.loss_type=cispo", *KL_OFF_THE_REWARD]
    settings += [*ADAPTIVE, "algorithm.gamma=0.99", "algorithm.rollout_is=sequence"]
    straight = run(arguments, tmp_path / "straight", 4, *settings, "trainer.save_freq=2")
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "global_step_4")
    resumed = run(arguments, tmp_path / "resumed", 4, *settings, "trainer.save_freq=2")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    assert resumed[2]["timing_s/step"] != straight[2]["timing_s/step"]  # done anew
    coefficients = [line["actor/kl_coef"] for line in straight]
    # One step of 12 responses: a fifth of the error over 60 responses at most. At step 1 the KL is 0.
    assert coefficients[:2] == pytest.approx([0.1, 0.1 * (1 - 0.2 * 12 / 60)])
    assert len(set(coefficients)) == 4
    for expected, actual in zip(straight, resumed, strict=True):
        for name in ("actor/kl_coef", "actor/ref_kl", "actor/pg_loss", "actor/grad_norm", "critic/rewards/mean"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
        taken_off = expected["critic/score/mean"] - expected["critic/rewards/mean"]
        assert taken_off >= 0 and (taken_off > 0) == (expected["actor/ref_kl"] > 0)
        assert "actor/kl_loss" not in expected
        assert expected["rollout/is_weight_mean"] == pytest.approx(1.0, abs=1e-3)


def test_remax_and_sequences(arguments, tmp_path):
    lines = run(
        arguments,
        tmp_path / "run",
        2,
        "algorithm.adv_estimator=remax",
        "worker.actor.loss_type=gspo",
        "worker.actor.loss_avg_mode=seq_sum",
        "algorithm.kl_penalty=mse",
        "algorithm.rollout_is=none",
    )
    for line in lines:
        advantage = line["critic/score/mean"] - line["reward/baseline"]
        assert line["critic/advantages/mean"] == pytest.approx(advantage, abs=1e-6)
        assert line["actor/grad_norm"] > 0
        assert "rollout/is_weight_mean" not in line and line["rollout/logprob_diff_max"] < 1e-4
    assert lines[1]["actor/kl_loss"] > 0


def test_the_critic_goes_on_where_it_was(arguments, tmp_path):
    settings = ["algorithm.adv_estimator=gae", "algorithm.lam=0.9", "algorithm.gamma=0.99", *KL_OFF_THE_REWARD]
    settings += ["worker.critic.global_batch_size=4", "worker.critic.ppo_epochs=2", "worker.critic.optim.lr=1e-4"]
    settings += ["worker.critic.optim.lr_scheduler_type=linear", "trainer.critic_warmup=1"]
    straight = run(arguments, tmp_path / "straight", 4, *settings, "trainer.save_freq=2")
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "global_step_4")
    resumed = run(arguments, tmp_path / "resumed", 4, *settings, "trainer.save_freq=2")
    assert [line["step"] for line in resumed] == [line["step"] for line in straight] == [1, 2, 3, 4]
    assert [line["timing_s/step"] for line in resumed[:2]] == [line["timing_s/step"] for line in straight[:2]]
    assert resumed[2]["timing_s/step"] != straight[2]["timing_s/step"]  # done anew
    # Two passes over one batch a step, eight updates in all: the mean of two neighbours on the way from 1e-4 to 0.
    rates = [1e-4 * (1 - (2 * step + 0.5) / 7) for step in range(4)]
    assert [line["critic/lr"] for line in straight] == pytest.approx(rates)
    assert straight[0]["critic/values/min"] == straight[0]["critic/values/max"] == 0.0  # of a head of zeros
    assert all(line["critic/values/min"] < line["critic/values/max"] for line in straight[1:])
    assert "actor/lr" not in straight[0] and all("actor/lr" in line for line in straight[1:])
    names = "lr vf_loss vf_clipfrac vpred_mean grad_norm vf_explained_var returns/mean advantages/mean".split()
    for expected, actual in zip(straight, resumed, strict=True):
        for name in [f"critic/{name}" for name in names] + ["actor/pg_loss", "actor/grad_norm", "actor/ref_kl"]:
            if name in expected:
                assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
        assert expected["critic/vf_loss"] > 0 and expected["critic/grad_norm"] > 0
        assert expected["timing_s/values"] > 0 and expected["timing_s/update_critic"] > 0


def test_a_run_without_a_critic_does_not_go_on_with_one(arguments, tmp_path):
    run(arguments, tmp_path, 1, "algorithm.disable_kl=true")
    done = start(arguments, tmp_path, 2, "algorithm.adv_estimator=gae")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{tmp_path / 'checkpoints' / 'global_step_1'} has no critic, it is of a run without" in done.stderr


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.nightly)])
def test_a_run_in_bf16_goes_on_where_it_was(arguments, tmp_path, engine):
    settings = ["worker.actor.dtype=bf16", "trainer.save_freq=2", f"worker.rollout.engine={engine}"]
    settings += ["worker.rollout.kv_cache_gb=1", f"worker.actor.model.fp32_lm_head={engine == 'vllm'}"]
    straight = run(arguments, tmp_path / "straight", 4, *settings)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "global_step_4")
    done = start(arguments, tmp_path / "resumed", 4, *settings[1:])  # in fp32
    assert done.returncode == 2 and "set worker.actor.dtype=bf16" in done.stderr
    resumed = run(arguments, tmp_path / "resumed", 4, *settings)
    assert resumed[2]["timing_s/step"] != straight[2]["timing_s/step"]  # done anew
    for expected, actual in zip(straight, resumed, strict=True):
        for name in ("actor/kl_loss", "actor/pg_loss", "actor/grad_norm", "rollout/logprob_diff_mean"):
            assert actual[name] == expected[name], name
        # What a token's rounding to 8 bits does; in fp32 it is below 1e-6.
        assert 1e-5 < expected["rollout/logprob_diff_mean"] < expected["rollout/logprob_diff_max"] < 0.1


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_adapters_go_on_where_they_were(arguments, tmp_path, engine):
    settings = ["worker.actor.model.lora.rank=3", "worker.actor.optim.lr=1e-2", "algorithm.kl_penalty=mse"]
    if engine == "vllm":
        settings += ["worker.rollout.engine=vllm", "worker.rollout.lora_sync=adapters", "worker.rollout.kv_cache_gb=1"]
    straight = run(arguments, tmp_path / "straight", 4, *settings)
    run(arguments, tmp_path / "resumed", 2, *settings)
    resumed = run(arguments, tmp_path / "resumed", 4, *settings)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    for expected, actual in zip(straight, resumed, strict=True):
        for name in ("actor/ref_kl", "actor/pg_loss", "actor/grad_norm", "rollout/is_weight_mean"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
        assert expected["rollout/logprob_diff_max"] < 1e-4  # the engine samples from weights and adapters
        assert (actual["perf/sync_bytes"] > 0) == (engine == "vllm")
    assert all(line["actor/ref_kl"] > 1e-3 for line in straight[1:])


def test_a_layer_that_the_model_has_not_ends_the_run_before_it_begins(arguments, tmp_path):
    lora = ["worker.actor.model.lora.rank=3", "worker.actor.model.lora.target_modules=[q_projj]"]
    done = start(arguments, tmp_path, 2, *lora)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "worker.actor.model.lora.target_modules: q_projj is no linear layer of" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()
