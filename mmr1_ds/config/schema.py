"""The run configuration: one typed tree, EasyR1's names where EasyR1 has the key.

Reading files and the command line is `config_loading`, upstream's other spellings are `config_upstream`, what must
hold between keys is `config_checks`. Ranges in the comments are those that `config_checks` holds a run to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    """What is asked, how it is read, and in which order prompts are drawn."""

    train_files: Any = ""  # path, directory, hub name, each with an optional @split, or a list of them
    val_files: Any = ""  # the same; "" = no validation
    prompt_key: str = "prompt"  # column with the question
    answer_key: str = "answer"  # column with the ground truth the reward compares with
    image_key: str = "images"  # column with the images (bytes, paths or PIL); text-only data has none
    id_key: str | None = None  # column with a stable id; null = a digest of the row's content
    category_key: str | None = None  # column that groups similar prompts; null = no groups
    image_dir: str | None = None  # folder that relative image paths start from; null = the data file's
    system_prompt: str | None = None  # system message before every prompt; null = none
    format_prompt: str | None = None  # jinja template over `content`: its path, or the template itself
    max_prompt_length: int = 512  # tokens, images included, >= 1
    max_response_length: int = 512  # tokens, >= 1
    rollout_batch_size: int = 512  # prompts a step, >= 1, a multiple of worker.actor.global_batch_size
    val_batch_size: int = -1  # prompts a validation call, >= 1, or -1 = all at once
    shuffle: bool = True  # false with no sampling_strategy given means sequential
    seed: int = 1  # of the order and the draws, >= 0
    min_pixels: int | None = 262144  # smaller images are enlarged to this many pixels, >= 1; null = as they are
    max_pixels: int | None = 4194304  # larger images are shrunk to this many pixels, >= min_pixels; null = as they are
    filter_overlong_prompts: bool = True  # drop prompts over max_prompt_length, and say how many
    filter_overlong_prompts_workers: int = 16  # processes that measure prompts, >= 1
    sampling_strategy: str = "shuffle"  # shuffle | sequential | curriculum (variance-aware sampling)
    curriculum_metrics: list[str] = field(default_factory=lambda: ["learnability"])  # parts of the score, by name
    curriculum_metric_weights: list[float] = field(default_factory=lambda: [1.0])  # one a metric, >= 0
    curriculum_mixture_ratio: float = 0.5  # lambda: share of the batch drawn by score, [0, 1]; the rest in turn
    curriculum_update_freq: int = 4  # full: T: steps between refreshes, >= 0; 0 = at each epoch's end
    curriculum_rollout_n: int = 8  # full: responses a prompt in a refresh, >= 2
    curriculum_rollout_batch_size: int = 8192  # full: prompts a chunk of a refresh, over all ranks, >= 1
    curriculum_momentum: float = 0.0  # full: m in w <- m*w_old + (1-m)*w_new, [0, 1); 1 would freeze the weights
    curriculum_refresh: str = "full"  # full (roll the whole data, Algorithm 1) | online (learn as it goes)
    curriculum_probe_fraction: float = 0.1  # online: rollouts on prompts long unseen, as a share of training's, [0, 1]
    curriculum_replacement: bool = True  # draw the scored part with replacement, as the paper does
    curriculum_weight_floor: float = 0.01  # share of the largest weight, before sharpening, that all keep, [0, 1]


@dataclass
class AlgorithmConfig:
    """The estimator of advantages and the pull towards the reference."""

    adv_estimator: str = "grpo"  # grpo | dr_grpo | rloo | reinforce_plus_plus[_baseline] | remax | gae (with a critic)
    gamma: float = 1.0  # reinforce_plus_plus, gae: discount of a reward per token before it, [0, 1]
    lam: float = 1.0  # gae: lambda, [0, 1]; 0 trusts the critic's next value, 1 the rewards that follow
    disable_kl: bool = False  # true: no reference model and no KL at all
    use_kl_loss: bool = True  # true: the KL is a term of the loss; false: it is taken off the reward of each token
    kl_penalty: str = "low_var_kl"  # estimate of the KL: kl (k1) | abs | mse (k2) | low_var_kl (k3)
    kl_coef: float = 1.0e-2  # weight of the KL, >= 0; adaptive: where it starts
    kl_type: str = "fixed"  # fixed | adaptive (kl_coef is steered towards kl_target)
    kl_target: float = 0.1  # adaptive: the KL to hold, nats a token, > 0
    kl_horizon: float = 10000.0  # adaptive: responses that a correction by its whole error takes, > 0
    rollout_is: str = "token"  # truncated importance sampling, rollout engine to trainer: token | sequence | none
    rollout_is_threshold: float = 2.0  # importance weights are cut to this, >= 1
    online_filtering: bool = False  # draw again until a batch of groups that teach has come together (DAPO)
    filter_key: str = "overall"  # the reward's key that a kept group must differ in
    filter_low: float | None = None  # keep only groups whose mean is above; null = no bound
    filter_high: float | None = None  # and below


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights. Rollouts sample from the sum; without adapters it is the reference."""

    rank: int = 0  # of the adapters, >= 0; 0 = none, every weight is trained
    alpha: float = 16.0  # what an adapter computes is scaled by alpha / rank, > 0
    target_modules: Any = "all-linear"  # all-linear (but the output layer), or a list of names like [q_proj,v_proj]
    exclude_modules: Any = None  # layers to leave out: a regex of whole names like .*visual.*, or a list; null = none


