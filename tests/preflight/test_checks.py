"""What must hold before a model is loaded: choices, ranges, batch arithmetic."""

import pytest
from fixtures.configs import check, load, model_folder, refused
from fixtures.dry_runs import write_rows

from mmr1_ds.config.derived import resolved_critic, total_training_steps
from mmr1_ds.preflight.checks import check_config


def test_batch_arithmetic(valid):
    plan = check(valid, "trainer.total_episodes=3")
    assert plan.responses_per_step == 60
    assert plan.optimizer_steps_per_step == 2
    assert plan.responses_per_optimizer_step == 30
    assert plan.micro_batches_per_rank == 5  # 30 responses, 2 ranks, 3 at once
    assert plan.experience_micro_batches_per_rank == 2  # 30 responses a rank, 16 at once
    assert plan.train_data.num_rows == 7 and plan.total_steps == 3


@pytest.mark.parametrize("num_prompts, steps", [(401, 33 * 15), (12, 15), (7, 15)])
def test_number_of_steps(valid, num_prompts, steps):
    assert total_training_steps(load(*valid), num_prompts) == steps
    assert total_training_steps(load(*valid, "trainer.max_steps=9"), num_prompts) == 9


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("data.rollout_batch_size=13", "13 % 6 = 1; set data.rollout_batch_size to 12 or 18"),
        (
            "worker.actor.micro_batch_size_per_device_for_update=4",
            "6 * 5 / 2 = 15, 15 % 4 = 3; set the micro-batch to 3",
        ),
        ("worker.rollout.n=1", "worker.rollout.n must be 2 or more, got 1"),
        ("worker.rollout.temperature=0", "worker.rollout.temperature must be over 0, got 0.0"),
        ("data.curriculum_mixture_ratio=1.5", "data.curriculum_mixture_ratio must be in [0, 1], got 1.5"),
        ("worker.rollout.min_p=1.5", "worker.rollout.min_p must be in [0, 1], got 1.5"),
        ("worker.rollout.repetition_penalty=0", "worker.rollout.repetition_penalty must be over 0, got 0.0"),
        ('worker.rollout.stop=["a",""]', "has an empty text, which ends every response; remove it"),
        ("worker.rollout.top_k=0", "worker.rollout.top_k must be 1 or more, or -1, got 0"),
        ("worker.actor.optim.betas=[0.9,1.0]", "worker.actor.optim.betas must each be in [0, 1), got 1.0"),
        ("data.sampling_strategy=curiculum", "did you mean curriculum?"),
        ("trainer.logger=[console,comet]", "comet"),
        ("data.train_weights=[2,1]", "data.train_weights has 2 weights, data.train_files 1 sources; give one for each"),
        ("data.train_weights=[0]", "data.train_weights must each be over 0, got 0"),
        ("worker.ref.ema_decay=0.9", "needs worker.ref.update_freq, which is 0; set it to 1"),
        ("trainer.n_gpus_per_node=8", "1 * 8 = 8, but 2 processes were started"),
        ("worker.rollout.tensor_parallel_size=3", "2 % 3 = 2; set it to 1 or 2"),
        ("worker.actor.model.model_path=/x/demo_assets/model", "not a hub id of the form org/name; make demo makes"),
        ("worker.actor.model.model_path=/x/real_text_assets/model", "form org/name; make real makes it"),
        ("data.id_key=id", "(data.id_key); it has problem, answer, images; name one of them, or set data.id_key=null"),
        ("worker.rollout.max_model_len=100", "512 + 512 = 1024"),
        ("data.min_pixels=5000000", "over data.max_pixels=4194304"),
        ("trainer.val_only=true", "needs data.val_files"),
        ("trainer.experiment_name=''", "trainer.experiment_name is empty"),
        ("worker.rollout.val_override_config.n=2", "n=2 greedy answers"),
        ("worker.rollout.temperature=0.009", "worker.rollout.temperature=0.009: vLLM would sample at 0.01 in"),
        ("worker.rollout.val_override_config.temperature=1e-6", "val_override_config.temperature=1e-06: vLLM would"),
        ("worker.rollout.val_override_config.max_tokens=513", "set worker.rollout.max_model_len=1025"),
        ("worker.actor.optim.lr=inf", "worker.actor.optim.lr must be finite, got inf"),
        ("algorithm.kl_coef=.nan", "algorithm.kl_coef must be finite, got nan"),
        ("worker.rollout.kv_cache_gb=0", "worker.rollout.kv_cache_gb must be 1 or more, got 0"),
    ],
)
def test_refused_with_the_numbers(valid, argument, expected):
    assert expected in refused(valid, argument)


