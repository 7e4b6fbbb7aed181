"""Loading and composition: typed values, later wins, one clear line for every mistake; upstream's spellings."""

import re

import pytest
import yaml
from fixtures.configs import load, mistake
from fixtures.dry_runs import GUIDE

from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import steps_between_saves
from mmr1_ds.config.keys import leaf_types
from mmr1_ds.config.loading import config_folders, dump_config, load_config
from mmr1_ds.config.unused import without_effect
from mmr1_ds.config.upstream import IGNORED, ONLY, RENAMED, ours
from mmr1_ds.preflight.checks import check_config

# --- values -------------------------------------------------------------------------------------------------------


def test_values_are_typed():
    config = load("data.seed=3", "worker.actor.optim.lr=1e-4", "worker.actor.optim.betas=[0.8,0.95]", "data.shuffle=no")
    assert config.data.seed == 3 and config.data.shuffle is False
    assert config.worker.actor.optim.lr == pytest.approx(1e-4)
    assert config.worker.actor.optim.betas == (0.8, 0.95)


def test_lists_and_null():
    config = load("data.curriculum_metrics=[learnability,self-bleu]", "data.system_prompt=null", "data.min_pixels=null")
    assert config.data.curriculum_metrics == ["learnability", "self-bleu"]
    assert config.data.system_prompt is None and config.data.min_pixels is None


def test_text_on_the_command_line_is_taken_as_it_is():
    prompt = "Think: first\nthen answer in \\boxed{}. # [not YAML] {a: b}"
    config = load(f"data.system_prompt={prompt}", "trainer.experiment_name=007")
    assert config.data.system_prompt == prompt
    assert config.trainer.experiment_name == "007"


def test_the_launcher_s_local_rank_is_passed_over():
    assert load("--local_rank=1", "data.seed=5").data.seed == 5


def test_interpolation():
    assert (
        load(
            "data.max_response_length=700", "data.max_prompt_length=${data.max_response_length}"
        ).data.max_prompt_length
        == 700
    )
    assert "data.nope" in mistake("data.seed=${data.nope}")


def test_keys_inside_a_mapping():
    config = load(
        "worker.actor.model.override_config.rope_theta=5", "worker.reward.reward_function_kwargs={weight: 0.2}"
    )
    assert config.worker.actor.model.override_config == {"rope_theta": 5}
    assert config.worker.reward.reward_function_kwargs == {"weight": 0.2}


