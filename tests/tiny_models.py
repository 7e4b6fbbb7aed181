"""Tiny models of several kinds, built on the spot and saved as ordinary model folders."""

from pathlib import Path

import numpy as np
from PIL import Image

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.demo.model import VOCABULARY, build_model, build_tokenizer, save_model
from mmr1_ds.records import Prompt


def save_vision_model(folder: Path, tied: bool = False, seed: int = 3) -> Path:
    """The demo's Qwen2.5-VL with random weights."""
    save_model(folder, build_model(seed, tie_word_embeddings=tied))
    return folder


def save_text_model(folder: Path, tied: bool = False, seed: int = 3, num_heads: int = 3) -> Path:
    """A Qwen2 of two layers with the demo's tokenizer and random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=32 * num_heads,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_prompt(encoder: PromptEncoder, index: int, with_image: bool) -> Prompt:
    """A prompt whose text, and image of noise, depend on its index alone."""
    images = []
    if with_image:
        width = 28 * (1 + index % 4)
        noise = np.random.default_rng(index).integers(0, 256, (28, width, 3), dtype=np.uint8)
        images = [Image.fromarray(noise)]
    token_ids, sized = encoder.encode(f"{'<image>' if with_image else ''}what is {index}?", images)
    return Prompt(index, str(index), token_ids, sized, str(index))
