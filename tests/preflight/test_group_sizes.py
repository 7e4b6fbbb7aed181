"""What groups of different sizes do not go with."""

import pytest
from fixtures.configs import refused
from fixtures.dry_runs import planned

from mmr1_ds.config.derived import without_training
from mmr1_ds.config.loading import load_config
from mmr1_ds.preflight.group_sizes import check_group_sizes

BOUNDS = ["worker.rollout.n_min=2", "worker.rollout.n_max=9"]
ONLINE = ["data.sampling_strategy=curriculum", "data.curriculum_refresh=online"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([*ONLINE, "worker.rollout.n_min=2"], "n_min=2, n_max=null: one alone says nothing; set both, or neither"),
        ([*ONLINE, "worker.rollout.n_max=9"], "n_min=null, n_max=9: one alone says nothing"),
        ([*ONLINE, *BOUNDS, "worker.rollout.n_min=6"], "do not enclose the mean, worker.rollout.n=5; lower n_min"),
        ([*ONLINE, *BOUNDS, "worker.rollout.n_min=1"], "worker.rollout.n_min must be 2 or more, got 1"),
        (BOUNDS, "follow from beliefs, which only data.sampling_strategy=curriculum"),
        ([*BOUNDS, "data.sampling_strategy=curriculum", "data.curriculum_refresh=full"], "follow from beliefs"),
        ([*ONLINE, *BOUNDS, "algorithm.online_filtering=true"], "algorithm.online_filtering keeps some groups alone"),
        ([*ONLINE, *BOUNDS, "worker.rollout.partial=64"], "with worker.rollout.partial=64 a batch is of the groups"),
        ([*ONLINE, *BOUNDS, "worker.actor.ulysses_size=2"], "cuts sequences of which every rank has as many"),
        (
            [*ONLINE, *BOUNDS, "algorithm.adv_estimator=own.py:mine"],
            "algorithm.adv_estimator=own.py:mine is handed groups of one size",
        ),
        (
            [*ONLINE, *BOUNDS, "worker.rollout.engine=server", "worker.rollout.max_num_seqs=8"],
            "worker.rollout.n_max=9 is over max_num_seqs=8",
        ),
        (
            [*ONLINE, *BOUNDS, "worker.rollout.engine=server", "worker.rollout.max_in_flight=7"],
            "worker.rollout.n_max=9; raise it or leave it out",
        ),
    ],
)
def test_what_is_refused(valid, settings, expected):
    assert expected in refused(valid, *settings)


def test_a_validation_of_such_a_run_is_not_refused(valid):
    config = load_config([*valid, *ONLINE, *BOUNDS, "trainer.val_only=true"]).config
    check_group_sizes(without_training(config))


def test_the_plan_counts_the_mean(valid):
    text = planned([*valid, *ONLINE, *BOUNDS])
    assert "12 prompts x 5 responses on average (2 to 9) = 60; 2 optimiser step(s) of 6 x 5 = 30 responses" in text
    assert "12 prompts x 5 responses = 60" in planned([*valid, *ONLINE])
