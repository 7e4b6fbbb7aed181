"""Checks of the functions in a user's files: rewards, losses, averages, estimators. The files are read, not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from mmr1_ds.config import RewardConfig, RunConfig, user_files
from mmr1_ds.config.ranges import value_at
from mmr1_ds.config.schema import names_a_file
from mmr1_ds.errors import UserError
from mmr1_ds.rewards.interfaces import NO_ARGUMENT, call_style
from mmr1_ds.rewards.loading import BUILT_IN, each_function, split_reference


def check_reward(reward: RewardConfig) -> None:
    """Check that the reward is built in, or a function of its file that takes the list of responses.

    The file is read, not run: a function that it may define in other ways is left to the reward processes.
    Raises: UserError.
    """
    if reward.functions:
        for one in each_function(reward):
            check_reward(one)
        return
    if reward.reward_function in BUILT_IN:
        return
    key = "worker.reward.reward_function"
    file, function = split_reference(reward.reward_function)
    node = _function_of(key, file, function)
    if node is not None:
        _check_signature(node, reward, f"{key}: {file}:{function}")


def check_functions(config: RunConfig) -> None:
    """Check that a loss, an average and an estimator of the user's own are functions of their files, which are not run.

    Raises: UserError.
    """
    for key in user_files.FUNCTION_KEYS:
        if names_a_file(value := value_at(config, key)):
            _function_of(key, *user_files.split_reference(key, value))


def _function_of(key: str, file: str, function: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the function's node, or None where the file may define it in other ways. Raises: UserError."""
    try:
        tree = ast.parse(Path(file).read_bytes())  # bytes: the file may name its encoding
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file}: cannot be read: {error}") from None
    except SyntaxError as error:
        raise UserError(f"{key}: {file}, line {error.lineno}: not Python: {error.msg}") from None
    names = dict(_top_level_names(tree))
    if function not in names and _binds(tree, function):
        return None
    if function not in names:
        known = ", ".join(name for name, node in names.items() if node is not None) or "none"
        raise UserError(f"{key}: {file} has no function {function!r}; its functions are: {known}")
    return names[function]


def _top_level_names(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | None]]:
    """Yield a module's names: functions with their node; decorated ones, and what else may be callable, with None."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, None if node.decorator_list else node
        elif isinstance(node, ast.ClassDef):
            yield node.name, None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, None) for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from ((target.id, None) for target in node.targets if isinstance(target, ast.Name))


def _binds(tree: ast.Module, name: str) -> bool:
    """Return whether the module may bind the name anywhere: inside if or try, by assignment, by import *."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
        if isinstance(node, ast.alias) and (node.name == "*" or name == (node.asname or node.name)):
            return True
    return False


def _check_signature(node: ast.FunctionDef | ast.AsyncFunctionDef, reward: RewardConfig, where: str) -> None:
    """Check for one argument, or two texts; the others need defaults or stand in reward_function_kwargs."""
    arguments = node.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    given = reward.reward_function_kwargs
    required = [name for name in positional[: len(positional) - len(arguments.defaults)] if name not in given]
    keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    by_keyword = [argument.arg for argument, default in keyword_only if default is None and argument.arg not in given]
    style = call_style(required, by_keyword, reward.reward_type)
    if style.keywords:
        return  # the worker says what does not fit
    missing = required[style.num_arguments :] + by_keyword
    if missing:
        raise UserError(
            f"{where} needs {', '.join(missing)}; a reward takes one list of dictionaries (response, response_length, "
            "ground_truth), further arguments come from worker.reward.reward_function_kwargs"
        )
    if not positional and arguments.vararg is None:
        raise UserError(f"{where} {NO_ARGUMENT}")
