"""The reduction of what is known of prompts to whole numbers, against its definition, and the file that keeps them."""

from types import SimpleNamespace

import numpy as np
import pytest

from mmr1_ds.data import features as reduction
from mmr1_ds.data import model_features
from mmr1_ds.data.features import NUM_FEATURES, UNIT, as_features


def brute_force(measures, vectors):
    """Each prompt by itself: its measures, and how far it lies along the right singular vectors of all prompts."""
    centered = vectors.astype(float) - vectors.mean(axis=0, dtype=float)
    _, widths, axes = np.linalg.svd(centered)
    found = np.zeros((len(vectors), NUM_FEATURES))
    for k in range(NUM_FEATURES):
        if k < measures.shape[1]:
            column = measures[:, k].astype(float)
        elif k - measures.shape[1] < np.count_nonzero(widths > 1e-4):
            axis = axes[k - measures.shape[1]]
            column = centered @ (axis if axis[np.abs(axis).argmax()] > 0 else -axis)
        else:
            continue
        if column.std() > 1e-5:
            found[:, k] = (column - column.mean()) / column.std() * UNIT
    return found.round().clip(-127, 127)


@pytest.mark.parametrize(("num_prompts", "num_measures", "width"), [(101, 3, 53), (401, 0, 7), (7, 12, 31), (2, 0, 1)])
def test_features_are_principal_components_and_measures(num_prompts, num_measures, width, monkeypatch):
    random = np.random.default_rng(num_prompts)
    spreads = 0.7 ** np.arange(width)  # apart, so that the components have an order
    vectors = (random.standard_normal((num_prompts, width)) * spreads + 5.0).astype(np.float32)
    measures = random.exponential(3.0, (num_prompts, num_measures)).astype(np.float32)
    measures[:, 1:2] = 7.0  # says nothing
    monkeypatch.setattr(reduction, "_BLOCK", 13)
    found = as_features(lambda part: (measures[part], vectors[part]), num_prompts)
    assert found.shape == (num_prompts, NUM_FEATURES) and found.dtype == np.int8
    expected = brute_force(measures, vectors)
    kept = min(num_measures + min(width, num_prompts - 1, 16), NUM_FEATURES)  # narrower ones drown in rounding
    assert np.abs(found.astype(int) - expected)[:, :kept].max() <= 1
    assert not found[:, num_measures + width :].any()


def test_a_sample_is_enough(monkeypatch):
    random = np.random.default_rng(3)
    vectors = (random.standard_normal((4001, 9)) * 3.0 ** -np.arange(9)).astype(np.float32)
    nothing = np.empty((4001, 0), dtype=np.float32)
    whole = as_features(lambda part: (nothing[part], vectors[part]), 4001).astype(float)
    monkeypatch.setattr(reduction, "_SAMPLE", 1000)
    by_sample = as_features(lambda part: (nothing[part], vectors[part]), 4001).astype(float)
    for k in range(9):
        assert np.corrcoef(whole[:, k], by_sample[:, k])[0, 1] > 0.99


@pytest.mark.parametrize(("num_prompts", "width"), [(31, 1024), (600_000, 447), (10**8, 256)])
def test_projected_states_keep_their_distances_and_narrow_ones_stay(num_prompts, width):
    states = np.random.default_rng(5).standard_normal((31, 1501)).astype(np.float32)
    found = model_features.projected(states, num_prompts)
    assert found.shape == (31, width) and found.dtype == np.float32
    np.testing.assert_allclose(found[7:8], model_features.projected(states[7:8], num_prompts), rtol=1e-4, atol=1e-4)
    before, after = (np.linalg.norm(one[:1] - one[1:], axis=1) for one in (states, found))
    np.testing.assert_allclose(after / before, 1.0, atol=0.2)
    np.testing.assert_array_equal(model_features.projected(states[:, :width], num_prompts), states[:, :width])


def test_a_kept_file_is_of_its_prompts_model_and_encoding_alone(dataset_cache):
    def path(**changes):
        data = {"fingerprint": "a", "rows_fingerprint": "b"} | changes.pop("data", {})
        given = {"encoding": "c", "weights": "d", "model": {"rope_theta": 1.0}} | changes
        return model_features.kept_file(SimpleNamespace(**data), **given)

    others = [{"encoding": "x"}, {"weights": "x"}, {"model": {"rope_theta": 2.0}}]
    others += [{"data": {"fingerprint": "x"}}, {"data": {"rows_fingerprint": "x"}}]
    assert path() == path() and len({path(), *(path(**change) for change in others)}) == 6


def test_kept_features_come_back_or_none(tmp_path, caplog):
    features = np.random.default_rng(1).integers(-127, 128, (23, NUM_FEATURES), dtype=np.int8)
    path = tmp_path / "folder" / "key.safetensors"
    assert model_features.read_kept(path, 23) is None
    model_features.keep(features, path)
    np.testing.assert_array_equal(model_features.read_kept(path, 23), features)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert model_features.read_kept(path, 24) is None
    path.write_bytes(path.read_bytes()[:-7])
    assert model_features.read_kept(path, 23) is None
    model_features.keep(features, path / "no folder" / "key.safetensors")
    assert "cannot be kept" in caplog.text
