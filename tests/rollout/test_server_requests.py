"""Requests to rollout servers that answer well, badly, late and never: each gets one group, and it is its own."""

import copy
import dataclasses
import json
import random
from contextlib import contextmanager

import pytest
from fixtures.scripted_server import EOS, FORBIDDEN, KEY, VOCABULARY, good_answer, scripted_servers
from fixtures.server_requests import SETTINGS, body_of, first, is_its_own, requests

from mmr1_ds.rollout.servers import group as server_group
from mmr1_ds.rollout.servers.client import Exchange, Nonsense, UnknownWeights
from mmr1_ds.rollout.servers.group import ServerGroup

SECONDS = 20.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server_group, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(server_group, "_LONGEST_PAUSE_SECONDS", 0.02)


@contextmanager
def group_of(servers, max_in_flight=6, server_timeout=5.0, request_timeout=30.0, first=0, urls=None):
    group = ServerGroup(
        urls or [server.url for server in servers],
        KEY,
        eos_token_ids=[EOS],
        forbidden_token_ids=FORBIDDEN,
        vocabulary_size=VOCABULARY,
        max_in_flight=max_in_flight,
        server_timeout_seconds=server_timeout,
        request_timeout_seconds=request_timeout,
        first_server=first,
    )
    try:
        group.set_usable(range(len(urls or servers)))
        yield group
    finally:
        group.close()
        assert not group._thread.is_alive()


def answered(group, ticket, asked):
    assert group.wait(ticket, SECONDS)
    found = group.take(ticket)
    assert all(is_its_own(one, request) for one, request in zip(found, asked, strict=True))


def once(what):
    """A script: this for the first request, good answers after it."""
    left = [what]
    return lambda body: left.pop() if left else None


def always(what):
    return lambda body: what


def until(condition):
    for _ in range(2000):
        if found := condition():
            return found
        server_group.threading.Event().wait(0.005)
    raise AssertionError("it did not happen")


def test_a_request_says_what_bends_the_distribution_and_what_ends_a_response():
    settings = dataclasses.replace(SETTINGS, min_p=0.1, repetition_penalty=1.2, stop=("</answer>", "END"))
    body = json.loads(Exchange([EOS], FORBIDDEN, VOCABULARY).body(requests(1)[0], settings, "id", 0))
    sampling = body["sampling_params"]
    assert (sampling["min_p"], sampling["repetition_penalty"]) == (0.1, 1.2)
    assert sampling["stop"] == ["</answer>", "END"] and sampling["detokenize"] is True


def test_requests_name_the_adapter_that_samples_and_a_server_without_it_is_lost():
    """Started anew, it does not know the name: the request goes to another one."""
    with scripted_servers(2) as servers, group_of(servers) as group:
        servers[0].script = always((404, "The model `policy-7` does not exist."))
        group.sample_with("policy-7")
        asked = requests(3)
        answered(group, group.submit(asked, SETTINGS), asked)
        assert "policy-7" in group.suspects()[0] and 1 not in group.suspects()
        assert servers[0].bodies and {body["model"] for body in servers[1].bodies} == {"policy-7"}
    assert "model" not in json.loads(Exchange([EOS], FORBIDDEN, VOCABULARY).body(requests(1)[0], SETTINGS, "id", 0))


def test_the_requests_and_their_answers():
    with scripted_servers(2) as servers, group_of(servers) as group:
        asked = requests(17)
        answered(group, group.submit(asked, SETTINGS, priority=1), asked)
        bodies = [body for server in servers for body in server.bodies]
        assert len({body["request_id"] for body in bodies}) == 17 and all(server.bodies for server in servers)
        assert {body["priority"] for body in bodies} == {1}
        assert bodies[0]["sampling_params"]["logit_bias"] == {"7": -100.0, "8": -100.0}
        assert bodies[0]["sampling_params"]["detokenize"] is False and "stop" not in bodies[0]["sampling_params"]
        assert group.metrics() == {
            "rollout/num_repeated_requests": 0,
            "rollout/num_nonsense_responses": 0,
            "rollout/num_request_timeouts": 0,
        }
        assert group.suspects() == {} and group.wait(group.submit([], SETTINGS), 0)


@pytest.mark.parametrize("what", ["close", "half", "garbage", "redirect", (500, "oops"), (503, "busy"), b"[" * 9999])
def test_one_bad_answer_of_a_living_server_is_asked_again(what):
    with scripted_servers(1) as servers, group_of(servers) as group:
        servers[0].script = once(what)
        asked = requests(1)
        answered(group, group.submit(asked, SETTINGS), asked)
        assert len(servers[0].bodies) == 2 and group.metrics()["rollout/num_repeated_requests"] == 1
        assert group.suspects() == {} and "/elsewhere" not in servers[0].paths


