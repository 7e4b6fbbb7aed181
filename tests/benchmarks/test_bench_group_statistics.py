"""The benchmark of the scoring kernel: its contenders compute the same thing, its figures are what they say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.launching import ROOT, environment

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "diversity.json").read_text())["cases"]
BENCHMARKS = ROOT / "benchmarks" / "kernel"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The benchmarks are programs beside one another, not a package; they set torch's threads for the process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def some_groups(*responses):
    from bench_group_statistics_rivals import Groups

    offsets = np.cumsum([0, *map(len, responses)]).astype(np.int64)
    return Groups(np.concatenate(responses).astype(np.int32), offsets, len(responses))


@pytest.mark.parametrize("threads", [1, 3])
def test_everyone_agrees_with_recorded_nltk(threads):
    from bench_group_statistics_rivals import contenders

    cases = [
        case
        for case in GOLDEN
        if len(case["responses"]) > 1 and all(3 <= len(response) for response in case["responses"])
    ]
    assert len(cases) > 5
    everyone, absent = contenders(threads)
    assert {"reference", "torch", "nltk", "sacrebleu"} <= {contender.name for contender in everyone}
    assert all(absent.values())
    for contender in everyone:
        for case in cases:
            found = contender.self_bleu(contender.prepare(some_groups(*case["responses"])))
            assert found == pytest.approx([case["self_bleu_123"]], abs=contender.tolerance), contender.name


def test_tokens_are_zipf_distributed_and_seeded():
    from bench_group_statistics import VOCABULARY, zipf_groups

    groups = zipf_groups(8, 2048, 40)
    lengths = np.diff(groups.offsets)
    assert lengths.mean() == 2048 and lengths.min() >= 2048 * 3 / 4 and len(set(lengths)) > 100
    assert groups.token_ids.min() >= 0 and groups.token_ids.max() < VOCABULARY
    counts = np.sort(np.bincount(groups.token_ids))[::-1] / len(groups.token_ids)
    harmonic = (1 / np.arange(1, VOCABULARY + 1)).sum()
    assert counts[:4] == pytest.approx([1 / harmonic / rank for rank in (1, 2, 3, 4)], rel=0.03)
    np.testing.assert_array_equal(groups.token_ids, zipf_groups(8, 2048, 40).token_ids)
    assert groups.as_lists()[0] != zipf_groups(8, 2048, 40, seed=1).as_lists()[0]


def size(responses, tokens, **seconds):
    results = {
        name: {
            "seconds_per_group": value,
            "tokens_per_second": responses * tokens / value,
            "slower_than_ours": value / seconds["cpu_2"],
            "rounds": [10 * value, value, 0.1 * value],
        }
        for name, value in seconds.items()
    }
    return {"responses": responses, "tokens": tokens, "groups": 1, "results": results}


def test_exponents_of_a_power_law():
    from bench_group_statistics_report import exponents

    sizes = [size(n, t, cpu_2=3e-9 * n**0.75 * t**1.25) for n in (4, 8, 64) for t in (256, 1024)]
    fitted = exponents(sizes, "cpu_2")
    assert fitted == {"responses": pytest.approx(0.75), "tokens": pytest.approx(1.25)}
    assert exponents(sizes[:2], "cpu_2") is None and exponents(sizes, "nltk") is None


def test_verdicts():
    from bench_group_statistics_report import verdicts

    results = {
        "environment": {"threads": 2},
        "ours": "cpu_2",
        "sizes": [
            size(8, 2048, cpu_1=8 * 2048 / 21e6, cpu_2=1e-3, nltk=1.1),
            size(32, 2048, cpu_1=1e-2, cpu_2=1e-3, nltk=2.9),
        ],
        "exponents": {"cpu_1": {"responses": 1.11, "tokens": 1.0}},
        "memory": [{"contender": "cpu_2", "bytes_per_token": 39.0}, {"contender": "torch", "bytes_per_token": 99.0}],
    }
    rival = "against one NLTK process, as upstream calls it (a Ray task a prompt)"
    core_for_core = "core for core: one thread against one NLTK process"
    told = {verdict["bar"]: (verdict["value"], verdict["holds"]) for verdict in verdicts(results)}
    assert told == {
        f"times faster at N=8, T=2,048, two threads {rival}": (pytest.approx(1100), True),
        f"times faster at N=8, T=2,048, {core_for_core}": (pytest.approx(1.1 / (8 * 2048 / 21e6)), None),
        f"times faster at N=32, T=2,048, two threads {rival}": (pytest.approx(2900), False),
        f"times faster at N=32, T=2,048, {core_for_core}": (pytest.approx(290), None),
        "tokens/s of one core at N=8, T=2,048": (pytest.approx(21e6), True),
        "exponent of N, cpu_1": (1.11, False),
        "exponent of N, cpu_2": (None, None),
        "exponent of T, cpu_1": (1.0, True),
        "exponent of T, cpu_2": (None, None),
        "extra bytes a token, most": (39.0, True),
    }


def test_a_contender_that_is_wrong_is_not_timed():
    from bench_group_statistics import SizeRun, zipf_groups
    from bench_group_statistics_rivals import Contender, contender

    groups = zipf_groups(4, 16, 2)
    reference = contender("reference", 1)
    oracle = reference.self_bleu(groups)
    wrong = Contender("wrong", "", lambda groups: reference.self_bleu(groups) + 2e-9)
    SizeRun([reference], "reference", groups, oracle).run(1, 0.0)
    with pytest.raises(SystemExit, match="wrong differs from the reference by 2e-09"):
        SizeRun([reference, wrong], "reference", groups, oracle).run(1, 0.0)


def test_a_ratio_is_the_median_over_rounds(monkeypatch):
    """Ours and the rival drift together by a factor of ten; in one round the rival is interrupted."""
    import bench_group_statistics
    from bench_group_statistics_rivals import contender

    groups = bench_group_statistics.zipf_groups(4, 16, 1)
    ours, rival = contender("reference", 1), contender("nltk", 1)
    clock = iter([1.0, 7.0, 10.0, 70.0, 1.0, 900.0])
    monkeypatch.setattr(bench_group_statistics, "seconds_of", lambda call, shortest: next(clock))
    run = bench_group_statistics.SizeRun([ours, rival], "reference", groups, ours.self_bleu(groups))
    found = run.run(3, 0.0)
    assert found["nltk"]["slower_than_ours"] == 7.0 and found["nltk"]["seconds_per_group"] == 70.0
    assert found["reference"]["tokens_per_second"] == 64.0
    assert math.isclose(run.agreement["nltk"], 0.0, abs_tol=1e-12)


@pytest.mark.nightly
def test_the_whole_program(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "bench_group_statistics.py"), "--quick"]
    command += ["--json", str(tmp_path / "results.json"), "--plot", str(tmp_path / "plot.png")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "It is recommended" not in done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    documented = (BENCHMARKS / "bench_group_statistics.py").read_text().split('"""')[1]
    keys = set(results) | {key for entry in results["memory"] + results["verdicts"] for key in entry}
    keys |= {key for one in results["sizes"] for found in (one, *one["results"].values()) for key in found}
    assert {key for key in keys if key not in documented} == set()
    assert len(results["sizes"]) == 4
    for one in results["sizes"]:
        assert {"reference", "torch", "nltk", "sacrebleu"} <= set(one["results"])
        assert one["results"][results["ours"]]["slower_than_ours"] == 1.0
    assert max(results["agreement"].values()) <= 1e-6
    assert str(ROOT) not in json.dumps(results)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "largest difference from the reference" in done.stdout and done.stdout.count("wanted") >= 6
