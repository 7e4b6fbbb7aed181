"""Packed responses: which of the tokens, end to end, belong to which response.

Shape letters: S responses, T tokens of all of them, L the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Cuts T packed tokens into S responses; one may be empty."""

    lengths: Tensor  # (S,) int64
    ids: Tensor  # (T,) int64: the response of each token

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Responses of these lengths, in order."""
        lengths_S = torch.tensor(list(lengths), dtype=torch.int64)
        ids_T = torch.repeat_interleave(torch.arange(len(lengths_S)), lengths_S)
        return cls(lengths_S.to(device), ids_T.to(device))

    def sum(self, values_T: Tensor) -> Tensor:
        """Over the tokens of each response, (S,)."""
        return values_T.new_zeros(len(self.lengths)).index_add(0, self.ids, values_T)

    def mean(self, values_T: Tensor) -> Tensor:
        """Over the tokens of each response, (S,); 0 for an empty one."""
        return self.sum(values_T) / self.lengths.clamp(min=1)

    def spread(self, values_S: Tensor) -> Tensor:
        """Each response's value at all of its tokens, (T,)."""
        return values_S[self.ids]