def test_what_is_written_reads_back(tmp_path):
    config = load(
        "config=mmr1_b200", "data.curriculum_metrics=[learnability,distinct-n]", "worker.actor.optim.betas=[0.7,0.9]"
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config([f"config={tmp_path / 'config.yaml'}"])
    assert again.config == config and again.warnings == ()


@pytest.mark.parametrize("text", ["${data.seed}", r"\${x}", r"a\\${", "\\boxed{}", "1e-3", "null", "a: b\n# c"])
def test_any_text_reads_back(tmp_path, text):
    config = RunConfig()
    config.data.system_prompt = config.trainer.experiment_name = text
    config.worker.reward.reward_function_kwargs = {"a": {"b": [text]}}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load(f"config={tmp_path / 'config.yaml'}") == config


def test_secrets_are_not_written():
    config = load("worker.reward.reward_function_kwargs={judge: {api_key: abc123, name: x}}")
    text = dump_config(config)
    assert "abc123" not in text and "'***'" in text and "name: x" in text


def test_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = ["worker.actor.model.model_path", "worker.actor.model.tokenizer_path", "trainer.load_checkpoint_path"]
    config = load(*(f"{path}=~/x" for path in paths), "data.train_files=~/a@dev, ~/b", "data.val_files=['~/c',d~]")
    assert config.worker.actor.model.model_path == config.worker.actor.model.tokenizer_path == "/home/someone/x"
    assert config.trainer.load_checkpoint_path == "/home/someone/x"
    assert config.data.train_files == "/home/someone/a@dev,/home/someone/b"
    assert config.data.val_files == ["/home/someone/c", "d~"]


def test_an_inline_template_longer_than_a_file_s_name(tmp_path):
    template = "{{ content }}" + " Think." * 100
    (tmp_path / "run.yaml").write_text(f"data: {{format_prompt: '{template}'}}\n")
    assert load(f"config={tmp_path / 'run.yaml'}").data.format_prompt == template
    (tmp_path / "run.yaml").write_text(f"worker: {{actor: {{deepspeed: '{'x' * 300}'}}}}\n")
    assert load(f"config={tmp_path / 'run.yaml'}").worker.actor.deepspeed == "x" * 300
    assert "not found" in mistake(f"config={'x' * 300}")


# --- mistakes in keys and types -----------------------------------------------------------------------------------


def test_unknown_key_names_the_nearest():
    assert mistake("data.rollout_bach_size=3") == (
        "unknown key data.rollout_bach_size in the command line; did you mean data.rollout_batch_size?"
    )
    assert "did you mean data.rollout_batch_size?" in mistake("rollout_batch_size=3")
    assert "did you mean worker.actor.ulysses_size?" in mistake("worker.actor.ulyses_size=1")
    assert "the sections are data, algorithm, worker, trainer" in mistake("xyzzy.plugh=3")


def test_unknown_key_of_a_file_names_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  sede: 3\n")
    assert mistake(f"config={path}") == f"unknown key data.sede in {path}; did you mean data.seed?"


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("data.seed=x", "data.seed=x: expected a whole number, got text"),
        ("data.seed=1.5", "data.seed=1.5: expected a whole number, got a number"),
        ("data.seed=null", "data.seed=null: expected a whole number, got null"),
        ("data.shuffle=maybe", "data.shuffle=maybe: expected true or false, got text"),
        ("worker.actor.optim.lr=[1]", "worker.actor.optim.lr=[1]: expected a number, got a list"),
        ("data.curriculum_metrics=learnability", "expected a list of text, like [a,b], got text"),
        ("data.curriculum_metrics=[{a: 1}]", "expected a list of text"),
        ("data.curriculum_metric_weights=[x]", "expected a list of numbers"),
        ("worker.actor.optim.betas=[0.9]", "expected a list of 2 numbers"),
        ("worker.actor.model.override_config=3", "expected a mapping, got a whole number"),
        ("data.min_pixels=many", "expected a whole number or null, got text"),
        ("data=3", "data is a section; give its keys, like data.train_files"),
        ("data.seed.x=3", "data.seed holds no further keys, it is a whole number"),
        ("data.curriculum_metrics=[a", "not readable as YAML"),
        ("seed", "argument 'seed' is not of the form key=value"),
        ("--seed=3", "argument '--seed=3' is not of the form key=value"),
    ],
)
def test_wrong_type_names_key_value_and_type(argument, expected):
    assert expected in mistake(argument)


@pytest.mark.parametrize(
    ("argument", "read"),
    [
        ("trainer.max_steps=010", "8"), ("data.seed=-010", "-8"), ("trainer.max_steps=12:30", "750"),
        ("trainer.max_wall_seconds=1:30.5", "90.5"), ("worker.reward.reward_function_kwargs.a=010", "8"),
    ],
)  # fmt: skip
def test_numbers_that_yaml_reads_otherwise_are_refused(tmp_path, argument, read):
    """YAML 1.1 has octal numbers and some of base 60."""
    key, value = argument.split("=")
    remedy = f"YAML reads it as {read}; write a plain number, or text in quotes"
    assert mistake(argument) == f"{argument} in the command line: {remedy}"
    path = tmp_path / "run.yaml"
    sections = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(key.split(".")))
    path.write_text(f"{sections[:-1]} {value}\n")
    assert mistake(f"config={path}") == f"{argument} in {path}: {remedy}"


def test_numbers_in_lists_and_secrets_are_looked_at_too():
    assert "data.train_weights=010 in the command line: YAML reads it as 8" in mistake("data.train_weights=[010, 3]")
    assert "010" not in mistake("worker.reward.reward_function_kwargs={api_key: 010}")
    config = load("trainer.max_steps=0x10", "data.seed=0", "trainer.experiment_name=010", "data.train_files='12:30'")
    assert (config.trainer.max_steps, config.trainer.experiment_name, config.data.train_files) == (16, "010", "12:30")


# --- files --------------------------------------------------------------------------------------------------------


