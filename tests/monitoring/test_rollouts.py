"""All rollouts of a run: one table that pandas and datasets read, bounded, cut where a run resumes."""

import json

import datasets
import numpy as np
import pandas
import pytest
from fixtures.batch_makers import scored
from fixtures.responses import response

from mmr1_ds.monitoring.rollouts import RolloutLog
from mmr1_ds.records import GroupRewards, Prompt, RolloutGroup, ScoredGroup


class TwoRanks:
    """Rank 0 of two; the other's rows are those of the next prompt."""

    rank, size = 0, 2

    def all_gather_objects(self, rows, stage):
        return [rows, [row | {"index": row["index"] + 1} for row in rows]]


def group(index, parts):
    rewards = scored([1, 0]).rewards
    rewards = GroupRewards(rewards.overall, np.array([1, np.nan], np.float32), rewards.failed, parts)
    answers = (response((100,) * 3), response((101,) * 5))
    return ScoredGroup(RolloutGroup(Prompt(index, f"p{index}", (7, index), (), "é"), answers, 4), rewards)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def opened(folder, resumed_step=0, most_bytes=1e9):
    return RolloutLog(folder, most_bytes, lambda ids: " ".join(map(str, ids)), resumed_step, TwoRanks())


def test_all_parts_are_one_table(tmp_path):
    log = opened(tmp_path)
    log.keep(1, [group(5, {})])
    log.keep(2, [group(8, {"format": np.array([0.5, np.nan], np.float32)})])
    table = pandas.read_parquet(tmp_path / "rollouts")
    assert table["step"].tolist() == [1] * 4 + [2] * 4 and table["index"].tolist() == [5, 5, 6, 6, 8, 8, 9, 9]
    assert table["response"].tolist()[:2] == ["100 100 100", "101 101 101 101 101"]
    assert table["num_tokens"].tolist()[:2] == [3, 5] and table["prompt"][0] == "7 5"
    assert table["ground_truth"][0] == "é" and table["step"].dtype == np.int64
    assert table["accuracy"].isna().tolist()[:2] == [False, True] and table["policy_version"][0] == 4
    assert json.loads(table["parts"][4]) == {"format": 0.5} and table["parts"][0] == "{}"
    assert table["parts"][5] == '{"format": null}'
    files = str(tmp_path / "rollouts" / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["response"] == table["response"].tolist()


@pytest.mark.parametrize(("resumed_step", "kept"), [(2, [1, 2, 3]), (0, [3])])
def test_a_resumed_run_goes_on_where_it_was_and_a_new_one_begins(tmp_path, resumed_step, kept):
    log = opened(tmp_path)
    for step in (1, 2, 3, 4):
        log.keep(step, [group(0, {})])
    opened(tmp_path, resumed_step).keep(3, [group(0, {})])
    assert names(tmp_path / "rollouts") == [f"step_{k:06d}.parquet" for k in kept]
    assert (tmp_path / "rollouts.1").exists() == (resumed_step == 0)


def test_the_newest_are_kept(tmp_path):
    log = opened(tmp_path)
    log.keep(1, [group(0, {})])
    size = (tmp_path / "rollouts" / "step_000001.parquet").stat().st_size
    log = opened(tmp_path, most_bytes=2.5 * size)
    for step in (1, 2, 3, 4):
        log.keep(step, [group(0, {})])
    assert names(tmp_path / "rollouts") == ["step_000003.parquet", "step_000004.parquet"]


def test_a_disk_that_fails_costs_the_part(tmp_path, caplog):
    (tmp_path / "rollouts").write_text("a file")
    with caplog.at_level("WARNING", logger="mmr1_ds"):
        opened(tmp_path, 1).keep(2, [group(0, {})])
    assert "the rollouts of step 2 are not written (File exists" in caplog.text