def test_an_endless_answer_is_cut(monkeypatch):
    monkeypatch.setattr("mmr1_ds.rollout.servers.client._MOST_BYTES", 2**17)
    with scripted_servers(1) as servers, group_of(servers) as group:
        servers[0].script = once("endless")
        asked = requests(1)
        answered(group, group.submit(asked, SETTINGS), asked)
        assert group.metrics()["rollout/num_nonsense_responses"] == 1


def test_a_request_past_its_deadline_is_asked_again():
    with scripted_servers(1) as servers, group_of(servers, request_timeout=0.3) as group:
        servers[0].script = once("hang")
        asked = requests(1)
        answered(group, group.submit(asked, SETTINGS), asked)
        assert group.metrics()["rollout/num_request_timeouts"] == 1 and servers[0].num_disconnected == 1


@pytest.mark.parametrize("status", [400, 500, 503])
def test_a_server_that_lives_no_more_is_a_suspect_whatever_it_answers(status):
    """One that ends answers 400 to what it gives up, one whose engine is dead 500: no request is to blame."""
    with scripted_servers(1) as servers, group_of(servers) as group:
        servers[0].script, servers[0].lives = always((status, "Client disconnected")), 503
        asked = requests(5)
        ticket = group.submit(asked, SETTINGS)
        until(lambda: group._suspects)
        group.set_usable([0])  # by a trainer that has not heard of it
        assert not group._servers[0].usable
        suspects = group.suspects()
        assert list(suspects) == [0] and "503 when asked for a sign of life" in suspects[0]
        num_asked = len(servers[0].bodies)
        assert num_asked <= 2 and not group.wait(ticket, 0.1)  # not asked before the trainer has looked
        assert len(servers[0].bodies) == num_asked
        servers[0].script, servers[0].lives = always(None), True
        group.set_usable([0])
        answered(group, ticket, asked)


def test_a_dead_server_and_one_that_hangs():
    with scripted_servers(2) as servers:
        with group_of(servers, server_timeout=0.2, urls=["http://127.0.0.1:9", *(s.url for s in servers)]) as group:
            servers[0].script, servers[0].lives = always("late"), "hang"
            asked = requests(9)
            answered(group, group.submit(asked, SETTINGS), asked)
            found = group.suspects()
            assert "takes no connection" in found[0] and "no sign of life for 0.2 s" in found[1] and 2 not in found
            servers[0].wait_for(lambda: servers[0].num_disconnected == len(servers[0].bodies) > 0)
            servers[0].set_free()


def test_weights_that_were_not_sent_make_a_suspect_at_once():
    with scripted_servers(2) as servers, group_of(servers) as group:
        servers[0].version = "default"
        asked = requests(9)
        answered(group, group.submit(asked, SETTINGS), asked)
        assert "not sent, 'default'" in group.suspects()[0] and group.suspects() == {}


@pytest.mark.parametrize("what", [b"{}", (500, f"no such thing, Bearer {KEY}")])
def test_a_server_that_always_fails_is_a_suspect_and_the_request_ends_in_an_error(what, caplog):
    with scripted_servers(1) as servers, group_of(servers) as group:
        servers[0].script = lambda body: what if body["token_ids"][0] == 4 else None
        ticket = group.submit(requests(1, first=4), SETTINGS)
        assert list(until(group.suspects)) == [0] and len(servers[0].bodies) == 3
        group.set_usable([0])
        with pytest.raises(RuntimeError, match=r"prompt-4.*the last of 5 times") as failure:
            group.wait(ticket, SECONDS)
        assert len(servers[0].bodies) == 5
        assert KEY not in caplog.text + repr(failure.value) + repr(failure.value.__cause__) + repr(vars(ticket))


def test_a_request_that_ends_every_server_ends_in_an_error():
    with scripted_servers(1) as servers, group_of(servers) as group:
        servers[0].script, servers[0].lives = always("close"), 503
        ticket = group.submit(requests(1), SETTINGS)
        for _ in range(server_group._MOST_LOSSES - 1):
            until(group.suspects)
            group.set_usable([0])
        with pytest.raises(RuntimeError, match=r"10 times a rollout server was lost .* 'prompt-0'"):
            group.wait(ticket, SECONDS)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_no_server_can_do_is_an_error_that_names_the_prompt(status):
    with scripted_servers(1) as servers, group_of(servers) as group:
        servers[0].script = always((status, "too\nlong"))
        with pytest.raises(RuntimeError, match=f"it answers {status}, 'too long', to prompt 'prompt-6'"):
            group.wait(group.submit(requests(1, first=6), SETTINGS), SECONDS)
        assert len(servers[0].bodies) == 1 and group.suspects() == {}


