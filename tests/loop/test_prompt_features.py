"""The features of the prompts, from the files to the curriculum."""

import numpy as np
import pytest
from fixtures.data_fixtures import encoder_of, text_rows, write_jsonl, write_text_model
from fixtures.rank_threads import SingleProcess

from mmr1_ds.config import DataConfig, RunConfig
from mmr1_ds.data.text_features import NUM_FEATURES


@pytest.mark.parametrize(
    ("features", "refresh", "expected"), [("text", "online", True), ("text", "full", False), ("none", "online", False)]
)
def test_features_reach_the_online_curriculum(tmp_path, features, refresh, expected):
    from mmr1_ds.loop import composition, starting

    path = write_jsonl(tmp_path / "rows.jsonl", text_rows(23))
    data = DataConfig(
        train_files=path, val_files=path, rollout_batch_size=4, min_pixels=None, max_pixels=None,
        sampling_strategy="curriculum", curriculum_refresh=refresh, curriculum_features=features,
    )  # fmt: skip
    config = RunConfig(data=data)
    train_data, val_data = starting.load_data(config, encoder_of(write_text_model(tmp_path)))
    assert val_data.take_sketches() is None
    coordinator = composition.make_coordinator(config, train_data, 10, SingleProcess())
    arrays = coordinator.table.columns()
    assert ("features.features" in arrays) == expected
    if expected:
        assert arrays["features.features"].shape == (23, NUM_FEATURES) and np.any(arrays["features.features"])