def test_answers_of_verl_s_rows_are_found(valid, tmp_path):
    rows = [{"prompt": "2 + 5?", "reward_model": {"ground_truth": "7", "style": "rule"}}] * 7
    data = [f"data.train_files={write_rows(tmp_path, 'verl.json', rows)}", "data.prompt_key=prompt"]
    assert "; rows of verl have it in data.answer_key=reward_model.ground_truth" in refused(valid, *data)
    check(valid, *data, "data.answer_key=reward_model.ground_truth")


def test_the_note_on_a_bent_distribution_names_what_bends_it(valid):
    def note(*argv):
        return next((note for note in check(valid, *argv).notes if "sampled distribution is not the whole" in note), "")

    assert note("worker.rollout.top_p=0.99").startswith("worker.rollout.top_p=0.99: the sampled")
    assert note("worker.rollout.top_k=7", "worker.rollout.min_p=0.1").startswith("worker.rollout.top_k=7, min_p=0.1: ")
    assert note("worker.rollout.top_p=1.0") == ""


def test_ranks_that_do_not_divide_the_batch(valid):
    message = refused(valid, "trainer.n_gpus_per_node=4", world_size=4)
    assert "6 % 4 = 2; set it to 4 or 8" in message


def test_whole_sequences_must_fit_without_chunked_prefill(valid):
    chunked = ["worker.rollout.enable_chunked_prefill=false", "worker.rollout.max_num_batched_tokens=1000"]
    assert "max_num_batched_tokens=1000 is under the longest sequence (1024 tokens)" in refused(valid, *chunked)


def test_sequences_must_fit_the_model_s_positions(valid, tmp_path):
    vllm, text = "worker.rollout.engine=vllm", {"max_position_embeddings": 1000}
    expected = "512 + 512 = 1024, the model has 1000 positions (max_position_embeddings); set data.max_response_length"
    for content in (text, {"text_config": text}, {**text, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6]}}):
        folder = model_folder(tmp_path, **content)
        assert f"{expected} to 488 or less" in refused(valid, folder, vllm)
        check(valid, folder, vllm, "data.max_response_length=488")
    assert "set the two to 1000 together" in refused(valid, folder, vllm, "data.max_prompt_length=1000")
    longer = ["data.max_response_length=488", "worker.rollout.max_model_len=1001"]
    assert "max_model_len=1001, the model has 1000 positions; lower it" in refused(valid, folder, vllm, *longer)
    # Where it is not vLLM that says so, or not certain that it would.
    check(valid, folder, "worker.rollout.engine=hf")
    check(valid, folder, vllm, "worker.actor.model.override_config={max_position_embeddings: 1024}")
    for doubt in ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"model_max_length": 2048}):
        check(valid, model_folder(tmp_path, **text, **doubt), vllm)
    layers = {"full_attention": {"rope_type": "linear", "factor": 4.0}}
    check(valid, model_folder(tmp_path, text_config=text | {"rope_parameters": layers}), vllm)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["data.curriculum_draw=posterior"], "set data.curriculum_refresh=online, or data.curriculum_draw=candidates"),
        (["data.curriculum_metrics=[learnabillity]"], "unknown metric 'learnabillity'; known: learnability, "),
        (["data.curriculum_metrics=[learnability,self-bleu]"], "one weight a metric"),
        (["data.curriculum_metrics=[self-bleu,self_bleu_123]", "data.curriculum_metric_weights=[1,1]"], "lists self"),
        (["data.curriculum_metric_weights=[-1.0]"], "data.curriculum_metric_weights must each be 0 or more, got -1.0"),
    ],
)
def test_metrics(valid, arguments, expected):
    assert expected in refused(valid, *arguments)


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("algorithm.adv_estimator=opo", "algorithm.adv_estimator must be grpo or dr_grpo or rloo or "),
        ("algorithm.kl_penalty=full", "algorithm.kl_penalty must be kl or abs or mse or low_var_kl, got full"),
        ("algorithm.kl_type=adaptiv", "algorithm.kl_type must be fixed or adaptive, got adaptiv; did you mean adap"),
        ("algorithm.rollout_is=seq", "algorithm.rollout_is must be token or sequence or none, got seq"),
        ("algorithm.rollout_is_threshold=0.5", "algorithm.rollout_is_threshold must be 1 or more, got 0.5"),
        ("algorithm.gamma=1.01", "algorithm.gamma must be in [0, 1], got 1.01"),
        ("algorithm.lam=-0.1", "algorithm.lam must be in [0, 1], got -0.1"),
        ("worker.critic.cliprange_value=0", "worker.critic.cliprange_value must be over 0, got 0.0"),
        ("worker.critic.loss_avg_mode=seq_sum", "worker.critic.loss_avg_mode must be token or seq, got seq_sum"),
        ("worker.critic.optim.betas=[0.9,1]", "worker.critic.optim.betas must each be in [0, 1), got 1.0"),
        ("worker.actor.loss_type=ppo2", "worker.actor.loss_type must be default or gspo or gspo_token or cispo or"),
        ("worker.actor.loss_type=clip_cov", "worker.actor.loss_type must be default or gspo or gspo_token or cispo or"),
        ("worker.actor.loss_avg_mode=batch", "loss_avg_mode must be token or seq or seq_sum or path/file.py:function"),
        ("worker.actor.loss_scale_factor=512", "loss_scale_factor=512 needs worker.actor.loss_avg_mode=seq_sum, got "),
        ("worker.actor.tau_negative=0", "worker.actor.tau_negative must be over 0, got 0.0"),
        ("worker.actor.optim.strategy=sgd", "strategy must be adamw or adamw_bf16 or adamw_8bit or muon, got sgd"),
        ("worker.rollout.name=sglang", "worker.rollout.engine must be auto or vllm or server or hf, got"),
        ("data.curriculum_momentum=1.0", "data.curriculum_momentum must be in [0, 1), got 1: no weight would ever"),
        ("data.curriculum_momentum=1.5", "data.curriculum_momentum must be in [0, 1], got 1.5"),
    ],
)
def test_values_of_ours_that_are_not_implemented(valid, argument, expected):
    assert expected in refused(valid, argument)


