"""A tiny Qwen2.5-VL (or text) model folder without weights, and small data files, for the data tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("user", "assistant", "system", "<think>", "</think>", "<answer>", "</answer>", "\\boxed{")
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CHARACTERS = [chr(code) for code in (10, *range(32, 127))]
VOCABULARY = {token: index for index, token in enumerate([*CHARACTERS, *WORDS, *SPECIALS])}
NUM_UNUSED_IDS = 3  # the model's embedding has more rows than the tokenizer has tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_vision_model(
    folder: Path, min_pixels: int = 28 * 28, max_pixels: int = 112 * 112, family: str = "qwen2_5_vl"
) -> str:
    """Config, processor and generation config of a tiny Qwen VL of any generation. Returns the folder."""
    import transformers

    name, patch_size = {
        "qwen2_vl": ("Qwen2VL", 14),
        "qwen2_5_vl": ("Qwen2_5_VL", 14),
        "qwen3_vl": ("Qwen3VL", 16),
    }[family]
    getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            min_pixels=min_pixels, max_pixels=max_pixels, patch_size=patch_size
        ),
        tokenizer=build_tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    text = {
        "vocab_size": len(VOCABULARY) + NUM_UNUSED_IDS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ids = {key: VOCABULARY[token] for key, token in names.items()}
    vision = {"patch_size": patch_size, "spatial_merge_size": 2}
    getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids).save_pretrained(folder)
    _write_generation_config(folder)
    return str(folder)


def write_text_model(folder: Path) -> str:
    """Config and tokenizer of a tiny OLMo 2. Returns the folder.

    Not Qwen2: AutoTokenizer gives that type its own splitting into words, whatever the folder says.
    """
    from transformers import Olmo2Config

    build_tokenizer().save_pretrained(folder)
    Olmo2Config(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1).save_pretrained(folder)
    _write_generation_config(folder)
    return str(folder)


def _write_generation_config(folder: Path) -> None:
    eos = [VOCABULARY["<|im_end|>"], VOCABULARY["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels: a resize or a mix-up shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(width: int, height: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    image(width, height, seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
