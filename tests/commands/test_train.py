"""The programs `python -m mmr1_ds.train` and `mmr1-ds`: exit codes, what is told and by whom, the plan."""

import subprocess
import sys

import pytest
from fixtures.dry_runs import valid_run, write_rows
from fixtures.launching import environment

from mmr1_ds.cluster.launch import gpu_is_here
from mmr1_ds.commands import cli
from mmr1_ds.config.loading import load_config
from mmr1_ds.train import main

pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture
def valid(tmp_path):
    return valid_run(tmp_path)


def test_a_mistake_is_one_line_and_exit_code_2(capfd):
    assert main(["data.sede=3"]) == 2
    captured = capfd.readouterr()
    assert captured.err == "mmr1-ds: error: unknown key data.sede in the command line; did you mean data.seed?\n"
    assert captured.out == ""


def test_only_rank_0_tells_and_it_is_never_outrun(capfd, monkeypatch):
    waits = []
    monkeypatch.setattr("mmr1_ds.train.time.sleep", waits.append)
    rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    assert main(["data.sede=3"]) == 2
    assert capfd.readouterr().err == ""
    assert waits and waits[0] > 1  # the launcher kills rank 0 as soon as it sees this rank gone


def test_a_dry_run_imports_nothing_heavy(valid):
    program = (
        "import sys; from mmr1_ds.commands.cli import main; "
        "code = main(['train', *sys.argv[1:], 'trainer.dry_run=true']); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'vllm', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *valid], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plan of default" in done.stderr


def test_eval_is_training_with_validation_only(monkeypatch):
    given = []
    monkeypatch.setattr("mmr1_ds.train.main", lambda argv: given.append(list(argv)) or 0)
    assert cli.main(["eval", "config=mmr1", "trainer.val_only=false"]) == 0
    assert cli.main(["train", "config=mmr1"]) == 0
    trainer = load_config(given[0]).config.trainer
    assert trainer.val_only and trainer.save_freq == -1
    assert given[1] == ["config=mmr1"]
    assert cli.main(["eval", "config=mmr1", "n=16", "temperature=0.5", "--pass-rates", "rates.jsonl"]) == 0
    config = load_config(given[2]).config
    assert (config.worker.rollout.val_override_config.n, config.trainer.pass_rates) == (16, "rates.jsonl")
    assert config.worker.rollout.val_override_config.temperature == 0.5


@pytest.mark.parametrize("rank", ["--local_rank=1", "--local-rank=1"])
def test_the_launcher_s_local_rank_is_passed_over(monkeypatch, rank):
    given = []
    monkeypatch.setattr("mmr1_ds.train.main", lambda argv: given.append(list(argv)) or 0)
    monkeypatch.setattr(sys, "argv", ["mmr1-ds", rank, "train", "config=mmr1"])
    assert cli.main() == 0
    assert cli.main(["train", rank, "config=mmr1"]) == cli.main(["train", "config=mmr1", rank]) == 0
    assert given == [["config=mmr1"]] * 3


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(capfd, word):
    with pytest.raises(SystemExit) as caught:
        main([word])
    assert caught.value.code == 0
    assert capfd.readouterr().out.startswith("usage: python -m mmr1_ds.train [config=FILE")


def test_eval_needs_something_to_validate_on(valid, tmp_path, capfd):
    assert cli.main(["eval", *valid, "trainer.dry_run=true"]) == 2
    assert "trainer.val_only=true needs data.val_files" in capfd.readouterr().err
    val = write_rows(tmp_path, "val.json")
    settings = [*valid, f"data.val_files={val}", "data.train_files=nowhere.json", "n=4", "trainer.dry_run=true"]
    assert cli.main(["eval", *settings, "temperature=0.7"]) == 0
    text = capfd.readouterr().err
    assert "4 answer(s) a prompt, temperature 0.7" in text  # the validation's own
    assert "each step repeats prompts" not in text  # of 12, while the data have 7
    assert "train data" not in text and "reference" not in text and "no optimiser" in text
    assert main([*valid, "trainer.pass_rates=rates.jsonl", "trainer.dry_run=true"]) == 2
    assert "trainer.pass_rates=rates.jsonl is for a validation alone; start mmr1-ds eval" in capfd.readouterr().err
    assert "run         validation only" in text
    assert (
        "output      runs/default/eval/step_N, N steps done by the newest checkpoint in runs/default/checkpoints"
        in text
    )


def plan(valid, capfd, *argv):
    assert main([*valid, *argv, "trainer.dry_run=true"]) == 0
    return capfd.readouterr().err


def test_without_a_launcher_a_dry_run_plans_for_the_ranks_of_the_config(valid, capfd):
    text = plan(valid, capfd, "trainer.nnodes=3", "worker.actor.micro_batch_size_per_device_for_update=1")
    assert "ranks       6 = 3 node(s) x 2" in text
    assert "a rank's optimiser step: 5 responses in packed micro-batches of up to 1,024 tokens" in text
    plain = ["worker.actor.dynamic_batching=false", "worker.actor.padding_free=false"]
    text = plan(valid, capfd, *plain, "worker.actor.micro_batch_size_per_device_for_update=5")
    assert "15 responses = 3 padded micro-batches of 5" in text


@pytest.mark.skipif(gpu_is_here(), reason="of a machine without GPUs")
def test_without_a_gpu_a_dry_run_checks_and_plans_for_one(valid, capfd, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    offload, states = "worker.actor.offload.offload_optimizer=true", "worker.actor.offload_states=true"
    for refused, expected in (
        ([offload, states], "DeepSpeed moves no states while zero_optimization.offload_optimizer keeps a part of them"),
        ([states, "worker.actor.optim.strategy=adamw_bf16"], "worker.actor.offload_states=true moves the states of"),
        ([offload, "worker.actor.optim.strategy=muon"], "muon keeps its states on the GPU, not with offload_optimizer"),
    ):
        assert main([*valid, *refused, "trainer.dry_run=true"]) == 2
        assert expected in (message := capfd.readouterr().err) and message.count("\n") == 1
        plan(valid, capfd, *refused, "worker.actor.dtype=fp32")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        plan(valid, capfd, *refused)
        monkeypatch.delenv("DS_ACCELERATOR")
    gae = ["algorithm.adv_estimator=gae", "worker.critic.offload.offload_params=true"]
    text = plan(valid, capfd, offload, "worker.ref.offload.offload_params=true", *gae)
    assert "CPU, fp32 (no GPU here; bf16 on a GPU)" in text
    assert "deepspeed   ZeRO-3, bf16 off here, offload: optimiser on cpu (on a GPU); train_batch_size 30" in text
    assert "reference   ZeRO-3, offload: parameters on cpu (on a GPU); KL" in text
    assert "with a value head; ZeRO-3, offload: parameters on cpu (on a GPU); 2" in text
    text = plan(valid, capfd)
    assert "offload: none; train_batch_size" in text and text.count("on a GPU") == 1
    text = plan(valid, capfd, offload, "worker.actor.deepspeed=zero3_cpu.json")
    assert "bf16 off, offload: none" in text and "on a GPU" not in text


def test_what_a_refresh_costs(valid, capfd):
    curriculum = ["data.sampling_strategy=curriculum", "data.curriculum_update_freq=2"]
    assert "every 2 steps: 7 prompts x 8 = 56 responses, 47% of the 120" in plan(valid, capfd, *curriculum)
    first = "plan of default: before step 1 a full refresh of 56 responses, as many as 0.9 steps of training; data.curr"
    assert first in plan(valid, capfd, *curriculum).splitlines()[0]
    assert "before step 1" not in plan(valid, capfd, *curriculum, "data.curriculum_refresh=online")
    without = [*curriculum, "data.curriculum_features=none"]
    unused = "keys without effect: data.curriculum_features (data.curriculum_refresh=full)"
    assert unused in plan(valid, capfd, *without)
    assert "a prior of each prompt" not in plan(valid, capfd, *without, "data.curriculum_refresh=online")
    online = plan(valid, capfd, *curriculum, "data.curriculum_refresh=online")
    assert "; a prior of each prompt from its text" in online and unused not in online
    by_model = [*curriculum, "data.curriculum_features=model", "data.curriculum_refresh=online"]
    assert "; a prior of each prompt from the model's hidden state of it: one forward" in plan(valid, capfd, *by_model)
    epoch = ["data.sampling_strategy=curriculum", "data.curriculum_update_freq=0", "data.curriculum_rollout_n=30"]
    assert "every epoch: 7 prompts x 30 = 210 responses, 350% of the 60" in plan(valid, capfd, *epoch)


def test_prompts_by_score_are_counted_as_the_sampler_counts(valid, capfd):
    batch = ["data.rollout_batch_size=100", "worker.actor.global_batch_size=100"]
    mixture = ["data.sampling_strategy=curriculum", "data.curriculum_mixture_ratio=0.29"]  # 0.29 * 100 = 28.99...
    text = plan(valid, capfd, *batch, *mixture, "worker.rollout.n=6")
    assert "curriculum: 29 of 100 prompts a step by score (1 learnability); the other 71 in turn; mom" in text
    online = ["data.curriculum_refresh=online", "data.curriculum_mixture_ratio=1"]
    text = plan(valid, capfd, *batch, *mixture, *online, "worker.rollout.n=6")
    assert "100 of 100 prompts a step by score (1 learnability)\n" in text
    text = plan(valid, capfd, *batch, *mixture, *online, "data.curriculum_draw=posterior", "worker.rollout.n=6")
    assert "100 of 100 prompts a step by score (1 learnability), the best by a draw from each belief\n" in text


def test_one_is_no_plural(valid, capfd):
    text = plan(valid, capfd, "trainer.max_steps=1", "worker.reward.num_workers=1")
    assert " 1 step (trainer.max_steps)" in text and "math, 1 process a rank, " in text


def test_the_plan_says_that_a_critic_is_trained(valid, capfd):
    gae = [
        "algorithm.adv_estimator=gae",
        "algorithm.lam=0.95",
        "worker.critic.optim.lr=1e-5",
        "trainer.critic_warmup=2",
    ]
    text = plan(valid, capfd, *gae, "worker.critic.ppo_epochs=2")
    assert "gae (gamma 1, lambda 0.95) advantages" in text
    assert (
        "critic      Qwen/Qwen2.5-VL-3B-Instruct with a value head; ZeRO-3, offload: none; 4 optimiser step(s) of "
        "30 responses, up to 3,072 tokens at once a rank; AdamW, lr 1e-05 constant; alone for the first 2 step(s)"
    ) in text
    assert "30 responses, 3 at once a rank" in plan(valid, capfd, *gae, "worker.critic.dynamic_batching=false")
    assert "value head" not in plan(valid, capfd)


def test_a_reward_that_does_not_read_what_the_preset_asks_for(valid, capfd, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def ends(item):\n    return {'overall': float(item['response'].endswith(item['ground_truth']))}\n"
        "def boxed(item):\n    return {'overall': float('boxed{' + item['ground_truth'] + '}' in item['response'])}\n"
    )
    preset, note = ["config=mmr1", *valid, "data.curriculum_refresh=online"], "gives 0 to a right answer in the form"
    ends, boxed = (f"worker.reward.reward_function={tmp_path / 'mine.py'}:{name}" for name in ("ends", "boxed"))
    assert note in plan(preset, capfd, ends)
    assert note not in plan(preset, capfd, boxed)
    assert note not in plan(preset, capfd, ends, "data.system_prompt=null")
    assert note not in plan(preset, capfd, ends, "data.system_prompt=Put it into a \\boxed{}.")
    assert note not in plan(valid, capfd, ends)


def test_what_is_ignored_is_said_once(valid, capfd):
    text = plan(valid, capfd, "worker.actor.use_torch_compile=true", "worker.rollout.disable_tqdm=true")
    assert text.count("ignored keys: worker.actor.use_torch_compile, worker.rollout.disable_tqdm") == 1


def test_a_launch_of_another_size_than_the_config_s_is_refused(valid, capfd):
    assert main(valid) == 2  # one process, two ranks asked for
    assert "1 * 2 = 2, but 1 process was started" in capfd.readouterr().err


@pytest.mark.parametrize("environ", [{"DS_ACCELERATOR": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_a_gpu_can_be_hidden(environ):
    assert not gpu_is_here(environ)


def test_no_file_in_the_folder_of_the_call_shadows_a_module(tmp_path):
    """`python -m` puts that folder first."""
    for name in ("random", "typing", "queue", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is shadowed')\n")
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "__init__.py").write_text("raise SystemExit('yaml is shadowed')\n")
    for module in ("mmr1_ds.train", "mmr1_ds.commands.cli"):
        command = [sys.executable, "-m", module, *(["keys"] if "cli" in module else ["trainer.nope=1"])]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
        assert "shadowed" not in done.stderr and done.returncode == (0 if "cli" in module else 2), done.stderr
