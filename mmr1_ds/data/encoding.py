"""The prompt encoder: owner of the tokenizer and processor, between rows and what the models take."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.chat import ChatFormat, load_format_prompt
from mmr1_ds.data.images import PixelLimits, resized
from mmr1_ds.data.positions import spatial_positions
from mmr1_ds.data.videos import Clip, VideoLimits
from mmr1_ds.data.vision import Seen, Vision
from mmr1_ds.errors import UserError, first_line
from mmr1_ds.records import Prompt, Video

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedConfig

# A policy must be able to write these, and a reward to read them, even where a tokenizer calls them special.
REASONING_TAGS = frozenset(("<think>", "</think>", "<answer>", "</answer>"))
VISION_ID_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
_IMAGE_THREADS = 4  # a rank: the image processor leaves the interpreter to others while it computes


@dataclass(frozen=True)
class ModelInputs:
    """One prompt as the transformers model takes it, without a batch axis, which the caller adds.

    A video is an image with a time axis: towers see no difference, and so all of a prompt's are computed in one call,
    as many on a rank that has videos as on one that has none.
    """

    input_ids: torch.Tensor  # (T,) int64, every image and video expanded to tokens, all of them the image's
    pixel_values: torch.Tensor | None  # (patches, channels * patch volume) float32; None without any
    image_grid_thw: torch.Tensor | None  # (images and videos, 3) int64: patches in time, height, width; text's order
    positions: torch.Tensor | None  # (3, T) int64, in time, height and width; None for a text model

    @cached_property
    def pinned_pixels(self) -> torch.Tensor:
        """Return the pixels in bf16, which a model on a GPU casts them to first, in memory that a GPU reads itself.

        Made once for all micro-batches of a step. On the caller's thread: another one would open the first GPU.
        """
        import torch

        assert self.pixel_values is not None
        return self.pixel_values.to(torch.bfloat16).pin_memory()


@dataclass(frozen=True)
class PromptText:
    """One prompt after the chat template."""

    text: str  # a placeholder an image or video
    image_order: tuple[int, ...]  # which of the row's images stands at each place; one may stand at several
    video_order: tuple[int, ...]  # the same of its videos
    has_answer: bool  # whether the assistant's last turn was taken off


class PromptEncoder:
    """Applies the chat template, sizes images, chooses frames of videos, expands their tokens, decodes responses.

    `token_ids` of a prompt hold ONE placeholder an image or video, as vLLM takes them. `expand` computes from those and
    the sized images and frames what transformers takes, so both see the same number of tokens.
    """

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        """Load tokenizer and processor. Raises: UserError when they or the model folder cannot be loaded."""
        config = _load_config(model)
        self.is_multimodal: bool = "vision_config" in config.to_dict()
        self.takes_videos = False
        self.processor: Any = None
        source = str(model.tokenizer_path or model.model_path)
        if self.is_multimodal:
            self.processor = _load_pretrained("AutoProcessor", source, model.trust_remote_code)
            if not hasattr(self.processor, "image_processor"):  # transformers gives a text model's tokenizer instead
                raise UserError(
                    f"{source!r} has a tokenizer but no image processor, and {model.model_path!r} takes images; "
                    "leave worker.actor.model.tokenizer_path out or name a folder with a processor"
                )
            self.tokenizer: Any = self.processor.tokenizer
            self.pixel_limits = _pixel_limits(self.processor, data, source)
            self.image_token_id = int(self.processor.image_token_id)
            self.vision = Vision(self.processor, config)
            self.takes_videos = self.vision.takes_videos
            self.video_limits = _video_limits(self.pixel_limits.factor, data)
        else:
            self.tokenizer = _load_pretrained("AutoTokenizer", source, model.trust_remote_code)
        self._template_owner = self._chat_template_owner(source)
        self._format = ChatFormat(
            data.system_prompt,
            load_format_prompt(data.format_prompt),
            data.assistant_prefill,
            self.is_multimodal,
            self.takes_videos,
        )
        self.eos_token_ids = _eos_token_ids(model, self.tokenizer)
        self.vocabulary_size = int(config.get_text_config().vocab_size)  # rows of the embedding
        special = _special_ids(self.tokenizer, config)
        self.forbidden_token_ids = tuple(
            sorted((special | _unused_ids(self.tokenizer, config)) - {*self.eos_token_ids})
        )
        self._hidden_ids = frozenset(special | {*self.eos_token_ids})
        self._vision_ids = frozenset(_vision_ids(config))
        self.video_token_id = config.to_dict().get("video_token_id")
        self._expanded: dict[int, Future[ModelInputs]] = {}  # by the id of a prompt to see, while it lives

    def encode(
        self, cell: object, images: Sequence[Image], where: str = "the prompt", videos: Sequence[Clip] = ()
    ) -> tuple[tuple[int, ...], tuple[Image, ...], tuple[Video, ...]]:
        """Return token ids with one placeholder an image or video, the images at their final size, and the videos.

        Args: cell: what the prompt column holds; images: RGB, any size, those of the row's column, then those that its
            messages carry; where: names the row in errors; videos: likewise, their frames not yet decoded.
        Raises: UserError naming the row.
        """
        prompt = self.prompt_text(cell, len(images), len(videos), where)
        (token_ids,) = self.tokenize([prompt.text])
        self.check_placeholders(token_ids, len(prompt.image_order), len(prompt.video_order), where)
        sized = {place: self._sized(images[place], where) for place in sorted(set(prompt.image_order))}
        sampled = {place: self.sampled(videos[place], where) for place in sorted(set(prompt.video_order))}
        return (
            tuple(token_ids),
            tuple(sized[place] for place in prompt.image_order),
            tuple(sampled[place] for place in prompt.video_order),
        )

    def prompt_text(self, cell: object, num_images: int, num_videos: int, where: str) -> PromptText:
        """Return the prompt as text after the chat template, generation prompt and prefill included.

        Raises: UserError naming the row when it is no prompt, or has images or videos for a model that takes none.
        """
        from jinja2 import TemplateError

        if num_images and not self.is_multimodal:
            raise UserError(f"{where}: the row has {num_images} images but the model takes text only")
        chat = self._format.chat(cell, num_images, num_videos, where)
        try:
            text = self._template_owner.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"{where}: the model's chat template refuses the prompt: {error}") from error
        opened = next((tag for tag in ("<think>", "<answer>") if text.rstrip().endswith(tag)), None)
        prefill = chat.prefill
        if opened is not None and prefill.lstrip().startswith(opened):  # the template opens it already
            text, prefill = text.rstrip().removesuffix(opened), prefill.lstrip()
        return PromptText(text + prefill, chat.image_order, chat.video_order, chat.has_answer)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts that already carry their special tokens."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def check_placeholders(self, token_ids: Sequence[int], num_images: int, num_videos: int, where: str) -> None:
        """Check a text. Raises: UserError when it spells vision tokens, on which models fail far from here."""
        if not self.is_multimodal:
            return
        counts = Counter(token for token in token_ids if token in self._vision_ids)
        if num_videos and counts[self.video_token_id] == 0:
            raise UserError(f"{where}: the model's chat template has no place for videos; take that of a newer model")
        kinds = {"image": (self.image_token_id, num_images), "video": (self.video_token_id, num_videos)}
        for kind, (token, number) in kinds.items():
            if counts[token] != number:
                raise UserError(
                    f"{where}: {counts[token]} {kind} placeholders for {number} {kind}s after the chat template; "
                    f"remove {getattr(self.processor, kind + '_token')} from the text and mark {kind}s by <{kind}>"
                )
        own = [token for token, _ in kinds.values()]
        for token, count in counts.items():
            # The template's own start and end tokens come once an image or video.
            if token not in own and count != num_images + num_videos:
                spelled = self.tokenizer.convert_ids_to_tokens(token)
                raise UserError(f"{where}: the text spells the vision token {spelled}; remove it")

    def num_image_tokens(self, width: int, height: int, where: str = "the prompt") -> int:
        """Return how many tokens an image of this size becomes, by the processor's arithmetic, without its pixels."""
        target_width, target_height = self.pixel_limits.target(width, height, where)
        return (target_width // self.pixel_limits.factor) * (target_height // self.pixel_limits.factor)

    def num_video_tokens(self, clip: Clip, where: str = "the prompt") -> int:
        """Return how many tokens a video becomes, the times between its frames included, without decoding it."""
        width, height = self.video_limits.size(clip, where)
        places = self.video_limits.places(clip)
        frames = np.broadcast_to(np.uint8(0), (len(places), height, width, 3))  # takes no memory
        return self.num_tokens_of(Video(frames, places, clip.num_frames, clip.fps))

    def num_tokens_of(self, video: Video) -> int:
        """Return how many tokens a video becomes whose frames are chosen."""
        return self.vision.num_tokens(video)

    def expand(self, prompt: Prompt) -> ModelInputs:
        """Return what transformers takes for the prompt, equal to the processor's output on its text and images.

        Images and videos are processed once for as long as the prompt lives, whichever of its responses asks.
        """
        return self._expansion(prompt).result() if prompt.has_vision else self._expand(prompt)

    def expand_ahead(self, prompts: Iterable[Prompt]) -> None:
        """Begin to process images and videos in threads, so that `expand` need not wait. Returns at once."""
        for prompt in prompts:
            if prompt.has_vision:
                self._expansion(prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the response as text, without end, padding and other special tokens; <think> and the like stay."""
        shown = [int(token) for token in token_ids if int(token) not in self._hidden_ids]
        return self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """Return a digest of what decides a prompt's tokens: vocabulary, chat template and format, pixel limits."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        digest.update(repr((self._template_owner.chat_template, self._format)).encode())
        digest.update(repr((self.pixel_limits, self.video_limits) if self.is_multimodal else None).encode())
        return digest.hexdigest()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:  # made late: a scan hands the encoder to its processes
        return ThreadPoolExecutor(_IMAGE_THREADS, "images")

    def _expansion(self, prompt: Prompt) -> Future[ModelInputs]:
        found = self._expanded.get(id(prompt))
        if found is None:
            found = self._expanded[id(prompt)] = self._threads.submit(self._expand, prompt)
            weakref.finalize(prompt, self._expanded.pop, id(prompt), None).atexit = False
        return found

    def _expand(self, prompt: Prompt) -> ModelInputs:
        import torch

        if not self.is_multimodal:
            return ModelInputs(torch.tensor(prompt.token_ids, dtype=torch.int64), None, None, None)
        images, videos = self.vision.images(prompt.images), self.vision.videos(prompt.videos)
        kinds = {self.image_token_id: images, self.video_token_id: videos}
        token_ids: list[int] = []
        seen: list[Seen] = []
        for token in prompt.token_ids:
            if token in kinds:
                seen.append(next(kinds[token]))
                token_ids += seen[-1].token_ids
            else:
                token_ids.append(token)
        assert next(images, None) is next(videos, None) is None, f"prompt {prompt.prompt_id}: too few placeholders"
        ids = np.array(token_ids, dtype=np.int64)
        is_seen = (ids == self.image_token_id) | (ids == self.video_token_id)
        positions = spatial_positions(is_seen, [block for one in seen for block in one.blocks])
        ids[is_seen] = self.image_token_id
        return ModelInputs(
            torch.from_numpy(ids),
            torch.cat([one.pixels for one in seen]) if seen else None,
            torch.tensor([one.grid for one in seen]) if seen else None,
            torch.from_numpy(positions),
        )

    def _sized(self, image: Image, where: str) -> Image:
        return resized(image, self.pixel_limits.target(image.width, image.height, where))

    def sampled(self, clip: Clip, where: str) -> Video:
        """Decode the frames that the model sees. Raises: UserError naming the row."""
        places = self.video_limits.places(clip)
        return Video(clip.read(places, self.video_limits.size(clip, where)), places, clip.num_frames, clip.fps)

    def _chat_template_owner(self, source: str) -> Any:
        if self.processor is not None and self.processor.chat_template:
            return self.processor
        if self.tokenizer.chat_template:
            return self.tokenizer
        raise UserError(f"the tokenizer of {source!r} has no chat template; use an instruction-tuned model's tokenizer")


def _load_config(model: ModelConfig) -> PreTrainedConfig:
    if not model.model_path:
        raise UserError("worker.actor.model.model_path is not set; give a model folder or hub name")
    _check_local(model.model_path, "worker.actor.model.model_path")
    if model.tokenizer_path:
        _check_local(model.tokenizer_path, "worker.actor.model.tokenizer_path")
    return _load_pretrained("AutoConfig", model.model_path, model.trust_remote_code)


def _check_local(path: str, key: str) -> None:
    """A path that is clearly local must exist: the hub's answer for it would only mislead."""
    if path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(path)):
        raise UserError(f"{key}: no such folder {path!r}")


def _load_pretrained(kind: str, source: str, trust_remote_code: bool) -> Any:
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    loaders: dict[str, Any] = {
        "AutoConfig": transformers.AutoConfig,
        "AutoTokenizer": transformers.AutoTokenizer,
        "AutoProcessor": transformers.AutoProcessor,
    }
    try:
        return loaders[kind].from_pretrained(os.path.expanduser(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"cannot load {kind[4:].lower()} of {source!r}: {first_line(error)}") from error
    except (AttributeError, TypeError, StrictDataclassError) as error:  # a file that holds another kind of value
        name = kind[4:].lower()
        raise UserError(f"cannot load {name} of {source!r}, a file of it is damaged: {first_line(error)}") from error


def _pixel_limits(processor: Any, data: DataConfig, source: str) -> PixelLimits:
    images = processor.image_processor
    if not hasattr(images, "merge_size") or not hasattr(images, "patch_size"):
        raise UserError(f"{source!r}: {type(images).__name__} is not supported; use Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    return PixelLimits.of(
        factor=images.patch_size * images.merge_size,
        processor_min=images.size["shortest_edge"],
        processor_max=images.size["longest_edge"],
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
    )


def _video_limits(factor: int, data: DataConfig) -> VideoLimits:
    pixels = PixelLimits.of(
        factor, factor**2, max(factor**2, data.video_max_pixels), data.video_min_pixels, data.video_max_pixels
    )
    return VideoLimits(data.video_fps, data.video_max_frames, pixels)


def _eos_token_ids(model: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a response: the generation config's, then the tokenizer's."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(os.path.expanduser(str(model.model_path))).eos_token_id
    except OSError:  # the file is optional
        eos = None
    except (TypeError, ValueError) as error:
        raise UserError(f"generation_config.json of {model.model_path!r} is damaged: {first_line(error)}") from error
    ids = list(eos) if isinstance(eos, (list, tuple)) else [eos]
    ids.append(tokenizer.eos_token_id)
    known = tuple(dict.fromkeys(int(token) for token in ids if token is not None))
    if not known:
        raise UserError(
            f"{model.model_path!r} has no end-of-sequence token; set eos_token_id in generation_config.json"
        )
    return known


def _vision_ids(config: PreTrainedConfig) -> set[int]:
    values = config.to_dict()
    return {int(values[key]) for key in VISION_ID_KEYS if isinstance(values.get(key), int)}


def _special_ids(tokenizer: Any, config: PreTrainedConfig) -> set[int]:
    """Special by any account: the tokenizer's list, its added tokens flagged so, the model's vision tokens."""
    flagged = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    kept = {token for token, added in tokenizer.added_tokens_decoder.items() if added.content in REASONING_TAGS}
    return ({*tokenizer.all_special_ids} | flagged | _vision_ids(config)) - kept


def _unused_ids(tokenizer: Any, config: PreTrainedConfig) -> set[int]:
    """Rows of the embedding that are no token (models pad their vocabulary); a policy does sample them."""
    return set(range(config.get_text_config().vocab_size)) - set(tokenizer.get_vocab().values())
