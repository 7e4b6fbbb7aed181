"""Backend `triton` without a GPU: in Triton's interpreter, and compiled for the GPUs that it is written for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mmr1_kernels
import numpy as np
import pytest
import torch
from fixtures.launching import PROGRAMS, environment
from mmr1_kernels import gpu

pytestmark = pytest.mark.slow  # Triton's interpreter takes half a minute

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "diversity.json").read_text())["cases"]
LARGEST_ID = 2**31 - 1
ENOUGH = 1 << 30
NAN = float("nan")


def arguments_of(groups: list[list[list[int]]], random: np.random.Generator, max_order: int = 3) -> dict:
    """Groups of responses as the arguments of group_statistics, with rewards and accuracies of every kind."""
    responses = [response for group in groups for response in group]
    rewards = random.choice([0.0, 1.0, 0.1, -3e7], len(responses), p=[0.4, 0.4, 0.1, 0.1])
    return {
        "token_ids": torch.tensor([token for response in responses for token in response], dtype=torch.int32),
        "offsets": torch.tensor(np.cumsum([0, *map(len, responses)])),
        "rewards": torch.tensor(rewards, dtype=torch.float32),
        "accuracies": torch.tensor(random.choice([0.0, 1.0, 0.25, NAN], len(responses)), dtype=torch.float32),
        "group_size": None,
        "group_offsets": torch.tensor(np.cumsum([0, *map(len, groups)])),
        "max_order": max_order,
    }


def ragged(seed: int, num_groups: int, max_responses: int, max_tokens: int, ids: list[int], max_order: int) -> dict:
    """Groups of 1 .. max_responses responses of 0 .. max_tokens tokens."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, max_responses + 1, num_groups)
    lengths = [random.integers(0, max_tokens + 1, size) for size in sizes]
    groups = [[random.choice(ids, length).tolist() for length in of_group] for of_group in lengths]
    return arguments_of(groups, random, max_order)


def equal_groups(group_size: int, lengths: list[int], num_ids: int, seed: int = 0) -> dict:
    """Groups of one size, tokens of a Zipf distribution, as in text: a few ids are most of it."""
    random = np.random.default_rng(seed)
    responses = [np.minimum(random.zipf(1.3, length), num_ids).tolist() for length in lengths]
    arguments = arguments_of([responses], random)
    del arguments["group_offsets"]
    return arguments | {"group_size": np.int64(group_size)}


LITTLE = ragged(3, num_groups=11, max_responses=5, max_tokens=9, ids=[7, 8, 9], max_order=3)
CASES = {
    "golden to 3-grams": arguments_of([case["responses"] for case in GOLDEN], np.random.default_rng(0)),
    "golden to 4-grams": arguments_of([case["responses"] for case in GOLDEN], np.random.default_rng(0), max_order=4),
    "one order": ragged(1, num_groups=7, max_responses=9, max_tokens=30, ids=list(range(20)), max_order=1),
    "two orders": ragged(2, num_groups=7, max_responses=9, max_tokens=30, ids=list(range(5)), max_order=2),
    "many little groups": LITTLE,
    "largest ids": ragged(4, 5, 7, 40, [0, 1, 2**30, 2**30 + 1, LARGEST_ID - 1, LARGEST_ID], max_order=4),
    "longer n-grams than responses": ragged(5, num_groups=3, max_responses=4, max_tokens=5, ids=[0, 1], max_order=7),
    "64 responses": equal_groups(64, [13] * 63 + [0] + [8] * 64, num_ids=50),
    "long responses": equal_groups(3, [701, 533, 0, 1, 640, 7], num_ids=150_000),
    "repeated tokens": arguments_of([[[5] * 150, [5] * 149 + [6], [5] * 20]], np.random.default_rng(0)),
    "101 short responses": equal_groups(101, [k % 3 for k in range(101)], num_ids=2),
    "one response": arguments_of([[[1, 2, 1, 2]]], np.random.default_rng(0)),
    "one token": arguments_of([[[5]], [[6], [6]]], np.random.default_rng(0)),
    "silent groups": arguments_of([[[], [], []], [[]], [[], [5]], [[], []]], np.random.default_rng(0)),
    "no tokens": arguments_of([[[], []]], np.random.default_rng(0)),
    "no groups": arguments_of([], np.random.default_rng(0)),
    "races": ragged(6, num_groups=3, max_responses=5, max_tokens=50, ids=list(range(9)), max_order=3),
    "strided": {key: v.repeat_interleave(2)[::2] if isinstance(v, torch.Tensor) else v for key, v in LITTLE.items()},
    "chunks": LITTLE,
    "chunks of one size": equal_groups(2, [9, 4, 0, 0, 5, 5, 30, 1], num_ids=9),
}
# The limits, in bytes of tables. The others take the whole batch at once.
CHUNKED = {"chunks": 40 * gpu.TABLE_BYTES * 3, "chunks of one size": 1}
# In blocks wider than those of a GPU, to spare the interpreter.
WIDER = {"golden to 3-grams", "golden to 4-grams", "largest ids", "long responses", "64 responses"}


