"""The demo's model: a Qwen2.5-VL of 0.9 M parameters and its tokenizer of characters, built on the spot.

The folder it writes is an ordinary Hugging Face model folder: transformers' Auto classes and vLLM load it as they
load the published models of this architecture.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

CHARACTERS = ("\n", *(chr(code) for code in range(32, 127)))
WORDS = ("system", "user", "assistant", "<think>", "</think>", "<answer>", "</answer>", "\\boxed{")
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = CHARACTERS + WORDS + SPECIALS  # 112: no id is unused, because unused ids do get sampled
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
UNKNOWN_CHARACTER = "?"  # what any character outside of ASCII is read as
MIN_PIXELS = 28 * 28
MAX_PIXELS = 112 * 112
MAX_POSITIONS = 512

# Qwen2.5-VL's format without its default system prompt, which in characters would be longer than the question.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'text' -%}{{ part.text }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: a token a character, except for the words and special tokens above."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert set(string.printable) - set("\t\r\x0b\x0c") == set(CHARACTERS)
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_CHARACTER))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=[token for token in SPECIALS if token not in (END_OF_TURN, PADDING)],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor() -> Qwen2_5_VLProcessor:
    """Return Qwen2.5-VL's processor around our tokenizer; one slot of 28 x 28 pixels becomes one image token."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(*, tie_word_embeddings: bool = False) -> Qwen2_5_VLConfig:
    """Return the configuration of the tiny Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids[PADDING],
        "eos_token_id": ids[END_OF_TURN],
        "pad_token_id": ids[PADDING],
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 128,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="float32",
    )


def build_model(seed: int, *, tie_word_embeddings: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """Return a freshly initialised model in float32; the same seed gives the same weights."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(build_config(tie_word_embeddings=tie_word_embeddings))
    model.generation_config.eos_token_id = ids[END_OF_TURN]
    model.generation_config.pad_token_id = ids[PADDING]
    model.generation_config.bos_token_id = None
    model.generation_config.do_sample = True
    return model


def save_model(folder: Path, model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Write the model folder: config.json, model.safetensors, generation settings, tokenizer and processor."""
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