def test_kl_cov_needs_several_optimiser_steps_a_batch(valid):
    check(valid, "worker.actor.loss_type=kl_cov")
    check(valid, "worker.actor.loss_type=kl_cov", "worker.actor.global_batch_size=12", "worker.actor.ppo_epochs=2")
    expected = "of a batch starts from; set worker.actor.global_batch_size below data.rollout_batch_size"
    assert expected in refused(valid, "worker.actor.loss_type=kl_cov", "worker.actor.global_batch_size=12")


GAE = "algorithm.adv_estimator=gae"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["worker.critic.global_batch_size=3"], "=3 must be a multiple of worker.actor.global_batch_size=6 and divide"),
        (["worker.critic.global_batch_size=24"], "divide data.rollout_batch_size=12: the ranks split"),
        (
            ["worker.critic.global_batch_size=12", "worker.critic.micro_batch_size_per_device_for_update=4"],
            "12 * 5 / 2 = 30, 30 % 4 = 2; set the micro-batch to 3",
        ),
        (["worker.critic.model.model_path=./none"], "worker.critic.model.model_path: no such folder './none'"),
        (["trainer.critic_warmup=9", "trainer.max_steps=9"], "leaves the actor none of 9 steps"),
    ],
)
def test_a_critic_that_cannot_work(valid, arguments, expected):
    assert expected in refused(valid, GAE, *arguments)


def test_a_critic_takes_the_actor_s_batches_and_model_unless_told(valid):
    config = load(*valid, GAE, "worker.actor.model.override_config={a: 1, b: 2}")
    config.worker.critic.model.override_config = {"b": 3}
    config.worker.actor.dynamic_batching = False
    critic = resolved_critic(config)
    assert (critic.global_batch_size, critic.micro_batch_size_per_device_for_update) == (6, 3)
    assert critic.dynamic_batching is False and critic.padding_free is True
    assert critic.model.model_path == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert critic.model.override_config == {"a": 1, "b": 3}
    assert config.worker.critic.global_batch_size is None and config.worker.critic.model.model_path is None
    config.worker.critic.model.model_path, config.worker.critic.global_batch_size = "org/other", 12
    critic = resolved_critic(config)
    assert critic.model.override_config == {"b": 3} and critic.global_batch_size == 12
    check_config(config, 2)


