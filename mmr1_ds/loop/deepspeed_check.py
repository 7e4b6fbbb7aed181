"""Every engine's DeepSpeed config of a run, read by DeepSpeed before a model is loaded."""

from __future__ import annotations

import importlib.util
import logging

from mmr1_ds.engine.deepspeed_config import check_deepspeed
from mmr1_ds.preflight.deepspeed import DeepspeedConfigs

logger = logging.getLogger(__name__)


def check_engines(configs: DeepspeedConfigs, name: str) -> None:
    """Have DeepSpeed read the configs. name: of the user's own one, from which all come. Raises: UserError."""
    if importlib.util.find_spec("deepspeed") is None:
        logger.warning("%s is not read by DeepSpeed: it is not installed here", name)
        return
    for engine in (configs.actor, configs.reference, configs.critic):
        if engine is not None:
            check_deepspeed(engine, name)
