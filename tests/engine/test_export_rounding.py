"""What rounding takes from the weights of an export, and that it is said."""

import pytest
import torch
from torch import nn

from mmr1_ds.config import ModelConfig
from mmr1_ds.engine.weights import export


@pytest.mark.parametrize(("step", "said"), [(1e-5, "100% of the weights that training changed"), (0.1, "")])
def test_an_export_that_loses_what_was_learned_says_so(monkeypatch, caplog, step, said):
    monkeypatch.setattr(export, "_stored_type", lambda config: torch.bfloat16)
    model = nn.Linear(7, 3, dtype=torch.bfloat16)
    nn.init.uniform_(model.weight, 0.5, 1.0)
    trained = {name: weight.detach().float() for name, weight in model.named_parameters()}
    trained["weight"] = trained["weight"] + step
    export.fill(model, trained, ModelConfig())
    torch.testing.assert_close(model.weight.float(), trained["weight"], atol=4e-3, rtol=0)
    assert said in caplog.text and bool(said) == bool(caplog.text)
