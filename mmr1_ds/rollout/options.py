"""How vLLM is set up for a run: the same for an engine inside a rank and for a server beside it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmr1_ds.config import DataConfig, ModelConfig, RolloutConfig
from mmr1_ds.config.families import FAMILIES
from mmr1_ds.data.images import PixelLimits
from mmr1_ds.data.videos import VideoLimits
from mmr1_ds.data.vision import VIDEO_OPTIONS
from mmr1_ds.records import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mmr1_ds.data.encoding import PromptEncoder

# Of the KV cache. Responses to one prompt share its whole blocks: at vLLM's own 128 a short prompt is computed once for
# each response. 32 is the least that its attention kernel likes. (On GPU it is 16.)
_CPU_BLOCK_TOKENS = 32
# FlashInfer's kernels come with no wheel of ours: all ranks would download and compile them at once, where vLLM takes
# them: attention and experts on a B200 (compute capability 10), linear attention on an H100 too, sums over tensor
# parallel ranks, and trials of all of these as it starts. Kinds of attention that are not listed (MLA) keep its choice.
_B200_ATTENTION = {"full_attention": "FLASH_ATTN", "sliding_window": "FLASH_ATTN"}
_WITHOUT_FLASHINFER = {
    "kernel_config": {"moe_backend": "triton", "enable_flashinfer_autotune": False},
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
    "gdn_prefill_backend": "triton",
}
_FLASHINFER_SWITCHES = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # serves no request of ours: all ask for log-probabilities
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}


@dataclass(frozen=True)
class VideoBounds:
    """The videos that an engine must be ready for."""

    most: int  # of the prompt that has the most
    limits: VideoLimits
    normalised_as_images: bool  # by the model's processors

    @property
    def tokens(self) -> int:
        """The tokens of the largest one: a pair of frames has those of an image."""
        return self.limits.max_frames // 2 * (self.limits.pixels.max_pixels // self.limits.pixels.factor**2)


@dataclass(frozen=True)
class ImageBounds:
    """The images and videos that an engine must be ready for, and keeps memory for."""

    most: int  # of the prompt that has the most; the run config may allow more
    limits: PixelLimits
    videos: VideoBounds | None = None  # None = there are none


def image_bounds(encoder: PromptEncoder, most: int, most_videos: int = 0) -> ImageBounds | None:
    """The bounds on images and videos of a run; None for a model that takes none."""
    if not encoder.is_multimodal:
        return None
    videos = VideoBounds(most_videos, encoder.video_limits, encoder.vision.normalises_alike) if most_videos else None
    return ImageBounds(most, encoder.pixel_limits, videos)


def engine_environment(config: RolloutConfig, *, on_gpu: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Environment variables of vLLM: those that the run decides, and those where the user's own value wins."""
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if on_gpu:
        return {}, defaults | _FLASHINFER_SWITCHES
    defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the launcher places the threads
    return {"VLLM_CPU_KVCACHE_SPACE": str(int(config.kv_cache_gb or 4))}, defaults


def engine_options(
    config: RolloutConfig,
    model: ModelConfig,
    data: DataConfig,
    *,
    on_gpu: bool,
    images: ImageBounds | None,
) -> dict[str, Any]:
    """Arguments of vLLM's engine, by the names of its Python interface. images: None for a model that takes none."""
    options: dict[str, Any] = {}
    max_model_len = config.max_model_len or data.max_prompt_length + data.max_response_length
    max_num_batched_tokens, chunked_prefill = config.max_num_batched_tokens, config.enable_chunked_prefill
    if not on_gpu:
        # A prompt cut in two, sampled with a seed of its own, asks the CPU's generator for an offset it has not.
        max_num_batched_tokens, chunked_prefill = max(max_num_batched_tokens, max_model_len), False
        options["block_size"] = _CPU_BLOCK_TOKENS
    else:
        options |= _WITHOUT_FLASHINFER
        if config.dtype != "fp32" and _compute_capability().startswith("10."):  # FlashAttention has no float32
            options["attention_config"] = {"backend_per_kind": _B200_ATTENTION}
    if not chunked_prefill and _carries_states(model):
        options["enable_prefix_caching"] = False  # vLLM keeps states where it cuts a prompt, and nowhere else
    if images is not None:
        most_videos = 0 if images.videos is None else images.videos.most
        options["limit_mm_per_prompt"] = {"image": config.limit_images or max(1, images.most), "video": most_videos}
        size = {"shortest_edge": images.limits.processor_min_pixels, "longest_edge": images.limits.max_pixels}
        options["mm_processor_kwargs"] = {"images_kwargs": {"size": size}}
    if images is not None and images.videos is not None:
        limits = images.videos.limits
        # For what vLLM keeps memory: Qwen3-VL's processor bounds all pixels of a video together.
        whole = limits.max_frames * limits.pixels.max_pixels
        size = {"shortest_edge": limits.pixels.min_pixels, "longest_edge": whole}
        options["mm_processor_kwargs"]["videos_kwargs"] = {**VIDEO_OPTIONS, "size": size}
        if not images.videos.normalised_as_images:
            options["mm_device_do_normalize"] = False  # on the device vLLM takes the numbers of images for both
        # Its cache of what the tower made is as large as a batch, and must hold a whole video.
        max_num_batched_tokens = max(max_num_batched_tokens, min(images.videos.tokens, data.max_prompt_length))
    return {
        "model": model.model_path,
        "tokenizer": model.tokenizer_path or model.model_path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": {"auto": "bfloat16" if on_gpu else "float32", "bf16": "bfloat16", "fp32": "float32"}[config.dtype],
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": not on_gpu if config.enforce_eager is None else config.enforce_eager,
        "enable_chunked_prefill": chunked_prefill,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: temperature and bans applied
        "hf_overrides": dict(model.override_config) | ({"head_dtype": "float32"} if model.fp32_lm_head else {}),
        "generation_config": "vllm",  # the run config alone says how to sample
        "disable_log_stats": True,
        "seed": config.seed,
        **options,
    }


def _carries_states(model: ModelConfig) -> bool:
    """Whether layers of the model carry a state from token to token. False for one that is not there, as vLLM says."""
    config = _read_config(model)
    return config is not None and "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def is_whole_after_a_sync(model: ModelConfig) -> bool:
    """Whether a sync of whole weights was seen to bring all of vLLM's parameters: then it need not read them."""
    config = _read_config(model)
    return config is not None and config.model_type in FAMILIES


def _read_config(model: ModelConfig) -> PreTrainedConfig | None:
    """The model's config.json; a hub model's is in the cache by now: the prompts' encoder has read it."""
    from transformers import AutoConfig

    code = model.trust_remote_code
    try:
        return AutoConfig.from_pretrained(model.model_path, trust_remote_code=code, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return None


def shaping(settings: SamplingSettings) -> dict[str, Any]:
    """Sampling parameters of vLLM, by its names, of what few runs ask for; a request without it stays as short."""
    options: dict[str, Any] = {"detokenize": bool(settings.stop)}
    if settings.min_p > 0:
        options["min_p"] = settings.min_p
    if settings.repetition_penalty != 1:
        options["repetition_penalty"] = settings.repetition_penalty
    if settings.stop:
        options["stop"] = list(settings.stop)
    return options


def _compute_capability() -> str:
    """Of the machine's GPUs, as "9.0"; torch would take memory of one to say it."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return (found.splitlines() or [""])[0].strip()
