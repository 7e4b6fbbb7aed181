"""The run configuration: one typed tree, EasyR1's names where EasyR1 has the key.

A key is stated once, here: its type with the range or choices, its default, and its meaning and unit in the comment.
The checks (`ranges`), `mmr1-ds keys` and docs/configuration.md (`reference`) read them here. Files and the command line
are read in `loading`, upstream's other spellings in `upstream`; what must hold between keys is in `preflight/checks`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Numbers that a key takes, as an interval: "[0, 1)" includes 0 and excludes 1. Of a list, each element."""

    interval: str
    or_minus_one: bool = False
    reason: str = ""  # what an error adds

    def __contains__(self, value: float) -> bool:
        low, high = (float(bound) for bound in self.interval[1:-1].split(","))
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return (above and below) or (self.or_minus_one and value == -1)

    def __str__(self) -> str:
        low, words = self.interval[1:].partition(",")[0], f"in {self.interval}"
        if self.interval.endswith("inf)"):
            words = f"{low} or more" if self.interval[0] == "[" else f"over {low}"
        return words + (", or -1" if self.or_minus_one else "")


def names_a_file(value: str) -> bool:
    """Return whether a value names a function of the user's own: path/file.py:function."""
    return re.search(r"\.py:\w+$", value) is not None


class OneOf:
    """The words that a key takes, and functions of the user's own files if told so."""

    def __init__(self, *choices: str, or_function: bool = False) -> None:
        self.choices, self._or_function = choices, or_function

    def __contains__(self, value: str | None) -> bool:
        return value in self.choices or (self._or_function and value is not None and names_a_file(value))

    def __str__(self) -> str:
        return " or ".join(self.choices + (("path/file.py:function",) if self._or_function else ()))


PositiveInt = Annotated[int, Range("[1, inf)")]
PositiveOrMinusOne = Annotated[int, Range("[1, inf)", or_minus_one=True)]
NonNegativeInt = Annotated[int, Range("[0, inf)")]
PositiveFloat = Annotated[float, Range("(0, inf)")]
NonNegativeFloat = Annotated[float, Range("[0, inf)")]
Share = Annotated[float, Range("[0, 1]")]


