import json
import math
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import mmr1_kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmr1_kernels import cpu, reference

GOLDEN = Path(__file__).parents[1] / "golden"
DIVERSITY_CASES = json.loads((GOLDEN / "diversity.json").read_text())["cases"]
ADVANTAGE_CASES = json.loads((GOLDEN / "group_advantages.json").read_text())["cases"]
FEW = settings(max_examples=40)
on_host_backends = pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not cpu.is_available(), reason="is not built here"))],
)


def pack(responses):
    token_ids = np.array([token for response in responses for token in response], dtype=np.int32)
    return token_ids, np.cumsum([0, *map(len, responses)]).astype(np.int64)


def statistics_of(responses, group_size=None, rewards=None, accuracies=None, max_order=3, backend=None):
    zeros = np.zeros(len(responses), dtype=np.float32)
    return mmr1_kernels.group_statistics(
        *pack(responses),
        zeros if rewards is None else np.array(rewards, dtype=np.float32),
        zeros if accuracies is None else np.array(accuracies, dtype=np.float32),
        len(responses) if group_size is None else group_size,
        max_order,
        backend=backend,
    )


def plain_self_bleu(group, max_order=3):
    """BLEU by its definition, one response against all others at a time, with dictionaries."""
    scores = []
    for i, response in enumerate(group):
        others = group[:i] + group[i + 1 :]
        logs = []
        for n in range(1, max_order + 1):
            grams = [Counter(tuple(r[k : k + n]) for k in range(len(r) - n + 1)) for r in [response, *others]]
            hits = sum(min(count, max(other[gram] for other in grams[1:])) for gram, count in grams[0].items())
            if n == 1 and hits == 0:
                logs = [-math.inf]
                break
            logs.append(math.log((hits or 0.1) / max(1, len(response) - n + 1)))
        closest = min((abs(len(other) - len(response)), len(other)) for other in others)[1]
        brevity = 1.0 if len(response) > closest else math.exp(1 - closest / max(1, len(response)))
        scores.append(brevity * math.exp(sum(logs) / len(logs)))
    return sum(scores) / len(scores)


def plain_edit_distance(left, right):
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


@on_host_backends
@pytest.mark.parametrize("case", DIVERSITY_CASES, ids=lambda case: case["name"])
def test_diversity_equals_nltk(case, backend):
    found = statistics_of(case["responses"], backend=backend)
    assert found.self_bleu[0] == pytest.approx(case["self_bleu_123"], abs=1e-9)
    for order in (1, 2, 3):
        assert found.self_bleu_by_order[0, order - 1] == pytest.approx(case[f"self_bleu_{order}"], abs=1e-9)
        assert found.distinct[0, order - 1] == pytest.approx(case[f"distinct_{order}"], abs=1e-9)
    up_to_four = statistics_of(case["responses"], max_order=4, backend=backend).self_bleu[0]
    assert up_to_four == pytest.approx(case["self_bleu_1234"], abs=1e-9)


