"""The reward pool with real processes and rewards that misbehave in every way."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.responses import response

from mmr1_ds.config import RewardConfig
from mmr1_ds.errors import UserError
from mmr1_ds.loop.collector import Collector
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import Prompt, RolloutGroup
from mmr1_ds.rewards import pool as pool_module
from mmr1_ds.rewards import worker
from mmr1_ds.rewards.loading import LoadedReward
from mmr1_ds.rewards.pool import RewardItem, RewardPool
from mmr1_ds.rewards.scoring import RewardCounts, score_groups

GONE_SECONDS = 10  # more than a killed process takes to disappear on any machine

REWARD = """
    import os, subprocess, sys, threading

    def score(items, bonus=0.0):
        (item,) = items
        word, _, rest = item["response"].partition(" ")
        if word == "hang":
            if rest:
                sys.stderr.write(f"{subprocess.Popen(['sleep', rest]).pid}\\n")
            sys.stderr.write("hanging\\n")
            threading.Event().wait()
        if word == "exit":
            os._exit(3)
        if word == "sys.exit":
            sys.exit("bye")
        if word == "segfault":
            os.kill(os.getpid(), 11)
        if word == "raise":
            raise RuntimeError("no such unit:\\n" + rest)
        if word == "print":
            print('{"score": {"overall": 5}}', flush=True)
            os.write(1, b'{"score": {"overall": 6}}\\n')
            os.system("echo '{\\"score\\": {\\"overall\\": 7}}'")
        if word == "input":
            input()
        if word == "pid":
            return [{"overall": os.getpid(), "accuracy": 0}]
        if word == "long":
            return [{"overall": len(item["response"])}]
        if word == "huge":
            return [{"overall": 1.0, **{f"key{i}": 1.0 for i in range(200_000)}}]
        if word == "return":
            return eval(rest)
        value = float(rest or 0) + bonus
        return [{"overall": value, "accuracy": 1.0, "length": item["response_length"], "truth": item["ground_truth"]}]