GDPO = "algorithm.adv_estimator=gdpo"
TWO_REWARDS = "worker.reward.functions=[{function: math}, {function: r1v, weight: 0.5}]"


def test_gdpo_needs_several_rewards_and_no_kl_in_them(valid):
    check(valid, GDPO, TWO_REWARDS)
    assert "gdpo needs several rewards; name them in worker.reward.functions" in refused(valid, GDPO)
    assert "set algorithm.use_kl_loss=true" in refused(valid, GDPO, TWO_REWARDS, "algorithm.use_kl_loss=false")


@pytest.mark.parametrize("function", ["math", "r1v", "openr1_wo_LMM"])
def test_kwargs_of_built_in_rewards_fit(valid, function):
    name = f"worker.reward.reward_function={function}"
    said = refused(valid, name, "worker.reward.reward_function_kwargs={bogus: 1}")
    assert f"the kwargs do not fit {function!r}: got an unexpected keyword argument 'bogus'" in said
    said = refused(valid, f"worker.reward.functions=[{{function: {function}, kwargs: {{bogus: 1}}}}]")
    assert f"the kwargs do not fit {function!r}" in said
    check(valid, "worker.reward.reward_function_kwargs={format_weight: 0.2}")


def test_one_reward_beside_several_is_refused(valid):
    said = refused(valid, TWO_REWARDS, "worker.reward.reward_function=r1v")
    assert "worker.reward.reward_function=r1v is not used beside worker.reward.functions" in said
    said = refused(valid, TWO_REWARDS, "worker.reward.reward_function_kwargs={format_weight: 0.2}")
    assert "worker.reward.reward_function_kwargs is not used beside worker.reward.functions" in said
    check(valid, TWO_REWARDS, "worker.reward.reward_function=math")


def test_a_best_that_no_validation_has_is_refused(valid):
    said = refused(valid, "trainer.best_metric=val/nope")
    assert "trainer.best_metric=val/nope is a figure of the validation: data.val_files is empty" in said
    files = valid[1].replace("train_files", "val_files")
    said = refused(valid, "trainer.best_metric=reward/overall", files)
    assert "trainer.best_metric=reward/overall is no figure of the validation" in said
    check(valid, "trainer.best_metric=val/pass_at_8", files)


def test_a_profile_of_a_step_that_never_comes_is_refused(valid):
    said = refused(valid, "trainer.max_steps=9", "trainer.profile_steps=[2, 10]")
    assert "trainer.profile_steps has 10, the run has 9 steps" in said
    check(valid, "trainer.max_steps=9", "trainer.profile_steps=[9]")


def test_without_gae_there_is_no_critic(valid):
    assert "trainer.critic_warmup=2 needs a critic, which algorithm.adv_estimator=rloo lacks" in refused(
        valid, "algorithm.adv_estimator=rloo", "trainer.critic_warmup=2"
    )


def test_transformers_has_no_tensor_parallelism(valid):
    message = refused(valid, "worker.rollout.engine=hf", "worker.rollout.tensor_parallel_size=2")
    assert "worker.rollout.tensor_parallel_size=2 needs vLLM, got worker.rollout.engine=hf" in message
    message = refused(valid, "worker.rollout.engine=hf", "worker.actor.offload_states=true")
    assert "worker.actor.offload_states=true moves away the weights that worker.rollout.engine=hf samples" in message


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("worker.actor.padding_free=false", "needs packed sequences; set worker.actor.padding_free=true"),
        ("worker.rollout.engine=hf", "transformers cannot generate with cut sequences"),
        ("algorithm.adv_estimator=gae", "the critic of algorithm.adv_estimator=gae does not cut sequences"),
    ],
)
def test_what_sequence_parallel_does_not_go_with(valid, argument, expected):
    message = refused(valid, argument, "worker.actor.ulysses_size=2")
    assert "worker.actor.ulysses_size=2" in message and expected in message


def test_the_model_s_features_need_whole_prompts(valid):
    asked = ["data.curriculum_features=model", "data.sampling_strategy=curriculum", "worker.actor.ulysses_size=2"]
    message = refused(valid, *asked, "data.curriculum_refresh=online")
    assert message.startswith("data.curriculum_features=model reads whole prompts, which worker.actor.ulysses_size=2")
    check_config(load(*valid, *asked, "data.curriculum_refresh=full"), 2)  # which reads none


