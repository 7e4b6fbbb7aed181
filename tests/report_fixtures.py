"""Run directories made up for the report's tests: all files that a run leaves, with a plausible course."""

import json
import math
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

NUM_PROMPTS = 240
GROUP = 8  # responses
HOSTILE = [
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "W" * 700,
    "🙂👩‍👩‍👧 数字を読む 数字最大的是多少 العدد الأكبر هو \u202eabc",
    "<svg onload=alert(3)> & \"quotes\" 'single' {{ 7 * 7 }} {% raw %} \x00\x0b",
    "half a character: \ud83d, and $x^2$ \\boxed{7}",
]


def write_run(
    run_dir: Path,
    strategy: str = "curriculum",
    refresh: str = "full",
    seed: int = 1,
    num_steps: int = 60,
    total_steps: int = 60,
    batch: int = 8,
    name: str = "digits",
) -> Path:
    """A run of `total_steps` that has come to `num_steps`. Returns: run_dir."""
    run_dir.mkdir(parents=True)
    random = np.random.default_rng([seed, len(strategy), len(refresh)])
    _write_config(run_dir, strategy, refresh, seed, total_steps, name)
    course = _Course(random, strategy, refresh, batch)
    lines: dict[str, list] = {kind: [] for kind in ("metrics", "draws", "observations", "curriculum", "samples")}
    lines["generations"] = []
    course.validate(0, lines)
    if strategy == "curriculum":
        course.look(0, lines)
    for step in range(1, num_steps + 1):
        course.learn(step, lines, run_dir)
    for kind, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run_dir / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    return run_dir