"""


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "my_reward.py"
    path.write_text(textwrap.dedent(REWARD))
    return str(path)


@pytest.fixture
def make_pool(reward_file):
    pools = []

    def make(workers=1, timeout=30.0, function="score", path=None, **kwargs):
        config = RewardConfig(f"{path or reward_file}:{function}", kwargs, workers, timeout)
        pools.append(RewardPool(config))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def shared_pool(reward_file):
    """For tests that leave a pool as they found it, whatever becomes of its one worker."""
    with RewardPool(RewardConfig(f"{reward_file}:score", {}, 1, 30.0)) as pool:
        yield pool


def items(*responses):
    return [RewardItem(response, len(response), "7") for response in responses]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_in_order_and_as_returned(make_pool):
    pool = make_pool(workers=3, bonus=0.5)
    results = pool.score(items(*(f"ok {i}" for i in range(23))))
    assert [result.overall for result in results] == [i + 0.5 for i in range(23)]
    assert {result.accuracy for result in results} == {1.0}
    assert [result.parts for result in results] == [{"length": float(len(f"ok {i}"))} for i in range(23)]
    assert {result.failure for result in results} == {None}
    assert pool.score([]) == []


def test_order_holds_when_the_first_is_the_slowest(make_pool):
    results = make_pool(workers=2, timeout=1.0).score(items("hang", *(f"ok {i}" for i in range(9))))
    assert [result.failure for result in results] == ["timeout"] + [None] * 9
    assert [result.overall for result in results[1:]] == [float(i) for i in range(9)]


@pytest.mark.parametrize(
    ("response", "kind", "reason"),
    [
        ("exit", "crash", "exit status 3"),
        ("segfault", "crash", "signal SIGSEGV"),
        ("sys.exit", "error", "SystemExit: bye"),
        ("raise 7", "error", "RuntimeError: no such unit: 7"),
        ("input", "error", "EOFError"),
        ("return [{'overall': float('nan')}]", "invalid", "'overall' is nan"),
        ("return [{'overall': float('inf'), 'accuracy': 1}]", "invalid", "'overall' is inf"),
        ("return [{'overall': 1e39}]", "invalid", "'overall' is 1e+39"),
        ("return [{'overall': 1, 'accuracy': float('nan')}]", "invalid", "'accuracy' is nan"),
        ("return [{'overall': 1, 'accuracy': 1.5}]", "invalid", "'accuracy' is 1.5; it must be in [0, 1]"),
        ("return [{'overall': 1, 'accuracy': -1.5}]", "invalid", "'accuracy' is -1.5; it must be in [0, 1]"),
        ("return [{'overall': 1, 'format': float('nan')}]", "invalid", "'format' is nan"),
        ("return [{'accuracy': 1}]", "invalid", "no number 'overall'"),
        ("return [{'overall': 'high'}]", "invalid", "no number 'overall'"),
        ("return [{'overall': None}]", "invalid", "no number 'overall'"),
        ("return [{'overall': 1}, {'overall': 1}]", "invalid", "want a list with one dictionary"),
        ("return []", "invalid", "want a list with one dictionary"),
        ("return None", "invalid", "want a list with one dictionary"),
        ("return 1.0", "invalid", "want a list with one dictionary"),
        ("huge", "invalid", "answered over 1048576 bytes"),
    ],
)
def test_a_failure_costs_one_response(shared_pool, response, kind, reason):
    before, failed, after = shared_pool.score(items("ok 1", response, "ok 2"))
    assert (failed.failure, failed.overall, failed.parts) == (kind, 0.0, {}) and np.isnan(failed.accuracy)
    assert reason in failed.reason and "\n" not in failed.reason
    assert (before.overall, after.overall) == (1.0, 2.0)


def test_a_hang_costs_its_time_limit_and_its_process(make_pool):
    pool = make_pool(timeout=1.0)
    (old,) = pool.pids
    first, second = pool.score(items("hang", "ok 2"))
    assert first.failure == "timeout" and "1 seconds" in first.reason
    assert second.overall == 2.0
    assert not is_running(old) and pool.pids != [old]


def test_prints_do_not_corrupt_the_channel(make_pool, capfd):
    results = make_pool().score(items("print 1", "print 2"))
    assert [result.overall for result in results] == [1.0, 2.0]
    out, err = capfd.readouterr()
    assert out == "" and '"overall": 5' in err and '"overall": 6' in err and '"overall": 7' in err


def test_responses_longer_than_a_pipe(shared_pool):
    text = "long " + "ä\n\u2028\"'" * 100_000
    (result,) = shared_pool.score(items(text))
    assert result.overall == len(text)


def test_a_long_response_to_a_stopped_worker_does_not_stall(make_pool):
    pool = make_pool(timeout=1.0)
    os.kill(pool.pids[0], signal.SIGSTOP)
    first, second = pool.score(items("long " + "x" * 1_000_000, "ok 2"))
    assert (first.failure, second.overall) == ("timeout", 2.0)


def test_a_worker_that_died_while_idle_costs_no_response(shared_pool):
    (old,) = shared_pool.pids
    handle = os.pidfd_open(old)
    os.kill(old, signal.SIGKILL)
    select.select([handle], [], [], GONE_SECONDS)
    os.close(handle)
    assert [result.overall for result in shared_pool.score(items("ok 1", "ok 2"))] == [1.0, 2.0]


def test_failures_are_logged_once_a_reason_and_a_few_of_a_kind(make_pool, caplog):
    pool = make_pool()
    with caplog.at_level(logging.WARNING):
        pool.score(items(*["raise 7"] * 9))
        assert caplog.text.count("RuntimeError: no such unit: 7") == 1
        pool.score(items(*(f"raise {number}" for number in range(9))))
    assert caplog.text.count("RuntimeError: no such unit") == pool_module.LOGGED_FAILURES == len(pool.first_reasons)


def test_without_accuracy_the_clipped_reward_stands_in(make_pool, caplog):
    with caplog.at_level(logging.WARNING):
        results = make_pool().score(items(*(f"return [{{'overall': {value}}}]" for value in (-1, 0.25, 3))))
    assert [result.accuracy for result in results] == [0.0, 0.25, 1.0]
    assert [result.overall for result in results] == [-1.0, 0.25, 3.0]
    assert caplog.text.count("returns no 'accuracy'") == 1


def test_a_reward_may_import_its_neighbours_and_numpy(make_pool, tmp_path):
    (tmp_path / "neighbour.py").write_text("import numpy as np\nVALUE = np.float32(0.5)\n")
    (tmp_path / "reward.py").write_text("from neighbour import VALUE\ndef f(items): return [{'overall': VALUE}]\n")
    (result,) = make_pool(path=tmp_path / "reward.py", function="f").score(items("x"))
    assert result.overall == 0.5


def test_the_built_in_math():
    with RewardPool(RewardConfig("math", {"format_weight": 0.2}, 1)) as pool:
        right, wrong, formula = pool.score(
            [
                RewardItem("<think>a</think><answer>\\boxed{7}</answer>", 9, "7"),
                RewardItem("\\boxed{8}", 9, "7"),
                RewardItem("\\boxed{\\frac{\\sqrt{2}}{2}}", 9, "\\frac{1}{\\sqrt{2}}"),
            ]
        )
    assert (right.overall, right.accuracy, right.parts) == (1.0, 1.0, {"format": 1.0})
    assert (wrong.overall, formula.overall) == (0.0, 0.8)


def test_what_a_built_in_imports_late_is_not_in_a_responses_seconds(monkeypatch):
    order = []
    reward = LoadedReward(lambda items: [], warm_up=lambda: order.append("warm"))
    monkeypatch.setattr(worker, "load_reward_function", lambda setup: reward)
    monkeypatch.setattr(worker, "_take_channel", lambda reply_fd: (io.StringIO('{"kwargs": {}}\n'), None))
    monkeypatch.setattr(worker, "_reply", lambda replies, message: order.extend(message))
    monkeypatch.setattr(worker, "_die_with_parent", lambda guard_fd: None)
    monkeypatch.setattr(worker.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(worker.os, "killpg", lambda group, number: None)
    worker.main(0, 0)
    assert order == ["warm", "ready", "takes"]


# --- starting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("raise SystemExit(4)", "does not start: SystemExit: 4"),
        ("import os; os._exit(5)", "does not start: its process ended .exit status 5"),
        ("def other(items): pass", "has no function 'score'"),
        ("score = 5", "has no function 'score'"),
        ("def score(items, weight): pass", "missing a required argument: 'weight'"),
        ("def score(): pass", "names no argument"),
        ("def score(:", "SyntaxError"),
    ],
)
def test_a_reward_that_cannot_start_is_an_error_at_once(make_pool, tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(UserError, match=message) as raised:
        make_pool(path=path)
    assert "\n" not in str(raised.value)


def test_a_reward_that_never_ends_its_import(make_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "STARTUP_SECONDS", 0.3)
    path = tmp_path / "slow.py"
    path.write_text("import threading; threading.Event().wait()")
    with pytest.raises(UserError, match=r"over 0.3 seconds to import"):
        make_pool(path=path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "'maths' is unknown; use math, r1v, openr1, openr1_vllm, openr1_wo_LMM or path"),
        ("reward.py", "'reward.py' is unknown"),
        ("/nowhere/reward.py:score", "no such file '/nowhere/reward.py'"),
    ],
)
def test_unknown_rewards_are_named(name, message):
    with pytest.raises(UserError, match=message):
        RewardPool(RewardConfig(name))


def test_a_reward_that_stops_starting_ends_the_run(make_pool, tmp_path):
    path = tmp_path / "vanishing.py"
    path.write_text(textwrap.dedent(REWARD))
    pool = make_pool(path=path)
    path.unlink()
    with pytest.raises(UserError, match=r"does not start: UserError: .*no such file"):
        pool.score(items("exit", "ok 1"))
    assert pool.pids == []


# --- ending -------------------------------------------------------------------------------------------------------


def test_close_leaves_no_process(make_pool):
    pool = make_pool(workers=3)
    running = pool.pids
    assert all(is_running(pid) for pid in running)
    pool.close()
    pool.close()
    assert not any(is_running(pid) for pid in running)


PARENT = """
    import json, os, sys, threading
    from mmr1_ds.config import RewardConfig
    from mmr1_ds.rewards.pool import RewardItem, RewardPool

    with RewardPool(RewardConfig(sys.argv[1], {}, 2)) as pool:
        print(json.dumps(pool.pids), flush=True)
        if sys.argv[2:]:  # as a rank ends on a fault
            threading.Thread(target=lambda: (sys.stdin.readline(), os._exit(1))).start()
        pool.score([RewardItem("hang", 1, "7"), RewardItem("hang 777", 1, "7")])
