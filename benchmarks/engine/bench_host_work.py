"""Seconds of a step's host work on one rank: all that Python does between forward passes, by part.

    python benchmarks/engine/bench_host_work.py [--prompts 64] [--group 8] [--tokens 1700] [--side 1024] [--json FILE]

The default is a rank's share of mmr1_h100 with Qwen2.5-VL-7B on eight GPUs: 512 responses of 1,700 tokens to 64 prompts
with an image of a megapixel each, micro-batches by that preset's budgets of tokens, two passes without gradient (old
policy, reference) and the update. The processor is Qwen2.5-VL's, the model a tiny one of which no layer is computed:
what is left of its forward is what transformers does around them. One thread, on the CPU. What a GPU adds is the copy
of the pixels into pinned memory, for which a copy stands in.

Prints a line a part: seconds of the step, calls, and in brackets what it was while images were processed for each
response in each pass (the processor's time for one, times the responses, times the passes).
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

from mmr1_ds.algorithm.aggregation import Segments
from mmr1_ds.commands.demo.model import build_model, save_model
from mmr1_ds.config import DataConfig, ModelConfig
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.micro_batches import by_prompts
from mmr1_ds.engine.model.attention import VARLEN, attend_images_at_once
from mmr1_ds.engine.model.batching import collate, end_to_end
from mmr1_ds.engine.model.packing import pack
from mmr1_ds.records import Pair, Prompt

CPU = torch.device("cpu")
BUDGETS = {"old policy": 4 * 6144, "reference": 4 * 6144, "update": 2 * 6144}  # tokens a micro-batch: mmr1_h100's
IMAGES, BESIDE = "images: processor, once a prompt", ("images: decoded and sized", "images: processor, once a prompt")


class Times:
    """Seconds and calls by part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what runs inside."""
        began = time.process_time()
        yield
        self.seconds[part] += time.process_time() - began
        self.calls[part] += 1


class Alone:
    """A rank without others."""

    def max(self, values: Mapping[str, float], stage: str) -> Mapping[str, float]:
        """Return the values, which are the largest."""
        return values


class Nothing(nn.Module):
    """Stands in for a part of the model that computes: zeros of as many rows as come out of it, of some width."""

    def __init__(self, width: int, rows_each: int = 1) -> None:
        super().__init__()
        self.width, self.rows_each, self.weight = width, rows_each, nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        return states.new_zeros(len(states) // self.rows_each, self.width)


class Positions(nn.Module):
    """Stands in for the rotary embedding."""

    def forward(self, states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return the positions, which no layer reads."""
        return position_ids


def hollow_model(folder: str) -> nn.Module:
    """Return the tiny model with varlen attention, without its layers."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=VARLEN).eval()
    attend_images_at_once(model)
    tower, text = model.base_model.visual, model.base_model.language_model
    tower.blocks, text.layers = nn.ModuleList(), nn.ModuleList()
    tower.patch_embed = Nothing(tower.config.hidden_size)
    tower.merger = Nothing(text.config.hidden_size, tower.config.spatial_merge_size**2)
    text.norm, text.rotary_emb = nn.Identity(), Positions()
    return model


def read_prompts(encoder: PromptEncoder, number: int, side: int, times: Times) -> list[Prompt]:
    """Return prompts with an image each, read from JPEG."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((side + 7, side + 7)).save(file, "jpeg")
    prompts = []
    for index in range(number):
        with times.of(BESIDE[0]):
            image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
            token_ids, sized, _ = encoder.encode("<image>" + "what is it?" * 10, [image])
        tokens = len(token_ids) - 1 + encoder.num_image_tokens(*sized[0].size)
        prompts.append(Prompt(index, str(index), token_ids, sized, "1", num_tokens=tokens))
    return prompts


@torch.no_grad()
def measure(prompts: list[Prompt], group: int, tokens: int, encoder: PromptEncoder, model: nn.Module) -> Times:
    """Go through a step's passes as `ZeroEngine` does."""
    times = Times()
    random = np.random.default_rng(0)
    for prompt in prompts:
        with times.of(IMAGES):
            found = encoder.expand(prompt)
        with times.of("pixels pinned, once a prompt"):
            found.pixel_values.to(torch.bfloat16).clone()
    pairs: list[Pair] = [
        (prompt, random.integers(100, 110, tokens, dtype=np.int32)) for prompt in prompts for _ in range(group)
    ]
    values = [random.random(tokens, dtype=np.float32) for _ in pairs]
    for name, budget in BUDGETS.items():
        with times.of("micro-batches planned"):
            lengths = [len(response) for _, response in pairs]
            prompt_lengths = [prompt.num_tokens for prompt, _ in pairs]
            parts = by_prompts([id(prompt) for prompt, _ in pairs], prompt_lengths, lengths, budget, Alone())
        for part in parts:
            chosen = [pairs[i] for i in part]
            with times.of("collation"):
                batch = collate(chosen, encoder, CPU)
            with times.of("packed rows, positions"):
                inputs, _ = pack(model, batch, prompts_once=True)
            with times.of("cuts of the attention"):
                assert inputs["row"].cuts
            with times.of("transformers around its layers"):
                model.base_model(**inputs, use_cache=False)
            if name == "update":
                with times.of("inputs of the loss"):
                    Segments.of([len(response) for _, response in chosen])
                    for _ in ("rollout", "old", "reference", "advantages"):
                        end_to_end([values[i] for i in part], CPU)
    return times


def main() -> None:
    """Measure one rank's step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 64), ("group", 8), ("tokens", 1700), ("side", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), build_model(0))
        data = DataConfig(min_pixels=7056, max_pixels=1048576, max_prompt_length=2048)
        encoder = PromptEncoder(ModelConfig(model_path=folder), data)
        encoder.processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 12845056}  # as published
        encoder.pixel_limits = type(encoder.pixel_limits).of(
            factor=28, processor_min=3136, processor_max=12845056, min_pixels=7056, max_pixels=1048576
        )
        model = hollow_model(folder)
        times = Times()
        prompts = read_prompts(encoder, o.prompts, o.side, times)
        found = measure(prompts, o.group, o.tokens, encoder, model)
    found.seconds.update(times.seconds)
    found.calls.update(times.calls)
    each = found.seconds[IMAGES] / o.prompts
    before = {IMAGES: each * o.prompts * o.group * len(BUDGETS)}
    main_thread = sum(seconds for part, seconds in found.seconds.items() if part not in BESIDE)
    lines = [f"{o.prompts} prompts of {prompts[0].num_tokens:,} tokens x {o.group} responses of {o.tokens:,}"]
    for part, seconds in found.seconds.most_common():
        was = f"  [{before[part]:.3g} s]" if part in before else ""
        lines.append(f"{part:34}{seconds:9.3f} s {found.calls[part]:6} calls{was}")
    lines.append(f"{'between forward passes':34}{main_thread:9.3f} s  [{main_thread + sum(before.values()):.3g} s]")
    lines.append(f"{'beside the sampling, in threads':34}{sum(found.seconds[part] for part in BESIDE):9.3f} s")
    sys.stdout.write("\n".join(lines) + "\n")
    if o.json:
        o.json.write_text(json.dumps({"settings": {**vars(o), "json": None}, "seconds": found.seconds}) + "\n")


if __name__ == "__main__":
    main()
