import subprocess
import sys

import numpy as np
import pytest
from fixtures.launching import environment
from fixtures.responses import response

from mmr1_ds.curriculum.metric_names import canonical_metric, check_metrics
from mmr1_ds.curriculum.scores import variance_promotion_score
from mmr1_ds.curriculum.statistics import PromptStatistics, from_records, score_batch, to_records
from mmr1_ds.errors import UserError
from mmr1_ds.records import GroupRewards, Prompt, RolloutGroup, ScoredGroup


def statistics(**changes):
    values = {
        "index": 3,
        "num_responses": 8,
        "pass_rate": 0.25,
        "reward_mean": 0.3,
        "reward_variance": 0.1,
        "self_bleu": 0.4,
        "distinct_3": 0.7,
        "edit_distance": 0.6,
    }
    return PromptStatistics(**(values | changes))


def scored_group(index, responses, rewards, accuracies):
    prompt = Prompt(index, f"id-{index}", (1, 2, 3), (), "42")
    sampled = tuple(map(response, responses))
    return ScoredGroup(
        RolloutGroup(prompt, sampled, 0),
        GroupRewards(
            overall=np.array(rewards, dtype=np.float32),
            accuracy=np.array(accuracies, dtype=np.float32),
            failed=np.zeros(len(rewards), dtype=bool),
            parts={},
        ),
    )


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("learnability", 0.25 * 0.75),
        ("self-bleu", 0.6),
        ("self_bleu_123", 0.6),
        ("distinct-n", 0.7),
        ("distinct_3", 0.7),
        ("edit-distance", 0.6),
        ("edit_distance", 0.6),
    ],
)
def test_each_metric(metric, expected):
    assert variance_promotion_score(statistics(), [metric], [1.0]) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["self-bleu", "distinct-n", "edit-distance"])
def test_one_response_has_no_diversity(metric):
    assert variance_promotion_score(statistics(num_responses=1), [metric], [1.0]) == 0.0


def test_unknown_accuracy_gives_no_score():
    assert np.isnan(variance_promotion_score(statistics(pass_rate=float("nan")), ["learnability"], [1.0]))


def test_unknown_metric_lists_the_known():
    with pytest.raises(UserError, match=r"unknown metric .bleu.; known: learnability, .*, self-bleu, distinct-n"):
        canonical_metric("bleu")


@pytest.mark.parametrize(
    ("metrics", "weights", "words"),
    [
        (["learnability", "self-bleu"], [1.0], r"one weight a metric, 2 for .*, got 1: \[1.0\]"),
        ([], [], "data.curriculum_metrics is empty"),
        (["learnability"], [float("nan")], "must be finite numbers, got nan"),
        (["nonsense"], [1.0], "unknown metric 'nonsense'"),
    ],
)
def test_metrics_and_weights_are_checked(metrics, weights, words):
    with pytest.raises(UserError, match=words):
        check_metrics(metrics, weights)


def test_statistics_of_groups():
    found = score_batch(
        [
            scored_group(7, [[4, 5, 6, 7, 99], [4, 5, 6, 7]], [1.0, 0.1], [1, 0]),
            scored_group(2, [[4, 5, 6, 98, 99], [9, 9, 9, 9]], [0.1, 0.1], [0, 0]),
        ],
        eos_token_ids=(98, 99),
        metrics=["learnability"],
    )
    assert [prompt.index for prompt in found] == [7, 2]
    assert [prompt.num_responses for prompt in found] == [2, 2]
    assert [prompt.pass_rate for prompt in found] == [0.5, 0.0]
    assert [prompt.is_effective for prompt in found] == [True, False]
    assert found[0].self_bleu == pytest.approx(1.0), "end-of-sequence must not be scored"
    assert found[1].self_bleu == 0.0
    assert found[1].distinct_3 == pytest.approx(2 / 3)
    assert np.isnan(found[0].edit_distance)


def test_accuracies_that_are_not_known_are_counted():
    group = scored_group(3, [[1, 2], [3], [4, 5], [6]], [1, 0.5, 0, 0.5], [1, float("nan"), 0, float("nan")])
    found = score_batch([group], (99,), ["learnability"])[0]
    assert (found.num_responses, found.num_unscored, found.pass_rate) == (4, 2, 0.5)
    assert from_records(to_records([found]))[0].num_unscored == 2


def test_edit_distance_only_when_asked():
    group = scored_group(0, [[1, 2, 3, 4], [1, 2, 3, 5, 99]], [1, 0], [1, 0])
    found = score_batch([group], (99,), ["learnability", "edit_distance"])[0]
    assert found.edit_distance == pytest.approx(0.25)


TRITON_ALIKE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import dataclasses
import numpy as np
import torch
from fixtures.launching import environment
from fixtures.responses import response
from mmr1_ds.curriculum.statistics import score_batch
from mmr1_ds.records import GroupRewards, Prompt, RolloutGroup, ScoredGroup

random = np.random.default_rng(5)
groups = []
for index, size in enumerate((3, 1, 4, 2)):
    overall = random.choice([0.1, 0.7], size if index % 2 else 1).repeat(1 if index % 2 else size).astype(np.float32)
    unknown = np.where(np.arange(size) % 3 == 1, np.nan, overall > 0.5).astype(np.float32)
    rewards = GroupRewards(overall, unknown, np.zeros(size, dtype=np.bool_), {})
    tokens = [random.integers(0, 5, random.integers(0, 12)).tolist() for _ in range(size)]
    groups.append(ScoredGroup(RolloutGroup(Prompt(index, "", (), (), ""), tuple(map(response, tokens)), 0), rewards))
one = score_batch(groups, (4,), ["learnability", "edit_distance"])
other = score_batch(groups, (4,), ["learnability", "edit_distance"], torch.device("cpu"))
for a, b in zip(one, other, strict=True):
    np.testing.assert_allclose(dataclasses.astuple(a), dataclasses.astuple(b), rtol=1e-9, atol=1e-12)
    assert a.is_effective is b.is_effective
"""


@pytest.mark.slow
def test_the_triton_kernel_gives_the_same_statistics():
    done = subprocess.run([sys.executable, "-c", TRITON_ALIKE], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_groups():
    assert score_batch([], (99,), ["learnability"]) == []
    assert from_records(to_records([])) == []


def test_records_are_exact():
    sent = [statistics(index=2**40 + 1, pass_rate=1 / 3), statistics(reward_variance=5e-324)]
    assert from_records(to_records(sent)) == sent