@dataclass
class DataConfig:
    """The prompts: where they lie, how they are read, and in which order they are drawn."""

    train_files: Any = ""  # path, directory, hub name, each with an optional @split, or a list of them
    # how much of a step's prompts each of train_files gives, in proportion, exactly; [] = as many as it has
    train_weights: Annotated[list[float], Range("(0, inf)")] = field(default_factory=list)
    val_files: Any = ""  # as train_files; "" = no validation
    prompt_key: str = "prompt"  # column with the question
    answer_key: str = "answer"  # column with the ground truth, or a path like reward_model.ground_truth
    # column with the images (bytes, paths or PIL), which text-only data lacks; null = no images are read
    image_key: str | None = "images"
    # column with the videos (files, bytes, lists of frames), which most data lacks; null = no videos are read
    video_key: str | None = "videos"
    video_fps: PositiveFloat = 2.0  # frames that are taken of a second of a video
    video_max_frames: Annotated[int, Range("[2, inf)")] = 32  # of a video; a longer one gives fewer a second
    video_min_pixels: PositiveInt = 3136  # smaller frames are enlarged to so many pixels
    video_max_pixels: PositiveInt = 100352  # larger frames are shrunk to so many, >= video_min_pixels
    id_key: str | None = None  # column with a stable id; null = a digest of the row's content
    category_key: str | None = None  # column that groups similar prompts; null = no groups
    # columns that rewards see beside the ground truth and data_source: names, or all = all others without images
    reward_columns: Any = field(default_factory=list)
    image_dir: str | None = None  # folder that relative image paths start from; null = the data file's
    # true: paths in the data may lead out of the data's folder and data.image_dir
    allow_any_image_path: bool = False
    max_image_pixels: PositiveInt = 89_478_485  # images with more are refused before they are decoded
    system_prompt: str | None = None  # system message before every prompt; null = none
    format_prompt: str | None = None  # jinja template over `content`: its path, or the template itself
    # true: a last message of the assistant begins the response; false: it is the answer, and taken off the prompt
    assistant_prefill: bool = False
    max_prompt_length: PositiveInt = 512  # tokens, images and videos included
    max_response_length: PositiveInt = 512  # tokens
    rollout_batch_size: PositiveInt = 512  # prompts a step, a multiple of worker.actor.global_batch_size
    val_batch_size: PositiveOrMinusOne = -1  # prompts a validation call; -1 = all at once
    shuffle: bool = True  # false with no sampling_strategy given means sequential
    seed: NonNegativeInt = 1  # seed of the order and the draws
    min_pixels: PositiveInt | None = 262144  # smaller images are enlarged to so many pixels; null = as they are
    max_pixels: PositiveInt | None = 4194304  # larger images are shrunk to so many, >= min_pixels; null = as they are
    filter_overlong_prompts: bool = True  # drop prompts over max_prompt_length, and say how many
    filter_overlong_prompts_workers: PositiveInt = 16  # processes that measure prompts
    # order of the prompts; curriculum: variance-aware sampling
    sampling_strategy: Annotated[str, OneOf("shuffle", "sequential", "curriculum")] = "shuffle"
    curriculum_metrics: list[str] = field(default_factory=lambda: ["learnability"])  # parts of the score, by name
    curriculum_metric_weights: Annotated[
        list[float], Range("[0, inf)", reason="prompts of higher metrics are sampled more (self-bleu: 1 - self-BLEU)")
    ] = field(default_factory=lambda: [1.0])  # one a metric
    # lambda: share of the batch drawn by score; the rest in turn. online: left out, it is .8
    curriculum_mixture_ratio: Share = 0.5
    curriculum_update_freq: NonNegativeInt = 4  # full: T: steps between refreshes; 0 = at each epoch's end
    curriculum_rollout_n: Annotated[int, Range("[2, inf)")] = 8  # full: responses a prompt in a refresh
    curriculum_rollout_batch_size: PositiveInt = 8192  # full: prompts a chunk of a refresh, over all ranks
    curriculum_momentum: Share = 0.0  # full: m in w <- m*w_old + (1-m)*w_new, below 1
    # full: scores by rollouts of the whole data (Algorithm 1); online: by the training rollouts
    curriculum_refresh: Annotated[str, OneOf("full", "online")] = "full"
    # online: rollouts on prompts long unseen, as a share of training's
    curriculum_probe_fraction: Share = 0.0
    # online: what else says how hard prompts never seen are: their words, lengths and images, or the model's states
    curriculum_features: Annotated[str, OneOf("none", "text", "model")] = "text"
    # online: the table of mmr1-ds eval --pass-rates, from which the beliefs of a new run begin
    curriculum_prior: str | None = None
    # proportional: by weight, the paper's; candidates: the best of some; posterior, online alone: the best by beliefs
    curriculum_draw: Annotated[str, OneOf("proportional", "candidates", "posterior")] = "proportional"
    curriculum_candidates: PositiveInt = 8  # candidates: prompts that compete for each place of the scored part
    # proportional: draw the scored part with replacement, as the paper does. online: left out, it is false
    curriculum_replacement: bool = True
    # what computes the scores of groups: auto takes the Triton kernel on a GPU, else the C++ one
    curriculum_kernel: Annotated[str, OneOf("auto", "cpu", "triton")] = "auto"
    curriculum_weight_floor: Share = 0.01  # share of the largest weight, before sharpening, that all keep


