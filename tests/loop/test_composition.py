"""The order in which a run is put together: what fails cheapest comes first."""

import contextlib
import os
from unittest import mock

import pytest
from fixtures.rank_threads import Ranks, SingleProcess

from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.config import DataConfig, RunConfig, TrainerConfig
from mmr1_ds.errors import UserError
from mmr1_ds.loop import composition, starting
from mmr1_ds.preflight.deepspeed import DeepspeedConfigs

LAUNCH = LaunchEnvironment(0, 1, 0, "none")


@pytest.mark.parametrize(("seen", "reached"), [(True, ["GPU", "tokenizer", "data"]), (False, ["GPU"])])
def test_a_gpu_is_used_before_data_is_read(monkeypatch, seen, reached):
    """A broken driver, or a torch that sees another machine than the configuration, shows before minutes of reading."""
    order = []

    class Reached(Exception):
        """Far enough."""

    def load(*arguments, **settings):
        order.append("data")
        raise Reached

    def initialise(launch):
        assert launch is LAUNCH
        order.append("GPU")
        return True

    monkeypatch.setattr(composition, "RewardPool", lambda *arguments: contextlib.nullcontext())
    monkeypatch.setattr(starting, "initialise_gpu", initialise)
    monkeypatch.setattr(starting, "gpu_is_here", lambda: seen)
    monkeypatch.setattr(composition, "PromptEncoder", lambda *arguments: order.append("tokenizer"))
    monkeypatch.setattr(starting, "load_dataset", load)
    config = DeepspeedConfigs({}, {}, None)
    expected = pytest.raises(Reached) if seen else pytest.raises(UserError, match="True, unlike")
    with expected:
        composition.run(RunConfig(), config, LAUNCH, None)
    assert order == reached


@pytest.mark.parametrize(("choice", "on_gpu", "taken"), [
    ("auto", True, True), ("auto", False, False), ("cpu", True, False), ("triton", True, True),
])  # fmt: skip
def test_scores_are_computed_where_the_tokens_are(choice, on_gpu, taken):
    """By the Triton kernel where there is a GPU; `score_batch` with a device is compared with the CPU's elsewhere."""
    ranks = mock.Mock(on_gpu=on_gpu, device="cuda:3")
    scorer = composition.make_scorer(DataConfig(curriculum_kernel=choice), ranks, mock.Mock(eos_token_ids=(1,)))
    assert scorer.keywords["device"] == ("cuda:3" if taken else None)


def test_a_run_whose_checkpoints_would_lie_in_another_s_directory_is_refused(tmp_path):
    first = RunConfig(trainer=TrainerConfig(run_dir=str(tmp_path / "first")))
    folder = tmp_path / "first" / "checkpoints"
    second = RunConfig(trainer=TrainerConfig(run_dir=str(tmp_path / "second"), save_checkpoint_path=str(folder)))
    with contextlib.ExitStack() as held:
        starting.lock_folders(first, Ranks(SingleProcess()), held)
        with contextlib.ExitStack() as refused, pytest.raises(UserError, match=f"save_checkpoint_path={folder} is in"):
            starting.lock_folders(second, Ranks(SingleProcess()), refused)
    with contextlib.ExitStack() as held:
        starting.lock_folders(second, Ranks(SingleProcess()), held)


@pytest.mark.parametrize("mode", [None, "700", "770"])
def test_the_folders_of_a_run_are_opened_to_whom_the_user_says(tmp_path, mode):
    config = RunConfig()
    config.trainer.run_dir, config.trainer.save_checkpoint_path = str(tmp_path / "run"), str(tmp_path / "checkpoints")
    config.trainer.run_dir_mode = mode
    umask = os.umask(0o027)
    try:
        with contextlib.ExitStack() as stack:
            starting.lock_folders(config, Ranks(SingleProcess()), stack)
            found = {folder.name: oct(folder.stat().st_mode)[-3:] for folder in tmp_path.iterdir()}
    finally:
        os.umask(umask)
    assert found == dict.fromkeys(["run", "checkpoints"], mode or "750")


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(starting.Path, "chmod", mock.Mock(side_effect=PermissionError(1, "Not permitted", "run")))
    config = RunConfig()
    config.trainer.run_dir, config.trainer.run_dir_mode = str(tmp_path / "run"), "700"
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=r"trainer.run_dir_mode=700: Not permitted"):
        starting.lock_folders(config, Ranks(SingleProcess()), stack)
