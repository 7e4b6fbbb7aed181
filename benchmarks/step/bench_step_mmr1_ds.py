"""One rank of our side of bench_step.py: the program itself, composed as `mmr1_ds.train` composes it.

Usage: bench_step_mmr1_ds.py FOLDER SETUP MICRO_BATCH NUM_STEPS, with RANK and the like in the environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench_step_sides import (
    KL_WEIGHT,
    LEARNING_RATE,
    LONGEST_PROMPT,
    NEW_TOKENS,
    PROMPTS,
    RESPONSES,
    TEMPERATURE,
    Turns,
)

from mmr1_ds import train
from mmr1_ds.cluster.exits import leave
from mmr1_ds.loop import composition
from mmr1_ds.loop.trainer import Trainer

folder, setup, micro_batch, num_steps = Path(sys.argv[1]), *sys.argv[2:5]
ENGINES = {"zero3_two_ranks_transformers": "hf", "one_rank_vllm": "vllm"}


class TurnTakingTrainer(Trainer):
    """The program's trainer; its steps wait for their turn."""

    def fit(self) -> None:
        self._turns = Turns(folder / setup / "mmr1_ds", int(os.environ["RANK"]))
        make = self.batches.make
        lengths: list[int] = []

        def watched(*arguments):
            batch = make(*arguments)
            lengths[:] = [len(r.token_ids) for g in batch.groups for r in g.group.responses]
            return batch

        self.batches.make = watched
        self._lengths = lengths
        super().fit()

    def train_step(self) -> dict[str, float]:
        self._turns.begin()
        metrics = super().train_step()
        stages = {name[9:]: value for name, value in metrics.items() if name.startswith("timing_s/")}
        stages.pop("step", None)
        self._turns.end(stages, self._lengths)
        return metrics


composition.Trainer = TurnTakingTrainer
arguments = {
    "data.train_files": folder / "prompts.jsonl",
    "data.prompt_key": "question",
    "data.max_prompt_length": LONGEST_PROMPT,
    "data.max_response_length": NEW_TOKENS,
    "data.rollout_batch_size": PROMPTS,
    "data.filter_overlong_prompts_workers": 1,
    "algorithm.kl_coef": KL_WEIGHT,
    "worker.actor.model.model_path": folder / "model",
    "worker.actor.model.enable_gradient_checkpointing": "false",
    "worker.actor.global_batch_size": PROMPTS,
    "worker.actor.micro_batch_size_per_device_for_update": micro_batch,
    "worker.actor.micro_batch_size_per_device_for_experience": micro_batch,
    "worker.actor.optim.lr": LEARNING_RATE,
    "worker.rollout.engine": ENGINES[setup],
    "worker.rollout.n": RESPONSES,
    "worker.rollout.temperature": TEMPERATURE,
    "worker.rollout.kv_cache_gb": 1,
    "worker.rollout.max_num_seqs": PROMPTS * RESPONSES,  # TRL's limits of vLLM, this one and the next
    "worker.rollout.max_num_batched_tokens": 4096,
    "worker.reward.reward_function": f"{folder / 'reward.py'}:score",
    "worker.reward.num_workers": 1,
    "trainer.max_steps": num_steps,
    "trainer.report_freq": "null",
    "trainer.train_generations_to_log": 0,
    "trainer.total_epochs": num_steps,
    "trainer.n_gpus_per_node": 2 if setup == "zero3_two_ranks_transformers" else 1,
    "trainer.val_before_train": "false",
    "trainer.save_freq": -1,
    "trainer.logger": "[jsonl]",
    "trainer.run_dir": folder / setup / "mmr1_ds" / "run",
}
leave(train.main([f"{key}={value}" for key, value in arguments.items()] + sys.argv[5:]))
