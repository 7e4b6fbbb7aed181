import itertools
import math
import random

import numpy as np
import pytest
from fixtures.data_fixtures import config, encoder_of, load, png, write_kind, write_vision_model

from mmr1_ds.data import features as reduction
from mmr1_ds.data import scan
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.data.features import NUM_FEATURES, UNIT
from mmr1_ds.data.text_features import SKETCH_BYTES, compress, sketch

TEXTS = ["", " ", "7", "Alice has 12 + 345 apples.", "ä€😀 \ud800 0x1F\0\0\0 end", "a" * 401, "one\ntwo\tthree", "+-*/"]


def as_array(sketches):
    return np.frombuffer(b"".join(sketches), dtype=np.uint8).reshape(-1, SKETCH_BYTES)


def of_texts(texts):
    return as_array(sketch(texts, [len(text) for text in texts], [()] * len(texts)))


def counts_of(sketches):
    return np.ascontiguousarray(sketches[:, -48:]).view(np.float32)


def bags_of(sketches):
    return np.ascontiguousarray(sketches[:, :-48]).view(np.int8)


def test_a_sketch_depends_on_its_prompt_alone():
    together = of_texts(TEXTS)
    for place, text in enumerate(TEXTS):
        np.testing.assert_array_equal(together[place], of_texts([text])[0])
    np.testing.assert_array_equal(of_texts(TEXTS[::-1]), together[::-1])


def test_counts():
    (found,) = counts_of(as_array(sketch(["Alice has 12 + 345 apples."], [9], [[(20, 10), (10, 40)]])))
    expected = [math.log1p(n) for n in (26 + 3, 7, 0, 2, 0, 5, 2)] + [3, math.log1p(9), 2, math.log1p(600), math.log(4)]
    others = np.arange(12) != 2  # the distinct tokens are the next test's
    np.testing.assert_allclose(found[others], np.array(expected)[others], rtol=1e-6)


@pytest.mark.parametrize("text", ["x", "two words", "tell me, tell me now"])
def test_distinct_tokens(text):
    words = text.replace(",", " ,").split()
    distinct = set(words) | {"two:" + a + " " + b for a, b in itertools.pairwise(words)}
    distinct |= {"run:" + (text + " ")[k : k + 4] for k in range(len(text) - 3)}
    (found,) = counts_of(of_texts([text]))
    assert round(math.expm1(found[2])) == len(distinct)


def test_case_and_digits_are_folded_and_words_are_not():
    a, b, c, d = bags_of(of_texts(["Add 12 and 34", "add 56 AND 78", "add 123 and 34", "12 and 34 add"])).astype(float)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any() and (a != d).any()
    near = a @ d / np.sqrt(a @ a * (d @ d))
    (other,) = bags_of(of_texts(["sing me a song"])).astype(float)
    assert near > 0.3 > abs(a @ other / np.sqrt(a @ a * (other @ other)))


def test_features_are_standardised_and_tell_templates_apart():
    chosen = random.Random(0)
    templates = ["What is {} plus {}?", "Find the prime factors of {} and of {}.", "Is {} larger than {}? Yes or no."]
    kinds = [chosen.randrange(3) for _ in range(401)]
    texts = [templates[kind].format(chosen.randrange(10**6), chosen.randrange(10)) for kind in kinds]
    features = compress(of_texts(texts))
    assert features.shape == (401, NUM_FEATURES) and features.dtype == np.int8
    x = features.astype(float)
    spread = x.std(axis=0) > 0
    np.testing.assert_allclose(x.mean(axis=0), 0.0, atol=2.0)
    deviation = x[:, spread].std(axis=0)  # less where rare prompts lie so far off that they are cut
    assert deviation.max() < 1.05 * UNIT and np.median(deviation) > 0.8 * UNIT
    assert not spread[[4, 9, 10, 11]].any()  # no letters beyond ASCII, no images
    target = np.eye(3)[kinds]
    design = np.column_stack([x, np.ones(401)])
    left = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
    assert left.var() < 0.02 * target.var()


def test_blocks_do_not_matter(monkeypatch):
    sketches = of_texts([f"what is {i} and {i * i}" for i in range(101)])
    whole = compress(sketches)
    monkeypatch.setattr(reduction, "_BLOCK", 7)
    assert np.abs(compress(sketches).astype(int) - whole).max() <= 1


def test_sketches_of_a_column_in_pieces():
    import pyarrow as pa

    sketches = sketch(TEXTS, [1] * len(TEXTS), [()] * len(TEXTS))
    kind = pa.binary(SKETCH_BYTES)
    pieces = [pa.array(sketches, kind)[1:4], pa.array([], kind), pa.array(sketches[4:5], kind)]
    np.testing.assert_array_equal(scan.sketches_in(pa.chunked_array(pieces)), as_array(sketches)[1:5])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_prompts(count):
    assert np.isfinite(compress(of_texts(TEXTS[:count])).astype(float)).all()


def test_the_scan_sketches_only_what_is_asked_for_and_kept(tmp_path, monkeypatch):
    model = write_vision_model(tmp_path / "model")
    rows = [
        {"prompt": f"what is {i}?" * (99 if i == 3 else 1), "answer": "1", "images": [{"bytes": png(28 + i, 28, i)}]}
        for i in range(41)
    ]
    path = write_kind("parquet", tmp_path, rows)
    assert load(path, model).take_sketches() is None

    def taken():
        dataset = load_dataset(path, config(), encoder_of(model), with_sketches=True)
        sketches = dataset.take_sketches()
        assert dataset.take_sketches() is None and len(sketches) == len(dataset) == 40
        return sketches

    alone = taken()
    np.testing.assert_allclose(counts_of(alone)[:, 10], np.log1p([(28 + i) * 28 for i in range(41) if i != 3]))
    monkeypatch.setattr(scan, "ROWS_KEPT", 20)
    monkeypatch.setattr(scan, "ROWS_A_PROCESS", 20)
    monkeypatch.setattr(scan, "BATCH_ROWS", 8)
    monkeypatch.setattr(scan.os, "cpu_count", lambda: 2)
    for _ in range(2):  # computed, then read from the cache
        np.testing.assert_array_equal(taken(), alone)
    assert load(path, model).take_sketches() is None
