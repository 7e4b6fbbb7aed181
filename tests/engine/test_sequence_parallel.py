"""Sequences that two ranks compute together, against each rank alone without packing; every kind of model."""

import numpy as np
import pytest
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model, save_vision_model
from transformers import AutoConfig

from mmr1_ds.cluster.ranks import Neighbours
from mmr1_ds.engine.model.attention import PACKED
from mmr1_ds.engine.model.sequence_parallel import SequenceParallel
from mmr1_ds.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "qwen3",
        "qwen3_vl",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("qwen2", "llama", "qwen2_5_vl", "qwen3_moe")),
    ],
)
def test_log_probs_are_those_of_a_rank_alone(tmp_path, family):
    save = save_vision_model if family.endswith("vl") else save_text_model
    model = save(tmp_path / "model", family=family, num_heads=4)
    run_ranks("sequence_parallel.py", model, tmp_path, num_ranks=2)
    results = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2)]
    for found in results:
        for i in range(15 if family == "qwen3_moe" else 5):  # the others: with experts replayed, and where they differ
            np.testing.assert_allclose(found[f"together {i}"], found[f"alone {i}"], atol=1e-5)
    assert sum(len(results[1][f"alone {i}"]) for i in range(5)) > 20
    # Each rank computes half of all tokens, once; rows of an odd number are filled up.
    total = sum(found["lengths"].sum() for found in results)
    for found in results:
        assert 0 <= 2 * found["cuts"].sum() - total <= len(found["cuts"])


def test_heads_that_cannot_be_shared_out_are_refused(tmp_path):
    config = AutoConfig.from_pretrained(save_text_model(tmp_path / "model"))  # 3 heads, 1 key-value head
    with pytest.raises(UserError, match="ulysses_size=2 cannot share out 3 attention heads and 1 key-value heads"):
        SequenceParallel(Neighbours(None, None, 0, 2), config, PACKED)
