"""Pass rates that were measured before a run, from the table of an evaluation to the first draws of training."""

import json

import numpy as np
import pytest
from fixtures.coordinators import P, make, train
from fixtures.data_fixtures import encoder_of, text_rows, write_jsonl, write_text_model
from fixtures.rank_threads import Ranks, SingleProcess

from mmr1_ds.config import DataConfig, RunConfig
from mmr1_ds.curriculum.known_rates import known_rates, read_known_rates
from mmr1_ds.errors import UserError
from mmr1_ds.monitoring.pass_rates import PassRates
from mmr1_ds.preflight.checks import _check_prior

ONLINE = {"sampling_strategy": "curriculum", "curriculum_refresh": "online"}
RATES = {7: 0.5, 11: 0.25, 2: 1.0, 3: 0.0, 19: None}  # of prompts that are measured, by their places


def table(path, names, num_answers=16):
    rows = [{"prompt_id": names[i], "pass_rate": rate, "num_answers": num_answers} for i, rate in RATES.items()]
    rows[-1]["num_answers"] = 0
    PassRates(path, "model after 0 steps", num_answers).add(rows)
    with path.open("a") as file:
        file.write('{"prompt_id": "torn')  # the evaluation is underway, or was killed


def test_training_begins_from_the_table_of_an_evaluation_of_the_same_file(tmp_path):
    from mmr1_ds.loop import composition, starting

    path = write_jsonl(tmp_path / "rows.jsonl", text_rows(P))
    data = DataConfig(
        train_files=path, val_files=path, rollout_batch_size=4, min_pixels=None, max_pixels=None, **ONLINE,
        curriculum_mixture_ratio=0.5, curriculum_features="none",
    )  # fmt: skip
    data.curriculum_prior = str(tmp_path / "rates.jsonl")
    config, one_rank = RunConfig(data=data), Ranks(SingleProcess())
    train_data, val_data = starting.load_data(config, encoder_of(write_text_model(tmp_path)))
    table(tmp_path / "rates.jsonl", val_data.prompt_ids)
    coordinator = composition.make_coordinator(config, train_data, 10, SingleProcess())
    plain = coordinator.table.predicted_pass_rates(np.arange(P))
    starting.known_beforehand(config, (3, tmp_path), coordinator, train_data, one_rank)()  # of a run that is resumed
    begin = starting.known_beforehand(config, None, coordinator, train_data, one_rank)
    np.testing.assert_array_equal(coordinator.table.predicted_pass_rates(np.arange(P)), plain)
    begin()
    believed = coordinator.table.predicted_pass_rates(np.arange(P))
    assert np.ptp(plain) == 0.0
    measured = [index for index, rate in RATES.items() if rate is not None]
    assert np.flatnonzero(~np.isnan(coordinator.table.known_pass_rates())).tolist() == sorted(measured)
    for index in measured:  # 16 answers outweigh the prior, which is about one
        assert believed[index] == pytest.approx(RATES[index], abs=0.1)
    assert len(set(np.delete(believed, measured).tolist())) == 1  # of the rest the prior, which has learned too
    weights = coordinator.table.sampling_weights
    assert weights.argmax() == 7 and set(np.argsort(weights)[:2].tolist()) == {2, 3}


def test_a_run_that_began_from_a_table_resumes_to_the_bit(tmp_path):
    settings = ONLINE | {"curriculum_draw": "posterior"}
    begun = [(np.array([7, 2, 3]), np.array([8.0, 16.0, 0.0]), np.array([16, 16, 16]))] * 2
    whole, first, second = (make(**settings) for _ in range(3))
    for coordinator, known in zip((whole, first), begun, strict=True):
        coordinator.begin_from(*known)
    expected = train(whole, range(1, 9))
    train(first, range(1, 4))
    first.save(tmp_path)
    second.load(tmp_path)
    assert train(second, range(4, 9)) == expected[3:]
    assert train(make(**settings), range(1, 9)) != expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]\n", "holds no pass rates"),
        ('{"prompt_id": "a"}\n', "holds no pass rates"),
        ('{"prompt_id": "a", "pass_rate": 1.5, "num_answers": 2}\n', "has pass rates outside"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, message):
    (tmp_path / "rates.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"^data.curriculum_prior=.*rates.jsonl {message}"):
        read_known_rates(tmp_path / "rates.jsonl")
    with pytest.raises(UserError, match=r"no\.jsonl: No such file or directory"):
        read_known_rates(tmp_path / "no.jsonl")


def test_a_table_of_other_prompts_and_another_refresh_are_refused(tmp_path):
    row = json.dumps({"prompt_id": "other", "pass_rate": 0.5, "num_answers": 2})
    (tmp_path / "rates.jsonl").write_text(row)  # whole, without an end of line
    assert read_known_rates(tmp_path / "rates.jsonl") == {"other": (0.5, 2)}
    with pytest.raises(UserError, match=r"has none of the 3 prompts of data.train_files"):
        known_rates(tmp_path / "rates.jsonl", ["a", "b", "c"])
    _check_prior(DataConfig(**ONLINE), str(tmp_path / "rates.jsonl"), False)
    _check_prior(DataConfig(**ONLINE), str(tmp_path / "gone.jsonl"), True)
    with pytest.raises(UserError, match="No such file"):
        _check_prior(DataConfig(**ONLINE), str(tmp_path / "gone.jsonl"), False)
    for settings in (ONLINE | {"curriculum_refresh": "full"}, ONLINE | {"sampling_strategy": "shuffle"}):
        with pytest.raises(UserError, match=r"is for data.sampling_strategy=curriculum with"):
            _check_prior(DataConfig(**settings), str(tmp_path / "rates.jsonl"), False)
