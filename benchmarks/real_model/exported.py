"""Does the exported model answer as the run's last validation says? In transformers and in vLLM, greedily.

    mmr1-ds train config=examples/real_text/config.yaml worker.rollout.val_override_config.temperature=0 \
        worker.rollout.val_override_config.n=1 trainer.run_dir=RUN ...
    python benchmarks/real_model/exported.py RUN

The validation after the last step must have been greedy, an answer a prompt. Prints how many answers are the same,
to the last character, and the first that differ: where two tokens are equally likely, either may come.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mmr1_ds.commands.cli import main as mmr1_ds
from mmr1_ds.config.loading import load_config
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.data.encoding import PromptEncoder


def main(run: Path) -> int:
    """Returns: 0 if all answers are the same."""
    config = load_config([f"config={run / 'config.yaml'}"]).config
    encoder = PromptEncoder(config.worker.actor.model, config.data)
    data = load_dataset(config.data.val_files, config.data, encoder, "data.val_files")
    last = max((run / "eval").iterdir(), key=lambda folder: int(folder.name.removeprefix("step_")))
    rows = [json.loads(line) for line in (last / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    said = {row["prompt_id"]: row["response"] for row in rows}
    assert len(said) == len(rows) == len(data), f"{last}: {len(rows)} answers of {len(said)} prompts"
    prompts = [list(prompt.token_ids) for prompt in data.prompts(range(len(data)))]
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/model"
        assert mmr1_ds(["export", f"config={run / 'config.yaml'}", folder]) == 0
        answers = {
            "transformers": by_transformers(folder, prompts, config.data.max_response_length, encoder),
            "vLLM": by_vllm(folder, prompts, config.data.max_response_length, encoder),
        }
    is_same = True
    for name, found in answers.items():
        texts = [encoder.decode(tokens) for tokens in found]
        differing = [i for i, id in enumerate(data.prompt_ids) if texts[i] != said[id]]
        sys.stdout.write(f"{name}: {len(data) - len(differing)} of {len(data)} answers as {last.name} has them\n")
        for i in differing[:3]:
            sys.stdout.write(f"  {data.prompt_ids[i]}: {texts[i]!r}, in the run {said[data.prompt_ids[i]]!r}\n")
        is_same = is_same and not differing
    return 0 if is_same else 1


def by_transformers(folder: str, prompts: list[list[int]], length: int, encoder: PromptEncoder) -> list[list[int]]:
    """The greedy answers by `generate`, one prompt at a time, without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=list(encoder.eos_token_ids),
            pad_token_id=encoder.eos_token_ids[0],
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def by_vllm(folder: str, prompts: list[list[int]], length: int, encoder: PromptEncoder) -> list[list[int]]:
    """The greedy answers by a fresh engine that reads the exported folder."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.2)
    settings = SamplingParams(temperature=0, max_tokens=length, stop_token_ids=list(encoder.eos_token_ids))
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