@on_host_backends
def test_groups_packed_together_do_not_see_each_other(backend):
    cases = [case for case in DIVERSITY_CASES if len(case["responses"]) == 4]
    assert len(cases) > 3
    packed = statistics_of([response for case in cases for response in case["responses"]], 4, backend=backend)
    np.testing.assert_allclose(packed.self_bleu, [case["self_bleu_123"] for case in cases], rtol=0, atol=1e-9)
    np.testing.assert_allclose(packed.distinct[:, 2], [case["distinct_3"] for case in cases], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", DIVERSITY_CASES, ids=lambda case: case["name"])
def test_edit_distance_equals_the_definition(case):
    responses = case["responses"]
    pairs = [(a, b) for i, a in enumerate(responses) for b in responses[i + 1 :]]
    distances = [plain_edit_distance(a, b) for a, b in pairs]
    mean = sum(distances) / max(1, len(pairs))
    assert mean == pytest.approx(case["edit_distance"], abs=1e-9)  # the plain computation is right
    normalised = [d / max(len(a), len(b), 1) for d, (a, b) in zip(distances, pairs, strict=True)]
    found = mmr1_kernels.mean_edit_distance(*pack(responses), len(responses))
    assert found[0] == pytest.approx(sum(normalised) / max(1, len(pairs)), abs=1e-9)


def test_edit_distance_of_two_groups():
    found = mmr1_kernels.mean_edit_distance(*pack([[1, 2], [1, 2], [5, 6], [7, 8]]), 2)
    np.testing.assert_array_equal(found, [0.0, 1.0])


@on_host_backends
@pytest.mark.parametrize("case", ADVANTAGE_CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize(("library", "epsilon"), [("verl", 1e-6), ("trl", 1e-4)])
def test_advantages_equal_verl_and_trl(case, library, epsilon, backend):
    order = np.argsort(case["index"], kind="stable")
    rewards = np.array(case[f"{library}_rewards"])[order]
    expected = np.array([np.nan if a is None else a for a in case[f"{library}_advantages"]])[order]
    found = statistics_of([[1]] * 8, group_size=4, rewards=rewards, backend=backend).advantages
    std = np.repeat(rewards.reshape(-1, 4).std(axis=1, ddof=1), 4)
    found = found * (std + 1e-6) / (std + epsilon)
    tested = ~np.isnan(expected)
    assert tested.sum() >= 7
    np.testing.assert_allclose(found[tested], expected[tested], rtol=0, atol=5e-7)  # rewards are float32 here


def test_reward_statistics():
    found = statistics_of([[1]] * 8, 4, rewards=[1, 0, 0.5, 1, 0.1, 0.1, 0.1, 0.1], accuracies=[1, 0, 0, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found.reward_mean, [0.625, 0.1], atol=1e-7)
    np.testing.assert_allclose(found.reward_variance, [np.var([1, 0, 0.5, 1]), 0.0], rtol=1e-12)
    np.testing.assert_array_equal(found.pass_rate, [0.5, 1.0])
    np.testing.assert_array_equal(found.outcome_variance, [0.25, 0.0])


@pytest.mark.parametrize("group_size", [1, 3, 7, 401])
@pytest.mark.parametrize("reward", [0.1, 0.9, -3.3e7, 1e-30])
def test_constant_rewards_give_exactly_zero(group_size, reward):
    found = statistics_of([[1, 2]] * group_size, rewards=[reward] * group_size)
    assert found.reward_variance[0] == 0.0
    assert not found.advantages.any()


def test_the_smallest_difference_of_rewards_is_a_variance():
    above = np.nextafter(np.float32(0.9), np.float32(1))
    found = statistics_of([[1]] * 7, rewards=[0.9] * 6 + [above])
    assert found.reward_variance[0] > 0.0


def test_unknown_accuracies_are_left_out():
    nan = float("nan")
    found = statistics_of([[1]] * 6, 3, accuracies=[1, nan, 0, nan, nan, nan])
    assert found.pass_rate[0] == 0.5
    assert np.isnan(found.pass_rate[1]) and np.isnan(found.outcome_variance[1])


def test_edge_cases_of_length():
    assert statistics_of([[], [], []]).self_bleu[0] == 1.0
    assert statistics_of([[], [], []]).distinct.tolist() == [[0.0, 0.0, 0.0]]
    assert statistics_of([[]]).self_bleu[0] == 0.0
    assert statistics_of([[5]]).distinct.tolist() == [[1.0, 0.0, 0.0]]
    assert statistics_of([[5], [5]]).self_bleu_by_order[0].tolist() == [1.0, 0.1, 0.1]
    assert mmr1_kernels.mean_edit_distance(*pack([[], []]), 2)[0] == 0.0
    assert mmr1_kernels.mean_edit_distance(*pack([[], [1, 2]]), 2)[0] == 1.0
    assert mmr1_kernels.mean_edit_distance(*pack([[1]]), 1)[0] == 0.0


def test_no_groups_at_all():
    found = statistics_of([], group_size=4)
    assert found.self_bleu.shape == (0,)
    assert found.self_bleu_by_order.shape == found.distinct.shape == (0, 3)
    assert found.advantages.shape == (0,)
    assert mmr1_kernels.mean_edit_distance(*pack([]), 4).shape == (0,)


def groups(min_tokens=0):
    tokens = st.integers(0, 4) | st.sampled_from([151_935, 2**31 - 1])
    return st.lists(st.lists(tokens, min_size=min_tokens, max_size=12), min_size=2, max_size=6)


@FEW
@given(groups())
def test_self_bleu_equals_the_definition(group):
    if any(group):
        assert statistics_of(group).self_bleu[0] == pytest.approx(plain_self_bleu(group), abs=1e-12)


@FEW
@given(groups(), st.data())
def test_order_of_responses_changes_nothing(group, data):
    shuffled = data.draw(st.permutations(group))
    found, again = statistics_of(group), statistics_of(shuffled)
    assert again.self_bleu[0] == pytest.approx(found.self_bleu[0], abs=1e-12)
    np.testing.assert_array_equal(again.distinct, found.distinct)


@FEW
@given(groups(), st.integers(0, 2**31 - 1))
def test_names_of_tokens_change_nothing(group, key):
    renamed = [[token ^ key for token in response] for response in group]  # one to one
    found, again = statistics_of(group), statistics_of(renamed)
    assert again.self_bleu[0] == pytest.approx(found.self_bleu[0], abs=1e-12)
    np.testing.assert_array_equal(again.distinct, found.distinct)


@FEW
@given(st.lists(st.integers(0, 9), min_size=3, max_size=30), st.integers(2, 7))
def test_identical_responses(response, group_size):
    found = statistics_of([response] * group_size)
    assert found.self_bleu[0] == pytest.approx(1.0, abs=1e-12)
    assert mmr1_kernels.mean_edit_distance(*pack([response] * group_size), group_size)[0] == 0.0
    assert found.distinct[0, 0] == pytest.approx(len(set(response)) / (group_size * len(response)))


@FEW
@given(st.lists(groups(), min_size=1, max_size=4), st.data())
def test_order_of_groups_only_orders_the_result(many, data):
    many = [(group * 3)[:3] for group in many]
    order = data.draw(st.permutations(range(len(many))))
    rewards = np.arange(3 * len(many)).reshape(-1, 3) ** 2.0
    in_order, reordered = (list(chain.from_iterable(many[g] for g in groups)) for groups in (range(len(many)), order))
    found = statistics_of(in_order, 3, rewards=rewards.reshape(-1))
    again = statistics_of(reordered, 3, rewards=rewards[order].reshape(-1))
    np.testing.assert_array_equal(again.self_bleu, found.self_bleu[order])
    np.testing.assert_array_equal(again.advantages.reshape(-1, 3), found.advantages.reshape(-1, 3)[order])


def test_scores_stay_in_range():
    random = np.random.default_rng(5)
    responses = [random.integers(0, 30, random.integers(0, 60)).tolist() for _ in range(7 * 11)]
    found = statistics_of(responses, 7)
    for values in (found.self_bleu, found.self_bleu_by_order, found.distinct):
        assert ((values >= 0) & (values <= 1)).all()
    distances = mmr1_kernels.mean_edit_distance(*pack(responses), 7)
    assert ((distances > 0) & (distances <= 1)).all()


TOKENS, OFFSETS = pack([[1, 2], [3]])
VALUES = np.zeros(2, dtype=np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((TOKENS.astype(np.int64), OFFSETS, VALUES, VALUES, 2), TypeError, "token_ids must be int32, got int64"),
        ((TOKENS.tolist(), OFFSETS, VALUES, VALUES, 2), TypeError, "a numpy array or a torch tensor, got list"),
        ((TOKENS - 2, OFFSETS, VALUES, VALUES, 2), ValueError, "token_ids must not be negative, got -1"),
        ((TOKENS, OFFSETS.astype(np.int32), VALUES, VALUES, 2), TypeError, "offsets must be int64, got int32"),
        ((TOKENS, OFFSETS + 1, VALUES, VALUES, 2), ValueError, r"offsets must begin with 0, got \[1\]"),
        ((TOKENS, OFFSETS[:2], VALUES, VALUES, 1), ValueError, r"must end with len\(token_ids\) = 3, got 2"),
        ((TOKENS, np.array([0, 4, 3]), VALUES, VALUES, 2), ValueError, "offsets must not fall, got 4 then 3 at 1"),
        (
            (TOKENS, np.array([0, 2**63 - 1, -2, 3]), VALUES, VALUES, 1),  # falls by more than 64 bits can say
            ValueError,
            "offsets must not fall, got 9223372036854775807 then -2 at 1",
        ),
        ((TOKENS, OFFSETS, VALUES, VALUES, 3), ValueError, "multiple of group_size 3, got 2"),
        ((TOKENS, OFFSETS, VALUES, VALUES, 0), ValueError, "group_size must be at least 1, got 0"),
        ((TOKENS, OFFSETS, VALUES, VALUES, 2.0), TypeError, "group_size must be an int, got 2.0"),
        ((TOKENS, OFFSETS, VALUES[:1], VALUES, 2), ValueError, "rewards must have one value a response, 2, got 1"),
        ((TOKENS, OFFSETS, VALUES + np.inf, VALUES, 2), ValueError, "rewards must be finite, got inf at 0"),
        ((TOKENS, OFFSETS, VALUES[None], VALUES, 2), ValueError, r"rewards must have one axis, got shape \(1, 2\)"),
        ((TOKENS, OFFSETS, VALUES, VALUES + 1.5, 2), ValueError, r"accuracies must be in \[0, 1\], got 1.5 at 0"),
        ((TOKENS, OFFSETS, VALUES, VALUES, 2, 0), ValueError, "max_order must be at least 1, got 0"),
        ((TOKENS, OFFSETS, VALUES, VALUES, 2, 65), ValueError, "max_order must be at most 64, got 65"),
        ((TOKENS, OFFSETS, VALUES, VALUES, 2, 1.0), TypeError, "max_order must be an int, got 1.0"),
    ],
)
def test_wrong_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        mmr1_kernels.group_statistics(*arguments)


@pytest.mark.parametrize(
    ("group_offsets", "words"),
    [
        ([0, 1], "group_offsets must end with the number of responses = 2, got 1"),
        ([0, 1, 3], "group_offsets must end with the number of responses = 2, got 3"),
        ([1, 2], r"group_offsets must begin with 0, got \[1\]"),
        ([0, 0, 2], "a group has a response at least, group 0 has none"),
        ([0, 2**63 - 1, -2, 2], "group_offsets must not fall, got 9223372036854775807 then -2 at 1"),
    ],
)
def test_wrong_groups_are_named(group_offsets, words):
    with pytest.raises(ValueError, match=words):
        mmr1_kernels.group_statistics(TOKENS, OFFSETS, VALUES, VALUES, None, group_offsets=np.array(group_offsets))
    with pytest.raises(ValueError, match=words):
        mmr1_kernels.mean_edit_distance(TOKENS, OFFSETS, None, group_offsets=np.array(group_offsets))


def tensors(**changed):
    """Correct arguments for two responses, as tensors, but for the changed ones."""
    rewards = torch.tensor([1.0, 0.0])
    correct = {"token_ids": torch.from_numpy(TOKENS), "offsets": torch.from_numpy(OFFSETS), "rewards": rewards}
    return correct | {"accuracies": rewards, "group_size": 2} | changed


def test_tensors_give_what_arrays_give():
    found = mmr1_kernels.group_statistics(**tensors(rewards=torch.tensor([1.0, 0.0], requires_grad=True)))
    expected = statistics_of([[1, 2], [3]], rewards=[1, 0], accuracies=[1, 0])
    for field, values in vars(expected).items():
        tensor = getattr(found, field)
        assert tensor.dtype == torch.float64 and tensor.device.type == "cpu" and not tensor.requires_grad
        np.testing.assert_array_equal(tensor, values, err_msg=field)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rewards": torch.zeros(2, dtype=torch.bfloat16)}, "rewards must be float32, got torch.bfloat16"),
        ({"token_ids": torch.tensor([1, 2, 3])}, "token_ids must be int32, got torch.int64"),
        ({"offsets": torch.tensor([0, 2, 3], dtype=torch.int32)}, "offsets must be int64, got torch.int32"),
        ({"rewards": torch.zeros(2).to_sparse()}, "rewards must be a dense tensor, got torch.sparse_coo"),
        ({"rewards": VALUES}, "rewards must be what token_ids is, a tensor on cpu, got a numpy array"),
        ({"rewards": [0.0, 0.0]}, "rewards must be a numpy array or a torch tensor, got list"),
        ({"token_ids": TOKENS}, "offsets must be what token_ids is, a numpy array, got a tensor on cpu"),
    ],
)
def test_wrong_tensors_are_named(changed, words):
    with pytest.raises(TypeError, match=words):
        mmr1_kernels.group_statistics(**tensors(**changed))