def tensors(**changed: object) -> dict:
    """Correct arguments for two responses, but for the changed ones."""
    correct = {
        "token_ids": torch.tensor([1, 2, 3], dtype=torch.int32),
        "offsets": torch.tensor([0, 2, 3]),
        "rewards": torch.zeros(2),
        "accuracies": torch.zeros(2),
        "group_size": 2,
    }
    return correct | changed


ERRORS = [
    (tensors(token_ids=torch.tensor([1, 2, 3])), "TypeError: token_ids must be int32, got torch.int64"),
    (tensors(token_ids=torch.tensor([1, -100, 3], dtype=torch.int32)), "token_ids must not be negative, got -100"),
    (tensors(offsets=torch.tensor([0, 2, 3], dtype=torch.int32)), "TypeError: offsets must be int64, got torch.int32"),
    (tensors(offsets=torch.tensor([1, 2, 3])), "ValueError: offsets must begin with 0, got [1]"),
    (tensors(offsets=torch.tensor([], dtype=torch.int64)), "ValueError: offsets must begin with 0, got []"),
    (tensors(offsets=torch.tensor([0, 2])), "offsets must end with len(token_ids) = 3, got 2"),
    (tensors(offsets=torch.tensor([0, 4, 3])), "offsets must not fall, got 4 then 3 at 1"),
    (tensors(offsets=torch.tensor([0, 2**63 - 1, -2, 3]), group_size=1), "got 9223372036854775807 then -2 at 1"),
    (tensors(group_size=3), "number of responses must be a multiple of group_size 3, got 2"),
    (tensors(group_size=2.0), "TypeError: group_size must be an int, got 2.0"),
    (tensors(group_size=None), "TypeError: group_size must be an int, got None"),
    (tensors(group_size=None, group_offsets=torch.tensor([0, 0, 2])), "a group has a response at least, group 0"),
    (tensors(group_offsets=torch.tensor([0, 2])), "group_size must be None beside group_offsets, got 2"),
    (tensors(rewards=torch.zeros(2, dtype=torch.float64)), "TypeError: rewards must be float32, got torch.float64"),
    (tensors(rewards=torch.zeros(1)), "rewards must have one value a response, 2, got 1"),
    (tensors(rewards=torch.zeros(1, 2)), "ValueError: rewards must have one axis, got shape (1, 2)"),
    (tensors(rewards=torch.tensor([0.0, NAN])), "ValueError: rewards must be finite, got nan at 1"),
    (tensors(accuracies=torch.tensor([1.5, 0.0])), "ValueError: accuracies must be in [0, 1], got 1.5 at 0"),
    (tensors(max_order=0), "ValueError: max_order must be at least 1, got 0"),
    (tensors(max_order=65), "ValueError: max_order must be at most 64, got 65"),
    (tensors(group_size=None, group_offsets=torch.tensor([0, 1])), "end with the number of responses = 2, got 1"),
    (tensors(group_size=None, group_offsets=torch.tensor([0, 1, 3])), "end with the number of responses = 2, got 3"),
    (tensors(rewards=torch.zeros(2).bfloat16()), "TypeError: rewards must be float32, got torch.bfloat16"),
    (tensors(rewards=torch.zeros(2).to_sparse()), "TypeError: rewards must be a dense tensor, got torch.sparse_coo"),
]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """What the interpreter gives: of a case by its name, of an error by its text. One process for all of them."""
    folder = tmp_path_factory.mktemp("triton")
    calls = {
        name: {"arguments": plain(arguments), "workspace_bytes": CHUNKED.get(name, ENOUGH)}
        for name, arguments in (*CASES.items(), *((words, wrong) for wrong, words in ERRORS))
    }
    for name, call in calls.items():
        call |= {"wider": name in WIDER, "stale": name == "races"}
    torch.save(list(calls.values()), folder / "calls")
    command = [sys.executable, PROGRAMS / "triton_interpreted.py", folder / "calls", folder / "results"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return dict(zip(calls, torch.load(folder / "results"), strict=True)).__getitem__


def plain(arguments: dict) -> dict:
    """With Python's integers, which torch.load takes without trust."""
    return {name: int(value) if isinstance(value, np.integer) else value for name, value in arguments.items()}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(interpreted, name):
    found, expected = interpreted(name), vars(mmr1_kernels.group_statistics(**CASES[name], backend="reference"))
    assert list(found) == list(expected)
    for field, values in expected.items():
        assert found[field].dtype == torch.float64
        scale = 1e-9 * max(1.0, values.nan_to_num().abs().max().item()) if values.numel() else 0.0
        np.testing.assert_allclose(found[field], values, rtol=0, atol=scale, err_msg=field)


def test_golden_cases_equal_nltk(interpreted):
    to_three, to_four = interpreted("golden to 3-grams"), interpreted("golden to 4-grams")
    for g, case in enumerate(GOLDEN):
        assert to_three["self_bleu"][g] == pytest.approx(case["self_bleu_123"], abs=1e-9), case["name"]
        assert to_four["self_bleu"][g] == pytest.approx(case["self_bleu_1234"], abs=1e-9), case["name"]
        for order in (1, 2, 3):
            found = to_three["self_bleu_by_order"][g, order - 1], to_three["distinct"][g, order - 1]
            expected = case[f"self_bleu_{order}"], case[f"distinct_{order}"]
            assert found == pytest.approx(expected, abs=1e-9), case["name"]


def test_chunks_change_nothing(interpreted):
    assert CHUNKED["chunks"] < gpu.TABLE_BYTES * 3 * len(LITTLE["token_ids"]) / 3  # at least three chunks
    whole, chunked = interpreted("many little groups"), interpreted("chunks")
    for field, values in whole.items():
        np.testing.assert_array_equal(chunked[field], values, err_msg=field)


def test_chunks_fit_the_limit(monkeypatch):
    monkeypatch.setattr(gpu, "WORKSPACE_BYTES", 100 * gpu.TABLE_BYTES * 3)
    group_starts = np.array([0, 60, 60, 100, 101, 401, 402, 402])
    chunks = list(gpu.chunks(group_starts, np.arange(8) * 5, 3))
    assert chunks == [(0, 15), (15, 20), (20, 25), (25, 35)]


@pytest.mark.parametrize(("wrong", "words"), ERRORS, ids=[words for _, words in ERRORS])
def test_wrong_input_is_named(interpreted, wrong, words):
    assert words in interpreted(words)


def test_a_group_too_large_for_32_bits(monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    monkeypatch.setattr(gpu, "MAX_GROUP_TOKENS", 2)
    with pytest.raises(ValueError, match="a group may have 2 tokens with backend triton, got 3"):
        mmr1_kernels.group_statistics(**tensors(), backend="triton")


def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(RuntimeError, match="backend triton needs tensors on a GPU, got cpu"):
        mmr1_kernels.group_statistics(**tensors(), backend="triton")


def test_compiled_kernels_fit_h100_and_b200():
    command = [sys.executable, PROGRAMS / "triton_compiled.py"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    for line in (rows[0].keys(), *(row.values() for row in rows)):
        sys.stdout.write("".join(f"{value!s:>19}" for value in line) + "\n")

    for capability in ("9.0 (H100)", "10.0 (B200)"):  # one variant each: no size or alignment compiles another
        kernels = [row["kernel"] for row in rows if row["capability"] == capability]
        assert kernels == [kernel.__name__ for kernel in gpu.LAUNCHES]
    for row in rows:
        assert (row["local_bytes"], row["spill_instructions"]) == (0, 0), row
        assert row["fences"] == 0, row  # relaxed atomics
        # An SM has 65,536 registers and takes 32 programs: 32 warps fit with 64 registers a thread. The two kernels
        # over responses are small; 16 of their programs on an SM are more than enough.
        over_tokens = row["kernel"] in ("count_kernel", "top_two_kernel", "match_kernel")
        assert row["registers"] <= (64 if over_tokens else 128), row
        # 8 programs of four warps in 64 KiB of the 228 KiB, the rest is cache.
        assert row["shared_bytes"] <= 8192, row
