"""What DeepSpeed leaves in the optimiser's state when it moves it to host memory and back."""

import torch
from deepspeed.runtime.zero.offload_states import offload_adam_states, reload_adam_states

from mmr1_ds.engine.weights.offloading import drop_host_copies


def test_host_copies_are_no_part_of_a_checkpoint():
    weight = torch.nn.Parameter(torch.arange(3.0))
    adam = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    adam.step()
    before = {name: value.clone() for name, value in adam.state[weight].items()}
    offload_adam_states(adam, "cpu")
    reload_adam_states(adam, "cpu")
    assert set(adam.state[weight]) > set(before)
    drop_host_copies(adam)
    found = adam.state_dict()["state"][0]
    assert set(found) == set(before)
    assert all(torch.equal(found[name], before[name]) for name in before)
