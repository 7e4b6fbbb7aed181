"""Who is timed in `bench_group_statistics.py`: our backends, and others that compute the same self-BLEU.

All give self-BLEU over 1-, 2- and 3-grams of each group, equal weights, smoothed as NLTK's method1. Ours give all the
other statistics in the same call. What turns token ids into a library's own input is not timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import mmr1_kernels
import numpy as np
from mmr1_kernels import cpu

MAX_ORDER = 3
WEIGHTS = (1 / 3, 1 / 3, 1 / 3)


@dataclass(frozen=True)
class Groups:
    """G groups of N responses, packed."""

    token_ids: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (G N + 1,) int64
    group_size: int  # N

    @property
    def num_groups(self) -> int:
        return (len(self.offsets) - 1) // self.group_size

    def first(self, num_groups: int) -> Groups:
        offsets = self.offsets[: num_groups * self.group_size + 1]
        return Groups(self.token_ids[: offsets[-1]], offsets, self.group_size)

    def as_lists(self) -> list[list[list[int]]]:
        """Token ids of each response of each group."""
        responses = [self.token_ids[start:end].tolist() for start, end in pairwise(self.offsets)]
        return [responses[at : at + self.group_size] for at in range(0, len(responses), self.group_size)]


@dataclass(frozen=True)
class Contender:
    """Something that computes self-BLEU."""

    name: str
    description: str
    self_bleu: Callable[[Any], np.ndarray]  # prepared groups -> (G,) float64; this is timed
    prepare: Callable[[Groups], Any] = lambda groups: groups
    is_quadratic: bool = False  # in the number of responses
    tolerance: float = 1e-9  # of self-BLEU, against the reference
    takes_all_groups: bool = False  # fast enough for the whole batch; others get as many groups as the time allows


def contenders(num_threads: int) -> tuple[list[Contender], dict[str, str]]:
    """Everyone who can run here, ours first, and why the others cannot. `num_threads`: of all cores."""
    found, absent = [], {}
    for name in dict.fromkeys([cpu_name(1), cpu_name(num_threads), *_MAKERS]):
        try:
            found.append(contender(name, num_threads))
        except (ImportError, RuntimeError) as error:
            absent[name] = str(error)
    return found, absent


def contender(name: str, num_threads: int) -> Contender:
    """One of them. Raises: ImportError, RuntimeError where it cannot run."""
    if name in _MAKERS:
        return _MAKERS[name](name, num_threads)
    if not cpu.is_available():
        raise RuntimeError("the extension is not built")
    threads = int(name.removeprefix("cpu_"))
    description = f"ours, C++, {threads} thread{'s' if threads > 1 else ''}"
    return Contender(name, description, partial(_ours_cpu, num_threads=threads), takes_all_groups=True)


def cpu_name(num_threads: int) -> str:
    return f"cpu_{num_threads}"


# --- ours --------------------------------------------------------------------------------------------------------


def _ours(groups: Groups, backend: str) -> np.ndarray:
    outcomes = np.zeros(len(groups.offsets) - 1, dtype=np.float32)
    found = mmr1_kernels.group_statistics(
        groups.token_ids, groups.offsets, outcomes, outcomes, groups.group_size, MAX_ORDER, backend=backend
    )
    return found.self_bleu


def _ours_cpu(groups: Groups, num_threads: int) -> np.ndarray:
    with _threads(num_threads):
        return _ours(groups, "cpu")


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """The public function takes its threads from OMP_NUM_THREADS, which is read once a process."""
    genuine = cpu.count_ngrams
    cpu.count_ngrams = partial(genuine, num_threads=num_threads)
    try:
        yield
    finally:
        cpu.count_ngrams = genuine


def _reference(name: str, num_threads: int) -> Contender:
    return Contender(name, "ours, numpy", partial(_ours, backend="reference"))


def _triton(name: str, num_threads: int) -> Contender:
    torch = _torch_with_gpu()
    from mmr1_kernels import gpu  # noqa: F401  asked for now: without it the backend is absent

    def prepare(groups: Groups) -> tuple[Any, Any, Any, int]:
        token_ids, offsets = torch.from_numpy(groups.token_ids).cuda(), torch.from_numpy(groups.offsets).cuda()
        return token_ids, offsets, torch.zeros(len(offsets) - 1, device="cuda"), groups.group_size

    def self_bleu(prepared: tuple[Any, Any, Any, int]) -> np.ndarray:
        token_ids, offsets, zeros, group_size = prepared
        found = mmr1_kernels.group_statistics(token_ids, offsets, zeros, zeros, group_size, MAX_ORDER, backend="triton")
        return found.self_bleu.cpu().numpy()  # waits for the GPU

    return Contender(name, "ours, Triton", self_bleu, prepare, tolerance=1e-5, takes_all_groups=True)


# --- torch -------------------------------------------------------------------------------------------------------


def _torch_sort(name: str, num_threads: int) -> Contender:
    import torch

    torch.set_num_threads(num_threads)
    return Contender(
        name, f"torch.unique (sort) by order, {num_threads} threads", _sorted_self_bleu, partial(_tensors, device="cpu")
    )


def _torch_sort_on_gpu(name: str, num_threads: int) -> Contender:
    _torch_with_gpu()
    description = "torch.unique (sort) by order, GPU"
    return Contender(name, description, _sorted_self_bleu, partial(_tensors, device="cuda"), takes_all_groups=True)


def _torch_with_gpu() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no GPU")
    return torch


def _tensors(groups: Groups, device: str) -> tuple[Any, Any, int]:
    import torch

    token_ids = torch.from_numpy(groups.token_ids).to(device, torch.int64)
    return token_ids, torch.from_numpy(groups.offsets).to(device), groups.group_size


def _sorted_self_bleu(prepared: tuple[Any, Any, int]) -> np.ndarray:
    """As one would write it in torch: everything batched, each order by two sorts. Dense n-gram ids, so it is exact."""
    import torch

    token_ids, offsets, group_size = prepared
    lengths_B = offsets.diff()
    num_responses = len(lengths_B)
    response_of = torch.repeat_interleave(torch.arange(num_responses, device=offsets.device), lengths_B)
    last = offsets[1:][response_of]
    starts = torch.arange(len(token_ids), device=offsets.device)
    ngrams = response_of // group_size  # the empty n-gram is named by its group
    log_sum_B = torch.zeros(num_responses, dtype=torch.float64, device=offsets.device)
    has_match_B = None
    for order in range(1, MAX_ORDER + 1):
        fits = starts + order <= last[starts]
        starts, ngrams = starts[fits], ngrams[fits]
        ngrams = torch.unique((ngrams << 32) | token_ids[starts + order - 1], return_inverse=True)[1]
        cells, counts = torch.unique(ngrams * num_responses + response_of[starts], return_counts=True)
        ngram_of, response = cells // num_responses, cells % num_responses
        zeros = counts.new_zeros(len(token_ids))
        largest = zeros.scatter_reduce(0, ngram_of, counts, "amax")[ngram_of]
        is_largest = counts == largest
        num_largest = zeros.scatter_add(0, ngram_of, is_largest.long())[ngram_of]
        second = zeros.scatter_reduce(0, ngram_of, counts.where(~is_largest, 0), "amax")[ngram_of]
        best_of_others = torch.where(is_largest & (num_largest == 1), second, largest)
        matches_B = torch.zeros_like(lengths_B).scatter_add(0, response, torch.minimum(counts, best_of_others))
        has_match_B = matches_B > 0 if has_match_B is None else has_match_B
        numerators_B = matches_B.double().masked_fill(matches_B == 0, 0.1)
        log_sum_B += (numerators_B / (lengths_B - order + 1).clamp(min=1)).log()
    lengths_GN = lengths_B.view(-1, group_size)
    distance_GNN = (lengths_GN[:, :, None] - lengths_GN[:, None, :]).abs()
    distance_GNN.diagonal(dim1=1, dim2=2).fill_(2**30)  # itself: further than any other, and no overflow below
    # The closest other length, the shorter of two: both in one number, distance first.
    closest_B = ((distance_GNN << 32) + lengths_GN[:, None, :]).amin(dim=2).view(-1) % 2**32
    brevity_B = (1 - closest_B.double() / lengths_B.clamp(min=1)).clamp(max=0).exp()
    bleu_B = (brevity_B * (log_sum_B / MAX_ORDER).exp()).where(has_match_B, 0.0)
    return bleu_B.view(-1, group_size).mean(dim=1).cpu().numpy()


# --- other libraries ---------------------------------------------------------------------------------------------


def _nltk(name: str, num_threads: int) -> Contender:
    import nltk
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1

    def self_bleu(groups: list[list[list[int]]]) -> np.ndarray:
        """As upstream MMR1 calls it: one response against the list of all others, then the mean."""
        scores = []
        for responses in groups:
            bleus = []
            for index, response in enumerate(responses):
                others = responses[:index] + responses[index + 1 :]
                bleus.append(sentence_bleu(others, response, weights=WEIGHTS, smoothing_function=smoothing))
            scores.append(sum(bleus) / len(bleus))
        return np.array(scores, dtype=np.float64)

    description = f"NLTK {nltk.__version__} sentence_bleu, as upstream calls it"
    return Contender(name, description, self_bleu, Groups.as_lists, is_quadratic=True)


def _sacrebleu(name: str, num_threads: int) -> Contender:
    """Its `floor` smoothing of 0.1 is NLTK's method1, except for responses of fewer than 3 tokens."""
    import sacrebleu

    # The function sentence_bleu is this method, but has no argument for the orders.
    metric = sacrebleu.BLEU(
        tokenize="none", smooth_method="floor", smooth_value=0.1, max_ngram_order=MAX_ORDER, effective_order=True
    )

    def prepare(groups: Groups) -> list[list[str]]:
        return [[" ".join(map(str, response)) for response in responses] for responses in groups.as_lists()]

    def self_bleu(groups: list[list[str]]) -> np.ndarray:
        scores = []
        for texts in groups:
            bleus = [metric.sentence_score(text, texts[:at] + texts[at + 1 :]).score for at, text in enumerate(texts)]
            scores.append(sum(bleus) / len(bleus) / 100)
        return np.array(scores)

    description = f"sacrebleu {sacrebleu.__version__} BLEU.sentence_score, tokenize=none, floor 0.1, 3 orders"
    return Contender(name, description, self_bleu, prepare, is_quadratic=True)


def _fast_bleu(name: str, num_threads: int) -> Contender:
    from fast_bleu import SelfBLEU

    def prepare(groups: Groups) -> list[list[list[str]]]:
        return [[list(map(str, response)) for response in responses] for responses in groups.as_lists()]

    def self_bleu(groups: list[list[list[str]]]) -> np.ndarray:
        return np.array([np.mean(SelfBLEU(responses, {3: WEIGHTS}).get_score()[3]) for responses in groups])

    # It keeps the weights in float32.
    return Contender(name, "fast-bleu SelfBLEU, its own threads", self_bleu, prepare, tolerance=1e-6)


_MAKERS: dict[str, Callable[[str, int], Contender]] = {
    "reference": _reference,
    "triton": _triton,
    "torch": _torch_sort,
    "torch_gpu": _torch_sort_on_gpu,
    "nltk": _nltk,
    "sacrebleu": _sacrebleu,
    "fast_bleu": _fast_bleu,
}