@dataclass
class ModelConfig:
    """The model that is trained; the reference starts as a copy of it."""

    model_path: str | None = None  # folder with *.safetensors, or a hub id org/name; required
    tokenizer_path: str | None = None  # null = model_path
    override_config: dict[str, Any] = field(default_factory=dict)  # keys of the model's own config.json to replace
    enable_gradient_checkpointing: bool = True  # recompute activations in the backward: less memory, a third slower
    trust_remote_code: bool = False  # run code that comes with the model
    freeze_vision_tower: bool = False  # train the language model only; it has no adapters then either
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule, in optimiser steps."""

    lr: float = 1.0e-6  # highest learning rate, > 0
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the two moments, each in [0, 1)
    weight_decay: float = 1.0e-2  # decoupled, >= 0
    strategy: str = "adamw"  # adamw
    lr_warmup_ratio: float = 0.0  # share of the run's optimiser steps spent warming up, [0, 1]
    lr_warmup_steps: int | None = None  # optimiser steps, >= 0, instead of the ratio
    lr_scheduler_type: str = "constant"  # constant | cosine | linear, after the warm-up
    min_lr_ratio: float = 0.0  # where cosine and linear end, as a share of lr, [0, 1]


@dataclass
class OffloadConfig:
    """What ZeRO-3 keeps in host memory. On a CPU run everything is there already."""

    offload_params: bool = False  # parameters
    offload_optimizer: bool = False  # optimiser states, and the optimiser step with them


@dataclass
class ActorConfig:
    """The update."""

    global_batch_size: int = 256  # prompts (worker.rollout.n responses each) an optimiser step, a multiple of the ranks
    micro_batch_size_per_device_for_update: int = 4  # responses a forward and backward, >= 1
    micro_batch_size_per_device_for_experience: int = 16  # responses a forward for log-probabilities, >= 1
    padding_free: bool = True  # sequences end to end, without padding; families not tested so are padded
    ulysses_size: int = 1  # ranks that compute each sequence together, a divisor of their number
    dynamic_batching: bool = True  # as many responses a micro-batch as have the tokens of its size at full length
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, > 0
    loss_type: str = "default"  # default (clipped PPO) | gspo | gspo_token | cispo | sapo
    clip_ratio_low: float = 0.2  # all but sapo: the ratio is clipped below at 1 - this, [0, 1]
    clip_ratio_high: float = 0.3  # all but sapo: and above at 1 + this, >= 0
    clip_ratio_dual: float = 3.0  # default: bound of the loss for negative advantages (dual clip), > 1
    tau_positive: float = 1.0  # sapo: temperature of the gate for positive advantages, > 0
    tau_negative: float = 1.05  # sapo: and for negative ones, > 0; higher forgets off-policy tokens sooner
    loss_avg_mode: str = "token"  # of an optimiser step: token (mean over tokens) | seq (over responses) | seq_sum
    loss_scale_factor: float | None = None  # seq_sum: what a sum is divided by, > 0; null = data.max_response_length
    ppo_epochs: int = 1  # passes over each rollout batch, >= 1
    deepspeed: Any = None  # JSON DeepSpeed config: its path, or inline; null = configs/deepspeed/zero3_{h100,cpu}.json
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    offload_states: bool = False  # states wait in host memory while vLLM samples; not with other offload


@dataclass
class CriticModelConfig:
    """The model under the critic's value head; its output layer is not loaded."""

    model_path: str | None = None  # null = the actor's; another must read the same tokens and images
    override_config: dict[str, Any] = field(default_factory=dict)  # keys of the model's own config.json to replace
    enable_gradient_checkpointing: bool = True  # recompute activations in the backward: less memory, a third slower
    trust_remote_code: bool = False  # run code that comes with the model
    freeze_vision_tower: bool = False  # train the language model and the head only


