"""Weights by vLLM's own nccl and ipc engines, our side and the worker's: all but what NCCL and CUDA do themselves."""

import json

import pytest
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model, save_vision_model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tied", "tensor_parallel_size"),
    [("vision", False, 1), ("text", True, 2)],
)
def test_every_weight_arrives_byte_for_byte(tmp_path, kind, tied, tensor_parallel_size):
    folder, out = tmp_path / "model", tmp_path / "out.json"
    save_vision_model(folder, tied) if kind == "vision" else save_text_model(folder, tied, num_heads=4)
    run_ranks("device_transfer.py", folder, out, num_ranks=tensor_parallel_size)
    for rank in range(tensor_parallel_size):
        report = json.loads((tmp_path / f"out.json.{rank}").read_text())
        rows, num_weights = report["rows"], report["weights"]
        assert (report["tied"], report["size"]) == (tied, tensor_parallel_size)
        assert num_weights > report["buckets"] > 10
        ways = [("nccl", True), ("nccl", False), ("ipc", True), ("ipc", False)]
        assert [(row["backend"], row["packed"]) for row in rows] == [way for way in ways for _ in range(2)]
        for row in rows:
            assert row["failed"] == {} and row["types"] == ["torch.bfloat16"]
            assert row["arrived"]  # what vLLM's model was given is what the actor has
            assert row["loaded"] and row["addresses"]  # as vLLM's own reload does it, in the same memory
            assert row["changed"] and row["held"] > 0.4
        # On rank 0 the sender counts as well.
        ends = 2 if rank == 0 else 1
        assert {row["broadcasts"] for row in rows[2:4]} == {ends * num_weights}
        assert all(ends < row["broadcasts"] < ends * num_weights for row in rows[:2])
        assert {row["broadcasts"] for row in rows[4:]} == {0}
        assert all(1 < row["updates"] < num_weights for row in rows[4:6])
