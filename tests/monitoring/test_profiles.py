"""A trace is written of the steps that are asked for, and opens."""

import gzip
import json
from types import SimpleNamespace

import torch

from mmr1_ds.monitoring.profiles import StepProfiles


def test_a_trace_names_its_stages_and_operators(tmp_path):
    profiles = StepProfiles(tmp_path, [3], SimpleNamespace(rank=1, on_gpu=False))
    for step in (2, 3, 4):
        profiles.begin(step)
        with profiles.stage("update_actor"):
            torch.ones(7, 7) @ torch.ones(7, 7)
        profiles.end()
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name == "step_3_rank_1.trace.json.gz"
    with gzip.open(path, "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"update_actor", "aten::mm"} <= names


def test_a_disk_that_fails_costs_the_trace(tmp_path, caplog):
    (tmp_path / "profiles").write_text("a file")
    profiles = StepProfiles(tmp_path, [1], SimpleNamespace(rank=0, on_gpu=False))
    profiles.begin(1)
    with caplog.at_level("WARNING", logger="mmr1_ds"):
        profiles.end()
    assert "the profile of step 1 is not written" in caplog.text