def test_later_wins_and_the_command_line_last(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {seed: 1, max_prompt_length: 11, rollout_batch_size: 21}\n")
    (tmp_path / "b.yaml").write_text("data: {seed: 2, max_prompt_length: 12}\n")
    (tmp_path / "run.yaml").write_text("defaults: [a, b]\ndata: {seed: 3}\n")
    data = load(f"config={tmp_path / 'run.yaml'}", "data.val_batch_size=9").data
    assert (data.seed, data.max_prompt_length, data.rollout_batch_size, data.val_batch_size) == (3, 12, 21, 9)
    assert load(f"config={tmp_path / 'run.yaml'}", "data.seed=4").data.seed == 4


def test_lists_are_replaced_and_mappings_merged(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "data: {curriculum_metrics: [learnability, self-bleu]}\n"
        "worker: {reward: {reward_function_kwargs: {x: 1, y: {u: 1, v: 2}}}}\n"
    )
    (tmp_path / "run.yaml").write_text(
        "defaults: a\ndata: {curriculum_metrics: [distinct-n]}\n"
        "worker: {reward: {reward_function_kwargs: {y: {v: 3}}}}\n"
    )
    config = load(f"config={tmp_path / 'run.yaml'}")
    assert config.data.curriculum_metrics == ["distinct-n"]
    assert config.worker.reward.reward_function_kwargs == {"x": 1, "y": {"u": 1, "v": 3}}
    emptied = load(f"config={tmp_path / 'run.yaml'}", "worker.reward.reward_function_kwargs={}")
    assert emptied.worker.reward.reward_function_kwargs == {}


def test_self_says_where_the_file_itself_comes(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {seed: 1}\n")
    (tmp_path / "run.yaml").write_text("defaults: [_self_, a]\ndata: {seed: 2}\n")
    assert load(f"config={tmp_path / 'run.yaml'}").data.seed == 1


def test_a_config_beside_the_file_comes_before_the_project_s(tmp_path):
    (tmp_path / "mmr1.yaml").write_text("data: {seed: 77}\n")
    (tmp_path / "run.yaml").write_text("defaults: [mmr1]\n")
    assert load(f"config={tmp_path / 'run.yaml'}").data.seed == 77
    assert load("config=mmr1").data.prompt_key == "problem"


def test_a_shared_base_is_no_cycle(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {seed: 5}\n")
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text("defaults: [base]\n")
    (tmp_path / "run.yaml").write_text("defaults: [a, b]\n")
    assert load(f"config={tmp_path / 'run.yaml'}").data.seed == 5


def test_cycle(tmp_path):
    (tmp_path / "a.yaml").write_text("defaults: [b]\n")
    (tmp_path / "b.yaml").write_text("defaults: [a]\n")
    assert "defaults form a cycle: a.yaml -> b.yaml -> a.yaml" in mistake(f"config={tmp_path / 'a.yaml'}")


def test_missing_config_lists_the_known():
    message = mistake("config=mmr1_b20")
    assert "config file mmr1_b20 not found" in message and "mmr1_b200" in message


def test_file_that_is_not_yaml_names_the_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  seed: 1\n  seed: [1\n")
    assert f"{path}, line 4: not readable as YAML" in mistake(f"config={path}")
    path.write_text("data:\n  seed: 1\n  seed: 2\n")
    assert f"{path}, line 3: not readable as YAML: found duplicate key seed" in mistake(f"config={path}")
    path.write_text("- 1\n")
    assert "must hold sections" in mistake(f"config={path}")


def test_paths_beside_their_file_are_found(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text("def score(items):\n    return items\n")
    (tmp_path / "run.yaml").write_text("worker: {reward: {reward_function: reward.py:score}}\n")
    monkeypatch.chdir("/")
    config = load(f"config={tmp_path / 'run.yaml'}")
    assert config.worker.reward.reward_function == f"{tmp_path / 'reward.py'}:score"
    assert load("config=mmr1_h100").worker.actor.deepspeed.endswith("configs/deepspeed/zero3_h100.json")


def test_a_key_inside_a_file_is_refused():
    assert "is the file" in mistake("config=mmr1_h100", "worker.actor.deepspeed.zero_optimization.stage=2")


# --- keys without effect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "reason", "remedy"),
    [
        ("worker.actor.optim.min_lr_ratio=0.1", "worker.actor.optim.lr_scheduler_type=constant", "cosine"),
        ("worker.actor.optim.muon_lr=0.1", "worker.actor.optim.strategy=adamw", "muon"),
        ("worker.actor.max_grad_norm=0.5", "worker.actor.optim.strategy=muon", "adamw"),
        ("worker.actor.clip_low=0.1", "worker.actor.loss_type=sapo", "gspo"),
        ("worker.actor.clip_ratio_dual=2", "worker.actor.loss_type=gspo", "default"),
        ("worker.actor.tau_positive=2", "worker.actor.loss_type=default", "mine.py:loss"),
        ("algorithm.filter_low=0.2", "algorithm.online_filtering=false", "true"),
        ("algorithm.filter_oversample=2", "algorithm.online_filtering=false", "true"),
        ("algorithm.rollout_is_threshold=3", "algorithm.rollout_is=none", "token"),
        ("algorithm.rollout_mask_low=0.1", "algorithm.rollout_mask=k3", "token"),
        ("algorithm.kl_coef=0.1", "algorithm.disable_kl=true", "false"),
        ("worker.ref.offload.offload_params=true", "algorithm.disable_kl=true", "false"),
        ("worker.rollout.num_servers=2", "worker.rollout.engine=auto", "server"),
        ("worker.rollout.weight_transfer=nccl", "worker.rollout.engine=vllm", "server"),
        ("worker.rollout.weight_swap=in_flight", "worker.rollout.engine=hf", "server"),
        ("algorithm.kl_target=0.3", "algorithm.kl_type=fixed", "adaptive"),
        ("algorithm.overlong_penalty=2", "algorithm.overlong_buffer=0", "64"),
        ("algorithm.gamma=0.9", "algorithm.adv_estimator=grpo", "reinforce_plus_plus"),
        ("algorithm.lam=0.9", "algorithm.adv_estimator=rloo", "gae"),
        ("worker.critic.optim.lr=1e-5", "algorithm.adv_estimator=grpo", "gae"),
        ("worker.actor.model.lora.alpha=64", "worker.actor.model.lora.rank=0", "8"),
        ("data.curriculum_mixture_ratio=0.7", "data.sampling_strategy=shuffle", "curriculum"),
        (
            "worker.reward.cos_len_reward_config.max_value_correct=0.5", "worker.reward.reward_function=math",
            "openr1_wo_LMM",
        ),
        ("worker.reward.judge.model=x", "worker.reward.reward_function=openr1_wo_LMM", "openr1_vllm"),
        ("trainer.best_metric=val/pass_at_8", "trainer.val_freq=-1", "5"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_warned_of(argument, reason, remedy):
    key = ours(argument.partition("=")[0])
    assert load_config([argument, reason]).warnings == (f"keys without effect: {key} ({reason})",)
    assert load_config([argument, reason, f"{reason.partition('=')[0]}={remedy}"]).warnings == ()
    assert load_config([argument, reason, "trainer.val_only=true"]).warnings == ()


def test_all_keys_without_effect_are_in_one_line():
    reward = "worker.reward.functions=[{function: math}, {function: 'mine.py:f'}]"
    filters = ["algorithm.filter_low=0.2", "algorithm.filter_high=0.8"]
    loaded = load_config([*filters, "worker.reward.judge.model=x", reward])
    assert loaded.warnings == (
        "keys without effect: algorithm.filter_low, algorithm.filter_high (algorithm.online_filtering=false); "
        "worker.reward.judge.model (worker.reward.functions: math, mine.py:f)",
    )


@pytest.mark.parametrize("key", ["algorithm.kl_target=0", "worker.actor.tau_positive=1.0", "trainer.best_metric=null"])
def test_what_asks_for_nothing_is_no_key_without_effect(key):
    assert load_config([key]).warnings == ()


@pytest.mark.parametrize("folder", config_folders())
def test_the_project_s_own_configs_have_none(folder):
    """And none is warned of where the user decides against what they are for."""
    for path in folder.glob("*.yaml"):
        assert without_effect(load(f"config={path}"), leaf_types()) == [], path
    assert load_config(["config=mmr1_online", "data.sampling_strategy=shuffle"]).warnings == ()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "worker.reward.reward_function_kwargs={format_weight:0.2}",
            "kwargs: format_weight has no value; write a space behind the colon, as in '{format_weight: 1}'",
        ),
        ("worker.reward.functions=[{function:math, weight: 1}]", "worker.reward.functions: function has no value; wri"),
        ("--worker.rollout.n=4", "--worker.rollout.n: settings have no dashes; write worker.rollout.n=4"),
        ("--config=demo", "--config: settings have no dashes; write config=demo"),
        ("data.train_batch_size=8", "unknown key data.train_batch_size in the command line; did you mean data.rollout"),
    ],
)
def test_what_other_programs_and_shells_lead_to(argument, expected):
    assert expected in mistake(argument)


def test_validation_data_of_a_preset_with_columns_of_the_user_s(tmp_path):
    (line,) = load_config(["config=mmr1_h100", "data.prompt_key=question"]).warnings
    assert line.startswith("data.val_files=hiyouga/geometry3k@test comes from a preset, data.prompt_key=question from")
    assert line.endswith("set data.val_files to data of yours, or to null")
    (tmp_path / "mine.yaml").write_text("defaults: [mmr1]\ndata: {answer_key: truth}")
    (line,) = load_config([f"config={tmp_path / 'mine.yaml'}"]).warnings
    assert "data.answer_key=truth from you" in line
    for quiet in ("data.prompt_key=problem", "data.val_files=null", "data.val_files=mine.json"):
        assert load_config(["config=mmr1_h100", "data.answer_key=answer", quiet]).warnings == ()
    assert load_config(["data.val_files=mine.json", "data.prompt_key=question"]).warnings == ()


@pytest.mark.parametrize("text", ["offload: {offload_optimizer: true}", "fsdp: {optimizer_offload: true}"])
def test_offload_in_a_file_means_another_thing_than_in_easyr1_s(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(f"worker: {{actor: {{{text}}}}}")
    file, key = f"config={tmp_path / 'mine.yaml'}", "worker.actor.offload.offload_optimizer"
    (line,) = load_config([file]).warnings
    assert line.startswith(f"{key}: not as in EasyR1, which moves them to host memory between the phases")
    assert "nearest to EasyR1's is worker.actor.offload_states=true" in line
    assert load_config([file, f"{key}=false"]).warnings == load_config([f"{key}=true"]).warnings == ()
    assert load_config([file, "trainer.val_only=true"]).warnings == ()
    (tmp_path / "mine.yaml").write_text("worker: {ref: {offload: {offload_params: true}}}")
    (line,) = load_config([file]).warnings
    assert line.startswith("worker.ref.offload.offload_params: not as in EasyR1") and "nearest" not in line
    (tmp_path / "mine.yaml").write_text("worker: {actor: {fsdp: {enable_cpu_offload: true}}}")  # FSDP's, as ZeRO's
    assert load_config([file]).warnings == ()


# --- upstream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("worker.critic.ulysses_size=2", "worker.critic.ulysses_size must be 1, got 2"),
        ("worker.rollout.ignore_eos=true", "worker.rollout.ignore_eos must be false, got true"),
        ("data.override_chat_template=x.jinja", "data.override_chat_template must be null, got x.jinja"),
    ],
)
def test_what_changes_the_algorithm_is_refused_not_ignored(argument, expected):
    assert expected in mistake(argument)


def test_keys_of_a_loss_that_is_gone_are_passed_over():
    """The config.yaml of an earlier version's run, which an export reads, has all keys."""
    assert load_config(["worker.actor.clip_cov_low=1.0"]).warnings == ("ignored keys: worker.actor.clip_cov_low",)


def test_offload_in_one_file_keeps_what_fsdp_says():
    both = ["worker.actor.fsdp.enable_cpu_offload=true", "worker.actor.offload.offload_params=false"]
    for argv in (both, both[::-1]):
        assert load(*argv).worker.actor.offload.offload_params
    assert not load("worker.actor.fsdp.enable_cpu_offload=false").worker.actor.offload.offload_params


@pytest.mark.parametrize("part", ["actor", "critic", "ref"])
def test_a_misspelt_key_of_fsdp_is_unknown(part):
    """Among those that are passed over it would switch off the offload that it asks for."""
    key = f"worker.{part}.fsdp.enable_cpu_ofload"
    assert f"unknown key {key} in the command line; did you mean {key[:-6]}offload?" in mistake(f"{key}=true")
    assert load_config([f"worker.{part}.fsdp.use_orig_params=true", f"worker.{part}.fsdp.fsdp_size=8"]).warnings == (
        f"ignored keys: worker.{part}.fsdp.use_orig_params, worker.{part}.fsdp.fsdp_size",
    )


@pytest.mark.parametrize("section", ["offload", "fsdp"])
def test_offload_by_its_other_names(section):
    for name in ("actor", "critic"):
        offload = getattr(load(f"worker.{name}.{section}.param_offload=true").worker, name).offload
        assert offload.offload_params and not offload.offload_optimizer
        offload = getattr(load(f"worker.{name}.{section}.optimizer_offload=true").worker, name).offload
        assert offload.offload_optimizer and not offload.offload_params
    reference = load_config(
        [f"worker.ref.{section}.param_offload=true", f"worker.ref.{section}.optimizer_offload=true"]
    )
    assert reference.config.worker.ref.offload.offload_params
    assert reference.warnings == (f"ignored keys: worker.ref.{section}.optimizer_offload",)


def test_a_critic_by_its_other_names():
    keys = ["strategy=fsdp", "fsdp.enable_full_shard=true", "use_torch_compile=true", "model.tokenizer_path=x"]
    own = [f"worker.critic.{key}" for key in (*keys, "loss_avg_mode=token-mean", "optim.warmup_style=cosine")]
    loaded = load_config([*own, "algorithm.adv_estimator=gae"])
    critic = loaded.config.worker.critic
    assert critic.loss_avg_mode == "token" and critic.optim.lr_scheduler_type == "cosine"
    (warning,) = loaded.warnings
    assert warning == "ignored keys: " + ", ".join(f"worker.critic.{key.partition('=')[0]}" for key in keys)
    assert "worker.critic.cliprange_value" in mistake("worker.critic.cliprange=0.2")


def test_coefficient_of_the_kl_in_the_loss():
    both = ["worker.actor.kl_loss_coef=0.02", "algorithm.kl_coef=0.0"]
    for argv in (both, both[::-1]):
        assert load(*argv).algorithm.kl_coef == 0.02
    assert "twice under different names" in mistake("worker.actor.kl_loss_coef=0.02", "algorithm.kl_coef=0.1")
    assert load("algorithm.kl_coef=0.0").algorithm.kl_coef == 0.0


def test_ways_to_learn_by_their_other_names():
    config = load(
        "algorithm.kl_penalty=k2", "worker.actor.loss_avg_mode=seq-mean-token-mean", "worker.actor.clip_low=0"
    )
    assert config.algorithm.kl_penalty == "mse" and config.worker.actor.loss_avg_mode == "seq"
    assert config.worker.actor.clip_ratio_low == 0.0
    config = load("worker.actor.kl_loss_type=k1", "worker.actor.loss_type=vanilla", "worker.actor.tau_positive=2")
    assert config.algorithm.kl_penalty == "kl" and config.worker.actor.loss_type == "default"
    assert config.worker.actor.tau_positive == 2.0


def test_steps_between_validations():
    assert load("trainer.test_freq=7").trainer.val_freq == 7


def test_one_key_under_two_names():
    assert "twice under different names" in mistake("worker.actor.clip_low=0.1", "worker.actor.clip_ratio_low=0.2")


def test_single_clip_ratio_and_single_metric():
    config = load("worker.actor.clip_ratio=0.25", "data.curriculum_metric=self_bleu_123")
    assert config.worker.actor.clip_ratio_low == config.worker.actor.clip_ratio_high == 0.25
    assert config.data.curriculum_metrics == ["self_bleu_123"]


@pytest.mark.parametrize(
    "keys",
    [
        ("worker.actor.clip_ratio=0.1", "worker.actor.clip_ratio_high=0.3"),
        ("data.curriculum_metric=accuracy", "data.curriculum_metrics=[self-bleu]"),
        ("worker.reward.compute_score=math", "worker.reward.reward_function=r1v"),
        ("worker.reward.base_url=http://a:1/v1", "worker.reward.base_urls=['http://b:1/v1']"),
    ],
)
def test_no_key_overwrites_another_in_either_order(keys):
    for given in (keys, keys[::-1]):
        assert "twice under different names" in mistake(*given)


def test_two_names_may_agree_and_one_of_them_may_be_empty():
    assert load("worker.actor.clip_ratio_high=0.3", "worker.actor.clip_ratio=0.3").worker.actor.clip_ratio_low == 0.3
    for keys in (("base_url=null", "base_urls=['http://a:1/v1']"), ("base_url=http://a:1/v1", "base_urls=null")):
        assert load(*(f"worker.reward.{key}" for key in keys)).worker.reward.judge.base_urls == ["http://a:1/v1"]


def test_shuffle_false_is_sequential_unless_said_otherwise():
    assert load("data.shuffle=false").data.sampling_strategy == "sequential"
    assert load("data.shuffle=false", "data.sampling_strategy=curriculum").data.sampling_strategy == "curriculum"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (0.5, True)),
        (["data.curriculum_refresh=full"], (0.5, True)),
        (["data.curriculum_refresh=online"], (0.8, False)),
        (["config=mmr1_online"], (0.8, False)),
        (["data.curriculum_refresh=online", "data.curriculum_mixture_ratio=.5"], (0.5, False)),
        (["config=mmr1_h100", "data.curriculum_replacement=true"], (0.8, True)),
    ],
)
def test_the_draw_that_a_refresh_brings(arguments, expected):
    data = load(*arguments).data
    assert (data.curriculum_mixture_ratio, data.curriculum_replacement) == expected