def test_a_prompt_that_cannot_be_written_is_no_fault_of_a_server():
    class Broken:
        def save(self, *arguments, **settings):
            raise OSError("image file is truncated")

    with scripted_servers(1) as servers, group_of(servers) as group:
        with pytest.raises(RuntimeError, match=r"'prompt-0' cannot be written .*truncated"):
            group.wait(group.submit(requests(1, images=(Broken(),)), SETTINGS), SECONDS)
        assert group.suspects() == {}


def test_a_defect_of_the_thread_is_told_to_who_waits(monkeypatch):
    with scripted_servers(1) as servers, group_of(servers) as group:
        monkeypatch.setattr(group, "_least_busy", lambda *_: 1 / 0)
        ticket = group.submit(requests(1), SETTINGS)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="division by zero"):
                group.wait(ticket, SECONDS)
        group._thread.join(SECONDS)
        group.submit(requests(1), SETTINGS)  # of a thread that has ended


def test_load_is_even_and_bounded():
    with scripted_servers(3) as servers, group_of(servers, max_in_flight=6, first=1) as group:
        for server in servers:
            server.script = always("late")
        group.hold()
        asked = requests(3) + requests(1, first=3, num_responses=7) + requests(9, first=4)
        ticket = group.submit(asked, SETTINGS)
        assert group.wait_idle(0)
        group.release()
        for server in servers:
            server.wait_for(lambda server=server: server.bodies)
        assert [server.bodies[0]["token_ids"][0] for server in servers] == [2, 0, 1]
        assert [len(server.bodies) for server in servers] == [1, 1, 1]  # the next is too large for what is left
        group.hold()
        assert not group.wait_idle(0)
        for server in servers:
            server.set_free()
        assert group.wait_idle(SECONDS) and group.finished(ticket) == 3
        group.release()
        answered(group, ticket, asked)


def test_what_is_urgent_goes_first():
    with scripted_servers(1) as servers, group_of(servers, max_in_flight=3) as group:
        group.hold()
        tickets = [group.submit(requests(2, first=10 * p), SETTINGS, priority=p) for p in (1, 0)]
        group.release()
        assert all(group.wait(ticket, SECONDS) for ticket in tickets)
        assert [body["token_ids"][0] for body in servers[0].bodies] == [0, 1, 10, 11]


def test_the_longest_go_first_and_come_back_in_their_places():
    with scripted_servers(1) as servers, group_of(servers, max_in_flight=3) as group:
        group.hold()
        lengths = 7, 401, 30
        asked = [dataclasses.replace(one, expected_tokens=n) for one, n in zip(requests(3), lengths, strict=True)]
        ticket = group.submit(asked, SETTINGS)
        group.release()
        answered(group, ticket, asked)
        assert [body["token_ids"][0] for body in servers[0].bodies] == [1, 2, 0]


def test_what_is_cut_off_frees_the_server():
    with scripted_servers(1) as servers, group_of(servers, max_in_flight=6) as group:
        servers[0].script = lambda body: "late" if body["token_ids"][0] else None
        asked = requests(5)
        ticket = group.submit(asked, SETTINGS)
        servers[0].wait_for(lambda: len(servers[0].bodies) == 3)
        until(lambda: group.finished(ticket) == 1)
        assert group.cut_off(ticket) == 4 and group.cut_off(ticket) == 0
        first, *others = group.take(ticket)
        assert is_its_own(first, asked[0]) and others == [None] * 4
        assert group.wait_idle(SECONDS)
        servers[0].wait_for(lambda: servers[0].num_disconnected == 2)
        with pytest.raises(AssertionError, match="once"):
            group.take(ticket)
        servers[0].script = always(None)
        answered(group, group.submit(asked, SETTINGS), asked)


def test_late_answers_of_a_server_that_is_not_used_any_more_are_not_read():
    with scripted_servers(2) as servers, group_of(servers) as group:
        servers[0].script = always("late")
        group.set_usable([0])
        asked = requests(2)
        ticket = group.submit(asked, SETTINGS)
        servers[0].wait_for(lambda: len(servers[0].bodies) == 2)
        group.set_usable([1])
        servers[0].set_free()
        answered(group, ticket, asked)
        assert len(servers[1].bodies) == 2 and group.metrics()["rollout/num_repeated_requests"] == 2


