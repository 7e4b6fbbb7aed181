"""A whole training run that starts in seconds: a tiny text model, prompts, a reward, a config; every step is saved."""

import json
from pathlib import Path

import torch
import yaml
from tiny_models import save_text_model

NUM_PROMPTS = 11
OF_THE_MACHINE = ("timing_s/", "timing_per_token_ms/", "memory_gb/", "perf/")  # no two runs share them
REWARD = """
def score(reward_inputs):
    return [{"overall": len(item["response"]) % 3 / 2, "accuracy": float(item["response_length"] % 2)}
            for item in reward_inputs]
"""


def write_run(folder: Path, num_steps: int) -> Path:
    """Returns: the config, for two ranks."""
    save_text_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"what is {i}?", "answer": str(i)} for i in range(NUM_PROMPTS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "data": {
            "train_files": str(folder / "data.jsonl"),
            "max_prompt_length": 64,
            "max_response_length": 6,
            "rollout_batch_size": 4,
            "sampling_strategy": "curriculum",
            "curriculum_refresh": "online",
        },
        "worker": {
            "actor": {
                "global_batch_size": 4,
                "micro_batch_size_per_device_for_update": 8,
                "micro_batch_size_per_device_for_experience": 8,
                "model": {"model_path": str(folder / "model")},
                "optim": {"lr": 1e-3},
            },
            "rollout": {"engine": "hf", "n": 4},
            "reward": {"reward_function": f"{folder / 'reward.py'}:score", "num_workers": 1},
        },
        "trainer": {
            "max_steps": num_steps,
            "report_freq": None,
            "n_gpus_per_node": 2,
            "save_freq": 1,
            "save_limit": 2,
            "collective_timeout_seconds": 60,
            "logger": ["console"],
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def assert_same_run(one: Path, other: Path) -> None:
    """The prompts of every step, every figure that is no time, the last step's curriculum and weights, bit by bit."""
    for name in ("draws", "observations", "curriculum", "samples"):
        assert (one / f"{name}.jsonl").read_bytes() == (other / f"{name}.jsonl").read_bytes(), name
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    for line in lines[0] + lines[1]:
        for name in [name for name in line if name.startswith(OF_THE_MACHINE)]:
            del line[name]
    assert lines[0] == lines[1]
    last = [run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() for run in (one, other)]
    assert last[0].name == last[1].name == f"global_step_{lines[0][-1]['step']}"
    names = sorted(path.name for path in (last[0] / "curriculum").iterdir())
    assert names
    for name in names:
        assert (last[0] / "curriculum" / name).read_bytes() == (last[1] / "curriculum" / name).read_bytes(), name
    states = sorted((last[0] / "actor").rglob("*optim_states.pt"))
    assert len(states) == 2
    for path in states:
        found = [torch.load(folder / path.relative_to(last[0]), weights_only=False) for folder in last]
        flat = [state["optimizer_state_dict"]["fp32_flat_groups"] for state in found]
        for a, b in zip(*flat, strict=True):
            assert torch.equal(a, b)