def test_tables_of_upstream_keys_are_about_other_keys_than_ours():
    ours = set(leaf_types())
    assert set(RENAMED.values()) <= ours
    assert not ours & (set(RENAMED) | set(ONLY) | set(IGNORED))


@pytest.mark.parametrize("num_steps", [1, 9, 10, 19, 60, 1001])
def test_a_fault_costs_a_tenth_of_a_run_at_most(num_steps):
    config = RunConfig()
    assert steps_between_saves(config, num_steps) <= max(1, num_steps / 10)
    config.trainer.save_freq = 7
    assert steps_between_saves(config, num_steps) == 7


@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        ("presence_penalty", "0", "0.5"), ("frequency_penalty", "0", "0.5"), ("min_tokens", "0", "8"),
        ("stop_token_ids", "null", "[7]"),
    ],
)  # fmt: skip
def test_validation_that_is_not_implemented_is_refused(key, neutral, other):
    section = "worker.rollout.val_override_config"
    assert load_config([f"{section}.{key}={neutral}"]).warnings == ()
    assert load_config([f"{section}.{key}=null"]).warnings == ()
    assert f"{section}.{key} must be" in mistake(f"{section}.{key}={other}")


def test_validation_has_its_own_length():
    assert load("worker.rollout.val_override_config.max_tokens=7").worker.rollout.val_override_config.max_tokens == 7
    assert "samples by worker.rollout.seed" in mistake("worker.rollout.val_override_config.seed=3")