def test_closing_with_requests_in_flight():
    with scripted_servers(1) as servers:
        with group_of(servers) as group:
            servers[0].script = always("hang")
            group.submit(requests(9), SETTINGS)
            servers[0].wait_for(lambda: len(servers[0].bodies) == 2)
        servers[0].wait_for(lambda: servers[0].num_disconnected == 2)
        group.close()
        group.set_usable([])


def test_no_proxy_of_the_environment_sees_the_key(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with scripted_servers(1) as servers, group_of(servers) as group:
        asked = requests(1)
        answered(group, group.submit(asked, SETTINGS), asked)


def nonsense(change):
    answer = copy.deepcopy(good_answer(body_of(requests(1)[0])))
    change(answer["choices"])
    return json.dumps(answer).encode()


def entry(name, value):
    return lambda choices: choices[0]["logprobs"]["content"][0].update({name: value})


def token(value):
    def change(choices):
        choices[0]["token_ids"][0] = choices[0]["logprobs"]["content"][0]["token_id"] = value

    return change


def span(**values):
    return lambda choices: choices[0]["weight_versions"][0].update(values)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda choices: choices.pop(), "2 responses in place of 3"),
        (first("index", 1), "3 responses in place"),
        (token(VOCABULARY), "cannot be sampled"),
        (token(-1), "cannot be sampled"),
        (token(FORBIDDEN[0]), "cannot be sampled"),
        (entry("token_id", 11), "of other tokens"),
        (entry("logprob", 0.1), "not finite or over 0"),
        (entry("logprob", -9999.0), "not finite or over 0"),
        (entry("logprob", float("nan")), "JSON"),
        (entry("logprob", None), "null"),
        (first("logprobs", None), "null"),
        (first("token_ids", []), "0 tokens"),
        (first("token_ids", [10] * 10), "10 tokens"),
        (first("finish_reason", "abort"), "abort"),
        (first("finish_reason", None), "null"),
        (span(start=1), "gaps"),
        (span(end=1), "weight versions of 1 tokens"),
        (first("weight_versions", []), "weight versions of 0"),
        (first("weight_versions", None), "weight versions of 0"),
        (span(version="default"), "not sent"),
        (span(version="9" * 5000), "not sent"),
        (span(version="²"), "not sent"),
    ],
)
def test_every_kind_of_nonsense_is_named(change, words):
    exchange = Exchange([EOS], FORBIDDEN, VOCABULARY)
    with pytest.raises(Nonsense, match=words) as failure:
        exchange.group(requests(1)[0], SETTINGS, nonsense(change))
    assert isinstance(failure.value, UnknownWeights) == (words == "not sent")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"\xff\xfe", b'{"choices":' + b"[" * 100000, b'{"x":"\xff","choices":[]}']
)
def test_what_is_no_answer_is_nonsense(text):
    with pytest.raises(Nonsense):
        Exchange([EOS], FORBIDDEN, VOCABULARY).group(requests(1)[0], SETTINGS, text)


def test_every_request_gets_one_group_whatever_servers_do(monkeypatch):
    """Three servers that die, hang, answer late and nonsense, and come back; the trainer's calls as it makes them."""
    monkeypatch.setattr(server_group, "_MOST_TRIES", 1000)
    monkeypatch.setattr(server_group, "_MOST_LOSSES", 1000)
    chance = random.Random(5)
    kinds = ["close", "half", "garbage", (500, "oops"), (503, "no"), b"{}", "hang", "late"]
    with scripted_servers(3) as servers, group_of(servers, max_in_flight=12) as group:
        for server in servers:
            server.script = lambda body: chance.choice(kinds) if chance.random() < 0.2 else None
        asked = [requests(100, first=100 * i, num_responses=1 + i % 4) for i in range(3)]
        tickets = [group.submit(some, SETTINGS, priority=i % 2) for i, some in enumerate(asked)]
        usable, repeated = {0, 1, 2}, 0
        for turn in range(4000):
            if all(group.wait(ticket, 0.005) for ticket in tickets):
                break
            usable -= group.suspects().keys()
            usable ^= {chance.randrange(3)} if turn % 3 == 0 else set()
            group.set_usable(usable)
            server = servers[chance.randrange(3)]
            server.lives = chance.choice([True, True, 503])
            if turn % 5 == 0:
                servers[turn % 3].set_free()
            repeated += group.metrics()["rollout/num_repeated_requests"]
        for ticket, some in zip(tickets, asked, strict=True):
            answered(group, ticket, some)
        assert repeated > 30