@dataclass
class AlgorithmConfig:
    """The estimator of advantages and the pull towards the reference."""

    adv_estimator: Annotated[
        str,
        OneOf(
            "grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "gae", "gdpo",
            "grpo_passk", or_function=True,
        ),
    ] = "grpo"  # gae trains a critic; gdpo standardises each of worker.reward.functions by itself
    gamma: Share = 1.0  # reinforce_plus_plus, gae: discount of a reward per token before it
    lam: Share = 1.0  # gae: lambda; 0 trusts the critic's next value, 1 the rewards that follow
    disable_kl: bool = False  # true: no reference model and no KL at all
    use_kl_loss: bool = True  # true: the KL is a term of the loss; false: it is taken off the reward of each token
    # estimate of the KL: kl (k1), absolute, mse (k2), low_var_kl (k3)
    kl_penalty: Annotated[str, OneOf("kl", "abs", "mse", "low_var_kl")] = "low_var_kl"
    kl_coef: NonNegativeFloat = 1.0e-2  # weight of the KL; adaptive: where it starts
    kl_type: Annotated[str, OneOf("fixed", "adaptive")] = "fixed"  # adaptive: kl_coef is steered towards kl_target
    kl_target: NonNegativeFloat = 0.1  # adaptive: the KL to hold, nats a token; not 0 then
    kl_horizon: NonNegativeFloat = 10000.0  # adaptive: responses that a correction by its whole error takes; not 0 then
    # truncated importance sampling, rollout engine to trainer
    rollout_is: Annotated[str, OneOf("token", "sequence", "none")] = "token"
    rollout_is_threshold: Annotated[float, Range("[1, inf)")] = 2.0  # importance weights are cut to this
    # tokens left out by the ratio trainer / rollout: their own (IcePop), their response's product or mean, or k3
    rollout_mask: Annotated[str, OneOf("none", "token", "sequence", "geometric", "k3")] = "none"
    rollout_mask_low: NonNegativeFloat = 0.5  # rollout_mask, all but k3: smaller ratios are masked; 0 = no bound
    rollout_mask_high: PositiveFloat = 2.0  # rollout_mask: larger ratios are masked; k3: nats
    mask_truncated: bool = False  # a response cut at the length limit trains nothing; its reward counts in its group
    overlong_buffer: NonNegativeInt = 0  # tokens before max_response_length that cost ever more reward (DAPO); 0 = none
    overlong_penalty: NonNegativeFloat = 1.0  # overlong_buffer: what a response of max_response_length loses
    online_filtering: bool = False  # draw again until a batch of groups with unequal rewards is full (DAPO)
    filter_oversample: PositiveInt = 1  # online_filtering: draws of data.rollout_batch_size prompts sampled together
    # filter_oversample: stop what is still sampled when the batch is full, which prefers groups of short responses
    filter_stop: bool = False
    filter_key: str = "overall"  # key of the reward in which a kept group must differ
    filter_low: float | None = None  # keep only groups whose mean is above; null = no bound
    filter_high: float | None = None  # keep only groups whose mean is below; null = no bound


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights. Rollouts sample from the sum; the weights alone are the reference."""

    rank: NonNegativeInt = 0  # rank of the adapters; 0 = no adapters, every weight is trained
    alpha: PositiveFloat = 16.0  # what an adapter computes is scaled by alpha / rank
    target_modules: Any = "all-linear"  # all-linear (but the output layer), or a list of names like [q_proj,v_proj]
    exclude_modules: Any = None  # layers to leave out: a regex of whole names like .*visual.*, or a list; null = none


@dataclass
class ModelConfig:
    """The model that is trained; the reference starts as a copy of it."""

    model_path: str | None = None  # folder with *.safetensors, or a hub id org/name; required
    tokenizer_path: str | None = None  # folder or hub id of the tokenizer; null = model_path
    override_config: dict[str, Any] = field(default_factory=dict)  # keys of the model's own config.json to replace
    enable_gradient_checkpointing: bool = True  # recompute activations in the backward: less memory, a third slower
    trust_remote_code: bool = False  # run code that comes with the model
    fp32_lm_head: bool = False  # logits are not rounded to bf16, by actor, reference and vLLM
    freeze_vision_tower: bool = False  # train the language model only; it has no adapters then either
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class OptimConfig:
    """The optimiser and its learning-rate schedule, in optimiser steps."""

    lr: PositiveFloat = 1.0e-6  # highest learning rate
    betas: Annotated[tuple[float, float], Range("[0, 1)")] = (0.9, 0.999)  # decay of the two moments
    weight_decay: NonNegativeFloat = 1.0e-2  # decoupled weight decay
    # adamw_bf16, adamw_8bit: moments of 2 bytes, of 1 (bitsandbytes); muon: matrices by Muon, all else by AdamW
    strategy: Annotated[str, OneOf("adamw", "adamw_bf16", "adamw_8bit", "muon")] = "adamw"
    # muon: highest learning rate of matrices, the spectral norm of an update; null = lr
    muon_lr: PositiveFloat | None = None
    lr_warmup_ratio: Share = 0.0  # share of the run's optimiser steps spent warming up
    lr_warmup_steps: NonNegativeInt | None = None  # optimiser steps, instead of the ratio
    # after the warm-up
    lr_scheduler_type: Annotated[str, OneOf("constant", "cosine", "linear")] = "constant"
    min_lr_ratio: Share = 0.0  # where cosine and linear end, as a share of lr


@dataclass
class OffloadConfig:
    """What ZeRO-3 keeps in host memory. A CPU run keeps everything there."""

    offload_params: bool = False  # parameters stay in host memory; each layer crosses PCIe whenever it is used
    offload_optimizer: bool = False  # optimiser states stay in host memory, where the CPU updates them


@dataclass
class RouterReplayConfig:
    """Mixtures of experts: whether tokens are sent to the experts that were chosen for them before the update."""

    # R3: those that vLLM chose in the ranks as it sampled; R2: those of the policy before a batch's first update
    mode: Annotated[str, OneOf("disabled", "R2", "R3")] = "disabled"


@dataclass
class ActorConfig:
    """The policy and its update."""

    global_batch_size: PositiveInt = 256  # prompts (n responses each) an optimiser step, a multiple of the ranks
    micro_batch_size_per_device_for_update: PositiveInt = 4  # responses a forward and backward
    micro_batch_size_per_device_for_experience: PositiveInt = 16  # responses a forward for log-probabilities
    # of weights and products. auto: bf16 on GPU, fp32 on CPU; bf16 on a CPU rounds as a GPU does; fp32 is the CPU's
    dtype: Annotated[str, OneOf("auto", "bf16", "fp32")] = "auto"
    padding_free: bool = True  # sequences end to end, without padding; untested families are padded
    # of packed sequences: varlen = one flash-attention call (GPU, bf16; auto where it can run), sdpa = torch's, singly
    attention: Annotated[str, OneOf("auto", "varlen", "sdpa")] = "auto"
    ulysses_size: PositiveInt = 1  # ranks that compute each sequence together, a divisor of their number
    dynamic_batching: bool = True  # fill a micro-batch up to the tokens that its size has at full length
    max_grad_norm: PositiveFloat = 1.0  # gradients are clipped to this norm
    # default: clipped PPO
    loss_type: Annotated[
        str,
        OneOf(
            "default", "gspo", "gspo_token", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl", "kl_cov", or_function=True
        ),
    ] = "default"
    # all but sapo: the ratio is clipped below at 1 - this; gmpo: its log at minus this; dppo: bound of tokens that fall
    clip_ratio_low: Share = 0.2
    # all but sapo: the ratio is clipped above at 1 + this; gmpo: its log at this; dppo: bound of tokens that rise
    clip_ratio_high: NonNegativeFloat = 0.3
    clip_ratio_dual: Annotated[float, Range("(1, inf)")] = 3.0  # default: bound of the loss for negative advantages
    tau_positive: PositiveFloat = 1.0  # sapo: temperature of the gate for positive advantages
    tau_negative: PositiveFloat = 1.05  # sapo: the same for negative ones; higher forgets off-policy tokens sooner
    kl_cov_ratio: Annotated[float, Range("(0, 1]")] = 2e-4  # kl_cov: share of an optimiser step's tokens that are held
    kl_cov_coef: NonNegativeFloat = 1.0  # kl_cov: weight of their KL to the policy before the update
    entropy_coef: NonNegativeFloat = 0.0  # weight of the entropy of each token in the loss, taken off it; 0 = no bonus
    # share of the tokens of an optimiser step, those of highest entropy before the update, that train; 1 = all
    top_entropy_quantile: Annotated[float, Range("(0, 1]")] = 1.0
    # over an optimiser step: mean over tokens, mean over responses, or their sum
    loss_avg_mode: Annotated[str, OneOf("token", "seq", "seq_sum", or_function=True)] = "token"
    loss_scale_factor: PositiveFloat | None = None  # seq_sum: what a sum is divided by; null = data.max_response_length
    ppo_epochs: PositiveInt = 1  # passes over each rollout batch
    deepspeed: Any = None  # JSON DeepSpeed config: its path, or inline; null = configs/deepspeed/zero3_{h100,cpu}.json
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    offload_states: bool = False  # states wait in host memory while vLLM samples; not with other offload
    router_replay: RouterReplayConfig = field(default_factory=RouterReplayConfig)


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
    """The model that values states; only algorithm.adv_estimator=gae has it."""

    # prompts an optimiser step, a multiple of the actor's; null = the actor's
    global_batch_size: PositiveInt | None = None
    # responses a forward and backward; null = the actor's
    micro_batch_size_per_device_for_update: PositiveInt | None = None
    # responses a forward for values; null = the actor's
    micro_batch_size_per_device_for_experience: PositiveInt | None = None
    padding_free: bool | None = None  # as worker.actor.padding_free; null = the actor's
    # as worker.actor.attention; null = the actor's
    attention: Annotated[str | None, OneOf("auto", "varlen", "sdpa")] = None
    dynamic_batching: bool | None = None  # as worker.actor.dynamic_batching; null = the actor's
    max_grad_norm: PositiveFloat = 1.0  # gradients are clipped to this norm
    cliprange_value: PositiveFloat = 0.5  # how far from its value at the rollout a value is rewarded for moving
    # over an optimiser step: mean over tokens or over responses
    loss_avg_mode: Annotated[str, OneOf("token", "seq")] = "token"
    ppo_epochs: PositiveInt = 1  # passes over each rollout batch
    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)  # 1e-5 is a common lr of critics
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass
class RefConfig:
    """The reference: the model that training starts from, or what follows the actor from there."""

    update_freq: NonNegativeInt = 0  # steps between its moves towards the actor; 0 = it stays as it is
    ema_decay: Annotated[float, Range("[0, 1)")] = 0.0  # share of itself that a move keeps; 0 = it becomes the actor
    offload: OffloadConfig = field(default_factory=OffloadConfig)  # offload_params only: it has no optimiser


@dataclass
class ValidationSampling:
    """How validation answers are sampled."""

    temperature: NonNegativeFloat = 0.0  # logits are divided by it; 0 = greedy
    top_p: Annotated[float, Range("(0, 1]")] = 1.0  # probability of the most likely tokens to choose from
    top_k: PositiveOrMinusOne = -1  # most likely tokens to choose from; -1 = all
    n: PositiveInt = 1  # answers a prompt; accuracies are averaged
    max_tokens: PositiveInt | None = None  # tokens of an answer; null = data.max_response_length
    min_p: Share = 0.0  # least probability of a token, as a share of the likeliest one's; 0 = no bound
    repetition_penalty: PositiveFloat = 1.0  # over 1: tokens that occurred, prompt included, become less likely
    stop: list[str] | None = None  # texts that end an answer; null = worker.rollout.stop


@dataclass
class RolloutConfig:
    """How responses are sampled while training."""

    # auto: vllm where installed; server: vLLM beside the ranks; hf: transformers
    engine: Annotated[str, OneOf("auto", "vllm", "server", "hf")] = "auto"
    n: Annotated[int, Range("[2, inf)")] = 8  # responses a prompt (the group); a group of one has no advantage
    # fewest responses a prompt, where data.curriculum_refresh=online sizes each group, n on average; null = all have n
    n_min: Annotated[int | None, Range("[2, inf)")] = None
    n_max: Annotated[int | None, Range("[2, inf)")] = None  # most responses a prompt, as n_min
    temperature: PositiveFloat = 1.0  # logits are divided by it
    top_p: Annotated[float, Range("(0, 1]")] = 1.0  # probability of the most likely tokens to choose from
    top_k: PositiveOrMinusOne = -1  # most likely tokens to choose from; -1 = all
    min_p: Share = 0.0  # least probability of a token, as a share of the likeliest one's; 0 = no bound
    repetition_penalty: PositiveFloat = 1.0  # over 1: tokens that occurred, prompt included, become less likely
    stop: list[str] = field(default_factory=list)  # texts that end a response, with the token that completes them
    # of samples: of the distribution cut by top_p, top_k, min_p, repetition_penalty, or whole (not with engine=server)
    logprobs: Annotated[str, OneOf("processed", "raw")] = "processed"
    seed: Annotated[int, Range("[0, 4294967295]")] = 1  # seed of the sampled responses
    limit_images: NonNegativeInt = 0  # images a prompt at most, more are an error; 0 = as many as the data has
    # of vLLM's weights and products; auto: as worker.actor.dtype
    dtype: Annotated[str, OneOf("auto", "bf16", "fp32")] = "auto"
    gpu_memory_utilization: Annotated[float, Range("(0, 1]")] = 0.6  # share of the GPU that vLLM may take
    kv_cache_gb: PositiveInt | None = None  # GB of vLLM's key-value cache, CPU only; null = 4
    # true: nothing compiled, no CUDA graphs: starts sooner, samples slower; null: on the CPU alone
    enforce_eager: bool | None = None
    enable_chunked_prefill: bool = True  # false needs max_num_batched_tokens >= max_model_len
    tensor_parallel_size: PositiveInt = 1  # ranks that share one vLLM engine, a divisor of the ranks
    max_model_len: PositiveInt | None = None  # tokens; null = max_prompt_length + max_response_length, never less
    max_num_batched_tokens: PositiveInt = 8192  # tokens vLLM schedules at once
    max_num_seqs: PositiveInt = 256  # responses vLLM samples at once
    sleep: bool = True  # vllm on GPU: its weights and cache leave the GPU while the actor trains
    # what a sync of LoRA sends: all weights with adapters added, or the adapters alone (not with engine=hf or experts)
    lora_sync: Annotated[str, OneOf("merged", "adapters")] = "merged"
    num_servers: PositiveInt = 1  # server: vLLM servers that the run starts, each on tensor_parallel_size GPUs
    server_devices: list[int] = field(default_factory=list)  # server: GPUs of rank 0's node; [] = after the ranks'
    server_urls: list[str] = field(default_factory=list)  # server: those of `mmr1-ds serve`; the run starts none then
    server_host: str = "127.0.0.1"  # server: the interface that started servers listen on
    server_key_variable: str = "MMR1_DS_SERVER_KEY"  # server: environment variable with their key; unset = a new one
    server_start_seconds: PositiveFloat = 900.0  # server: time to load a model
    server_timeout_seconds: PositiveFloat = 60.0  # server: without a sign of life for so long it is restarted
    request_timeout_seconds: PositiveFloat = 3600.0  # server: time for the responses to a prompt, then requested again
    servers_gone_seconds: PositiveFloat = 1800.0  # server: with none left for so long the run saves and stops
    max_in_flight: PositiveInt | None = None  # server: responses one samples at once, >= n; null = twice max_num_seqs
    # server: auto = nccl on GPU, shared_memory on CPU
    weight_transfer: Annotated[str, OneOf("auto", "nccl", "ipc", "shared_memory")] = "auto"
    # vllm: a rank whose engine has room takes the next prompt from one queue of all ranks; not repeated to the last bit
    shared_queue: bool = False
    partial: PositiveInt | None = None  # tokens a response grows by in a step, the rest in later ones; null = no bound
    max_staleness_steps: NonNegativeInt = 0  # server: steps that sampling may run ahead of training; 0 = in turn
    # server: new weights come between requests (boundary) or in their middle (in_flight)
    weight_swap: Annotated[str, OneOf("boundary", "in_flight")] = "boundary"
    val_override_config: ValidationSampling = field(default_factory=ValidationSampling)


@dataclass
class CosineLengthConfig:
    """The openr1 rewards' part by length: along half a cosine from length 0 to max_length."""

    min_value_wrong: float = -1.0  # reward of a wrong answer of length 0
    max_value_wrong: float = -0.5  # reward of a wrong answer of max_length or more
    min_value_correct: float = 0.0  # reward of a right answer of max_length or more
    max_value_correct: float = 0.0  # reward of a right answer of length 0
    max_length: PositiveInt | None = None  # tokens; null = data.max_response_length


