"""Backend `cpu` of the kernels: the C++ equals the reference whatever the threads and divisions, and is optional."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings

import mmr1_kernels
import numpy as np
import pytest
from fixtures.launching import PROGRAMS, ROOT, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from mmr1_kernels import cpu, reference

MANY = settings(max_examples=150)
LARGEST_ID = 2**31 - 1


def pack(groups):
    """Lists of lists of responses to token_ids, offsets, group_offsets."""
    responses = [response for group in groups for response in group]
    token_ids = np.array([token for response in responses for token in response], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, responses)], dtype=np.int64)
    return token_ids, offsets, np.cumsum([0, *map(len, groups)], dtype=np.int64)


def assert_equal(found, expected):
    np.testing.assert_array_equal(found.matches, expected.matches)
    np.testing.assert_array_equal(found.distinct, expected.distinct)


def zipf_batch(group_sizes, longest, alphabet, seed):
    """Ragged groups of Zipf-distributed tokens, about half of each response a copy of its neighbour's."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 2**31, alphabet, dtype=np.int32)
    groups = []
    for size in group_sizes:
        shared = ids[random.zipf(1.3, longest) % alphabet]
        own = [ids[random.zipf(1.3, n) % alphabet] for n in random.integers(0, longest + 1, size)]
        groups.append([np.where(random.random(len(r)) < 0.5, shared[: len(r)], r) for r in own])
    return pack(groups)


@st.composite
def batches(draw):
    """Ragged groups, some of one response and some empty; copies with changes, few or many different ids."""
    tokens = draw(st.sampled_from([st.integers(0, 1), st.integers(0, 6), st.sampled_from([0, 1, 2**16, LARGEST_ID])]))
    response = st.lists(tokens, max_size=draw(st.sampled_from([1, 3, 25])))
    groups = draw(st.lists(st.lists(response, min_size=1, max_size=5), max_size=4))
    for group in groups:
        if len(group) > 1 and draw(st.booleans()):
            group[-1] = group[0] + group[-1]
    return groups


@MANY
@given(batches(), st.integers(1, 6), st.integers(1, 6), st.sampled_from([2, 3, 8, 30, 131_072]))
def test_counts_equal_the_reference(groups, max_order, num_threads, max_undivided):
    batch = pack(groups)
    found = cpu.count_ngrams(*batch, max_order, num_threads=num_threads, max_undivided=max_undivided)
    assert_equal(found, reference.count_ngrams(*batch, max_order))


@pytest.mark.parametrize("max_undivided", [2, 7, 401, 5000, 131_072])
@pytest.mark.parametrize(
    ("group_sizes", "longest", "alphabet"),
    [
        ((64,), 700, 3000),  # one group: shares
        ((7, 1, 1), 6000, 2),  # an n-gram so frequent that its bucket is divided at every order
        ((1,), 20_001, 20_000),
        ((3, 9, 1, 8, 5, 2, 7, 7, 7, 30), 401, 100),  # groups of unequal size beside each other
        ((2000,), 2, 9),  # more responses than a thread's sums are allowed to cost
    ],
)
def test_threads_and_divisions_do_not_show_in_the_result(group_sizes, longest, alphabet, max_undivided):
    batch = zipf_batch(group_sizes, longest, alphabet, seed=len(group_sizes))
    expected = reference.count_ngrams(*batch, 5)
    for num_threads in (1, 2, 3, 16):
        found = cpu.count_ngrams(*batch, 5, num_threads=num_threads, max_undivided=max_undivided)
        assert_equal(found, expected)


@pytest.mark.parametrize(
    "tokens",
    [
        np.arange(50_000),
        np.arange(50_000) * 2**15,  # nothing in the low bits
        (np.arange(50_000) * 2**15) % LARGEST_ID,
        np.zeros(50_000),
        np.arange(50_000) % 2,
        np.arange(50_000) // 25_000 + LARGEST_ID - 1,
    ],
    ids=["ascent", "high bits", "stride", "one token", "two in turn", "two runs"],
)
def test_patterns(tokens):
    token_ids = (tokens % 2**31).astype(np.int32)
    offsets, group_offsets = np.array([0, 9_999, 9_999, 30_000, 50_000]), np.array([0, 4])
    expected = reference.count_ngrams(token_ids, offsets, group_offsets, 4)
    assert_equal(cpu.count_ngrams(token_ids, offsets, group_offsets, 4), expected)
    assert_equal(cpu.count_ngrams(token_ids, offsets, group_offsets, 4, num_threads=2, max_undivided=999), expected)


