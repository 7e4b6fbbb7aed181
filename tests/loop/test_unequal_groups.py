"""A run on two ranks with vLLM whose groups differ in size; resumed, it is the run that was never stopped."""

import json

import numpy as np
import pytest
import torch
import yaml
from fixtures.launching import run_ranks
from fixtures.tiny_run import OF_THE_MACHINE, write_run

# A third of the prompts is never right, a third always.
REWARD = """
def score(reward_inputs):
    found = []
    for item in reward_inputs:
        kind = int(item["ground_truth"]) % 3
        accuracy = float(item["response_length"] % 2) if kind == 1 else kind / 2
        found.append({"overall": accuracy, "accuracy": accuracy})
    return found
"""
NUM_STEPS, N, LARGEST = 7, 4, 9


def lines(path, since):
    return [line for text in path.read_text().splitlines() if (line := json.loads(text))["step"] > since]


def write(folder):
    path = write_run(folder, NUM_STEPS)
    (folder / "reward.py").write_text(REWARD)
    config = yaml.safe_load(path.read_text())
    config["data"] |= {"rollout_batch_size": 8, "curriculum_mixture_ratio": 0.25, "curriculum_probe_fraction": 0.1}
    config["worker"]["rollout"] = {"engine": "vllm", "kv_cache_gb": 1, "n": N, "n_min": 2, "n_max": LARGEST}
    config["trainer"] |= {"save_limit": -1, "save_freq": 4}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
def test_a_resumed_run_has_the_same_groups_and_weights(tmp_path):
    config = write(tmp_path / "assets")
    begun, resumed = tmp_path / "begun", tmp_path / "resumed"
    run_ranks("train.py", f"config={config}", f"trainer.run_dir={begun}", num_ranks=2)
    last = f"checkpoints/global_step_{NUM_STEPS}"
    fourth = f"trainer.load_checkpoint_path={begun}/checkpoints/global_step_4"
    run_ranks("train.py", f"config={config}", f"trainer.run_dir={resumed}", fourth, num_ranks=2)

    observed = lines(begun / "observations.jsonl", 0)
    sizes = [np.array(line["num_responses"])[: len(line["prompts"]) - line["num_probes"]] for line in observed]
    assert all(len(step) == 8 and step.sum() == 8 * N for step in sizes)
    everything = np.concatenate(sizes)
    assert 2 <= everything.min() < N < everything.max() <= LARGEST
    metrics = lines(begun / "metrics.jsonl", 0)
    assert [line["curriculum/group_size_max"] for line in metrics] == [step.max() for step in sizes]
    assert sum(line["actor/num_bad_updates"] for line in metrics) == 0

    for name in ("observations", "draws"):
        assert lines(begun / f"{name}.jsonl", 4) == lines(resumed / f"{name}.jsonl", 4), name
    # In the order of what changed since a prompt was shown first, of which another folder knows nothing.
    samples = (lines(folder / "samples.jsonl", 4) for folder in (begun, resumed))
    one, other = (sorted(found, key=lambda line: (line["step"], line["index"])) for found in samples)
    assert one == other
    pairs = zip(lines(begun / "metrics.jsonl", 4), lines(resumed / "metrics.jsonl", 4), strict=True)
    for one, other in pairs:
        for name, value in one.items():
            assert name.startswith(OF_THE_MACHINE) or other[name] == value, name
    for path in sorted((begun / last / "actor").rglob("*optim_states.pt")):
        other = resumed / path.relative_to(begun)
        states = [torch.load(file, weights_only=False)["optimizer_state_dict"] for file in (path, other)]
        for one, two in zip(*(state["fp32_flat_groups"] for state in states), strict=True):
            assert torch.equal(one, two)
