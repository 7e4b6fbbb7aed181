"""How often a step's images go through the model's image processor on one rank, and what that takes.

    python benchmarks/scale/images.py [--prompts 64] [--group 8] [--side 448]

So many prompts with an image of side x side pixels each, and a group of responses to each, go through the collation of
the old policy's, the reference's and the update's micro-batches, of 8 responses each. `now` as the program does,
`before` as it did while every response in every pass had its prompt's images processed. Calls of the processor, and
processor seconds of the collation with it; what vLLM processes itself, once a prompt, is beside both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmr1_ds.commands.demo.model import build_model, save_model
from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.data.images import PixelLimits
from mmr1_ds.engine.model.batching import collate
from mmr1_ds.records import Pair, Prompt

PASSES, MICRO_BATCH, RESPONSE_TOKENS = ("old policy", "reference", "update"), 8, 512


class Counted:
    """The image processor, its calls and images counted."""

    def __init__(self, processor: Any) -> None:
        self._processor, self.num_calls, self.num_images = processor, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: list[Image.Image], **settings: Any) -> Any:
        self.num_calls += 1
        self.num_images += len(images)
        return self._processor(images=images, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--side", type=int, default=448)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        save_model(Path(root) / "model", build_model(0))
        encoder = PromptEncoder(ModelConfig(model_path=f"{root}/model"), DataConfig(min_pixels=None, max_pixels=None))
    encoder.pixel_limits = PixelLimits.of(
        factor=28, processor_min=3136, processor_max=12845056, min_pixels=None, max_pixels=None
    )
    processor = encoder.processor.image_processor
    processor.size = {"shortest_edge": 3136, "longest_edge": 12845056}  # as Qwen2.5-VL's is published
    for name in ("before", "now"):
        counted = encoder.processor.image_processor = Counted(processor)
        pairs = make_pairs(encoder, arguments.prompts, arguments.group, arguments.side)
        if name == "before":
            encoder.expand = encoder._expand
        else:
            del encoder.expand
        begin = time.process_time()
        for _ in PASSES:
            for start in range(0, len(pairs), MICRO_BATCH):
                collate(pairs[start : start + MICRO_BATCH], encoder, torch.device("cpu"))
        seconds = time.process_time() - begin
        figures = f"{counted.num_calls:6d} calls, {counted.num_images:6d} images, {seconds:7.2f} s of the processor"
        sys.stdout.write(f"{name:7s} {figures}\n")


def make_pairs(encoder: PromptEncoder, num_prompts: int, group: int, side: int) -> list[Pair]:
    """Prompts and responses, group by group, none of which was seen before."""
    random = np.random.default_rng(0)
    response, pairs = np.ones(RESPONSE_TOKENS, dtype=np.int32), []
    for index in range(num_prompts):
        image = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        token_ids, images, _ = encoder.encode(f"<image>How many of {index}?", [image], "a prompt", [])
        pairs += [(Prompt(index, str(index), token_ids, images, ""), response)] * group
    return pairs


if __name__ == "__main__":
    main()
