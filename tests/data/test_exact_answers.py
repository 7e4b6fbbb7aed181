"""Answers are what the file says: no digit is lost to a column's type."""

from __future__ import annotations

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.packaged_modules.json import json as json_reader
from fixtures.data_fixtures import load

from mmr1_ds.errors import UserError


def write(kind, folder, literals):
    """Rows whose answers are spelled so, in JSON."""
    rows = [f'{{"prompt": "p{i}", "answer": {literal}}}' for i, literal in enumerate(literals)]
    folder.mkdir(exist_ok=True)
    path = folder / ("rows.json" if kind == "json" else "rows.jsonl")
    path.write_text("[" + ",\n".join(rows) + "]" if kind == "json" else "\n".join(rows) + "\n\n")
    return str(folder if kind == "folder" else path)


def answers(path, model, **data):
    return [prompt.ground_truth for prompt in load(path, model, **data)]


@pytest.mark.parametrize("kind", ["json", "jsonl", "folder"])
@pytest.mark.parametrize(
    ("literals", "expected"),
    [
        (["123456789012345678", "0.5"], ["123456789012345678", "0.5"]),
        (["123456789012345678901234567890", "1"], ["123456789012345678901234567890", "1"]),
        (["1.10", "2.50", "1e3", "-0.0"], ["1.10", "2.50", "1e3", "-0.0"]),
        (["0.12345678901234567890123", "7"], ["0.12345678901234567890123", "7"]),
        (['"007"', "7", '"a"', "true"], ["007", "7", "a", "True"]),
        (['"2024-01-02"', '"2024-01-03"'], ["2024-01-02", "2024-01-03"]),
        (["1", "2"], ["1", "2"]),
    ],
)
def test_answers_of_json_keep_their_digits(tmp_path, text_model, kind, literals, expected):
    assert answers(write(kind, tmp_path / "rows", literals), text_model) == expected


def test_other_numbers_far_behind_the_first(tmp_path, text_model, monkeypatch):
    monkeypatch.setattr(json_reader.JsonConfig, "chunksize", 1000)
    literals = ["123456789012345678"] * 50 + ["0.5", '"a"']
    assert answers(write("jsonl", tmp_path / "rows", literals), text_model) == [*literals[:51], "a"]


def test_nested_answers_keep_their_digits(tmp_path, text_model):
    path = tmp_path / "a.jsonl"
    rows = [f'{{"prompt": "p", "reward_model": {{"ground_truth": {x}}}}}' for x in ("123456789012345678", "0.50")]
    path.write_text("\n".join(rows))
    found = answers(str(path), text_model, answer_key="reward_model.ground_truth")
    assert found == ["123456789012345678", "0.50"]


@pytest.mark.parametrize("literal", ["null", "NaN", "[1]", '{"a": 1}'])
def test_what_is_no_answer_is_still_named(tmp_path, text_model, literal):
    with pytest.raises(UserError, match=r"rows.jsonl"):
        answers(write("jsonl", tmp_path / "rows", ["0.5", literal]), text_model)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_cells_of_csv_are_text(tmp_path, text_model, place):
    expected = ["007", "NA", "1.10", "null", "123456789012345678901", "1e5", " x", "True", "None", "nan"]
    lines = ["answer,prompt", *(f"{answer},p" for answer in expected)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    assert answers(str(tmp_path / "rows.csv" if place == "file" else tmp_path), text_model) == expected


def test_an_empty_cell_of_csv_is_no_answer(tmp_path, text_model):
    (tmp_path / "rows.csv").write_text('prompt,answer\np,1\np,\n')
    with pytest.raises(UserError, match=r"rows.csv row 1 .*no answer in column 'answer'"):
        answers(str(tmp_path / "rows.csv"), text_model)


def test_equal_files_give_equal_data_sets(tmp_path, text_model):
    first, second = (load(write("jsonl", tmp_path / name, ["1", "0.5"]), text_model) for name in ("a", "b"))
    assert first.fingerprint == second.fingerprint
    assert json.dumps(list(first.prompt_ids)) == json.dumps(list(second.prompt_ids))


def test_answers_of_parquet_are_as_short_as_their_type_holds_them(tmp_path, text_model):
    columns = {
        "half": (pa.array([0.1], pa.float32()), "0.1"),
        "money": (pa.array([Decimal("1.10")]), "1.10"),
        "double": (pa.array([0.1 + 0.2]), "0.30000000000000004"),
        "whole": (pa.array([2**60 + 1]), str(2**60 + 1)),
        "label": (pa.array([7]).dictionary_encode(), "7"),
    }
    table = pa.table({"prompt": ["p"], **{name: column for name, (column, _) in columns.items()}})
    pq.write_table(table, tmp_path / "rows.parquet")
    for name, (_, expected) in columns.items():
        assert answers(str(tmp_path / "rows.parquet"), text_model, answer_key=name) == [expected]
