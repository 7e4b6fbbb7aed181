"""DeepSpeed's own reading of a DeepSpeed config, before it is needed."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from mmr1_ds.errors import UserError, first_line

# DeepSpeed reads these elsewhere than in its config class.
_READ_ELSEWHERE = ("compression_training", "elasticity", "sequence_parallel_size")
# Sections that DeepSpeed reads key by key, so that one which is misspelt is passed over. Others refuse it themselves.
_READ_BY_KEY = (
    "activation_checkpointing", "data_types", "aio", "optimizer", "checkpoint", "flops_profiler", "torch_autocast",
    "autotuning", "data_efficiency",
)  # fmt: skip


def check_deepspeed(resolved: Mapping[str, Any], name: str) -> None:
    """Have the installed DeepSpeed read a complete config. Takes seconds to import.

    Args: name: of the file, for errors.
    Raises: UserError, one line, for what DeepSpeed refuses, and for a key that it does not know.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
    from pydantic import ValidationError

    content = _Asked(copy.deepcopy(dict(resolved)))
    for section in _READ_BY_KEY:
        if isinstance(content.get(section), dict):
            content[section] = _Asked(content[section])
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
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{name}: DeepSpeed refuses {key}={first.get('input')!r:.60}: {first['msg']}") from None
    except Exception as error:  # of its own kinds, too, which derive from nothing narrower
        raise UserError(f"{name}: DeepSpeed refuses it: {first_line(error)}") from None
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
    _check_known(content, _READ_ELSEWHERE, name, "")
    for section in _READ_BY_KEY:
        if isinstance(content.get(section), _Asked):
            _check_known(content[section], ("params",), name, section + ".")
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
    import difflib

    known = section.asked | set(others)
    for key in section:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {prefix}{close[0]}?" if close else "remove it"
            raise UserError(f"{name}: DeepSpeed knows no key {prefix}{key}; {advice}")


def _check_optimizer(params: Mapping[str, Any], name: str) -> None:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    known = {"torch_adam"}
    for optimizer in (DeepSpeedCPUAdam, FusedAdam, torch.optim.AdamW):
        known |= set(inspect.signature(optimizer.__init__).parameters)
    section = _Asked(params)
    section.asked |= known - {"self", "params", "model_params"}
    _check_known(section, (), name, "optimizer.params.")