"""


def start_parent(reward_file, *arguments):
    """Returns: a process whose two workers hang, and descriptors of both and of a child that one has started."""
    command = [sys.executable, "-c", textwrap.dedent(PARENT), f"{reward_file}:score", *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    parent = subprocess.Popen(command, **pipes, text=True)
    pids = json.loads(parent.stdout.readline())
    lines = [parent.stderr.readline() for _ in range(3)]
    assert lines.count("hanging\n") == 2, lines
    pids += [int(line) for line in lines if line != "hanging\n"]
    assert len(pids) == 3, lines
    return parent, [os.pidfd_open(pid) for pid in pids]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, -signal.SIGINT), (None, 1)]
)
def test_a_parent_that_dies_leaves_no_process(reward_file, sent, status):
    """Two workers hang in the reward, one has started a child: none outlives the parent, whatever ends that."""
    parent, running = start_parent(reward_file, *(["exit on a line"] if sent is None else []))
    with parent:
        if sent is None:
            parent.stdin.write("\n")
            parent.stdin.flush()
        else:
            parent.send_signal(sent)
        assert parent.wait(GONE_SECONDS) == status
    for process in running:
        readable, _, _ = select.select([process], [], [], GONE_SECONDS)
        os.close(process)
        assert readable, "a process outlived the parent of its worker"


def test_a_worker_that_waits_ends_with_its_parent_and_takes_its_children_along(make_pool, tmp_path):
    path = tmp_path / "leaves_a_child.py"
    path.write_text(
        "import subprocess\ndef score(items): return [{'overall': subprocess.Popen(['sleep', '777']).pid}]\n"
    )
    pool = make_pool(path=path)
    (result,) = pool.score(items("x"))
    running = [os.pidfd_open(pid) for pid in (*pool.pids, int(result.overall))]
    os.close(pool._workers[0].process._lifeline)  # as the kernel does when this process ends
    for process in running:
        assert select.select([process], [], [], GONE_SECONDS)[0]
        os.close(process)
    pool._workers[0].process._lifeline = os.open(os.devnull, os.O_RDONLY)  # for the pool to close


def test_a_worker_ignores_ctrl_c(shared_pool):
    before = shared_pool.pids
    os.kill(before[0], signal.SIGINT)
    assert shared_pool.score(items("ok 1"))[0].overall == 1.0
    assert shared_pool.pids == before


# --- groups -------------------------------------------------------------------------------------------------------


def group(index, responses):
    prompt = Prompt(index, str(index), (1, 2), (), ground_truth=str(index))
    return RolloutGroup(prompt, tuple(response([*map(ord, text)]) for text in responses), 0)


def test_groups_get_their_own_rewards(make_pool):
    groups = [
        group(0, ["ok 1", "raise", "ok 3"]),
        group(1, ["return [{'overall': 1, 'accuracy': 0, 'extra': 2}]"]),
        group(2, ["exit", "return 5", "hang"]),
    ]
    scored, counts = score_groups(make_pool(workers=2, timeout=1.0), groups, lambda ids: "".join(map(chr, ids)))
    assert [item.group for item in scored] == groups
    first, second, third = (item.rewards for item in scored)
    assert first.overall.dtype == first.accuracy.dtype == np.float32 and first.failed.dtype == bool
    assert first.overall.tolist() == [1.0, 2.0, 3.0]  # a failed one takes the mean of the others
    np.testing.assert_array_equal(first.accuracy, [1.0, np.nan, 1.0])
    assert first.is_unknown.tolist() == [False, True, False]
    assert first.failed.tolist() == [False, True, False]
    np.testing.assert_array_equal(first.parts["length"], [4.0, np.nan, 4.0])
    assert {key: value.tolist() for key, value in second.parts.items()} == {"extra": [2.0]}
    assert third.failed.all() and third.parts == {}
    kinds = dict.fromkeys(("timeouts", "crashes", "invalid", "errors"), 1)
    assert counts == {f"reward/num_{name}": count for name, count in {"responses": 7, "failed": 4, **kinds}.items()}


def test_a_reward_that_asks_for_token_ids_gets_those_of_its_group(tmp_path):
    path = tmp_path / "ids.py"
    path.write_text(
        "def f(completions, prompt_ids, completion_ids, **kwargs):\n"
        "    return [10 * sum(prompt) + len(ids) for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]\n"
    )
    with RewardPool(RewardConfig(f"{path}:f", num_workers=1)) as pool:
        scored, _ = score_groups(pool, [group(0, ["a", "bcd"]), group(1, [""])], lambda ids: "")
    assert [item.rewards.overall.tolist() for item in scored] == [[31.0, 33.0], [30.0]]


def test_no_groups(shared_pool):
    assert score_groups(shared_pool, [], str) == ([], RewardCounts())


def test_failures_count_as_wrong_where_that_is_asked_for(reward_file):
    config = RewardConfig(f"{reward_file}:score", num_workers=1, on_failure="zero")
    with RewardPool(config) as pool:
        (item,), _ = score_groups(pool, [group(0, ["ok 1", "raise"])], lambda ids: "".join(map(chr, ids)))
    assert item.rewards.overall.tolist() == [1.0, 0.0] and item.rewards.accuracy.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("responses", "stops"), [(["ok 1", "raise"] * 2, False), (["ok 1", *["raise no"] * 3], True)])
def test_three_rewards_in_four_that_fail_end_the_run(make_pool, responses, stops):
    encoder = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    alone = SimpleNamespace(sum=lambda own, stage: own, all_gather_objects=lambda own, stage: [own])
    collector = Collector(None, make_pool(), "mine.py:score", encoder, alone)
    with pytest.raises(UserError, match=r"failed for 3 of 4 .*: error: RuntimeError: no such unit: no") if stops else (
        contextlib.nullcontext()
    ):  # fmt: skip
        collector.score([group(0, responses)], StageClock())
