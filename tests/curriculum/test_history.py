import json

import numpy as np
import pytest
from fixtures.coordinators import answer, make, refresh, train

from mmr1_ds.curriculum.history import TableHistory, batch_metrics, observations
from mmr1_ds.curriculum.statistics import PromptStatistics


def found(index, pass_rate, num_responses=8, is_probe=False, num_unscored=0):
    return PromptStatistics(
        index, num_responses, pass_rate, pass_rate, pass_rate * (1 - pass_rate), 0.5, 0.5,
        num_unscored=num_unscored, is_probe=is_probe,
    )  # fmt: skip


def by_hand(values):
    """Bins counted one value at a time."""
    counts = [0] * 10
    for value in values:
        if value == value:
            counts[min(9, int(value * 10))] += 1
    return counts


def test_histograms_and_transitions_against_counting_by_hand():
    chance = np.random.default_rng(3)
    before = (chance.uniform(0.1, 2.0, 401), np.where(chance.random(401) < 0.2, np.nan, chance.random(401)))
    now = (chance.uniform(0.1, 3.0, 401), np.where(chance.random(401) < 0.1, np.nan, chance.random(401)))
    history = TableHistory()
    first, second = history.look(*before), history.look(*now)
    assert first["weight_counts"] == by_hand(before[0] / before[0].max())
    assert first["pass_rate_counts"] == by_hand(before[1])
    assert first["num_unknown"] == np.isnan(before[1]).sum()
    assert first["weight_transitions"] is None and first["pass_rate_transitions"] is None
    expected = np.zeros((10, 10), dtype=int)
    for old, new in zip(before[1], now[1], strict=True):
        if old == old and new == new:
            expected[min(9, int(old * 10)), min(9, int(new * 10))] += 1
    assert second["pass_rate_transitions"] == expected.tolist()
    assert np.sum(second["weight_transitions"]) == 401
    json.dumps(second)  # plain numbers


def test_one_is_in_the_last_bin_and_zero_in_the_first():
    line = TableHistory().look(np.array([1.0, 0.0, 0.1]), np.array([1.0, 0.0, np.nan]))
    assert line["pass_rate_counts"] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1] and line["num_unknown"] == 1


def test_a_loaded_history_goes_on_in_another_order_of_the_prompts():
    rates = np.array([0.05, 0.55, 0.95])
    whole, saved = TableHistory(), TableHistory()
    for history in (whole, saved):
        history.look(np.ones(3), rates)
    again = TableHistory()
    again.load(saved.arrays(), np.array([2, 0, 1]))  # our prompt 0 was saved as 2
    later = np.array([0.15, 0.55, 0.05])
    assert whole.look(np.ones(3), later) == again.look(np.ones(3), later[[2, 0, 1]])


def test_observations_come_by_prompt_with_probes_last():
    observed = [found(5, 0.5), found(3, float("nan"), num_unscored=8), found(1, 0.25, 4, is_probe=True), found(0, 1.0)]
    row = observations(observed, np.array([0.5, np.nan, 0.123456, 0.9]))
    assert row == {
        "prompts": [0, 3, 5, 1],
        "predicted": [0.9, None, 0.5, 0.1235],
        "pass_rates": [1.0, None, 0.5, 0.25],
        "num_responses": [8, 8, 8, 4],
        "num_probes": 1,
    }


def test_log_loss_leaves_probes_and_unscored_responses_out():
    observed = [found(0, 0.5), found(1, 0.0, num_unscored=4), found(2, 0.75, is_probe=True)]
    metrics = batch_metrics(observed, np.array([0.5, 0.2, 0.1]))
    expected = (8 * -np.log(0.5) + 4 * -np.log(0.8)) / 12
    assert metrics["curriculum/log_loss"] == pytest.approx(expected)
    assert metrics["curriculum/effective_group_fraction"] == 0.5


SMALL = {"num_prompts": 7, "rollout_batch_size": 2}


def run(curriculum, steps):
    """The records of each step, and of the refresh before it."""
    found = []
    for number in steps:
        train(curriculum, [number])
        found.append(curriculum.take_records())
    return found


def test_a_full_refresh_tells_of_the_table_and_a_step_of_its_groups():
    curriculum = make(curriculum_update_freq=4, **SMALL)
    refresh(curriculum, 1)
    records = curriculum.take_records()
    assert list(records) == ["curriculum"] and records["curriculum"]["kind"] == "full"
    assert records["curriculum"]["pass_rate_counts"] == by_hand([answer(k, 1).pass_rate for k in range(7)])
    (records,) = run(curriculum, [1])
    assert list(records) == ["observations"] and len(records["observations"]["prompts"]) == 2
    rates = dict(zip(records["observations"]["prompts"], records["observations"]["predicted"], strict=True))
    for index, rate in rates.items():
        assert rate == pytest.approx((answer(index, 1).pass_rate * 8 + 0.5) / 9, abs=1e-4)
    assert curriculum.take_records() == {}


def test_online_looks_at_the_table_every_few_steps_and_knows_what_it_has_not_seen():
    online = {"curriculum_refresh": "online", "curriculum_update_freq": 3, "curriculum_probe_fraction": 0.0}
    steps = run(make(**SMALL, **online), (1, 2, 3))
    assert ["curriculum" in records for records in steps] == [False, False, True]
    seen = {index for records in steps for index in records["observations"]["prompts"]}
    assert steps[-1]["curriculum"]["num_unknown"] == 7 - len(seen)


@pytest.mark.parametrize("refreshed", ["full", "online"])
def test_a_resumed_curriculum_tells_the_same(refreshed, tmp_path):
    settings = {"curriculum_refresh": refreshed, "curriculum_update_freq": 2, **SMALL}
    whole = run(make(**settings), range(1, 8))
    first, second = make(**settings), make(**settings)
    run(first, range(1, 4))
    first.save(tmp_path)
    second.load(tmp_path)
    rest = run(second, range(4, 8))
    assert rest == whole[3:] and any("curriculum" in records for records in rest)
