"""Text of responses into token ids: by a model's tokenizer, or into words by one of sacrebleu's tokenisers.

Imports nothing heavy until a model's tokenizer is asked for.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmr1_ds.errors import UserError, remedy
from mmr1_ds.monitoring.logger import quiet_libraries

Tokenize = Callable[[Sequence[str]], list[np.ndarray]]  # texts -> one (T,) int32 array a text, ids not negative

SACREBLEU = "sacrebleu:"
_SACREBLEU_NAMES = ("13a", "intl", "zh", "char")


def open_tokenizer(name: str) -> Tokenize:
    """The tokenizer of a name: `sacrebleu:13a` (intl, zh, char), else a model's folder or hub name.

    Ids of sacrebleu's words mean the same word within one call only. Raises: UserError.
    """
    if name.startswith(SACREBLEU):
        return _sacrebleu_words(name.removeprefix(SACREBLEU))
    if not name.strip() or (name.startswith((".", "/")) and not Path(name).is_dir()):
        what = f"{name!r} is no folder" if name.strip() else f"{name!r} is empty"
        raise UserError(f"--tokenizer: {what}; give a model's folder, a hub name or sacrebleu:13a")
    return _model_tokens(name)


def _sacrebleu_words(name: str) -> Tokenize:
    """Split as sacrebleu's BLEU does, so that counts of n-grams equal its counts."""
    if name not in _SACREBLEU_NAMES:
        known = ", ".join(SACREBLEU + known for known in _SACREBLEU_NAMES)
        raise UserError(f"--tokenizer: unknown {SACREBLEU + name!r}; known: {known}")
    try:
        from sacrebleu.metrics import BLEU
        from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
    except ImportError as error:
        raise UserError(f"--tokenizer {SACREBLEU + name} does not import ({error}); install sacrebleu") from error
    splitter: Any = BLEU(tokenize=name).tokenizer
    caches: list[Any] = [type(splitter).__call__, TokenizerRegexp.__call__]

    def tokenize(texts: Sequence[str]) -> list[np.ndarray]:
        # Not its own __len__ for the next number: such a cycle keeps the words of many calls until it is collected.
        numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)
        split = [splitter(text.rstrip()).split() for text in texts]  # rstrip: as sacrebleu does before it splits
        for cached in caches:
            cached.cache_clear()  # they would keep the last 65,536 texts
        return [np.fromiter(map(numbers.__getitem__, words), np.int32, count=len(words)) for words in split]

    return tokenize


def _model_tokens(name: str) -> Tokenize:
    """Split as a Hugging Face tokenizer does, without code from its repository and without special tokens."""
    quiet_libraries()
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"--tokenizer {name!r}: transformers does not import; {remedy('models')}") from error
    except Exception as error:  # whatever a damaged folder makes it raise: TypeError, KeyError, its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"--tokenizer {name!r} cannot be loaded: {reason}; give a model's folder, a hub name or sacrebleu:13a"
        ) from error

    def tokenize(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = tokenizer(
            # JSON can hold half an emoji, cut off by a token limit; tokenizers take UTF-8, which cannot.
            [text.encode("utf-8", "replace").decode() for text in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it would warn of every text longer than the model's window
        )
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    return tokenize
