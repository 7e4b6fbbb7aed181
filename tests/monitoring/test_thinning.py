"""Texts within a limit of bytes: recent steps all stay, old ones thin out, nothing is torn."""

import json

from mmr1_ds.monitoring.answers import FILE, AnswerLog
from mmr1_ds.monitoring.thinning import too_many
from mmr1_ds.monitoring.writers import JsonLinesWriter


def test_every_second_of_the_older_half_goes():
    assert too_many([3, 3, 5, 8, 9, 11, 12, 20]) == {5}
    assert too_many(range(10)) == {1, 3}
    assert too_many([1, 2]) == too_many([]) == set()


def test_records_stay_under_the_limit_and_go_on(tmp_path):
    writer, limit = JsonLinesWriter(tmp_path, 0, 10_000), 10_000
    for step in range(1, 301):
        for index in (0, 1):
            writer.record("samples", step, {"index": index, "text": f"{step} {'x' * 90}ä"})
            writer.record("draws", step, {"prompts": [index]})
        assert (tmp_path / "samples.jsonl").stat().st_size <= limit
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert all(line["text"].startswith(f"{line['step']} ") for line in lines) and steps == sorted(steps)
    assert steps[0] == 1 and {*range(290, 301)} <= {*steps}
    assert all(steps.count(step) == 2 for step in steps)  # a step goes or stays as a whole
    gaps = [after - before for before, after in zip(sorted({*steps}), sorted({*steps})[1:], strict=False)]
    assert gaps[0] > gaps[-1] == 1
    assert len((tmp_path / "draws.jsonl").read_text().splitlines()) == 600  # which the report's figures need
    writer = JsonLinesWriter(tmp_path, 295, 10_000)  # a resume drops the steps after its checkpoint
    writer.record("samples", 296, {"index": 0})
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[-2])["step"] == 295


def test_answers_of_old_validations_go(tmp_path):
    for step in range(0, 90, 10):
        with AnswerLog(tmp_path, True, 1_000).of_step(step) as write:
            write([{"answer": "y" * 180}])
    (tmp_path / "step_old").mkdir()
    (tmp_path / "step_old" / FILE).write_text("somebody's own")
    with AnswerLog(tmp_path, True, 1_000).of_step(10) as write:  # an earlier checkpoint, validated alone
        write([{"answer": "z" * 180}])
    assert (tmp_path / "step_10" / FILE).is_file()
    (tmp_path / "step_10" / FILE).unlink()
    kept = sorted(int(path.parent.name.removeprefix("step_")) for path in tmp_path.glob(f"step_[0-9]*/{FILE}"))
    assert kept[0] == 0 and kept[-3:] == [60, 70, 80] and len(kept) == 5
