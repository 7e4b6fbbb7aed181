"""Updates whose loss or gradient is not finite change nothing, are counted and kept, and stop the run in a row."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

from mmr1_ds.algorithm.kl import KLController
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.errors import UserError
from mmr1_ds.records import Prompt, Trajectory


class OneRank:
    rank, size, step = 0, 1, 5

    def all_gather_objects(self, value, stage):
        return [value]


class OneOfSix(OneRank):
    def all_gather_objects(self, value, stage):
        return [1.0, math.nan, math.inf, -math.inf, math.nan, math.nan]


TRAJECTORIES = [
    Trajectory(prompt, np.arange(length, dtype=np.int32), *np.ones((2, length), np.float32), returns=np.ones(length))
    for prompt, length in ((Prompt(3, "a", (1, 2), (), ""), 3), (Prompt(4, "b", (1,), (), ""), 0))
]


def bad(updates, loss):
    outputs = torch.tensor([1.0, 2.0], requires_grad=True)
    updates.guard(outputs.sum() * 0 + loss, outputs)
    updates.was_bad(TRAJECTORIES, [[0, 1]])


def test_a_loss_that_is_not_finite_gets_such_a_gradient_and_another_stays_itself():
    updates = BadUpdates("actor", 3, OneRank(), None)
    outputs = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = outputs.clamp(0, 0.5).sum() + math.inf  # its own gradient is 0
    updates.guard(loss, outputs).backward()
    assert outputs.grad.isnan().all()
    outputs.grad = None
    good = updates.guard(outputs.square().sum(), outputs)
    good.backward()
    assert good.item() == 14 and outputs.grad.tolist() == [2, 4, 6]


def test_only_updates_in_a_row_stop_the_run(tmp_path):
    updates = BadUpdates("critic", 2, OneRank(), tmp_path / "bad")
    for _ in range(3):
        bad(updates, math.nan)
        updates.was_good()
    resumed = BadUpdates("critic", 2, OneRank(), tmp_path / "bad")
    bad(updates, math.nan)
    resumed.load_state_dict(updates.state_dict())
    with pytest.raises(UserError) as raised:
        bad(resumed, math.inf)
    told = str(raised.value)
    assert resumed.num_bad == 5 and "\n" not in told
    for part in (
        "step 5",
        "critic",
        "the loss is inf on rank 0",
        "2 in a row",
        str(tmp_path / "bad"),
        "critic.optim.lr",
    ):
        assert part in told
    assert BadUpdates("actor", 2, OneRank(), None).load_state_dict({}) is None  # a checkpoint of an earlier version


def test_the_message_names_a_few_ranks_and_a_gradient_by_its_loss(caplog):
    with caplog.at_level(logging.WARNING):
        bad(BadUpdates("actor", 9, OneOfSix(), None), math.nan)
        bad(BadUpdates("actor", 9, OneRank(), None), 0.25)
    first, second = caplog.messages
    assert "nan on rank 1, inf on rank 2, -inf on rank 3, nan on rank 4 and on 1 more" in first
    assert "the loss is 0.25, its gradient not finite" in second


def test_a_batch_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "bad").write_text("in the way")
    updates = BadUpdates("actor", 2, OneRank(), tmp_path / "bad")
    with caplog.at_level(logging.WARNING):
        bad(updates, math.nan)
    assert updates.num_bad == 1 and "could not be kept" in caplog.text


def test_a_kl_that_is_not_finite_leaves_the_coefficient():
    controller = KLController(AlgorithmConfig(kl_type="adaptive", kl_coef=0.1, kl_horizon=100))
    for kl in (math.nan, math.inf):
        controller.update(kl, 7)
        assert controller.coefficient == 0.1
    controller.update(99.0, 7)
    assert controller.coefficient > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", pytest.param("offloaded", marks=pytest.mark.nightly)])
def test_a_bad_update_on_one_rank_leaves_all_ranks_as_they_were(tmp_path, kind):
    model = save_text_model(tmp_path / "model")
    run_ranks("bad_updates.py", model, tmp_path, kind, num_ranks=2)
    events = json.loads((tmp_path / "events.json").read_text())
    assert len(events["lines"]) == 7 if kind == "offloaded" else 8
    nan, old, inf, gradient, ref = events["lines"][:5]
    assert all("on rank 1" in line and "rank 0" not in line for line in (nan, old, inf, ref))
    assert "its gradient not finite" in gradient
    assert "step 7: the actor's update was left out" in nan and "1 in a row, 1 in all" in nan
    assert "2 in a row, 3 in all" in inf
    assert "3 in a row (trainer.max_bad_updates)" in events["told"] and "optim.lr" in events["told"]