@dataclass
class JudgeConfig:
    """The language model that openr1 and openr1_vllm ask about answers that the rules refuse."""

    base_urls: list[str] = field(default_factory=list)  # OpenAI-compatible servers, like [http://localhost:8000/v1]
    model: str | None = None  # name of the model at the server
    key_variable: str | None = None  # environment variable that holds the key; null = no key is sent
    timeout_seconds: PositiveFloat = 60.0  # time for a response, retries included; past it the response is unscored
    request_timeout_seconds: PositiveFloat = 30.0  # time for a request
    max_retries: NonNegativeInt = 3  # requests after the first
    max_tokens: PositiveInt = 512  # tokens of the judge's reply


@dataclass
class RewardConfig:
    """The function that scores responses."""

    reward_function: str = "math"  # math | r1v | openr1 | openr1_wo_LMM | openr1_vllm, or path/file.py:function
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)  # passed to every call
    num_workers: PositiveInt = 4  # processes a rank; each asks a judge about one response at a time
    timeout_seconds: PositiveFloat = 10.0  # time for a response, which fails past it; a judge has its own
    # a call of a file's function: sequential = a response, group = all to a prompt, batch = a rank's; null = by file
    reward_type: str | None = None
    # a response whose reward hung, crashed, raised or gave NaN: mask = it teaches nothing; zero = it counts as wrong
    on_failure: Annotated[str, OneOf("mask", "zero")] = "mask"
    cos_len_reward_config: CosineLengthConfig = field(default_factory=CosineLengthConfig)
    # several instead, summed by their weights: {function, weight, kwargs} each
    functions: list[dict[str, Any]] = field(default_factory=list)
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
    """The length of a run, what it does how often, and where it writes."""

    total_episodes: PositiveInt = 15  # passes over the data set
    max_steps: PositiveInt | None = None  # steps, instead of total_episodes
    critic_warmup: NonNegativeInt = 0  # gae: steps at first in which only the critic learns
    max_try_make_batch: Annotated[int, Range("[-1, inf)")] = 20  # draws a batch (online_filtering); -1, 0 = no bound
    project_name: str = "mmr1_ds"  # name of the project at wandb, swanlab, mlflow and trackio
    experiment_name: str = "default"  # names the run directory
    run_dir: str | None = None  # null = runs/<experiment_name>
    # who may read the run's folders, as chmod takes it: prompts and answers lie there; null = as the umask says
    run_dir_mode: Annotated[str | None, OneOf("700", "750", "755", "770", "775")] = None
    logger: Annotated[
        list[str], OneOf("console", "jsonl", "file", "tensorboard", "wandb", "swanlab", "mlflow", "trackio")
    ] = field(default_factory=lambda: ["console", "jsonl"])  # jsonl is always on, file is EasyR1's name for it
    nnodes: PositiveInt = 1  # machines
    n_gpus_per_node: PositiveInt = 8  # ranks a node; nnodes * n_gpus_per_node must be what was launched
    # 1e12 FLOP a second of one device, for perf/mfu_actor; null = by the GPU's name, no figure where it is not known
    peak_tflops: PositiveFloat | None = None
    val_freq: PositiveOrMinusOne = -1  # steps between validations; -1 = none after the first
    val_before_train: bool = True  # validate before the first step
    val_only: bool = False  # validate and stop
    # validation alone: a file that gets each prompt's pass rate, a JSON line each; prompts that it has are passed over
    pass_rates: str | None = None
    val_generations_to_log: NonNegativeInt = 0  # validation answers logged
    # GB of samples.jsonl, of generations.jsonl and of all eval/step_N/answers.jsonl; over it old steps are thinned out
    samples_limit_gb: PositiveFloat = 2.0
    train_generations_to_log: NonNegativeInt = 8  # prompts a step whose best and worst answers go to samples.jsonl
    # parquet: all responses of every step go to rollouts/, a part a step; null = none
    rollout_log: Annotated[str | None, OneOf("parquet")] = None
    rollout_log_gb: PositiveFloat = 10.0  # GB (1e9 bytes) of parts kept, the newest
    profile_steps: Annotated[list[int], Range("[1, inf)")] = field(default_factory=list)  # steps traced into profiles/
    report_freq: PositiveOrMinusOne | None = -1  # steps between reports in the run; -1 = only at the end; null = none
    save_freq: PositiveOrMinusOne | None = None  # steps between checkpoints; null = a tenth of the run; -1 = no others
    save_limit: PositiveOrMinusOne = 3  # newest checkpoints kept; -1 = all
    # a figure of the validation, higher is better: its best step is saved and never deleted; null = no best
    best_metric: str | None = "val/accuracy_reward"
    async_save: bool = True  # checkpoints are copied to host memory and written while the next steps train
    save_model_only: bool = False  # checkpoints are weights to export, 2 bytes a parameter; no run resumes from them
    save_checkpoint_path: str | None = None  # null = <run_dir>/checkpoints
    load_checkpoint_path: str | None = None  # a global_step_N folder to start from; null = none
    resume: bool = True  # resume from the newest good checkpoint in save_checkpoint_path
    dry_run: bool = False  # check everything, print the plan, load no model
    collective_timeout_seconds: PositiveFloat = 1800.0  # deadline of every collective
    silence_seconds: PositiveFloat = 120.0  # a rank without a sign of life for so long is lost, and the run ends
    max_restarts: NonNegativeInt = 3  # a run that crashed is started again so often without a new checkpoint
    max_wall_seconds: PositiveFloat | None = None  # after so long save and end with exit code 75; null = never
    preemption_seconds: PositiveFloat = 30.0  # time from SIGTERM or SIGUSR1 until the job is killed
    max_bad_updates: PositiveInt = 3  # updates skipped in a row (loss or gradient not finite) that end the run


@dataclass
class RunConfig:
    """The whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