def test_every_upstream_key_is_read_as_the_table_says(tmp_path, monkeypatch):
    """A configuration with every key loads unchanged; docs/coming_from.md says of each what becomes of it."""
    monkeypatch.chdir(tmp_path)
    path = GUIDE / "every_upstream_key.yaml"
    loaded = load_config([f"config={path}"])
    config, actor = loaded.config, loaded.config.worker.actor
    check_config(config, 8)
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.21, 0.29) and actor.padding_free
    assert actor.offload.offload_params and actor.offload.offload_optimizer  # fsdp.enable_cpu_offload
    assert config.worker.ref.offload.offload_params
    assert config.worker.critic.cliprange_value == 0.5 and config.worker.critic.optim.lr == 1e-6
    assert actor.optim.lr_scheduler_type == "cosine" and actor.optim.min_lr_ratio == 0.0
    assert config.trainer.total_episodes == 12 and config.trainer.resume is False
    assert config.worker.rollout.engine == "vllm" and config.worker.rollout.dtype == "bf16"
    assert config.worker.rollout.val_override_config.temperature == 0.6
    assert config.worker.reward.reward_function == "math" and config.worker.reward.num_workers == 3
    assert config.data.format_prompt.endswith("configs/format_prompt/math.jinja")
    assert "SECRET" not in " ".join(loaded.warnings)
    assert len(loaded.warnings) == 5  # two of example files that ours replace, two of keys that are not read
    (ignored,) = [line for line in loaded.warnings if line.startswith("ignored keys: ")]
    ignored = set(ignored.removeprefix("ignored keys: ").split(", "))
    table = (GUIDE.parents[1] / "docs" / "coming_from.md").read_text().partition("| upstream's key |")[2]
    said = dict(re.findall(r"^\| `([\w.]+)` \| (\w+(?: over| meaning)?) \|", table.partition("\n\n")[0], re.MULTILINE))
    assert set(said) == {key for key, _ in flat(yaml.safe_load(path.read_text()))}
    assert {key for key, word in said.items() if word == "passed over"} == ignored
    for key, word in said.items():
        if word in ("same", "better", "other meaning"):
            assert key in leaf_types(), key
        elif word == "renamed":
            assert key not in leaf_types(), key
        elif word == "refused":
            assert f"{key} must be" in mistake(f"{key}=another")


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
