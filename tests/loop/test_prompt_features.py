"""The features of the prompts, from the files to the curriculum."""

import json
import shutil

import numpy as np
import pytest
import yaml
from fixtures.data_fixtures import encoder_of, text_rows, write_jsonl, write_text_model
from fixtures.launching import run_ranks, run_training
from fixtures.rank_threads import SingleProcess
from fixtures.tiny_models import save_text_model, save_vision_model
from fixtures.tiny_run import NUM_PROMPTS, assert_same_run, write_run
from safetensors.numpy import load_file

from mmr1_ds.config import DataConfig, RunConfig
from mmr1_ds.config.derived import prompt_features
from mmr1_ds.data.features import NUM_FEATURES


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


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, "model"), ({"curriculum_refresh": "full"}, "none"), ({"sampling_strategy": "shuffle"}, "none")],
)
def test_who_reads_features(change, expected):
    settings = {"sampling_strategy": "curriculum", "curriculum_refresh": "online", "curriculum_features": "model"}
    config = RunConfig(data=DataConfig(**settings | change))
    assert prompt_features(config) == expected
    config.trainer.val_only = True
    assert prompt_features(config) == "none"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "layout", "num_ranks"), [(save_text_model, "padded", 1), (save_vision_model, "packed", 2)]
)
def test_an_actor_s_states_are_those_of_the_plain_model(tmp_path, save, layout, num_ranks):
    model = save(tmp_path / "model")
    run_ranks("prompt_states.py", model, tmp_path / "states.npz", layout, num_ranks=num_ranks)
    with np.load(tmp_path / "states.npz") as states:
        np.testing.assert_allclose(states["found"], states["expected"], rtol=1e-4, atol=1e-5)
        apart = np.linalg.norm(states["found"][:, None] - states["found"][None], axis=2)
    assert (apart + np.eye(len(apart)) > 1e-3).all()


FORWARD, KEPT = "what the model makes of each prompt: 11 of 11", "what the model makes of each prompt is known"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a configuration, and a run of three steps in `straight`, by one rank; what that printed."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_run(folder / "assets", num_steps=3)
    settings = yaml.safe_load(config.read_text())
    settings["data"] |= {"curriculum_features": "model", "curriculum_update_freq": 2}  # a look at the table each two
    settings["trainer"] |= {"n_gpus_per_node": 1, "save_limit": -1}
    config.write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder, train(folder, "straight")


def train(folder, name, *settings):
    done = run_training(f"config={folder / 'assets' / 'run.yaml'}", f"trainer.run_dir={folder / name}", *settings)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def features_of(run_dir, step=1):
    return load_file(run_dir / "checkpoints" / f"global_step_{step}" / "curriculum" / "curriculum.safetensors")[
        "table.features.features"
    ]


@pytest.mark.slow
def test_a_run_has_what_the_model_made_of_its_prompts_before_training(runs):
    folder, printed = runs
    assert FORWARD in printed and KEPT not in printed
    features = features_of(folder / "straight", 3)
    assert features.shape == (NUM_PROMPTS, NUM_FEATURES)
    x = features.astype(float)
    assert np.abs(x.mean(axis=0)).max() < 2.0 and np.count_nonzero(x.std(axis=0) > 25) >= 8
    (kept,) = (folder / "cache").rglob("mmr1_ds_model_features_*/*.safetensors")
    np.testing.assert_array_equal(load_file(kept)["features"], features)
    last = json.loads((folder / "straight" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "curriculum/feature_weight" in last


@pytest.mark.slow
def test_a_resumed_run_draws_as_if_never_stopped_and_asks_the_model_nothing(runs):
    folder, _ = runs
    shutil.copytree(folder / "straight", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "global_step_3")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "global_step_2")
    shutil.move(folder / "cache", folder / "away")
    try:
        printed = train(folder, "resumed")
    finally:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        shutil.move(folder / "away", folder / "cache")
    assert "what the model makes" not in printed
    assert_same_run(folder / "resumed", folder / "straight", num_ranks=1)


@pytest.mark.slow
def test_a_second_run_takes_what_was_kept(runs):
    folder, _ = runs
    printed = train(folder, "second", "trainer.max_steps=1")
    assert KEPT in printed and FORWARD not in printed
    np.testing.assert_array_equal(features_of(folder / "second"), features_of(folder / "straight"))
    draws = [(folder / name / "draws.jsonl").read_text().splitlines()[0] for name in ("second", "straight")]
    assert draws[0] == draws[1]


@pytest.mark.slow
def test_two_ranks_find_the_same_but_for_rounding(runs, tmp_path, monkeypatch):
    folder, _ = runs
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = (f"trainer.run_dir={tmp_path / 'two'}", "trainer.n_gpus_per_node=2", "trainer.max_steps=1")
    run_ranks("train.py", f"config={folder / 'assets' / 'run.yaml'}", *own, num_ranks=2)
    found = features_of(tmp_path / "two").astype(int)
    expected = features_of(folder / "straight").astype(int)
    widest = expected.std(axis=0) > 25
    assert np.abs(found - expected)[:, widest].max() <= 2
