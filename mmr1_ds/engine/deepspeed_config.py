"""DeepSpeed's own reading of a DeepSpeed config, before it is needed."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from mmr1_ds.errors import UserError, first_line

if TYPE_CHECKING:
    from pydantic import ValidationError

_READ_ELSEWHERE = ("sequence_parallel_size",)  # than in DeepSpeed's config class
# Sections that DeepSpeed reads key by key, so that one which is misspelt is passed over. Others refuse it themselves.
_READ_BY_KEY = (
    "activation_checkpointing", "data_types", "aio", "optimizer", "checkpoint", "flops_profiler", "torch_autocast",
    "timers", "checkpoint.parallel_write",
)  # fmt: skip
_OF_OTHERS = ("autotuning", "data_efficiency", "expert_parallel", "pipeline")  # than an engine of ZeRO-3 alone


def check_deepspeed(resolved: Mapping[str, Any], name: str) -> None:
    """Have the installed DeepSpeed read a complete config. Takes seconds to import.

    Args: name: of the file, for errors.
    Raises: UserError, one line, for what DeepSpeed refuses, and for a key that it does not know.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
    from pydantic import ValidationError

    for section in _OF_OTHERS:
        if section in resolved:
            raise UserError(f"{name}: DeepSpeed's {section} is not used with ZeRO-3 here; remove it")
    content = _Asked(copy.deepcopy(dict(resolved)))
    watched: dict[str, _Asked] = {}
    for section in _READ_BY_KEY:  # outer ones first
        outer, _, key = section.rpartition(".")
        parent = watched.get(outer) if outer else content
        if parent is not None and isinstance(parent.get(key), dict):
            watched[section] = parent[key] = _Asked(parent[key])
    content.pop("train_batch_size", None)  # of all ranks, which are not here
    loggers = [logging.getLogger(each) for each in ("DeepSpeed", "deepspeed")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        read = DeepSpeedConfig(content)
        if read.grad_accum_dtype is not None:
            DtypeEnum(read.grad_accum_dtype)  # as its engine does, once the model is there
    except ValidationError as error:
        raise UserError(f"{name}: DeepSpeed {_refused(error, content)}") from None
    except Exception as error:  # of its own kinds, too, which derive from nothing narrower
        raise UserError(f"{name}: DeepSpeed refuses it: {first_line(error)}") from None
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
    _check_known(content, _READ_ELSEWHERE, name, "")
    for section, asked in watched.items():
        _check_known(asked, ("params",), name, section + ".")
    _check_optimizer(resolved.get("optimizer", {}).get("params", {}), name)


class _Asked(dict[str, Any]):
    """A mapping that knows the keys it was asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def __copy__(self) -> _Asked:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def _check_known(section: _Asked, others: Iterable[str], name: str, prefix: str) -> None:
    known = section.asked | set(others)
    for key in section:
        if key not in known:
            raise UserError(f"{name}: DeepSpeed {_unknown(prefix, key, known)}")


def _unknown(prefix: str, key: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f"knows no key {prefix}{key}; " + (f"did you mean {prefix}{close[0]}?" if close else "remove it")


def _refused(error: ValidationError, content: Mapping[str, Any]) -> str:
    """What DeepSpeed's classes refuse first. They name the key inside the section, and not the section."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    section = next((name for name, part in content.items() if _at(part, path) == (True, first.get("input"))), None)
    *outer, key = path if section is None else [section, *path]
    prefix = "".join(f"{part}." for part in outer)
    if first["type"] == "extra_forbidden":
        return _unknown(prefix, key, _fields(error.title, path[:-1]))
    return f"refuses {prefix}{key}={first.get('input')!r:.60}: {first['msg']}"


def _at(section: object, path: Iterable[str]) -> tuple[bool, object]:
    """Whether a section has a key, and its value."""
    for part in path:
        if not isinstance(section, Mapping) or part not in section:
            return False, None
        section = section[part]
    return True, section


def _fields(title: str, path: Iterable[str]) -> list[str]:
    """The keys of one of DeepSpeed's classes, or of the section at `path` in it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from pydantic import BaseModel

    model: type[BaseModel] | None = next(
        (known for known in DeepSpeedConfigModel.__subclasses__() if known.__name__ == title), None
    )
    for part in path:
        annotation = model.model_fields[part].annotation if model is not None and part in model.model_fields else None
        kinds = (annotation, *get_args(annotation))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return [] if model is None else list(model.model_fields)


def _check_optimizer(params: Mapping[str, Any], name: str) -> None:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    known = {"torch_adam"}
    for optimizer in (DeepSpeedCPUAdam, FusedAdam, torch.optim.AdamW):
        known |= set(inspect.signature(optimizer.__init__).parameters)
    section = _Asked(params)
    section.asked |= known - {"self", "params", "model_params"}
    _check_known(section, (), name, "optimizer.params.")
