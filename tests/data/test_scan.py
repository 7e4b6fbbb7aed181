"""What is held of every prompt: ids made different, and columns that stay where they lie."""

import logging
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from fixtures.data_fixtures import load, write_jsonl

from mmr1_ds.data import scan
from mmr1_ds.data.dataset import TextColumn
from mmr1_ds.errors import UserError


@pytest.mark.parametrize("rows", [None, [0, 1, 2, 5, 6, 12], [12], []], ids=str)
def test_a_column_reads_as_the_list_that_it_stands_for(rows):
    chunks = [["a", "", "c"], [], ["d"], [f"e{i}" for i in range(9)]]
    renamed = {2: "c#1", 6: "é", 11: "z"}
    texts = [text for chunk in chunks for text in chunk]
    texts = [renamed.get(row, text) for row, text in enumerate(texts)]
    kept = None if rows is None else np.array(rows, dtype=np.int32)
    column = TextColumn(pa.chunked_array(chunks, pa.string()), kept, renamed)
    expected = texts if rows is None else [texts[row] for row in rows]
    assert len(column) == len(expected) and list(column) == expected
    for start in range(-len(expected) - 1, len(expected) + 2):
        assert column[start:] == expected[start:] and column[:start] == expected[:start]
        assert column[start : start + 3] == expected[start : start + 3]
    assert column[::2] == expected[::2] and column[::-1] == expected[::-1]
    assert [column[i] for i in range(-len(expected), len(expected))] == [*expected, *expected]
    for outside in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            column[outside]


@pytest.mark.parametrize("most", [9, 60])
def test_ids_that_repeat_are_numbered_over_all_files_dropped_rows_included(
    tmp_path, text_model, monkeypatch, caplog, most
):
    """Three slices of rows, three files; `most`: tokens of a prompt, of which some have more."""
    monkeypatch.setattr(scan, "_SLICE", 13)
    random = np.random.default_rng(3)
    numbers = random.integers(0, 25, 38).tolist()
    texts = ["p" * int(count) for count in random.integers(1, 4, 38)]
    rows = [{"prompt": t, "answer": "1", "number": n} for t, n in zip(texts, numbers, strict=True)]
    files = [write_jsonl(tmp_path / f"{k}.jsonl", part) for k, part in enumerate((rows[:17], rows[17:18], rows[18:]))]
    with caplog.at_level(logging.WARNING):
        dataset = load(files, text_model, id_key="number", max_prompt_length=most)
    seen, names = Counter(), []
    for number in numbers:
        names.append(f"{number}#{seen[number]}" if seen[number] else str(number))
        seen[number] += 1
    lengths = np.array([8 + len(text) for text in texts])  # the chat template's, and a token a letter
    kept = np.flatnonzero(lengths <= most)
    assert 0 < len(kept) and (len(kept) < 38) == (most == 9)
    assert list(dataset.prompt_ids) == [names[row] for row in kept]
    assert [prompt.prompt_id for prompt in dataset.prompts(range(len(dataset)))] == [names[row] for row in kept]
    assert [prompt.num_tokens for prompt in dataset.prompts(range(len(dataset)))] == lengths[kept].tolist()
    files_of = np.repeat([0, 1, 2], [17, 1, 20])[kept]
    assert dataset.sources.tolist() == files_of.tolist()
    assert [dataset.source_name(i) for i in range(len(dataset))] == [str(file) for file in files_of]
    repeated = [number for number, count in seen.items() if count > 1]
    assert f"{len(repeated)} prompts occur more than once (first: id {repeated[0]})" in caplog.text


@pytest.mark.parametrize("ids", [["7", "7", "7#1"], ["7#1", "7", "8", "7"], ["7", "7", "7", "7#2"]])
def test_an_id_that_a_numbered_one_would_repeat_is_refused(tmp_path, text_model, ids):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "1", "name": name} for name in ids])
    with pytest.raises(UserError, match="'name': ids repeat even after numbering"):
        load(path, text_model, id_key="name")


def test_a_rank_holds_no_copy_of_a_scan_that_is_kept(tmp_path, text_model):
    """Arrow counts what it allocates, and not what it maps."""
    rows = [{"prompt": "p", "answer": "1", "name": f"{i:0200d}", "kind": "k" * 50} for i in range(scan.ROWS_KEPT)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    settings = {"id_key": "name", "category_key": "kind"}
    expected = load(path, text_model, **settings)
    before = pa.total_allocated_bytes()
    dataset = load(path, text_model, **settings)
    held = pa.total_allocated_bytes() - before
    assert dataset.prompt_ids[401] == f"{401:0200d}" and dataset.fingerprint == expected.fingerprint
    assert held < 50_000  # the ids and categories are 250,000 bytes
