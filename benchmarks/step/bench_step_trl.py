"""One rank of TRL's side of bench_step.py: GRPOTrainer with the same work, and what it needs on a CPU.

Usage: bench_step_trl.py FOLDER SETUP MICRO_BATCH NUM_STEPS, with RANK and the like in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from bench_step_sides import (
    KL_WEIGHT,
    LEARNING_RATE,
    LONGEST_PROMPT,
    NEW_TOKENS,
    PROMPTS,
    RESPONSES,
    TEMPERATURE,
    StageTimer,
    Turns,
    reward,
)
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

folder, setup, micro_batch, num_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
WITH_VLLM = setup == "one_rank_vllm"

ROOT = Path(__file__).resolve().parents[2]


def capitals(completions, **_):
    return [reward(completion[0]["content"]) for completion in completions]


def fit_vllm_to_cpu() -> None:
    """TRL leaves vLLM's type at bf16, and loads weights into layers that vLLM's CPU build has packed, which fails."""
    from trl.generation import vllm_generation

    plain = vllm_generation.LLM
    vllm_generation.LLM = lambda **options: plain(
        **options, dtype="float32", enforce_eager=True, generation_config="vllm", disable_log_stats=True
    )

    def sync_weights(self) -> None:
        weights = list(self._iter_named_params())
        self.llm.collective_rpc(lambda worker: worker.reload_weights(weights_iterator=iter(weights)))
        self.llm.reset_prefix_cache()

    vllm_generation.VLLMGeneration.sync_weights = sync_weights


class TakeTurns(TrainerCallback):
    """A step is what GRPOTrainer does between these two calls: generation, reward, reference, update."""

    def on_step_begin(self, args, state, control, **_):
        turns.begin()

    def on_step_end(self, args, state, control, **_):
        turns.end(stages.take(), lengths)
        lengths.clear()


turns = Turns(folder / setup / "trl", int(os.environ["RANK"]))
stages = StageTimer()
lengths: list[int] = []
if WITH_VLLM:
    fit_vllm_to_cpu()
rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows])
num_ranks = int(os.environ["WORLD_SIZE"])
deepspeed = None
if num_ranks > 1:
    deepspeed = json.loads((ROOT / "configs" / "deepspeed" / "zero3_cpu.json").read_text())
    deepspeed["optimizer"]["params"]["torch_adam"] = True  # as ours on a machine without a GPU
    from deepspeed import init_distributed

    init_distributed(dist_backend="gloo")  # else ZeRO-3 counts one rank when the model is loaded
trainer = GRPOTrainer(
    model=str(folder / "model"),
    reward_funcs=capitals,
    train_dataset=data,
    args=GRPOConfig(
        output_dir=str(folder / setup / "trl" / "run"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        deepspeed=deepspeed,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=PROMPTS * RESPONSES // micro_batch // num_ranks,
        num_generations=RESPONSES,
        max_completion_length=NEW_TOKENS,
        temperature=TEMPERATURE,
        beta=KL_WEIGHT,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=num_steps,
        use_vllm=WITH_VLLM,
        vllm_mode="colocate",
        vllm_max_model_length=LONGEST_PROMPT + NEW_TOKENS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    callbacks=[TakeTurns()],
)
trainer.generate_single_turn = trainer._generate_single_turn


def watched(*arguments, **named):
    with stages("gen"):
        completion_ids, logprobs = trainer.generate_single_turn(*arguments, **named)
    lengths.extend(len(ids) for ids in completion_ids)
    return completion_ids, logprobs


trainer._generate_single_turn = watched
if WITH_VLLM:
    stages.wrap(trainer.vllm_generation, "sync_weights", "sync")
inner = trainer._get_per_token_logps_and_entropies


def log_probs(model, *arguments, **named):
    if torch.is_grad_enabled():
        return inner(model, *arguments, **named)
    with stages("ref" if model is trainer.ref_model else "old"):
        return inner(model, *arguments, **named)


trainer._get_per_token_logps_and_entropies = log_probs
stages.wrap(trainer, "_calculate_rewards", "reward")
stages.wrap(trainer, "_generate_and_score_completions", "experience")
trainer.train()
sys.stdout.flush()
os._exit(0)
