import io
import json
import threading

import numpy as np
from fixtures.batch_makers import scored
from fixtures.rank_threads import ThreadRank
from fixtures.responses import response
from PIL import Image

from mmr1_ds.config import TrainerConfig
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.monitoring.samples import TrainingSamples
from mmr1_ds.records import Prompt, RolloutGroup, ScoredGroup

PICTURE = Image.new("RGB", (700, 350), (200, 30, 30))


class Rank(ThreadRank):
    """With objects too."""

    def all_gather_objects(self, value, stage):
        return self._exchange(value, stage)


def group(index, accuracies, images=(PICTURE,)):
    rewards = scored(accuracies).rewards
    responses = tuple(response((100 + k,) * 3) for k in range(len(accuracies)))
    prompt = Prompt(index, f"p{index}", (index, 7), images, str(index))
    return ScoredGroup(RolloutGroup(prompt, responses, 0), rewards)


def decode(token_ids):
    return " ".join(map(str, token_ids))


def observed(*groups):
    return {
        "prompts": [item.group.prompt.index for item in groups],
        "predicted": [0.5 for _ in groups],
        "pass_rates": [float(np.mean(item.rewards.accuracy)) for item in groups],
        "num_responses": [len(item.group.responses) for item in groups],
        "num_probes": 0,
    }


def run(folder, steps, num_groups=2, resumed_step=0, size=2):
    """Each step a list of groups, dealt to the ranks by turns. Returns: the lines kept."""
    slots, barrier, errors = [None] * size, threading.Barrier(size), []

    def rank(number):
        try:
            is_main = number == 0
            with MetricsLogger.open(TrainerConfig(logger=[]), folder, 9, resumed_step, {}, is_main) as log:
                samples = TrainingSamples(folder, num_groups, decode, log, Rank(number, size, barrier, slots))
                for step, groups in steps:
                    row = observed(*groups) if is_main else None
                    trained = np.array([item.group.prompt.index for item in groups])
                    samples.keep(step, groups[number::size], trained, row)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


FIRST = [group(4, [0, 0, 0, 0]), group(2, [0, 1, 0, 1]), group(9, [0, 0, 0, 1]), group(1, [1, 1, 1, 1])]
SECOND = [group(2, [0, 1, 1, 1]), group(9, [1, 1, 1, 1]), group(5, [0, 1, 1, 0])]


def test_new_prompts_by_variance_then_those_that_moved_most(tmp_path):
    rows = run(tmp_path, [(1, FIRST), (2, SECOND)])
    assert [(row["step"], row["index"], row["pass_rate"]) for row in rows] == [
        (1, 2, 0.5), (1, 9, 0.25), (2, 9, 1.0), (2, 2, 0.75),
    ]  # fmt: skip


def test_best_and_worst_response_and_a_small_picture(tmp_path):
    row = run(tmp_path, [(3, FIRST)])[0]
    assert [(item["text"], item["reward"], item["accuracy"]) for item in row["responses"]] == [
        ("103 103 103", 1.0, 1.0), ("100 100 100", 0.0, 0.0),
    ]  # fmt: skip
    assert (row["prompt"], row["ground_truth"], row["predicted"], row["num_responses"]) == ("2 7", "2", 0.5, 4)
    assert row["images"] == ["samples/2_0.webp"]
    picture = Image.open(io.BytesIO((tmp_path / "samples" / "2_0.webp").read_bytes()))
    assert picture.size == (256, 128)
    assert np.allclose(np.asarray(picture)[5, 5], (200, 30, 30), atol=12)


def test_the_same_on_one_rank_as_on_three(tmp_path):
    found = []
    for size in (1, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        found.append(run(folder, [(1, FIRST), (2, SECOND)], size=size))
    assert found[0] == found[1]


def test_a_resumed_run_knows_what_it_has_shown(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", [(1, FIRST), (2, SECOND)])
    run(tmp_path, [(1, FIRST), (2, [group(7, [0, 1])])])  # killed after a second step that is not kept
    assert run(tmp_path, [(2, SECOND)], resumed_step=1) == whole


def test_none_are_kept_where_none_are_wanted(tmp_path):
    with MetricsLogger.open(TrainerConfig(logger=[]), tmp_path, 9, 0, {}, True) as log:
        samples = TrainingSamples(tmp_path, 0, decode, log, Rank(0, 1, threading.Barrier(1), [None]))
        samples.keep(1, FIRST, np.empty(0), None)
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_disk_that_takes_no_picture_costs_the_picture_alone(tmp_path):
    (tmp_path / "samples").write_text("")  # no folder can be made there
    assert [row["index"] for row in run(tmp_path, [(1, FIRST)])] == [2, 9]
