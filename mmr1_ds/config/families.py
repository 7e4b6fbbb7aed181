"""The families of models that were tested, and with what: read by the checks, by `mmr1-ds plan` and docs/models.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What models with one `model_type` in their config.json were tested with. All are packed."""

    name: str
    tested_with: str
    difference: float | None  # the largest seen between vLLM's log-probabilities and the actor's; None: under 1e-4
    takes_images: bool = False  # several a prompt, and videos
    has_experts: bool = False
    carries_states: bool = False  # along a sequence, by linear attention: prompts are shared outside of it
    ulysses: bool = False  # worker.actor.ulysses_size was tested
    lora: Literal["tested", "by name", "linear layers"] = "by name"
    servers: Literal["tested", "as in the ranks"] = "as in the ranks"


_UPDATES = "vLLM, three updates and syncs"
_STATES = "vLLM with linear attention in float32 by the test, three updates and syncs"
_APART = "one rank against two; resumed to the last bit"
FAMILIES = {
    "qwen2": Family(
        "Qwen2 and 2.5",
        "vLLM, five updates and syncs, embeddings tied and not; tensor parallelism; Ulysses", 9.5e-7,
        ulysses=True, lora="tested", servers="tested",
    ),
    "qwen3": Family("Qwen3", f"{_UPDATES}, tied; Ulysses", None, ulysses=True),
    "llama": Family("Llama", f"{_UPDATES}, Llama 3's frequencies; Ulysses", None, ulysses=True),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL",
        "vLLM, five updates and syncs on two ranks, tied and not; vLLM's servers; whole runs with videos; Ulysses",
        9.5e-7,
        takes_images=True, ulysses=True, lora="tested", servers="tested",
    ),
    "qwen2_vl": Family("Qwen2-VL", _UPDATES, 3.8e-6, takes_images=True),
    "qwen3_vl": Family(
        "Qwen3-VL", f"{_UPDATES} on two ranks, tied; whole runs with videos; Ulysses", 1.9e-6, takes_images=True,
        ulysses=True,
    ),
    "qwen3_5": Family(
        "Qwen3.5",
        "vLLM and its servers with linear attention in float32 by the test, three updates and syncs, tied; "
        f"whole runs with images; {_APART}", 1.9e-6,
        takes_images=True, carries_states=True, servers="tested",
    ),
    "qwen3_5_text": Family(
        "Qwen3.5, text alone", "as above but for images and tied embeddings; whole runs", 1.9e-6,
        carries_states=True, lora="tested", servers="tested",
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE", f"{_UPDATES}, tied; vLLM's servers; whole runs; Ulysses; {_APART}", 1.9e-6,
        has_experts=True, ulysses=True, lora="linear layers", servers="tested",
    ),
    "qwen3_vl_moe": Family(
        "Qwen3-VL-MoE", f"{_UPDATES}; vLLM's servers; whole runs with images; {_APART}", 2.1e-6,
        takes_images=True, has_experts=True, lora="linear layers", servers="tested",
    ),
    "qwen3_5_moe": Family(
        "Qwen3.5-MoE", f"{_STATES}, tied; whole runs with images; vLLM's servers; {_APART}", 3.3e-6,
        takes_images=True, has_experts=True, carries_states=True, lora="linear layers", servers="tested",
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3.5-MoE, text alone", _STATES, 1.9e-6,
        has_experts=True, carries_states=True, lora="linear layers",
    ),
}  # fmt: skip

# Of the published models that `mmr1-ds plan` knows by name: told before anything is downloaded.
PUBLISHED = {
    **{f"Qwen/Qwen2.5-VL-{size}-Instruct": "qwen2_5_vl" for size in ("3B", "7B", "32B")},
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "qwen3_vl_moe",
    "Qwen/Qwen3.5-9B": "qwen3_5",
    "Qwen/Qwen3.5-35B-A3B": "qwen3_5_moe",
}


def table() -> str:
    """Return the table of docs/models.md, in Markdown."""
    head = "family | packed | images | videos | LoRA | servers | experts | tested with | largest difference seen"
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for model_type, family in FAMILIES.items():
        cells = [
            f"{family.name} (`{model_type}`)",
            "yes, prompts shared" + (" outside of linear attention" if family.carries_states else ""),
            "yes, several a prompt" if family.takes_images else "no",
            "tested" if family.takes_images else "no",
            family.lora,
            family.servers,
            "yes" if family.has_experts else "no",
            family.tested_with,
            _difference(family),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(model_type: str) -> str:
    """Return what is known of a family, in one line."""
    family = FAMILIES.get(model_type)
    if family is None:
        return f"{model_type}, in no row of docs/models.md: padded, and tested with nothing"
    has = ["images and videos"] if family.takes_images else []
    has += ["experts"] if family.has_experts else []
    has += ["linear attention"] if family.carries_states else []
    figure = _figure(family.difference or 1e-4)
    tested = f"log-probabilities within {figure} of vLLM's, tested tiny, in fp32 on the CPU (docs/models.md)"
    shown = "; ".join([*has, "packed", tested])
    return f"{family.name} ({model_type}): {shown}"


def _difference(family: Family) -> str:
    return "under 1e-4" if family.difference is None else _figure(family.difference)


def _figure(difference: float) -> str:
    return f"{difference:.1e}".replace("e-0", "e-").replace(".0e", "e")
