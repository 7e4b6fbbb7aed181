import numpy as np

from mmr1_ds.monitoring.clock import StageClock, StageMemory


def test_the_peak_is_the_stage_s_own():
    clock = StageClock(memory=StageMemory(on_gpu=False))
    with clock("large"):
        np.ones(37_000_000)  # 296 MB, given back at once
    with clock("small"):
        pass
    held = clock.memory_gb["large"] - clock.memory_gb["small"]
    assert 0.25 < held < 0.35
    assert clock.metrics().keys() == {"timing_s/large", "timing_s/small", "memory_gb/large", "memory_gb/small"}


def test_a_stage_entered_twice_has_its_larger_peak_and_all_its_seconds():
    clock = StageClock(memory=StageMemory(on_gpu=False))
    for size in (37_000_000, 1):
        with clock("stage"):
            np.ones(size)
    once = StageClock(memory=StageMemory(on_gpu=False))
    with once("stage"):
        pass
    assert clock.memory_gb["stage"] > once.memory_gb["stage"] + 0.2
    assert clock.seconds["stage"] > 0
