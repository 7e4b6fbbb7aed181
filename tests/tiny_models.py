"""Tiny models of several kinds, built on the spot and saved as ordinary model folders."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.demo.model import CHAT_TEMPLATE, VOCABULARY, build_model, build_tokenizer, save_model
from mmr1_ds.records import Prompt

HEAD_SIZE = 32  # the smallest that vLLM's attention on the CPU takes
MAX_IMAGE_PIXELS = 112 * 112
SPREAD = 0.1  # of the initial weights: at the usual 0.02 positions and images would hardly show in log-probabilities
MROPE_SECTIONS = {"qwen2_vl": [4, 6, 6], "qwen3_vl": [6, 5, 5]}  # half a head: time, height, width


def save_vision_model(
    folder: Path, tied: bool = False, seed: int = 3, family: str = "qwen2_5_vl", num_heads: int = 3
) -> Path:
    """A Qwen VL with random weights; qwen2_5_vl is the demo's (4 heads), qwen2_vl and qwen3_vl are smaller."""
    if family == "qwen2_5_vl":
        save_model(folder, build_model(seed, tie_word_embeddings=tied))
    else:
        _save_other_vision_model(folder, family, tied, seed, num_heads)
    return folder


def save_text_model(folder: Path, tied: bool = False, seed: int = 3, num_heads: int = 3, family: str = "qwen2") -> Path:
    """A text model of two layers with the demo's tokenizer and random weights. family: qwen2, qwen3 or llama."""
    import transformers

    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family]
    own: dict[str, Any] = {
        "qwen2": {"initializer_range": 0.02},  # the usual: its loss curves are compared over ranks
        # Heads wider than their share of the hidden size, as in the published small ones.
        "qwen3": {"hidden_size": 64, "head_dim": HEAD_SIZE},
        # Llama 3's frequencies; every sequence is longer than what they are scaled from.
        "llama": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    }[family]
    shared = {**_text_settings(num_heads), "hidden_size": HEAD_SIZE * num_heads, "bos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**{**shared, **own}, tie_word_embeddings=tied, dtype="float32")
    _save(folder, getattr(transformers, f"{name}ForCausalLM"), config, seed)
    build_tokenizer().save_pretrained(folder)
    return folder


def _save_other_vision_model(folder: Path, family: str, tied: bool, seed: int, num_heads: int) -> None:
    import transformers

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    name, patch_size = {"qwen2_vl": ("Qwen2VL", 14), "qwen3_vl": ("Qwen3VL", 16)}[family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE_SECTIONS[family]}
    text = {**_text_settings(num_heads), "hidden_size": HEAD_SIZE * num_heads, "rope_parameters": rope}
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": patch_size, "initializer_range": SPREAD}
    if family == "qwen2_vl":
        text["bos_token_id"] = None
        vision |= {"embed_dim": 64, "hidden_size": HEAD_SIZE * num_heads, "mlp_ratio": 2}
    else:
        rope["mrope_interleaved"] = True
        text |= {"hidden_size": 64, "head_dim": HEAD_SIZE}
        vision |= {
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "num_position_embeddings": 25,  # a grid of 5 x 5, resampled to each image's own
            "deepstack_visual_indexes": [0, 2],  # features of these layers go into the first layers of the text model
        }
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
        dtype="float32",
    )
    _save(folder, getattr(transformers, f"{name}ForConditionalGeneration"), config, seed)
    factor = 2 * patch_size
    getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            min_pixels=factor**2, max_pixels=MAX_IMAGE_PIXELS, patch_size=patch_size
        ),
        tokenizer=build_tokenizer(),
        video_processor=getattr(transformers, f"{name}VideoProcessor")(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def _text_settings(num_heads: int) -> dict[str, Any]:
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    return {
        "vocab_size": len(VOCABULARY),
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": SPREAD,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }


def _save(folder: Path, model_class: Any, config: Any, seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    model = model_class(config)
    model.generation_config.eos_token_id = VOCABULARY.index("<|im_end|>")
    model.generation_config.pad_token_id = VOCABULARY.index("<|endoftext|>")
    model.save_pretrained(folder)


def make_prompt(encoder: PromptEncoder, index: int, with_image: bool, most_images: int = 1) -> Prompt:
    """A prompt whose text, and images of noise (1 to most_images), depend on its index alone."""
    random = np.random.default_rng(index)
    images = []
    for place in range(1 + index % most_images if with_image else 0):
        height, width = 28 * (1 + (index + place) // 2 % 2), 28 * (1 + (index + place) % 4)
        images.append(Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    token_ids, sized = encoder.encode(f"{'<image>' * len(images)}what is {index}?", images)
    return Prompt(index, str(index), token_ids, sized, str(index))
