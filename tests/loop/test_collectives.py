"""How many control collectives a step takes: each waits for the slowest of all ranks."""

import json

import pytest
from fixtures.launching import run_ranks
from fixtures.tiny_run import write_run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "mini_batch", "most", "more"),
    [(4, 4, 15, []), (8, 2, 20, []), (4, 4, 15, ["worker.rollout.n_min=2", "worker.rollout.n_max=9"])],
)
def test_a_step_takes_few(tmp_path, batch, mini_batch, most, more):
    config = write_run(tmp_path, 4)
    run_ranks(
        "collectives_of_a_step.py", tmp_path, f"config={config}", f"trainer.run_dir={tmp_path}/run",
        "trainer.save_freq=-1", f"data.rollout_batch_size={batch}", f"worker.actor.global_batch_size={mini_batch}",
        "worker.actor.micro_batch_size_per_device_for_update=4", *more, num_ranks=2,
    )  # fmt: skip
    for rank in (0, 1):
        steps = json.loads((tmp_path / f"{rank}.json").read_text())
        assert 0 < len(steps[1]) <= most, steps[1]
        assert len(steps[1]) == len(steps[2])
