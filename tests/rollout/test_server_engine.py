"""Real rollout servers beside real ZeRO-3 ranks."""

import json

import pytest
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_vision_model

pytestmark = pytest.mark.slow


def run(folder, engine, num_ranks):
    out = folder / f"{engine}.json"
    arguments = (folder / "model", out, 3, engine, 1, "no-videos")  # which servers do not take
    run_ranks("logprob_agreement.py", *arguments, num_ranks=num_ranks, timeout_seconds=500)
    return json.loads(out.read_text())["steps"]


def test_a_server_samples_and_trains_as_the_engine_in_the_rank(tmp_path):
    """The same seeds, so the same responses: then every loss is the same too, and no log-probability drifts."""
    save_vision_model(tmp_path / "model")
    beside, inside = run(tmp_path, "server", 1), run(tmp_path, "vllm", 1)
    assert len(beside) == 3
    for one, other in zip(beside, inside, strict=True):
        assert one["tokens"] == other["tokens"] and one["images"] == other["images"]
        assert one["rollout/logprob_diff_max"] < 1e-4
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert len({tuple(map(tuple, step["tokens"])) for step in beside}) == 3  # the policy moved


@pytest.mark.nightly
def test_weights_that_change_in_the_middle_of_a_response_are_told_apart(tmp_path):
    """Every token's log-probability is that of the policy it names, and not that of the other."""
    save_vision_model(tmp_path / "model")
    run_ranks("server_swap.py", tmp_path / "model", tmp_path / "out.json", timeout_seconds=500)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["oldest"] == [0, 0, 0]
    mixed = [row for row in found["rows"] if len(row["spans"]) == 2]
    assert mixed  # how many are still being sampled when the weights change is a matter of time
    for row in found["rows"]:
        assert sum(count for _, count in row["spans"]) == row["length"]
        assert [version for version, _ in row["spans"]] == [0, 1][: len(row["spans"])]
        assert max(row["far"].values()) < 1e-4
    assert min(min(row["other"].values()) for row in mixed) > 0.1
