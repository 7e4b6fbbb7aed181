"""Signals and time limits that end a run: what is asked, when sampling is cut off, and that handlers go back."""

import os
import signal
import time

import pytest

from mmr1_ds.cluster.preemption import Preempted, Preemption, SamplingAbandoned


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.sigpending()  # a call into the interpreter, after which the handler has run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_start_at_once_and_training_at_a_boundary(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)]
    preemption = Preemption(notice_seconds=60, max_wall_seconds=None)
    with preemption.handled():
        with pytest.raises(Preempted, match=f"{signal.Signals(number).name} before training began"):
            send(number)
        send(number)  # one is enough: the way out is not cut off
    preemption = Preemption(notice_seconds=60, max_wall_seconds=None)
    with preemption.handled():
        preemption.begin_training()
        assert not preemption.is_asked and not preemption.is_urgent
        send(number)
        assert preemption.is_asked and signal.Signals(number).name in preemption.reason
        assert not preemption.is_urgent
        with preemption.interrupting():
            pass  # half of the notice is left to sample
        reason = preemption.reason
        send(signal.SIGTERM)  # a second one changes nothing
        assert preemption.reason == reason
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_sampling_is_cut_off_when_learning_and_saving_need_the_time():
    preemption = Preemption(notice_seconds=60, max_wall_seconds=None)
    with preemption.handled():
        preemption.begin_training()
        preemption.took(after_sampling=30.0)
        preemption.took(to_save=9.9)
        send(signal.SIGTERM)
        assert not preemption.is_urgent  # 1.5 x 39.9 s of 60
        preemption.took(to_save=10.1)
        assert preemption.is_urgent
        with pytest.raises(SamplingAbandoned), preemption.interrupting():
            raise AssertionError("it must not begin")


def test_sampling_underway_is_cut_off_by_the_alarm():
    preemption = Preemption(notice_seconds=60, max_wall_seconds=None)
    began = time.monotonic()
    with preemption.handled():
        preemption.begin_training()
        preemption.took(after_sampling=39.9, to_save=0.0)  # 0.15 s are left to sample
        with pytest.raises(SamplingAbandoned), preemption.interrupting():
            try:
                send(signal.SIGUSR1)
                while time.monotonic() < began + 30:
                    pass  # as an engine that samples in this thread
            except Exception as error:
                raise AssertionError("an engine's own `except Exception` must not swallow it") from error
        assert preemption.is_asked
        preemption.took(after_sampling=0.1)
        with preemption.interrupting():
            pass  # outside of `interrupting`, and when there is time, alarms raise nothing


def test_the_wall_limit_asks_in_time_to_save():
    preemption = Preemption(notice_seconds=3600, max_wall_seconds=3600.2)
    with preemption.handled():
        preemption.begin_training()
        deadline = time.monotonic() + 30
        while not preemption.is_asked and time.monotonic() < deadline:
            signal.sigtimedwait([], 0.05)
        assert preemption.reason == "trainer.max_wall_seconds are over"
        assert not preemption.is_urgent


@pytest.mark.parametrize(("wall", "urgent"), [(None, False), (50, True)])
def test_a_signal_leaves_no_more_time_than_the_wall_limit(wall, urgent):
    preemption = Preemption(notice_seconds=100, max_wall_seconds=wall)
    with preemption.handled():
        preemption.begin_training()
        preemption.took(after_sampling=36.0, to_save=0.0)  # 54 s
        send(signal.SIGTERM)
        assert preemption.is_urgent == urgent


def test_sigusr1_leaves_the_time_until_the_end_of_the_job(monkeypatch):
    """Which `sbatch --signal` chose; SIGTERM comes shortly before the kill whatever that was."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    urgent = {}
    for number in (signal.SIGUSR1, signal.SIGTERM):
        preemption = Preemption(notice_seconds=30, max_wall_seconds=None)
        with preemption.handled():
            preemption.begin_training()
            preemption.took(after_sampling=600.0)
            send(number)
            urgent[number] = preemption.is_urgent
    assert urgent == {signal.SIGUSR1: False, signal.SIGTERM: True}


def test_a_second_signal_is_heeded_where_it_leaves_less_time(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100_000))
    preemption = Preemption(notice_seconds=30, max_wall_seconds=None)
    with preemption.handled():
        preemption.begin_training()
        preemption.took(after_sampling=600.0)
        send(signal.SIGUSR1)
        assert not preemption.is_urgent
        send(signal.SIGTERM)
        assert preemption.is_urgent and "SIGUSR1" in preemption.reason
        send(signal.SIGUSR1)  # and one that leaves more is not
        assert preemption.is_urgent
