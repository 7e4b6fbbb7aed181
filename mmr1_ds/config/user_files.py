"""Functions in files of the user's own, named in a key as path/file.py:function."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from mmr1_ds.config.schema import names_a_file
from mmr1_ds.errors import UserError, first_line

FUNCTION_KEYS = ("worker.actor.loss_type", "worker.actor.loss_avg_mode", "algorithm.adv_estimator")


def split_reference(key: str, reference: str) -> tuple[str, str]:
    """Split `path/file.py:function` into (path, function). No user code runs. Raises: UserError for a missing file."""
    assert names_a_file(reference), reference
    path, _, name = os.path.expanduser(reference).rpartition(":")
    if not os.path.isfile(path):
        raise UserError(f"{key}: no such file {path!r}; name one as path/file.py:function")
    return path, name


@cache
def load_function(key: str, reference: str) -> Callable[..., Any]:
    """Import the file, once for all keys that name it, and return the function. It runs the user's module.

    Raises: UserError when there is no such file or function, or the file fails.
    """
    path, name = split_reference(key, reference)
    try:
        module = _imported(os.path.abspath(path))
    except (Exception, SystemExit) as error:  # a script, which exits at its end, would end the run without a word
        raise UserError(f"{key}: {path} fails: {type(error).__name__}: {first_line(error)}; mend it") from error
    function = module.__dict__.get(name)
    if not callable(function):
        raise UserError(f"{key}: {path} has no function {name!r}; name one that it has")
    return function  # type: ignore[no-any-return]


def import_file(path: str) -> Any:
    """Run a file as a module of a name of its own, and return the module."""
    # The file may import its neighbours, behind all that is installed: a math.py beside it is not the library's.
    sys.path += [os.path.dirname(os.path.abspath(path)), os.getcwd()]
    # A name of its own: a run may have several files.
    name = "user_file" if "user_file" not in sys.modules else f"user_file_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look modules up by name
    spec.loader.exec_module(module)
    return module


@cache
def _imported(path: str) -> Any:
    return import_file(path)
