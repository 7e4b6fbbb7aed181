import json

import pytest

from mmr1_ds.errors import UserError
from mmr1_ds.monitoring.pass_rates import PassRates


def row(prompt_id, rate):
    return {"prompt_id": prompt_id, "pass_rate": rate, "num_answers": 4}


def test_a_table_is_continued_after_a_torn_line(tmp_path):
    path = tmp_path / "rates" / "table.jsonl"
    table = PassRates(path, "model after 0 steps", 4)
    table.add([row("a", 0.0), row("b", 0.25)])
    with path.open("a") as file:
        file.write('{"prompt_id": "c", "pass')
    again = PassRates(path, "model after 0 steps", 4)
    assert again.prompt_ids == {"a", "b"}
    again.add([row("c", 1.0), row("d", 0.999), row("e", None)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["prompt_id"], row["pass_rate"]) for row in rows] == [
        ("a", 0.0), ("b", 0.25), ("c", 1.0), ("d", 0.999), ("e", None),
    ]  # fmt: skip
    lines = again.histogram().splitlines()
    assert lines[0].endswith("2 are neither 0 nor 1; 1 unknown")
    assert [line.split()[-2] for line in lines[1:] if line.endswith("#")] == ["1"] * 4
    assert lines[1].split()[:2] == ["0", "1"] and lines[-1].split()[:2] == ["1", "1"]
    assert lines[4].split()[:4] == ["0.2", "to", "0.3", "1"]


def test_a_table_of_another_policy_or_number_is_refused(tmp_path):
    path = tmp_path / "table.jsonl"
    PassRates(path, "model after 0 steps", 4).add([row("a", 0.5)])
    for policy, number in (("model after 8 steps", 4), ("model after 0 steps", 8)):
        with pytest.raises(UserError, match="holds pass rates of model after 0 steps by 4 answers"):
            PassRates(path, policy, number)


@pytest.mark.parametrize("text", ["no JSON\n", "[1]\n", '{"prompt_id": "a"}\n'])
def test_another_file_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "other"
    path.write_text(text)
    with pytest.raises(UserError, match=r"trainer\.pass_rates=.*holds no pass rates; name another file"):
        PassRates(path, "model", 4)
    assert path.read_text() == text