def _write_config(run_dir: Path, strategy: str, refresh: str, seed: int, total_steps: int, name: str) -> None:
    config = {
        "data": {
            "train_files": "data/train.parquet",
            "val_files": "data/val.parquet",
            "rollout_batch_size": 8,
            "seed": seed,
            "sampling_strategy": strategy,
            "curriculum_metrics": ["learnability", "self-bleu"],
            "curriculum_metric_weights": [0.8, 0.2],
            "curriculum_mixture_ratio": 0.5,
            "curriculum_update_freq": 15,
            "curriculum_refresh": refresh,
        },
        "algorithm": {"adv_estimator": "grpo"},
        "worker": {
            "actor": {"model": {"model_path": "models/tiny-qwen2.5-vl"}},
            "rollout": {"engine": "vllm", "n": GROUP, "seed": seed},
            "reward": {"api_key": "sk-not-to-be-shown"},
        },
        "trainer": {"max_steps": total_steps, "experiment_name": name, "run_dir": str(run_dir)},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    versions = {"mmr1_ds": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "deepspeed": "0.19.8", "vllm": None}
    environment = {"versions": versions, "device": "NVIDIA H100 80GB HBM3", "num_ranks": 2, "num_cores": 32}
    (run_dir / "environment.json").write_text(json.dumps(environment | {"num_gpus": 2}), encoding="utf-8")


class _Course:
    """A policy whose pass rates rise, and what is written of it."""

    def __init__(self, random: np.random.Generator, strategy: str, refresh: str, batch: int) -> None:
        self.random, self.strategy, self.refresh, self.batch = random, strategy, refresh, batch
        self.difficulty = random.normal(0.3, 2.0, NUM_PROMPTS)
        self.table = np.full(NUM_PROMPTS, np.nan)  # predicted pass rates
        self.seconds, self.rollouts, self.trained, self.skill = 31.0, 0, 0, 0.0
        self.bins: dict[str, np.ndarray] = {}

    def truth(self) -> np.ndarray:
        return 1 / (1 + np.exp(self.difficulty - self.skill))

    def learn(self, step: int, lines: dict[str, list], run_dir: Path) -> None:
        online = self.strategy == "curriculum" and self.refresh == "online"
        weights = np.ones(NUM_PROMPTS)
        if self.strategy == "curriculum":
            weights = np.where(np.isnan(self.table), 0.25, self.table * (1 - self.table)) + 0.01
        prompts = self.random.choice(NUM_PROMPTS, self.batch, replace=False, p=weights / weights.sum())
        probes = self.random.choice(NUM_PROMPTS, 2, replace=False) if online else np.empty(0, dtype=int)
        seen = np.concatenate([prompts, probes])
        right = self.random.binomial(GROUP, self.truth()[seen])
        predicted, rates = self.table[seen], right / GROUP
        if online:
            self.table[seen] = np.clip(0.5 * np.nan_to_num(predicted, nan=0.5) + 0.5 * rates, 0.03, 0.97)
        effective = float(((right[: self.batch] > 0) & (right[: self.batch] < GROUP)).mean())
        self.skill += 0.05 * effective + 0.01
        self.rollouts += len(seen) * GROUP
        self.trained += self.batch * GROUP
        accuracy = float(rates[: self.batch].mean())
        metrics = {"step": step} | self._step_metrics(step, accuracy, effective)
        lines["metrics"].append(metrics)
        lines["draws"].append({"step": step, "prompts": prompts.tolist()})
        lines["observations"].append(
            {
                "step": step,
                "prompts": seen.tolist(),
                "predicted": [None if np.isnan(value) else round(float(value), 4) for value in predicted],
                "pass_rates": rates.tolist(),
                "num_responses": [GROUP] * len(seen),
                "num_probes": len(probes),
            }
        )
        for place in range(2):
            lines["samples"].append(self._sample(step, int(seen[place]), predicted[place], rates[place], run_dir))
        if self.strategy == "curriculum" and step % 15 == 0:
            self.look(step, lines)
        if step % 10 == 0:
            self.validate(step, lines)

    def _step_metrics(self, step: int, accuracy: float, effective: float) -> dict[str, float | None]:
        noise = self.random.normal(0, 1, 12)
        timing = {
            "gen": 4.2 + 0.3 * noise[0] + (9 if step == 1 else 0),
            "reward": 0.11,
            "curriculum": 0.02,
            "draw": 0.001,
            "old": 0.8 + 0.02 * noise[1],
            "ref": 0.9 + 0.02 * noise[2],
            "adv": 0.004,
            "update_actor": 3.1 + 0.1 * noise[3],
            "sync": 0.6,
        }
        whole = sum(timing.values()) + 0.2
        self.seconds += whole
        memory = {"gen": 61.2, "reward": 12.0, "old": 38.5, "ref": 35.1, "update_actor": 66.0 + noise[4], "sync": 41.0}
        length = 180 + 2.2 * step + 6 * noise[5]
        return {
            "reward/overall": 0.9 * accuracy + 0.1,
            "reward/accuracy": accuracy,
            "reward/format": min(1.0, 0.9 + step / 500),
            "reward/num_responses": float(self.batch * GROUP),
            "actor/entropy_loss": 0.6 * math.exp(-step / 60) + 0.01 * noise[6],
            "actor/ref_kl": 0.0004 * step * (1 + 0.1 * abs(noise[7])),
            "actor/pg_clipfrac_higher": abs(0.004 * noise[8]),
            "actor/pg_clipfrac_lower": abs(0.002 * noise[9]),
            "actor/grad_norm": None if step == 17 else 0.4 + 0.08 * abs(noise[10]),
            "actor/lr": 1e-6 * min(1.0, step / 5),
            "rollout/logprob_diff_max": 0.02 + 0.004 * abs(noise[11]),
            "rollout/logprob_diff_mean": 0.003,
            "response_length/mean": length,
            "response_length/max": length * 2.1,
            "response_length/clip_ratio": max(0.0, 0.02 * noise[0]),
            "curriculum/effective_group_fraction": effective,
            "curriculum/extra_rollout_fraction": self.rollouts / self.trained - 1,
            "curriculum/log_loss": 0.5 + 0.05 * noise[1],
            "perf/throughput": 5200 + 200 * noise[2],
            "perf/cpu_memory_used_gb": 88.0 + 0.1 * step,
            "perf/max_memory_allocated_gb": 66.0 + step / 50,
            "perf/elapsed_seconds": self.seconds,
            "perf/num_rollouts": float(self.rollouts),
            **{f"timing_s/{stage}": seconds for stage, seconds in timing.items()},
            "timing_s/step": whole,
            **{f"memory_gb/{stage}": peak for stage, peak in memory.items()},
        }

    def look(self, step: int, lines: dict[str, list]) -> None:
        if self.refresh == "full":
            self.table = self.random.binomial(GROUP, self.truth()) / GROUP
            self.rollouts += NUM_PROMPTS * GROUP
            self.seconds += 48.0
            lines["metrics"][-1]["timing_s/refresh"] = 48.0
            lines["metrics"][-1] |= {"perf/elapsed_seconds": self.seconds, "perf/num_rollouts": float(self.rollouts)}
        weights = np.where(np.isnan(self.table), 0.25, self.table * (1 - self.table)) + 0.01
        row: dict[str, object] = {"step": step, "kind": self.refresh, "num_unknown": int(np.isnan(self.table).sum())}
        for kind, values in (("weight", weights / weights.max()), ("pass_rate", self.table)):
            bins = np.where(np.isnan(values), 10, np.clip(np.nan_to_num(values) * 10, 0, 9)).astype(int)
            before = self.bins.get(kind)
            row[f"{kind}_counts"] = np.bincount(bins, minlength=11)[:10].tolist()
            moves = None
            if before is not None:
                table = np.zeros((11, 11), dtype=int)
                np.add.at(table, (before, bins), 1)
                moves = table[:10, :10].tolist()
            row[f"{kind}_transitions"] = moves
            self.bins[kind] = bins
        lines["curriculum"].append(row)

    def validate(self, step: int, lines: dict[str, list]) -> None:
        accuracy = float(self.random.binomial(512, self.truth().mean()) / 512)
        if not lines["metrics"]:
            lines["metrics"].append({"step": step, "perf/elapsed_seconds": self.seconds, "perf/num_rollouts": 0.0})
        self.seconds += 11.0
        lines["metrics"][-1] |= {
            "val/accuracy_reward": accuracy,
            "timing_s/testing": 11.0,
            "timing_s/save_checkpoint": 4.0,
            "perf/elapsed_seconds": self.seconds,
        }
        for number in range(4):
            lines["generations"].append(
                {
                    "step": step,
                    "prompt": f"user\nWhich digit is the largest? ({number})\nassistant\n",
                    "response": f"<think>4 6 {number}</think><answer>{HOSTILE[number]}</answer>",
                    "ground_truth": str(number),
                    "score": float(number % 2),
                }
            )

    def _sample(self, step: int, index: int, predicted: float, rate: float, run_dir: Path) -> dict[str, object]:
        image = run_dir / "samples" / f"{index}_0.webp"
        if not image.exists():
            image.parent.mkdir(exist_ok=True)
            _draw(index).save(image)
        digits = [index * 7 % 10, index * 3 % 10, index % 10]
        texts = [
            f"I read the digits one by one: {digits}. The largest is {max(digits)}.",
            HOSTILE[index % len(HOSTILE)],
        ]
        return {
            "step": step,
            "index": index,
            "prompt_id": f"train/{index:05d}",
            "prompt": f"<image>Which digit in the picture is the largest? {HOSTILE[(index + 1) % len(HOSTILE)]}",
            "ground_truth": str(max(digits)),
            "predicted": None if np.isnan(predicted) else float(predicted),
            "pass_rate": float(rate),
            "num_responses": GROUP,
            "responses": [
                {"text": text, "reward": float(rate > 0) * (1 - place), "accuracy": float(rate > 0) * (1 - place)}
                for place, text in enumerate(texts)
            ],
            "images": [f"samples/{index}_0.webp"],
        }


def _draw(index: int) -> Image.Image:
    image = Image.new("RGB", (224, 64), (18, 18, 24))
    pen = ImageDraw.Draw(image)
    for place, digit in enumerate([index * 7 % 10, index * 3 % 10, index % 10]):
        pen.text((24 + 64 * place, 8), str(digit), fill=(240, 240, 240), font_size=44)
    return image
