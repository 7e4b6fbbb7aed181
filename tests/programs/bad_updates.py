"""Updates that are not finite, between good ones, on real ZeRO-3 ranks; what they left is compared with what was.

Usage: bad_updates.py MODEL FOLDER plain|offloaded. The last rank alone has what is not finite; the checks are here,
where the tensors are. Writes FOLDER/events.json (rank 0).
"""

import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fixtures.tiny_models import make_prompt
from safetensors.torch import load_file
from settings import deepspeed_configs, end, make_actor, make_critic, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine import bad_updates
from mmr1_ds.errors import UserError
from mmr1_ds.records import Trajectory

model, folder, kind = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
PROMPTS, RESPONSES = 4, 2
bad_updates.KEPT = 3
lines: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger("mmr1_ds.engine.bad_updates").addHandler(handler)

ranks = start_ranks()
ranks.step = 7
config = small_config(model, PROMPTS, RESPONSES, micro_batch=1)
config.data.rollout_batch_size = PROMPTS
config.worker.actor.dynamic_batching = False
config.trainer.max_bad_updates = 3
config.algorithm.kl_type, config.algorithm.kl_coef = "adaptive", 0.1
config.worker.actor.optim.lr_scheduler_type, config.worker.actor.optim.lr_warmup_steps = "linear", 3
encoder = PromptEncoder(config.worker.actor.model, config.data)
settings, _ = deepspeed_configs(config, ranks.size)
# Some parameters stay whole on every rank, others are partitioned.
settings["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 200, "sub_group_size": 20_000}
if kind == "offloaded":
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    settings["zero_force_ds_cpu_optimizer"] = False
actor = make_actor(config, settings, ranks, encoder, num_updates=11, bad_batches=folder / "bad")
is_last = ranks.rank == ranks.size - 1


def batch(step: int) -> list[Trajectory]:
    """This rank's share, from the numbers alone."""
    share, found = PROMPTS // ranks.size, []
    for index in range(step * PROMPTS + ranks.rank * share, step * PROMPTS + (ranks.rank + 1) * share):
        for sample in range(RESPONSES):
            random = np.random.default_rng((index, sample))
            length = int(random.integers(2, 9))
            token_ids = random.integers(0, 100, length).astype(np.int32)
            logprobs = random.normal(-3, 0.1, length).astype(np.float32)
            advantages = np.full(length, random.normal(), np.float32)
            found.append(Trajectory(make_prompt(encoder, index, False), token_ids, logprobs, advantages, 0.5))
    return found


def state(engine: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all that an optimiser step changes on this rank: weights, fp32 weights, moments, Adam's counts."""
    optimizer = engine.optimizer
    found = [part for group in optimizer.fp16_partitioned_groups for part in group]
    found += list(optimizer.fp32_partitioned_groups_flat)
    for part in optimizer.optimizer.state.values():
        found += [torch.as_tensor(value) for _, value in sorted(part.items())]
    return [item.detach().clone() for item in found]


def same(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ours) == len(others) and all(map(torch.equal, ours, others))


def spoilt(items: list[Trajectory], change: Callable[[Trajectory], Trajectory]) -> list[Trajectory]:
    """The items, on the last rank with its first one changed."""
    return [change(items[0]), *items[1:]] if is_last else items


def with_nan(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array[:1] * np.float32(math.nan), array[1:]])


def update(step: int, spoil: str = "") -> dict[str, float]:
    """One optimiser step. spoil: what is not finite on the last rank."""
    mine = batch(step)
    pairs = [item.pair for item in mine]
    old = actor.log_probs(pairs)
    mine = [replace(item, old_logprobs=old[i], ref_logprobs=old[i] - np.float32(0.1)) for i, item in enumerate(mine)]
    if spoil in ("nan", "inf"):
        mine = spoilt(mine, lambda item: replace(item, advantages=np.full_like(item.advantages, float(spoil))))
    elif spoil == "old":  # a clamp lets no gradient of it through: the loss alone tells
        mine = spoilt(mine, lambda item: replace(item, old_logprobs=with_nan(item.old_logprobs)))
    elif spoil == "ref":
        mine = spoilt(mine, lambda item: replace(item, ref_logprobs=with_nan(item.ref_logprobs)))
    hooks = []
    if spoil == "gradient" and is_last:  # overflows in one layer's backward, the loss is as ever
        layer = actor.model.model.layers[0].mlp.down_proj
        hooks.append(layer.register_full_backward_hook(lambda *parts: tuple(g * math.inf for g in parts[1])))
    metrics = actor.update(mine)
    for hook in hooks:
        hook.remove()
    return metrics


# What a run that never saw a bad batch comes to.
actor.save(folder / "start")
ranks.barrier("saved")
expected = [state(actor.engine)]
for step in range(3):
    good = update(step)
    assert good["actor/num_bad_updates"] == 0 and math.isfinite(good["actor/grad_norm"])
    expected.append(state(actor.engine))
    assert not same(expected[-1], expected[-2])
coefficient = actor.kl.coefficient
actor.load(folder / "start")
assert same(state(actor.engine), expected[0])

# The same with bad ones in between.
for step, bad in enumerate((["nan"], ["old", "inf"], ["gradient", "ref"])):
    for spoil in bad:
        before, number, version = actor.kl.coefficient, actor.bad_updates.num_bad, actor.num_updates_done
        metrics = update(step, spoil)
        assert metrics == {"actor/num_bad_updates": number + 1}, (spoil, metrics)
        assert same(state(actor.engine), expected[step]), f"{spoil} changed the state"
        assert (actor.kl.coefficient, actor.num_updates_done) == (before, version), spoil
    metrics = update(step)
    assert metrics["actor/num_bad_updates"] == actor.bad_updates.num_bad
    assert metrics["actor/lr"] == metrics["actor/lr"] and math.isfinite(metrics["actor/pg_loss"])
    assert same(state(actor.engine), expected[step + 1]), f"step {step} after {bad} is not that of a clean run"
assert actor.kl.coefficient == coefficient

# Counts go on from a checkpoint, and too many in a row stop every rank.
update(3, "nan")
actor.save(folder / "later")
ranks.barrier("saved")
actor.bad_updates.load_state_dict({})
actor.load(folder / "later")
assert actor.bad_updates.state_dict() == {"num_bad": 6, "num_in_a_row": 1}
update(3, "inf")
told = ""
try:
    update(3, "gradient")
except UserError as error:
    told = str(error)
assert told and ranks.all_gather_objects(told, "compare") == [told] * ranks.size
assert same(state(actor.engine), expected[3])

# What was kept: of each rank the last batches.
kept = sorted((folder / "bad").glob(f"actor_*_rank_{ranks.rank}.json"))
assert [path.name.split("_")[1] for path in kept] == ["6", "7", "8"], kept
assert len(list((folder / "bad").glob("*"))) == 2 * 3 * ranks.size
facts, tensors = json.loads(kept[0].read_text()), load_file(kept[0].with_suffix(".safetensors"))
mine = batch(3)
assert facts["step"] == 7 and facts["rank"] == ranks.rank and facts["micro_batches"] == [[0], [1], [2], [3]]
assert [entry["prompt_id"] for entry in facts["prompts"]] == [item.prompt.prompt_id for item in mine]
assert tensors["token_ids"].tolist() == [token for item in mine for token in item.token_ids]
assert tensors["lengths"].tolist() == [len(item.token_ids) for item in mine]
assert tensors["rewards"].tolist() == [0.5] * len(mine)
assert tensors["losses"].isnan().tolist() == [is_last, False, False, False]
assert tensors["advantages"].isnan().sum() == (len(mine[0].token_ids) if is_last else 0)
assert len(tensors["old_logprobs"]) == len(tensors["ref_logprobs"]) == len(tensors["token_ids"])
ranks.barrier("looked")

if kind == "plain":
    config.worker.critic.optim.lr = 1e-3
    critic = make_critic(config, settings, ranks, encoder, num_updates=11, bad_batches=folder / "bad")
    pairs = [item.pair for item in batch(0)]
    values = critic.values(pairs)
    good_batch = [replace(item, values=values[i], returns=np.ones_like(values[i])) for i, item in enumerate(batch(0))]
    taken = critic.update(good_batch)
    assert taken["critic/num_bad_updates"] == 0 and taken["critic/grad_norm"] > 0
    after_one = state(critic.engine)
    bad_batch = spoilt(good_batch, lambda item: replace(item, returns=with_nan(item.returns)))
    assert critic.update(bad_batch) == {"critic/num_bad_updates": 1}
    assert same(state(critic.engine), after_one) and critic.num_updates_done == 1
    critic.update(good_batch)
    assert not same(state(critic.engine), after_one)
    assert len(list((folder / "bad").glob(f"critic_1_step_7_rank_{ranks.rank}.*"))) == 2
if ranks.rank == 0:
    (folder / "events.json").write_text(json.dumps({"lines": lines, "told": told}))
end(ranks)
