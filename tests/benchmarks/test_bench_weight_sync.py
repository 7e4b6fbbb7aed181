"""The benchmark of weight syncs: its table, and a run on the smallest model."""

import json
import subprocess
import sys

import pytest
from fixtures.launching import ROOT, environment

BENCHMARK = ROOT / "benchmarks" / "weights" / "bench_weight_sync.py"


def row(method, seconds, peak):
    return {"method": method, "model": "1M", "num_parameters": 10, "bytes": 40, "seconds": seconds,
            "bytes_per_second": 40 / seconds, "num_collectives": 3, "num_requests": 2, "peak_extra_bytes": peak,
            "peak_extra_bytes_by_rank": [peak, 1], "peak_live_bytes_by_rank": [peak, 1],
            "bucket_bytes": 2**20, "rounds": [seconds, 3 * seconds]}  # fmt: skip


def test_the_table_says_ours_over_each_method(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    from bench_weight_sync import report

    lines = report([row("buckets", 1.0, 50), row("per_parameter", 4.0, 20)]).splitlines()
    assert lines[2].split()[-2:] == ["1.00", "1.00"] and lines[3].split()[-2:] == ["0.25", "2.50"]
    assert "buckets of 1 MiB" in lines[0]


@pytest.mark.nightly
def test_all_methods_hand_over_the_same_weights(tmp_path):
    """The program itself compares the consumer's weights with the model's."""
    command = [sys.executable, BENCHMARK, "--sizes", "1M", "--rounds", "1", "--bucket-mib", "1"]
    command += ["--json", tmp_path / "rows.json"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {item["method"]: item for item in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {"buckets", "per_parameter", "whole_model"}
    ours, single = rows["buckets"], rows["per_parameter"]
    assert ours["num_collectives"] == ours["num_requests"]  # one all-gather a bucket
    assert single["num_collectives"] == single["num_requests"] > 4 * ours["num_requests"] > 8
    for item in rows.values():
        assert item["bytes"] == 2 * item["num_parameters"] and len(item["rounds"]) == 1
        assert item["bytes_per_second"] == pytest.approx(item["bytes"] / item["seconds"])
        assert all(peak > 0 for peak in item["peak_extra_bytes_by_rank"])
