"""Figures of one run: from the metrics it wrote to tokens a second, seconds by stage and the share of peak FLOP."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr1_ds.config import ModelConfig
from mmr1_ds.engine.model.flops import Work, model_flop
from mmr1_ds.engine.model.shapes import ModelShape, policy_shape

STAGES = {  # shown -> of `timing_s/*`
    "generate": ("gen",),
    "reward": ("reward",),
    "score": ("curriculum",),  # the kernel, and the table's update
    "log_probs": ("old", "ref", "values"),
    "update": ("update_actor", "update_critic"),
    "sync": ("sync",),
    "draw": ("draw",),
}


@dataclass(frozen=True)
class Settings:
    """What the figures need beside the metrics."""

    warmup: int  # steps left out
    num_responses: int  # trained on a step, all ranks
    refresh_steps: int  # that the run would have between two refreshes; their seconds are spread over as many
    ranks: int
    peak_tflops: float | None  # 1e12 FLOP a second of one rank's device; None: not known


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Raises: OSError, ValueError for a run that wrote no metrics."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_figures(rows: Sequence[Mapping[str, Any]], settings: Settings, shape: ModelShape | None) -> dict[str, float]:
    """Medians over the steps after the warm-up.

    `seconds/refresh` is the median of the refreshes after the first (which warms the engine up), spread over
    `refresh_steps`; `seconds/all` is a step with its share of the refresh, and every rate is by it.
    Raises: ValueError when no step, or no refresh where the run had one, is left to measure.
    """
    steps = [row for row in rows if row["step"] > settings.warmup and "timing_s/step" in row]
    if not steps:
        raise ValueError(f"no step after the warm-up of {settings.warmup}")
    figures = {f"seconds/{name}": _median_sum(steps, parts) for name, parts in STAGES.items()}
    figures["seconds/refresh"] = _refresh_seconds(rows) / settings.refresh_steps
    step = _median(steps, "timing_s/step")
    figures["seconds/other"] = max(0.0, step - sum(figures[f"seconds/{name}"] for name in STAGES))
    figures["seconds/step"] = step
    figures["seconds/all"] = whole = step + figures["seconds/refresh"]
    tokens = _median(steps, "perf/total_num_tokens")
    response = _median(steps, "response_length/mean")
    figures |= {
        "tokens_per_second": tokens / whole,
        "tokens_per_second_per_rank": tokens / whole / settings.ranks,
        "samples_per_second": settings.num_responses / whole,
        "generated_tokens_per_second": response * settings.num_responses / figures["seconds/generate"],
        "memory_gb": max(max(_of(row, "memory_gb/").values(), default=0.0) for row in steps),
        "response_tokens": response,
        "prompt_tokens": _median(steps, "prompt_length/mean"),
    }
    if shape is not None and settings.peak_tflops is not None:
        figures |= _utilisation(steps, figures, settings, shape, settings.peak_tflops)
    return figures


def _utilisation(
    steps: Sequence[Mapping[str, Any]],
    figures: Mapping[str, float],
    settings: Settings,
    shape: ModelShape,
    peak_tflops: float,
) -> dict[str, float]:
    """Model FLOP over what the devices could do; the vision tower and what checkpointing computes again do not count.

    `mfu_update`: forward and backward over the update's seconds. `mfu`: those, the forwards of log-probabilities and
    of sampling, over the whole step.
    """
    prompt, response = figures["prompt_tokens"], figures["response_tokens"]
    count = settings.num_responses
    work = Work([prompt + response] * count, response * count)
    text, update = model_flop(shape, work)
    passes = sum(f"timing_s/{name}" in steps[-1] for name in ("old", "ref"))
    peak = peak_tflops * 1e12 * settings.ranks
    return {
        "mfu_update": update / (figures["seconds/update"] * peak),
        "mfu": (update + text * (passes + 1)) / (figures["seconds/all"] * peak),
    }


def model_shape(path: str) -> ModelShape:
    return policy_shape(ModelConfig(model_path=path))


def over_repeats(repeats: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each figure."""
    return {
        name: {
            "median": statistics.median(run[name] for run in repeats),
            "min": min(run[name] for run in repeats),
            "max": max(run[name] for run in repeats),
        }
        for name in repeats[0]
    }


def _refresh_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    found = [float(row["timing_s/refresh"]) for row in rows if "timing_s/refresh" in row]
    if len(found) == 1:
        raise ValueError("one refresh alone, which warms the engine up: take more steps")
    return statistics.median(found[1:]) if found else 0.0


def _median(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(statistics.median(row[name] for row in steps))


def _median_sum(steps: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> float:
    return statistics.median(sum(row.get(f"timing_s/{part}", 0.0) for part in parts) for row in steps)


def _of(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(prefix)}
