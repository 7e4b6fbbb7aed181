import numpy as np
import pytest

from mmr1_ds.curriculum.prompt_ids import decode_prompt_ids, encode_prompt_ids
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.curriculum.table import CurriculumTable, min_max_normalise
from mmr1_ds.errors import UserError

NAN = float("nan")


def make_table(num_prompts=5, floor=0.0, momentum=0.0, fingerprint="abc"):
    return CurriculumTable([f"p{i}" for i in range(num_prompts)], fingerprint, floor, momentum)


def replace(table, scores, pass_rates=None, num_responses=8):
    rates = np.full(len(table), 0.5) if pass_rates is None else np.array(pass_rates)
    table.replace_scores(np.array(scores, dtype=np.float32), rates, np.full(len(table), num_responses))


def saved(table):
    return encode_prompt_ids(table.prompt_ids) | table.columns()


def test_nothing_known_is_uniform():
    assert make_table().sampling_weights.tolist() == [1.0] * 5


def test_weights_are_normalised_over_the_data_set():
    table = make_table()
    replace(table, [0.1, 0.2, 0.3, 0.15, 0.1])
    np.testing.assert_allclose(table.sampling_weights, [0, 0.5, 1, 0.25, 0], atol=1e-6)


def test_floor_keeps_every_prompt_reachable():
    table = make_table(floor=0.01)
    replace(table, [0, 0, 0.25, 0.1, 0])
    np.testing.assert_allclose(table.sampling_weights, [0.01, 0.01, 1.0, 0.406, 0.01], atol=1e-6)


@pytest.mark.parametrize("score", [0.0, 0.25, -1.0])
def test_equal_scores_are_uniform(score):
    table = make_table(floor=0.01)
    replace(table, [score] * 5)
    assert table.sampling_weights.tolist() == [1.0] * 5


def test_momentum_blends_normalised_weights():
    table = make_table(num_prompts=3, momentum=0.75)
    replace(table, [0.0, 0.1, 0.2])
    np.testing.assert_allclose(table.sampling_weights, [0, 0.5, 1], atol=1e-6)  # nothing old to blend with
    replace(table, [0.25, 0.0, 0.0])
    np.testing.assert_allclose(table.sampling_weights, [0.25, 0.375, 0.75], atol=1e-6)


def test_unknown_scores_keep_the_old_row():
    table = make_table(num_prompts=3)
    replace(table, [0.0, 0.1, 0.2], pass_rates=[0, 0.5, 1])
    replace(table, [NAN, 0.2, 0.0], pass_rates=[NAN, 0.25, 0])
    np.testing.assert_allclose(table.sampling_weights, [0, 1, 0], atol=1e-6)
    assert table.column("pass_rate").tolist() == [0.0, 0.25, 0.0]


def test_a_prompt_never_scored_gets_the_mean_weight():
    table = make_table(num_prompts=3)
    replace(table, [NAN, 0.0, 0.2], pass_rates=[NAN, 0, 0.5])
    np.testing.assert_allclose(table.sampling_weights, [0.5, 0, 1], atol=1e-6)
    assert np.isnan(table.predicted_pass_rates(np.array([0]))[0])


def test_all_scores_unknown_is_uniform():
    table = make_table(num_prompts=3)
    replace(table, [NAN] * 3, pass_rates=[NAN] * 3)
    assert table.sampling_weights.tolist() == [1.0] * 3


def test_predictions_are_smoothed_by_half_a_success_and_half_a_failure():
    table = make_table(num_prompts=3)
    replace(table, [0.0, 0.1, 0.2], pass_rates=[0.0, 0.5, 1.0], num_responses=4)
    np.testing.assert_allclose(table.predicted_pass_rates(np.arange(3)), [0.1, 0.5, 0.9])


def test_sampling_weights_are_a_new_read_only_array_only_when_they_change():
    table = make_table()
    before = table.sampling_weights
    table.finish_step(9, [statistics(1), statistics(3)], np.array([1, 3]))
    assert table.sampling_weights is before
    replace(table, range(5))
    assert table.sampling_weights is not before
    with pytest.raises(ValueError, match="read-only"):
        table.sampling_weights[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        table.column("weight")[0] = 1


def statistics(index):
    return PromptStatistics(index, 8, 0.5, 0.5, 0.25, 0.5, 0.5)


def test_values_follow_the_prompt_ids():
    ids = ["ä", "", "a\nb", "7"]
    table = CurriculumTable(ids, "abc")
    replace(table, [0, 1, 2, 3], pass_rates=[0, NAN, 0.5, 1])
    state = saved(table)
    assert decode_prompt_ids(state) == ids
    reordered = CurriculumTable(ids[::-1], "abc")
    assert reordered.load(state, {}, "abc").tolist() == [3, 2, 1, 0]
    for name in ("weight", "pass_rate", "num_responses"):
        np.testing.assert_array_equal(reordered.column(name), table.column(name)[::-1])
        assert reordered.column(name).dtype == table.column(name).dtype
    np.testing.assert_array_equal(reordered.sampling_weights, table.sampling_weights[::-1])


def test_columns_of_earlier_versions_are_left():
    table, again = make_table(), make_table()
    replace(table, [0.3, NAN, 0.1, 0.2, 0.25])
    again.load(saved(table) | {"raw_score": np.zeros(5), "last_seen_step": np.zeros(5)}, {}, "abc")
    assert table.columns().keys() == again.columns().keys()
    np.testing.assert_array_equal(again.sampling_weights, table.sampling_weights)


@pytest.mark.parametrize("num_prompts", [5, 6])
def test_another_data_set_is_refused(num_prompts):
    state = saved(make_table())
    with pytest.raises(UserError, match=r"data set abc \(5 prompts\).*data set xyz"):
        make_table(num_prompts, fingerprint="xyz").load(state, {}, "abc")


def test_other_ids_under_one_fingerprint_are_refused():
    state = saved(CurriculumTable(["p0", "p1", "p9"], "abc"))
    with pytest.raises(UserError, match="lacks prompt 'p2'"):
        make_table(3).load(state, {}, "abc")


def test_min_max():
    np.testing.assert_allclose(min_max_normalise(np.array([2.0, NAN, 4.0, 3.0])), [0, NAN, 1, 0.5])
    np.testing.assert_array_equal(min_max_normalise(np.array([2.0, NAN])), [1, NAN])
