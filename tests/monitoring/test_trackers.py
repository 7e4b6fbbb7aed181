"""Trackers: what each is asked for, by its documented calls, and that a resumed run goes on in its own run."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from mmr1_ds.config import TrainerConfig
from mmr1_ds.errors import UserError
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.monitoring.trackers import check_trackers

NAMES = ["wandb", "swanlab", "mlflow", "trackio"]


def write(run_dir, name, resumed_step):
    trainer = TrainerConfig(logger=[name], experiment_name="trial", project_name="mmr1_ds")
    config = {"data": {"seed": 1, "api_key": "sk-secret"}}
    with MetricsLogger.open(trainer, run_dir, 10, resumed_step, config, True) as log:
        log.log(resumed_step + 1, {"reward/overall": 0.5})


@pytest.fixture
def calls(monkeypatch):
    """The calls that stand-ins for all four libraries received."""
    found = []
    for name in NAMES:
        library = ModuleType(name)

        def note(call, library=library, answer=None):
            def noted(*arguments, **named):
                found.append((f"{library.__name__}.{call}", arguments, named))
                return answer(named) if answer else None

            setattr(library, call, noted)

        for call in ("log", "finish", "log_metrics", "end_run", "set_tracking_uri", "set_experiment", "set_tag"):
            note(call)
        for call in ("init", "start_run"):
            note(call, answer=lambda named, name=name: SimpleNamespace(
                name=f"{named.get('name')}-7" if named.get("resume") == "never" else named.get("name"),
                info=SimpleNamespace(run_id=named.get("run_id") or "m1"),
                log=lambda values, step, name=name: found.append((f"{name}.log", (values,), {"step": step})),
                finish=lambda name=name: found.append((f"{name}.finish", (), {})),
            ))  # fmt: skip
        library.Settings = lambda **named: named
        monkeypatch.setitem(sys.modules, name, library)
    for variable in ("WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    return found


def named(calls, call):
    return [arguments for name, _, arguments in calls if name == call]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_arrive_and_the_run_ends_without_secrets(tmp_path, calls, name):
    write(tmp_path, name, 0)
    logged = "mlflow.log_metrics" if name == "mlflow" else f"{name}.log"
    assert (logged, ({"reward/overall": 0.5},), {"step": 1}) in calls
    assert calls[-1][0] == ("mlflow.end_run" if name == "mlflow" else f"{name}.finish")
    assert "sk-secret" not in str(calls) and "seed" in str(calls)


@pytest.mark.parametrize(
    ("name", "call", "key"),
    [
        ("wandb", "wandb.init", "id"),
        ("swanlab", "swanlab.init", "id"),
        ("mlflow", "mlflow.start_run", "run_id"),
        ("trackio", "trackio.init", "name"),
    ],
)
def test_a_resumed_run_goes_on_in_its_own_and_a_new_one_begins(tmp_path, calls, name, call, key):
    for resumed_step in (0, 3, 7, 0):
        write(tmp_path, name, resumed_step)
    first, second, third, anew = named(calls, call)
    assert second[key] == third[key] == {"mlflow": "m1", "trackio": "trial-7"}.get(name, first[key])
    assert anew[key] != second[key]
    if name != "mlflow":
        assert second["resume"] == "allow"


def test_without_an_account_swanlab_and_mlflow_stay_in_the_run_directory(tmp_path, calls, monkeypatch):
    write(tmp_path, "swanlab", 0)
    (started,) = named(calls, "swanlab.init")
    assert (started["mode"], started["logdir"]) == ("offline", str(tmp_path / "swanlog"))
    write(tmp_path, "mlflow", 0)
    assert ("mlflow.set_tracking_uri", (f"sqlite:///{tmp_path / 'mlflow.db'}",), {}) in calls
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    monkeypatch.setenv("SWANLAB_API_KEY", "k")
    calls.clear()
    for name in ("swanlab", "mlflow"):
        write(tmp_path, name, 0)
    assert named(calls, "swanlab.init")[0]["mode"] is None and not named(calls, "mlflow.set_tracking_uri")


@pytest.mark.parametrize("name", ["swanlab", "mlflow", "trackio"])
def test_one_that_is_away_costs_its_curves_and_not_the_run(tmp_path, calls, monkeypatch, caplog, name):
    def refuse(*arguments, **named):
        raise ConnectionError("no answer")

    monkeypatch.setattr(sys.modules[name], "log_metrics" if name == "mlflow" else "log", refuse)
    trainer = TrainerConfig(logger=[name], experiment_name="trial", project_name="mmr1_ds")
    with MetricsLogger.open(trainer, tmp_path, 10, 0, {}, True) as log:
        for step in (1, 2):
            log.log(step, {"reward/overall": 0.5})
    assert [record.args[:2] for record in caplog.records if "did not take" in record.message] == [(name, 1)]


def test_mlflow_is_given_names_that_it_takes(tmp_path, calls):
    trainer = TrainerConfig(logger=["mlflow"], experiment_name="trial", project_name="mmr1_ds")
    with MetricsLogger.open(trainer, tmp_path, 10, 0, {}, True) as log:
        log.log(1, {"source/data@train/share": 1.0, "reward/f1 (%)": 0.5})
    (taken,) = [arguments[0] for name, arguments, _ in calls if name == "mlflow.log_metrics"]
    assert taken == {"source/data_train/share": 1.0, "reward/f1 ___": 0.5}


@pytest.mark.parametrize("name", ["swanlab", "mlflow", "trackio"])
def test_one_that_is_not_installed_is_named_with_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"trainer.logger has {name}, which does not import .*mmr1_ds\[trackers\]"):
        write(tmp_path, name, 0)


def test_a_dry_run_names_one_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "swanlab" else name)
    check_trackers(["console", "jsonl", "file", "tensorboard", "wandb"])
    with pytest.raises(UserError, match=r"trainer.logger=swanlab needs swanlab, not installed .*mmr1_ds\[trackers\]"):
        check_trackers(["console", "swanlab"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow", "trackio", "swanlab"])
def test_for_real(tmp_path, monkeypatch, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for resumed_step in (0, 1):
        write(tmp_path, name, resumed_step)