@dataclass
class CriticConfig:
    """The model of what a state is worth; it exists with algorithm.adv_estimator=gae only."""

    global_batch_size: int | None = None  # prompts an optimiser step, a multiple of the actor's; null = the actor's
    micro_batch_size_per_device_for_update: int | None = None  # responses a forward and backward; null = the actor's
    micro_batch_size_per_device_for_experience: int | None = None  # responses a forward for values; null = the actor's
    padding_free: bool | None = None  # as worker.actor.padding_free; null = the actor's
    dynamic_batching: bool | None = None  # as worker.actor.dynamic_batching; null = the actor's
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, > 0
    cliprange_value: float = 0.5  # how far from its value at the rollout a value is rewarded for moving, > 0
    loss_avg_mode: str = "token"  # of an optimiser step: token (mean over tokens) | seq (over responses)
    ppo_epochs: int = 1  # passes over each rollout batch, >= 1
    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)  # 1e-5 is a common lr of critics
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass
class RefConfig:
    """The frozen reference."""

    offload: OffloadConfig = field(default_factory=OffloadConfig)  # offload_params only: it has no optimiser


@dataclass
class ValidationSampling:
    """How validation answers are sampled."""

    temperature: float = 0.0  # >= 0, 0 = greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = -1  # >= 1, or -1 = all
    n: int = 1  # answers a prompt, >= 1; accuracies are averaged


@dataclass
class RolloutConfig:
    """How responses are sampled while training."""

    engine: str = "auto"  # auto (vllm where installed) | vllm | server (vLLM beside the ranks) | hf (transformers)
    n: int = 8  # responses a prompt (the group), >= 2
    temperature: float = 1.0  # > 0
    top_p: float = 1.0  # (0, 1]
    top_k: int = -1  # >= 1, or -1 = all
    seed: int = 1  # >= 0
    limit_images: int = 0  # images a prompt at most (more is an error), >= 0; 0 = as many as the data has
    dtype: str = "auto"  # auto (bf16 on GPU, fp32 on CPU) | bf16 | fp32
    gpu_memory_utilization: float = 0.6  # share of the GPU that vLLM may take, (0, 1]
    kv_cache_gb: int | None = None  # GB of vLLM's key-value cache, >= 1, CPU only; null = 4
    enforce_eager: bool = False  # true: no CUDA graphs; starts sooner, samples slower
    enable_chunked_prefill: bool = True  # false needs max_num_batched_tokens >= max_model_len
    tensor_parallel_size: int = 1  # ranks that share one vLLM engine, a divisor of the ranks
    max_model_len: int | None = None  # tokens; null = max_prompt_length + max_response_length, never less
    max_num_batched_tokens: int = 8192  # tokens vLLM schedules at once, >= 1
    max_num_seqs: int = 256  # responses vLLM samples at once, >= 1
    sleep: bool = True  # vllm on GPU: its weights and cache leave the GPU while the actor trains
    num_servers: int = 1  # server: vLLM servers that the run starts, >= 1, each on tensor_parallel_size GPUs
    server_devices: list[int] = field(default_factory=list)  # server: GPUs of rank 0's node; [] = after the ranks'
    server_urls: list[str] = field(default_factory=list)  # server: those of `mmr1-ds serve`; none is started then
    server_host: str = "127.0.0.1"  # server: the interface that started servers listen on
    server_key_variable: str = "MMR1_DS_SERVER_KEY"  # server: environment variable with their key; unset = a new one
    server_start_seconds: float = 900.0  # server: time to load a model, > 0
    server_timeout_seconds: float = 60.0  # server: without a sign of life for so long it is started anew, > 0
    request_timeout_seconds: float = 3600.0  # server: the responses to a prompt, > 0; past it they are asked for again
    servers_gone_seconds: float = 1800.0  # server: with none left for so long the run saves and stops, > 0
    max_in_flight: int | None = None  # server: responses asked of one at once, >= n; null = twice max_num_seqs
    weight_transfer: str = "auto"  # server: nccl | ipc | shared_memory; auto = nccl on GPU, shared_memory on CPU
    partial: int | None = None  # tokens a response grows by in a step, longer ones go on in the next; null = no bound
    max_staleness_steps: int = 0  # server: steps that sampling may run ahead of training, >= 0; 0 = in turn
    weight_swap: str = "boundary"  # server: new weights come between requests (boundary) | in the middle (in_flight)
    val_override_config: ValidationSampling = field(default_factory=ValidationSampling)


