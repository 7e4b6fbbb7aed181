"""A try of the user's reward: started in a process of its own, on one response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmr1_ds.config import DataConfig, RewardConfig
from mmr1_ds.data.paths import at_path, column_of
from mmr1_ds.data.reward_columns import RewardColumns
from mmr1_ds.data.sources import list_names, open_sources, split_name
from mmr1_ds.errors import UserError
from mmr1_ds.rewards.loading import BUILT_IN, each_function
from mmr1_ds.rewards.pool import RewardItem, RewardPool, RewardResult


def try_reward(reward: RewardConfig, data: DataConfig) -> RewardResult | None:
    """Start a reward file as training would, and score a response that gives the answer of the data's first row.

    Returns: what the response got; None for built-in rewards, and where the data's first row is not here.
    Raises: UserError when it does not start, or fails on this response.
    """
    if all(one.reward_function in BUILT_IN for one in each_function(reward)):
        return None
    row, columns, messages = _first_row(data)
    truth = at_path(row, data.answer_key)
    prompt, ids = str(at_path(row, data.prompt_key) or ""), tuple(range(8))  # without a tokenizer: any
    item = RewardItem(right_response(truth), len(ids), str(truth), prompt, 0, columns, ids, ids, messages)
    with RewardPool(replace(reward, num_workers=1), logs_failures=False) as pool:
        if truth is None:  # the data would have to be fetched, or its first row has no answer
            return None
        result = pool.score([item, item])[0]  # two: a reward that compares responses needs another
    if result.failure is not None and result.failure != "unscored":
        names = ", ".join(one.reward_function for one in each_function(reward))
        key = "worker.reward.functions" if reward.functions else "worker.reward.reward_function"
        raise UserError(
            f"{key} {names!r} fails on a response to the first row of data.train_files: "
            f"{result.failure}: {result.reason}"
        )
    return result


def pays_nothing(result: RewardResult) -> bool:
    """Return whether a reward took a right response for a wrong one."""
    return result.failure is None and result.accuracy == 0


def right_response(answer: object) -> str:
    r"""Return a response in the form that the built-in rewards read: reasoning, then an <answer> with a \boxed{}."""
    return f"<think>\n</think>\n<answer>\\boxed{{{answer}}}</answer>"


def _first_row(data: DataConfig) -> tuple[dict[str, Any], Mapping[str, Any], list[dict[str, Any]]]:
    """The first row of a local data set, its reward columns and messages; empty where it would have to be fetched."""
    name = next(iter(list_names(data.train_files)), "")
    if not Path(split_name(name)[0]).exists():
        return {}, {}, []
    rows = open_sources([name], answer_key=data.answer_key)[0].rows
    if not len(rows):
        return {}, {}, []
    found = (column_of(key, rows.column_names) for key in (data.answer_key, data.prompt_key))
    row = dict(rows.select_columns(sorted({name for name in found if name is not None}))[0])
    columns = RewardColumns(name, rows, data)
    return row, columns.read(0), columns.messages(0)