@pytest.mark.parametrize("part", [None, "text_config"])
def test_adapters_alone_are_not_sent_to_mixtures_of_experts(valid, tmp_path, part):
    experts = {"num_experts": 4}
    folder = model_folder(tmp_path, **(experts if part is None else {part: experts}))
    lora = ["worker.actor.model.lora.rank=8", "worker.rollout.lora_sync=adapters"]
    message = refused(valid, folder, *lora)
    assert message == (
        "worker.rollout.lora_sync=adapters is not for mixtures of experts; set worker.rollout.lora_sync=merged"
    )


def test_an_output_layer_that_vllm_would_leave_random_is_named(valid, tmp_path):
    content = {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": {}}
    assert "tie_word_embeddings is true in " in refused(valid, model_folder(tmp_path, **content))
    over = "worker.actor.model.override_config"
    for argument in (f"{over}.text_config.tie_word_embeddings=true", f"{over}.tie_word_embeddings=false"):
        check(valid, model_folder(tmp_path, **content), argument)
    content["text_config"] = {"tie_word_embeddings": True}
    check(valid, model_folder(tmp_path, **content))
    key = f"{over}.text_config.tie_word_embeddings"
    message = refused(valid, model_folder(tmp_path, **content), f"{key}=false")
    assert "tie_word_embeddings is true in " in message and message.endswith(f"{key}=true")


@pytest.mark.parametrize(
    "arguments",
    [
        ["data.curriculum_momentum=1.0", "data.curriculum_refresh=online"],  # which does not read it
        *(
            [f"data.curriculum_metrics=[{names}]", "data.curriculum_metric_weights=[1,1,1,1]"]
            for names in (
                "learnability,self_bleu_123,distinct_3,edit_distance",
                "self-bleu,distinct-n,edit-distance,learnability",
            )
        ),
        ["algorithm.use_kl_loss=false"],  # KL in the reward
        ["algorithm.use_kl_loss=false", "algorithm.disable_kl=true"],
        ["algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.99", "algorithm.kl_penalty=k1"],
        ["worker.actor.loss_avg_mode=seq_sum", "worker.actor.loss_scale_factor=512"],
        ["worker.actor.loss_type=cispo", "worker.actor.clip_ratio_low=1.0", "algorithm.rollout_is=sequence"],
        ["algorithm.kl_type=adaptive", "algorithm.kl_horizon=13"],  # 60 responses a step
        ["algorithm.kl_target=0.0", "algorithm.kl_horizon=0.0"],  # upstream's, of the fixed coefficient
    ],
)
def test_ways_to_learn(valid, arguments):
    check(valid, *arguments)


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("algorithm.kl_coef=0", "algorithm.kl_coef must be over 0 with algorithm.kl_type=adaptive, got 0"),
        ("algorithm.kl_target=0", "algorithm.kl_target must be over 0 with algorithm.kl_type=adaptive, got 0"),
        ("algorithm.kl_horizon=12", "kl_horizon=12 is too short for 60 responses a step: one step may change kl_coef"),
    ],
)
def test_adaptive_kl(valid, argument, expected):
    assert expected in refused(valid, "algorithm.kl_type=adaptive", argument)
    check(valid, "algorithm.kl_type=adaptive", "algorithm.disable_kl=true", argument)


def test_an_estimate_that_pulls_nowhere_is_noted(valid):
    def notes(*argv):
        return " ".join(check(valid, "algorithm.kl_penalty=k1", *argv).notes)

    unused = "worker.ref.offload.offload_optimizer"
    assert unused in notes(f"{unused}=true") and unused not in notes()
    assert "its gradient is zero on average" in notes()
    assert "its gradient" not in notes("algorithm.use_kl_loss=false") + notes("algorithm.disable_kl=true")


def test_shuffle_false_contradicts_shuffle(valid):
    assert "contradicts" in refused(valid, "data.shuffle=false", "data.sampling_strategy=shuffle")


def test_a_reference_that_is_the_model_without_adapters_does_not_move(valid):
    message = refused(valid, "worker.ref.update_freq=4", "worker.actor.model.lora.rank=8")
    assert "worker.ref.update_freq=4: with worker.actor.model.lora.rank=8 the reference is the model without" in message