@dataclass
class CosineLengthConfig:
    """The openr1 rewards' part by length: along half a cosine from length 0 to max_length."""

    min_value_wrong: float = -1.0  # of a wrong answer of length 0
    max_value_wrong: float = -0.5  # of a wrong answer of max_length or more
    min_value_correct: float = 0.0  # of a right answer of max_length or more
    max_value_correct: float = 0.0  # of a right answer of length 0
    max_length: int | None = None  # tokens, >= 1; null = data.max_response_length


@dataclass
class JudgeConfig:
    """The language model that openr1 and openr1_vllm ask about answers which the rules refuse."""

    base_urls: list[str] = field(default_factory=list)  # OpenAI-compatible servers, like [http://localhost:8000/v1]
    model: str | None = None  # its name at the server
    key_variable: str | None = None  # environment variable that holds the key; null = no key is sent
    timeout_seconds: float = 60.0  # a response, retries included, > 0; past it the response is unscored
    request_timeout_seconds: float = 30.0  # a request, > 0
    max_retries: int = 3  # requests after the first, >= 0
    max_tokens: int = 512  # tokens of the judge's reply, >= 1


@dataclass
class RewardConfig:
    """What scores a response."""

    reward_function: str = "math"  # math | r1v | openr1 | openr1_wo_LMM | openr1_vllm, or path/file.py:function
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)  # passed to every call
    num_workers: int = 4  # processes a rank, >= 1; each asks a judge about one response at a time
    timeout_seconds: float = 10.0  # a response, > 0; past it the response counts as failed; a judge has its own limit
    reward_type: str | None = None  # how a file's function is called: batch | sequential; null = as the file says
    cos_len_reward_config: CosineLengthConfig = field(default_factory=CosineLengthConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class WorkerConfig:
    """The parts that do the work, each with its own section."""

    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class TrainerConfig:
    """How long, how often, where."""

    total_episodes: int = 15  # passes over the data set, >= 1
    max_steps: int | None = None  # steps, >= 1, instead of total_episodes
    critic_warmup: int = 0  # gae: steps at first in which only the critic learns, >= 0
    max_try_make_batch: int = 20  # draws a batch with online_filtering, >= 1, or -1 (also 0) = until it is full
    project_name: str = "mmr1_ds"  # for wandb
    experiment_name: str = "default"  # names the run directory
    run_dir: str | None = None  # null = runs/<experiment_name>
    logger: list[str] = field(
        default_factory=lambda: ["console", "jsonl"]
    )  # and tensorboard, wandb; jsonl is always on
    nnodes: int = 1  # machines, >= 1
    n_gpus_per_node: int = 8  # ranks a node, >= 1; nnodes * n_gpus_per_node must be what was launched
    val_freq: int = -1  # steps between validations, >= 1, or -1 = none after the first
    val_before_train: bool = True  # validate before the first step
    val_only: bool = False  # validate and stop
    val_generations_to_log: int = 0  # validation answers logged, >= 0
    train_generations_to_log: int = 8  # prompts of a step kept with their best and worst answer, samples.jsonl, >= 0
    report_freq: int | None = -1  # steps between reports while it runs, >= 1, or -1 = only at the end; null = none
    save_freq: int = -1  # steps between checkpoints, >= 1, or -1 = only after the last
    save_limit: int = -1  # checkpoints kept, >= 1, or -1 = all
    save_checkpoint_path: str | None = None  # null = <run_dir>/checkpoints
    load_checkpoint_path: str | None = None  # a global_step_N folder to start from; null = none
    resume: bool = True  # go on from the newest good checkpoint of save_checkpoint_path
    dry_run: bool = False  # check everything, print the plan, load no model
    collective_timeout_seconds: float = 1800.0  # deadline of every collective, > 0
    max_wall_seconds: float | None = None  # after these save and end with exit code 75, > 0; null = never
    preemption_seconds: float = 30.0  # from SIGTERM or SIGUSR1 until the job is killed, > 0
    max_bad_updates: int = 3  # updates skipped in a row, their loss or gradient not finite, that end the run, >= 1


@dataclass
class RunConfig:
    """The whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "CriticConfig",
    "CriticModelConfig",
    "DataConfig",
    "ModelConfig",
    "OffloadConfig",
    "OptimConfig",
    "RefConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainerConfig",
    "ValidationSampling",
    "WorkerConfig",
]
