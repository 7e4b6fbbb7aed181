"""When a run is saved: at its steps, around a refresh, and when it is stopped. The real thing is in test_run.py."""

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmr1_ds.cluster.preemption import Preempted, SamplingAbandoned
from mmr1_ds.loop.state import RunState
from mmr1_ds.monitoring.clock import StageClock


class Parts:
    """A run of 9 steps on one rank, which notes what it saves and logs; a refresh is due before `refreshes`.

    A save in the background is written when it is waited for, and fails where `fails`.
    """

    def __init__(
        self,
        save_freq=-1,
        saves_when_interrupted=True,
        refreshes=(),
        asked=False,
        saves_in_background=False,
        fails=False,
        kept=Path("none"),
    ):
        self.saved, self.logged = [], []  # a step in the background as (step, "begun"), and its publication
        self._fails = fails
        self.checkpoints = SimpleNamespace(
            root=Path("root"), failure="", save=self.save, is_best=lambda figures: figures, is_writing=False,
            has_written=lambda: False, finish=self.finish, written_at=0.0,
        )  # fmt: skip
        nothing = SimpleNamespace(save=lambda folder: None, load=lambda folder: None, finish_ahead=lambda: None)
        self.learners = SimpleNamespace(num_steps_done=0, save_reference=nothing.save, load_reference=nothing.load)
        self.preemption = SimpleNamespace(
            begin_training=lambda: None, is_asked=asked, reason="SIGTERM received", took=lambda **seconds: None
        )
        self.state = RunState(
            save_freq=save_freq,
            saves_when_interrupted=saves_when_interrupted,
            saves_in_background=saves_in_background,
            weights_alone=False,
            num_steps=9,
            config_yaml="",
            kept_refresh=kept,
            actor=nothing,
            critic=None,
            coordinator=SimpleNamespace(refresh_due=lambda step: step in refreshes, save=lambda folder: None),
            batches=nothing,
            learners=self.learners,
            checkpoints=self.checkpoints,
            preemption=self.preemption,
            records=SimpleNamespace(clock=StageClock, stages=lambda clock: {"timing_s/save_checkpoint": 1.0}),
            metrics_logger=SimpleNamespace(
                elapsed_seconds=0.0,
                log=lambda step, metrics: self.logged.append(step),
                progress=lambda *_, **__: nullcontext(lambda count: None),
            ),
            ranks=SimpleNamespace(
                rank=0,
                step=0,
                any=lambda flag, stage: flag,
                all_gather_objects=lambda reason, stage: ["", reason],  # a rank before this one that was not told
            ),
        )

    def save(self, step, write, folders, in_background):
        assert not self.checkpoints.is_writing
        self.checkpoints.is_writing = in_background
        self.saved.append((step, "begun") if in_background else step)
        return True

    def finish(self):
        self.checkpoints.is_writing = False
        self.saved.append("failed" if self._fails else "there")
        return not self._fails

    def learn(self, steps, validated=None):
        for step in steps:
            self.state.begin(step)
            self.learners.num_steps_done = step
            self.state.save_if_due((validated or {}).get(step, {}))


@pytest.mark.parametrize(
    ("save_freq", "refreshes", "expected"), [(-1, (4,), [9]), (4, (), [4, 8, 9]), (4, (4, 7), [3, 4, 6, 8, 9])]
)
def test_steps_that_are_saved(save_freq, refreshes, expected):
    parts = Parts(save_freq, refreshes=refreshes)
    parts.learn(range(1, 10))
    assert parts.saved == expected


def test_a_step_that_validates_best_is_saved_with_its_figures():
    parts = Parts(save_freq=4)
    parts.learn(range(1, 10), validated={3: {"val/accuracy_reward": 0.5}})
    assert parts.saved == [3, 4, 8, 9]


def test_a_refresh_is_saved_where_its_step_is_saved_anyway():
    """Else a run that falls back to this checkpoint would have to sample the whole data set again."""
    parts = Parts(save_freq=3, refreshes=(4, 6))
    parts.learn(range(1, 4))
    assert parts.saved == [3]  # before the refresh
    parts.state.take_refresh({"timing_s/refresh": 1.0})
    assert parts.saved == [3, 3]  # and after it
    parts.learn([4, 5])
    parts.state.take_refresh({"timing_s/refresh": 1.0})
    assert parts.saved == [3, 3, 5]
    parts.state.take_refresh({})  # none was due
    assert parts.saved == [3, 3, 5]


def test_what_is_saved_in_the_background():
    """Not the last step, and not before a refresh, whose kept answers a later save would throw away."""
    parts = Parts(save_freq=2, refreshes=(5,), saves_in_background=True)
    parts.learn(range(1, 10), validated={7: {"val/accuracy_reward": 0.5}})
    assert parts.saved == [
        (2, "begun"), "there", 4, (6, "begun"), "there", (7, "begun"), "there", (8, "begun"), "there", 9,
    ]  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_is_stopped_waits_for_what_is_written(fails):
    parts = Parts(save_freq=4, saves_in_background=True, fails=fails)
    parts.learn(range(1, 5))
    parts.preemption.is_asked = True
    with pytest.raises(Preempted, match="4 of 9 steps are done, saved in root"):
        parts.state.end_if_asked()
    assert parts.saved == [(4, "begun")] + (["failed", 4] if fails else ["there"])


def test_a_refresh_that_is_kept_after_a_save_began_outlives_it(tmp_path):
    kept = tmp_path / "refresh.safetensors"
    for is_later in (False, True):
        parts = Parts(save_freq=4, saves_in_background=True, kept=kept)
        kept.write_text("answers")
        parts.learn(range(1, 5))
        if is_later:
            os.utime(kept, (1, 1))
        parts.state.publish()
        assert kept.exists() == is_later


def test_a_request_to_end_that_came_in_a_refresh_is_heeded_before_the_next_step():
    parts = Parts(save_freq=3, asked=True)
    parts.state.begin(2)
    with pytest.raises(Preempted, match="SIGTERM received: 2 of 9 steps are done, saved in root"):
        parts.state.take_refresh({"timing_s/refresh": 1.0})
    assert parts.saved == [2]


def test_a_run_that_is_stopped_in_a_step_saves_the_steps_that_are_learned():
    parts = Parts(asked=True)
    with pytest.raises(Preempted, match="4 of 9 steps are done, saved in root"), parts.state.saved_when_interrupted():
        parts.learn(range(1, 5))
        parts.state.begin(5)
        raise SamplingAbandoned
    assert parts.saved == [4] and parts.state.step == 4


def test_a_run_that_is_stopped_in_the_validation_after_its_last_step_is_done(caplog):
    parts = Parts(asked=True)
    with parts.state.saved_when_interrupted():
        parts.learn(range(1, 9))
        parts.state.begin(9)
        parts.learners.num_steps_done = 9
        raise SamplingAbandoned
    assert parts.saved == [9]
    assert "all 9 steps are done and saved, the last validation is not; mmr1-ds eval does it" in caplog.text


def test_a_validation_that_is_stopped_leaves_the_checkpoint_as_it_is():
    parts = Parts(saves_when_interrupted=False, asked=True)
    with pytest.raises(Preempted, match="validation is not finished"), parts.state.saved_when_interrupted():
        parts.state.load(7, Path("none"), None)
        raise SamplingAbandoned
    assert parts.saved == []
