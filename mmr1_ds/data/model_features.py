"""A small vector of each prompt, from what a model makes of it, that may go with how hard the prompt is.

It is the last layer's hidden state of the prompt's last token. `projected` keeps so much of it as all prompts have room
for together (by a fixed random projection, which keeps distances), `compress_states` turns those of a data set into
features. They are kept in a file for later runs, since they take a forward of the model over the whole data set.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.data.features import NUM_FEATURES, as_features

if TYPE_CHECKING:
    from mmr1_ds.data.dataset import PromptDataset

logger = logging.getLogger(__name__)

_MOST_NUMBERS = 1 << 28  # of all prompts: a gibibyte on rank 0
_MOST_OF_A_PROMPT, _FEWEST_OF_A_PROMPT = 1024, 256  # the components of more take minutes
CACHE_FOLDER = "mmr1_ds_model_features_1"  # inside the cache of `datasets`; counted up when a feature changes
_NAME = "features"  # in the file


def projected(states: np.ndarray, num_prompts: int) -> np.ndarray:
    """Project hidden states, (K, H) float32, to the V numbers each that P prompts have room for, (K, V) float32.

    V is 1,024 up to 262,144 prompts, 256 from a million on. States that are no wider stay as they are.
    """
    width = states.shape[1]
    number = min(max(_MOST_NUMBERS // num_prompts, _FEWEST_OF_A_PROMPT), _MOST_OF_A_PROMPT)
    if width <= number:
        return states
    matrix = np.random.default_rng(width).standard_normal((width, number), dtype=np.float32)
    return states @ matrix / np.float32(np.sqrt(number))


def compress_states(states: np.ndarray) -> np.ndarray:
    """Reduce the projected states of a data set, (P, V) float32, to features, (P, NUM_FEATURES) int8."""
    nothing = np.empty((len(states), 0), dtype=np.float32)
    return as_features(lambda part: (nothing[part], states[part]), len(states))


def kept_file(data: PromptDataset, encoding: str, weights: str, model: Mapping[str, Any]) -> Path:
    """Return where the features of these prompts by this model are kept.

    Args: encoding: the encoder's fingerprint; weights: their digest; model: its configuration.
    """
    import datasets

    parts = (data.fingerprint, data.rows_fingerprint, encoding, weights, sorted(model.items()))
    key = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / CACHE_FOLDER / f"{key}.safetensors"


def read_kept(path: Path, num_prompts: int) -> np.ndarray | None:
    """Return the features that `keep` wrote, (P, NUM_FEATURES) int8; None without a file that holds them."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        features = load_file(path).get(_NAME)
    except (OSError, SafetensorError):
        return None
    is_whole = features is not None and features.shape == (num_prompts, NUM_FEATURES) and features.dtype == np.int8
    return features if is_whole else None


def keep(features: np.ndarray, path: Path) -> None:
    """Write features whole or not at all; a disk that refuses costs later runs their time, not this one its start."""
    from safetensors.numpy import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = os.path.join(scratch, path.name)
            save_file({_NAME: features}, whole)
            os.chmod(whole, path.parent.stat().st_mode & 0o666)
            os.replace(whole, path)
    except OSError as error:
        logger.warning("the features of the prompts cannot be kept (%s): the next run computes them", error)