def test_tensors_of_two_axes_are_named():
    with pytest.raises(ValueError, match=r"rewards must have one axis, got shape \(1, 2\)"):
        mmr1_kernels.group_statistics(**tensors(rewards=torch.zeros(1, 2)))


@pytest.mark.parametrize(("at", "name"), [(0, "token_ids"), (1, "offsets")])
def test_edit_distance_takes_arrays_alone(at, name):
    arrays = [TOKENS, OFFSETS]
    arrays[at] = torch.from_numpy(arrays[at])
    with pytest.raises(TypeError, match=f"{name} must be a numpy array, the only kind .*, got Tensor"):
        mmr1_kernels.mean_edit_distance(*arrays, 2)


def test_sizes_of_few_bits_are_enough():
    """A thousand responses in groups of np.uint8(4): arithmetic on the size itself would overflow."""
    responses = [[number % 7, number % 3] for number in range(1000)]
    found = statistics_of(responses, np.uint8(4), max_order=np.uint8(2))
    expected = statistics_of(responses, 4, max_order=2)
    np.testing.assert_array_equal(found.self_bleu, expected.self_bleu)
    assert found.self_bleu.shape == (250,)


def test_the_default_is_the_cpu_backend(monkeypatch):
    counted = []

    def count_ngrams(*arguments):
        counted.append(arguments)
        return reference.count_ngrams(*arguments)

    monkeypatch.setattr(cpu, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "count_ngrams", count_ngrams)
    statistics_of([[1, 2], [3]])
    mmr1_kernels.group_statistics(**tensors())
    assert len(counted) == 2
    statistics_of([[1, 2], [3]], backend="reference")
    assert len(counted) == 2


def test_a_missing_triton_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # what import takes for not installed
    for name in ("gpu", "gpu_kernels"):
        monkeypatch.delitem(sys.modules, f"mmr1_kernels.{name}", raising=False)
        monkeypatch.delattr(mmr1_kernels, name, raising=False)
    with pytest.raises(RuntimeError, match=r"backend triton does not import .*; install triton, or ask for") as raised:
        mmr1_kernels.group_statistics(**tensors(), backend="triton")
    assert "\n" not in str(raised.value)