def test_a_high_order_of_a_long_run():
    """Each order is divided again: it must not nest a call an order, nor take quadratic time."""
    batch = pack([[[5] * 3000, [5] * 2000]])
    found = cpu.count_ngrams(*batch, 2500, num_threads=1, max_undivided=16)
    orders = np.arange(1, 2501)
    in_both = np.maximum(2001 - orders, 0)
    np.testing.assert_array_equal(found.matches, [in_both, in_both])
    np.testing.assert_array_equal(found.distinct, [np.ones(2500)])


def test_arrays_that_are_views():
    token_ids, offsets, group_offsets = zipf_batch((3, 4), 50, 20, seed=2)
    expected = reference.count_ngrams(token_ids, offsets, group_offsets, 3)
    strided = [np.repeat(array, 2)[::2] for array in (token_ids, offsets, group_offsets)]
    assert_equal(cpu.count_ngrams(*strided, 3), expected)


def test_a_group_too_large_is_named():
    offsets = np.array([0, 1, 2**31 + 1])  # nothing reads the tokens that are not there
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens, group 1 has 2147483648"):
        cpu.count_ngrams(np.zeros(1, dtype=np.int32), offsets, np.array([0, 1, 2]), 3)


def test_no_memory_is_a_memory_error():
    """In the C++ no exception leaves: it says so in its result, and the table serves the next call."""
    program = (
        "import resource, numpy as np\n"
        "from mmr1_kernels import cpu\n"
        "tokens, groups = np.arange(2**21, dtype=np.int32), np.array([0, 1])\n"
        "small = tokens[:1000], np.array([0, 1000]), groups, 2\n"
        "cpu.count_ngrams(*small, num_threads=1)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, used + 2**24))\n"
        "large = tokens, np.array([0, len(tokens)]), groups, 2\n"
        "for limit in (2**22, 1000):\n"
        "    try:\n"
        "        cpu.count_ngrams(*large, num_threads=1, max_undivided=limit)\n"
        "        raise SystemExit('it fitted')\n"
        "    except MemoryError as error:\n"
        "        assert '2097152 tokens' in str(error), error\n"
        "assert cpu.count_ngrams(*small, num_threads=1).distinct.tolist() == [[1000, 999]]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), timeout=60)


def count_in_child(batch, results):
    results.put(cpu.count_ngrams(*batch, 3, num_threads=3, max_undivided=64))


@pytest.mark.slow
def test_a_fork_can_count():
    batch = zipf_batch((8, 3), 300, 50, seed=3)
    expected = cpu.count_ngrams(*batch, 3, num_threads=3, max_undivided=64)  # the parent has threads now
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads: that is the point here
        child = context.Process(target=count_in_child, args=(batch, results))
        child.start()
    try:
        assert_equal(results.get(timeout=30), expected)
    finally:
        child.kill()
        child.join()


def test_a_fork_can_count_where_torch_has_threads():
    """torch and this backend share one runtime of OpenMP: its threads count, though this backend never ran before."""
    program = (
        "import os, signal, warnings, numpy as np, torch\n"
        "from mmr1_kernels import cpu\n"
        "warnings.simplefilter('ignore')\n"  # of forking beside threads
        "torch.set_num_threads(2)\n"
        "torch.ones(2**20).add_(1)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(30)\n"  # ends it, were it to wait for ever
        "    tokens, ends = np.arange(50_000, dtype=np.int32), np.array([0, 20_000, 50_000])\n"
        "    for threads in (None, 2):\n"
        "        found = cpu.count_ngrams(tokens, ends, np.array([0, 1, 2]), 2, num_threads=threads)\n"
        "        if found.distinct.tolist() != [[20_000, 19_999], [30_000, 29_999]]:\n"
        "            os._exit(1)\n"
        "    os._exit(0)\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), timeout=60)


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARY", "_not_built")
    for function in (cpu._library, cpu.warn_that_it_is_missing):
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in (cpu._library, cpu.warn_that_it_is_missing):
        function.cache_clear()


def test_without_the_library_the_reference_serves_with_one_warning(without_library):
    assert not cpu.is_available()
    batch = zipf_batch((3, 3), 40, 10, seed=4)
    arguments = *batch[:2], np.zeros(6, dtype=np.float32), np.zeros(6, dtype=np.float32), 3
    with pytest.raises(RuntimeError, match="backend cpu is not built here"):
        mmr1_kernels.group_statistics(*arguments, backend="cpu")
    with pytest.warns(RuntimeWarning, match="without its C\\+\\+ extension") as caught:
        found = mmr1_kernels.group_statistics(*arguments)
        mmr1_kernels.group_statistics(*arguments)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for by name: nothing to say
        expected = mmr1_kernels.group_statistics(*arguments, backend="reference")
    np.testing.assert_array_equal(found.self_bleu, expected.self_bleu)


def test_a_library_of_another_version_is_not_used(without_library, monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARY", "_count_ngrams")
    if not cpu.is_available():
        pytest.skip("there is no library to refuse")
    cpu._library.cache_clear()
    monkeypatch.setattr(cpu, "FUNCTION", "mmr1_count_ngrams_0")
    assert not cpu.is_available()


@pytest.mark.parametrize("builds", [True, False])
def test_setup_replaces_an_old_extension_and_needs_the_new_one(tmp_path, builds):
    """The script itself, with an interpreter that only pretends."""
    for folder in ("launch", "requirements", "kernels/csrc", "kernels/mmr1_kernels", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("requirements/cpu.lock", "setup.py", "pyproject.toml", "kernels/csrc/source.cpp"):
        (tmp_path / file).touch()
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    old = tmp_path / "kernels" / "mmr1_kernels" / "_count_ngrams.cpython-311-x86_64-linux-gnu.so"
    old.touch()
    pretended = tmp_path / "bin" / "python"
    pretended.write_text(
        "#!/bin/sh\n"
        'if [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi\n'
        f'case "$2" in *is_available*) test ! -e {old} && exit {int(not builds)};; esac\n'
    )
    (tmp_path / "bin" / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "uv").write_text("#!/bin/sh\nexit 1\n")  # pip takes its place
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", tmp_path / "launch" / "setup.sh", "cpu"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": str(pretended), "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert not old.exists()
    assert len(list(tmp_path.glob(".venv/installed-cpu-*"))) == builds
    if builds:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1 and done.stderr.startswith("setup: the C++ extension was not built")
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["found", "missing"])
def test_a_wheel_with_and_without_a_compiler(tmp_path, compiler):
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path)
    for part in ("mmr1_ds", "kernels", "configs", "launch"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    missing = {"CC": "/bin/false", "CXX": "/bin/false"} if compiler == "missing" else {}
    wheel = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path]
    subprocess.run(wheel, check=True, env=environment(**missing), cwd=tmp_path)
    (built,) = tmp_path.glob("mmr1_ds-*.whl")
    installed = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", built, installed], check=True)
    assert len(list(installed.glob("mmr1_kernels/_count_ngrams*.so"))) == (compiler == "found")
    program = (
        "import warnings, numpy as np, mmr1_kernels\n"
        f"assert mmr1_kernels.__file__.startswith({str(installed)!r})\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    zeros = np.zeros(2, dtype=np.float32)\n"
        "    tokens, offsets = np.array([4, 5, 4, 5], dtype=np.int32), np.array([0, 2, 4])\n"
        "    assert mmr1_kernels.group_statistics(tokens, offsets, zeros, zeros, 2, 2).self_bleu == [1.0]\n"
        f"assert len(caught) == {int(compiler == 'missing')}, caught\n"
    )
    alone = environment() | {"PYTHONPATH": str(installed)}
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}[1:]\n{program}"],
                   check=True, env=alone, cwd=tmp_path)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("pattern", ["all distinct", "one token", "short period", "same response", "half one token"])
def test_peak_extra_memory_is_below_40_bytes_a_token(pattern, num_threads):
    command = [sys.executable, PROGRAMS / "kernel_memory.py", pattern, str(num_threads)]
    given_back = environment(MALLOC_MMAP_THRESHOLD_="131072")  # what was freed before does not serve again unseen
    measured = subprocess.run(command, check=True, env=given_back, capture_output=True, text=True, timeout=120)
    assert 7 < float(measured.stdout) < 40  # the records at least were seen


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_random_inputs_under_the_sanitizers(tmp_path):
    command = ["make", "-s", "sanitize", "SMALL=4000", "LARGE=8", f"SEED={os.getpid()}", f"SANITIZED={tmp_path}/fuzz"]
    fuzz = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert fuzz.returncode == 0, fuzz.stdout + fuzz.stderr
    assert "4000 small inputs, 8 large inputs and 41 tables passed" in fuzz.stdout
