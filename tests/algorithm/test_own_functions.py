"""A loss, an average and an estimator of the user's own files: the example of docs/training.md, and what is refused."""

import numpy as np
import pytest
import torch
from fixtures.doc_blocks import DOCS, blocks
from fixtures.dry_runs import planned, valid_run
from fixtures.golden_numbers import OneRank

from mmr1_ds.algorithm import advantages
from mmr1_ds.algorithm.aggregation import GlobalBatch, Segments, token_weights
from mmr1_ds.algorithm.experience import StepRewards, estimate
from mmr1_ds.algorithm.losses import PolicyLoss
from mmr1_ds.config import ActorConfig, AlgorithmConfig
from mmr1_ds.config.loading import load_config
from mmr1_ds.errors import UserError
from mmr1_ds.loop.own_functions import try_functions

(EXAMPLE,) = [block.text for block in blocks(DOCS / "training.md") if block.text.startswith("# my_learning.py")]
SEGMENTS = Segments.of([3, 1])


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "my_learning.py"
    path.write_text(EXAMPLE)
    return path


def own(path, text):
    path.write_text(text)
    return f"{path}:f"


def test_the_documented_example_trains_as_the_same_built_in(example):
    random = np.random.default_rng(0)
    logprobs_T, old_T, advantages_T = (torch.tensor(row) for row in random.normal(-1, 0.1, (3, 4)))
    loss_T, figures = PolicyLoss(f"{example}:plain_ratio", 0.2, 0.3)(logprobs_T, old_T, advantages_T, SEGMENTS)
    torch.testing.assert_close(loss_T, -advantages_T * (logprobs_T - old_T).exp())
    assert set(figures) == {"over_two", "ppo_kl"}

    batch = GlobalBatch(4.0, 2.0)
    weights_T = token_weights(f"{example}:by_root_of_length", SEGMENTS, batch, 1.0)
    np.testing.assert_allclose(weights_T, [3**-0.5 / 2] * 3 + [0.5])

    rewards_GN = np.array([[1.0, 0.0, 0.0], [2.0, 5.0, 3.0]])
    known_GN, lengths_B = rewards_GN < 5, np.array([1, 2, 1, 1, 3, 1])
    step = StepRewards(rewards_GN, known_GN, lengths_B, None, None, OneRank(), AlgorithmConfig())
    expected_GN = np.array([[1.0, 0.0, 0.0], [-0.5, 2.5, 0.5]])
    np.testing.assert_allclose(estimate(f"{example}:less_the_median", step), np.repeat(expected_GN.ravel(), lengths_B))
    np.testing.assert_array_equal(
        estimate("rloo", step), np.repeat(advantages.rloo(rewards_GN, known_GN).astype(np.float32).ravel(), lengths_B)
    )


def settings(example):
    return [
        f"worker.actor.loss_type={example}:plain_ratio",
        f"worker.actor.loss_avg_mode={example}:by_root_of_length",
        f"algorithm.adv_estimator={example}:less_the_median",
    ]


def test_the_plan_names_them_and_a_try_takes_them(example, tmp_path):
    arguments = [*valid_run(tmp_path), *settings(example)]
    plan = planned(arguments)
    assert f"{example}:less_the_median advantages; {example}:plain_ratio loss, {example}:by_root_of_length" in plan
    config = load_config(arguments).config
    try_functions(config.worker.actor, config.algorithm)


def test_a_path_beside_the_config_file_is_found_from_elsewhere(example, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("worker: {actor: {loss_type: my_learning.py:plain_ratio}}\n")
    monkeypatch.chdir("/")
    config = load_config([f"config={tmp_path / 'mine.yaml'}"]).config
    assert config.worker.actor.loss_type == f"{example}:plain_ratio"


@pytest.mark.parametrize("key", ["worker.actor.loss_type", "worker.actor.loss_avg_mode", "algorithm.adv_estimator"])
def test_a_missing_file_or_function_is_one_line(example, tmp_path, key):
    for value, expected in (
        ("/nowhere.py:f", f"{key}: no such file '/nowhere.py'"),
        (f"{example}:g", f"{key}: {example} has no function 'g'; its functions are: plain_ratio, by_root_of_length, "),
        ("my_loss.py", f"{key} must be "),
    ):
        with pytest.raises(UserError) as refused:
            planned([*valid_run(tmp_path), f"{key}={value}"])
        assert expected in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nothing_of_that_name", "fails: ModuleNotFoundError"),
        ("import sys; sys.exit(4)\ndef f(*_): pass", "fails: SystemExit: 4"),
        ("def f(*_): raise SystemExit", "SystemExit: SystemExit"),
        ("def f(tokens): pass", "fails on a try"),
        ("def f(tokens, loss): return tokens.logprobs_T.sum()", "has shape (), not one number for each"),
        ("def f(tokens, loss): return tokens.advantages_T", "the loss has no gradient"),
        ("def f(tokens, loss): return tokens.logprobs_T / 0", "is not finite"),
        ("def f(tokens, loss): return tokens.logprobs_T, {'a': tokens.logprobs_T[:1]}", "a has shape (1,)"),
    ],
)
def test_a_loss_that_cannot_train_is_refused_before_a_model_loads(tmp_path, text, expected):
    with pytest.raises(UserError) as refused:
        try_functions(ActorConfig(loss_type=own(tmp_path / "own.py", text)), AlgorithmConfig())
    assert str(refused.value).startswith("worker.actor.loss_type: ") and expected in str(refused.value)


def test_a_file_shadows_no_module(tmp_path):
    (tmp_path / "math.py").write_text("raise AssertionError")
    reference = own(tmp_path / "own.py", "import math\ndef f(segments, batch, scale): return segments.ids * math.pi")
    assert token_weights(reference, SEGMENTS, GlobalBatch(4.0, 2.0), 1.0)[3] == pytest.approx(np.pi)
