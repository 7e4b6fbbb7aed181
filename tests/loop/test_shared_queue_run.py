"""Whole runs on two ranks with vLLM whose ranks take their prompts from one queue."""

import json

import pytest
import yaml
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model
from fixtures.tiny_run import write_run

pytestmark = pytest.mark.slow
NUM_STEPS, BATCH, N = 3, 10, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a run whose engines hold two groups at once, a fifth of the batch."""
    path = write_run(tmp_path_factory.mktemp("assets"), NUM_STEPS)
    config = yaml.safe_load(path.read_text())
    config["data"] |= {"val_files": config["data"]["train_files"]}
    config["data"] |= {"rollout_batch_size": BATCH, "max_response_length": 23, "curriculum_probe_fraction": 0.1}
    config["worker"]["actor"] |= {"global_batch_size": BATCH, "micro_batch_size_per_device_for_update": 4}
    config["worker"]["rollout"] = {"engine": "vllm", "kv_cache_gb": 1, "n": N, "max_num_seqs": 2 * N}
    config["worker"]["rollout"]["val_override_config"] = {"n": 3, "temperature": 1.0}
    config["trainer"] |= {"save_freq": -1, "val_before_train": True, "val_freq": -1, "val_generations_to_log": 2}
    path.write_text(yaml.safe_dump(config))
    return path


def run(config, folder, *settings, idle_rank=-1):
    """Returns: the groups that each rank sampled, by rank and step, the metrics of steps and of validation before."""
    folder.mkdir()
    run_ranks(
        "queued_run.py", folder, str(idle_rank), f"config={config}", f"trainer.run_dir={folder}/run", *settings,
        num_ranks=2,
    )  # fmt: skip
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    validation, *steps = metrics
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], steps, validation


def assert_as_drawn(folder, sampled):
    """The groups of all ranks are those of the prompts that were drawn, slot by slot."""
    draws = [json.loads(line) for line in (folder / "run" / "draws.jsonl").read_text().splitlines()]
    assert len(draws) == NUM_STEPS
    for step, line in enumerate(draws):
        assert [index for _, index, _ in sorted(sampled[0][step] + sampled[1][step])] == line["prompts"]


@pytest.fixture(scope="module")
def apart(config, tmp_path_factory):
    """The run whose ranks have prompts of their own."""
    folder = tmp_path_factory.mktemp("apart") / "out"
    return *run(config, folder), folder


@pytest.mark.parametrize("idle_rank", [-1, 0])
def test_the_first_batch_is_that_of_a_run_without_a_queue_and_training_goes_on(config, apart, tmp_path, idle_rank):
    """Rank 0 takes its share, or leaves all to rank 1."""
    queued = run(config, tmp_path / "out", "worker.rollout.shared_queue=true", idle_rank=idle_rank)
    sampled, metrics, validation = queued
    expected, of_apart, validation_apart, apart_folder = apart
    for step in range(NUM_STEPS):
        assert sorted(slot for rank in sampled for slot, *_ in rank[step]) == [*range(BATCH)]
        assert (sampled[0][step] == []) == (idle_rank == 0)
    # Later steps have other weights: what is computed together differs in rounding.
    assert sorted(sampled[0][0] + sampled[1][0]) == sorted(expected[0][0] + expected[1][0])
    assert [line["step"] for line in metrics] == [line["step"] for line in of_apart] == [1, 2, 3]
    for line in metrics:
        assert line["rollout/logprob_diff_max"] < 1e-4
        assert line["actor/grad_norm"] > 0 and line["actor/num_bad_updates"] == 0
    for name in ("reward/overall", "response_length/mean", "actor/grad_norm"):
        assert metrics[0][name] == pytest.approx(of_apart[0][name], rel=1e-3), name
    assert_as_drawn(tmp_path / "out", sampled)
    # Each rank has the answers to its own prompts again: the same in the same order.
    for name in ("eval/step_0/answers.jsonl", "generations.jsonl"):
        assert (tmp_path / "out" / "run" / name).read_text() == (apart_folder / "run" / name).read_text() != ""
    assert {name for name in validation if name.startswith("val/")} >= {"val/reward_score", "val/num_responses"}
    assert {k: v for k, v in validation.items() if k.startswith("val")} == pytest.approx(
        {k: v for k, v in validation_apart.items() if k.startswith("val")}
    )


@pytest.mark.nightly
def test_refresh_and_baselines_come_from_the_queue(config, tmp_path):
    """Rank 0 takes nothing: rank 1 samples all, and both learn what ranks with prompts of their own find."""
    settings = ["data.curriculum_refresh=full", "algorithm.adv_estimator=remax"]
    found = []
    for name, idle_rank, more in (("apart", -1, []), ("queued", 0, ["worker.rollout.shared_queue=true"])):
        _, metrics, _ = run(config, tmp_path / name, *settings, *more, idle_rank=idle_rank)
        draws = (tmp_path / name / "run" / "draws.jsonl").read_text().splitlines()
        found.append((draws[0], metrics[0]))
    assert found[0][0] == found[1][0]
    for figure in ("reward/baseline", "reward/overall", "curriculum/mean_weight", "curriculum/std_weight"):
        assert found[1][1][figure] == pytest.approx(found[0][1][figure], rel=1e-3), figure


@pytest.mark.nightly
def test_ranks_that_share_an_engine_take_together(config, tmp_path):
    save_text_model(tmp_path / "model", num_heads=4)  # two a rank
    settings = ["worker.rollout.tensor_parallel_size=2", f"worker.actor.model.model_path={tmp_path}/model"]
    sampled, metrics, _ = run(config, tmp_path / "out", "worker.rollout.shared_queue=true", *settings)
    for step in range(NUM_STEPS):
        assert sorted(slot for rank in sampled for slot, *_ in rank[step]) == [*range(BATCH)]
        assert all(abs(len(rank[step]) - BATCH // 2) <= 1 for rank in sampled)  # one more where a probe is taken
    assert_as_drawn(tmp_path / "out", sampled)
    assert all(line["rollout/logprob_diff_max"] < 1e-4 and line["actor/grad_norm"] > 0 for line in metrics)
