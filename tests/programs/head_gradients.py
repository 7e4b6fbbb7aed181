"""Two micro-batches through a ZeRO-3 policy; write log-probabilities, entropies and whole gradients.

Usage: head_gradients.py MODEL OUT.json [apart]. The second micro-batch has no response tokens on the last of several
ranks. apart: no two ranks have a token in common.
"""

import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from settings import deepspeed_configs, end, small_config, start_ranks

from mmr1_ds.engine.model.batching import ModelBatch
from mmr1_ds.engine.model.policy import load_policy

model, out, *apart = sys.argv[1:]
FORBIDDEN, TEMPERATURE = (2, 5, 9), 0.7
ranks = start_ranks()
config = small_config(model, 2, 2 * ranks.size, 2)
deepspeed.init_distributed(auto_mpi_discovery=False)  # it adopts the group that is there
settings, for_frozen = deepspeed_configs(config, ranks.size)


def batch(index: int, empty: bool) -> ModelBatch:
    """Two sequences of random tokens; a part of the positions are responses."""
    random = torch.Generator().manual_seed(index)
    first, last = (10 + 25 * ranks.rank, 35 + 25 * ranks.rank) if apart else (10, 60)
    input_ids = torch.randint(first, last, (2, 11), generator=random)
    rows, columns = torch.tensor([[row, column] for row in range(2) for column in range(4 + row, 10)]).unbind(1)
    if empty:
        rows, columns = rows[:0], columns[:0]
    targets = input_ids[rows, columns + 1]
    return ModelBatch(input_ids, torch.ones_like(input_ids), {}, rows, columns, targets, torch.arange(2))


def weighted(logprobs_T: torch.Tensor) -> torch.Tensor:
    return (logprobs_T * torch.linspace(-1, 2, len(logprobs_T))).sum()


policy = load_policy(config.worker.actor, settings, FORBIDDEN, TEMPERATURE, torch.float32, True, ranks)
engine, *_ = deepspeed.initialize(model=policy, config=settings, model_parameters=list(policy.parameters()))
batches = [batch(10 * ranks.rank + k, empty=k == 1 and ranks.rank == ranks.size - 1 > 0) for k in range(2)]
results = []
for k, item in enumerate(batches):
    engine.set_gradient_accumulation_boundary(k == 1)
    logprobs, entropies = engine(item)
    results.append((logprobs.detach(), entropies))
    engine.backward(weighted(logprobs), scale_wrt_gas=False)
gradients = {name: safe_get_full_grad(parameter) for name, parameter in policy.model.named_parameters()}
with torch.no_grad():
    again = [engine(item) for item in batches]
    logits = policy.model(input_ids=batches[0].input_ids).logits  # as generate() calls it
head_is_released = policy.model.get_output_embeddings().weight.numel() == 0
engine.step()
with torch.no_grad():
    moved = engine(batches[0])[0]
del engine

frozen = load_policy(config.worker.actor, for_frozen, FORBIDDEN, TEMPERATURE, torch.float32, False, ranks)
reference, *_ = deepspeed.initialize(model=frozen, config=for_frozen)
with torch.no_grad():
    of_reference = [reference(item)[0] for item in batches]
torch.save(
    {
        "batches": batches, "results": results, "gradients": gradients, "again": again, "logits": logits,
        "head_is_released": head_is_released, "moved": moved, "of_reference": of_reference,
    },
    f"{out}.{ranks.rank}",
)  # fmt: skip
end(ranks)
