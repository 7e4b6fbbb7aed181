"""vLLM's V2 model runner, which GPUs take: what of it looks at our requests and arguments, run on the CPU."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from fixtures.launching import PROGRAMS, environment
from fixtures.tiny_models import save_text_model, save_vision_model

from mmr1_ds.rollout.adapters import adapter_request

pytestmark = pytest.mark.slow  # imports vLLM

# As tests/programs/v2_sampler.py has them.
FORBIDDEN, EOS, VOCABULARY, TEMPERATURE = [2, 11, 40], 6, 61, 0.7
PROMPTS = [(5, 9, 5, 30), (17,), (8, 41, 8, 8, 20, 3, 1)]
SHAPES = {  # temperature, top_k, top_p, min_p, repetition penalty
    "plain": (1.0, 0, 1.0, 0.0, 1.0),
    "cooler": (TEMPERATURE, 0, 1.0, 0.0, 1.0),
    "top_k": (1.3, 7, 1.0, 0.0, 1.0),
    "top_p": (1.0, 0, 0.8, 0.0, 1.0),
    "min_p": (0.9, 0, 1.0, 0.1, 1.0),
    "repetition": (1.0, 0, 1.0, 0.0, 1.4),
    "all": (0.8, 20, 0.9, 0.02, 1.2),
    "greedy": (0.0, 0, 1.0, 0.0, 1.0),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/programs/v2_sampler.py wrote: one process, all tests."""
    folder = tmp_path_factory.mktemp("v2")
    for family in ("qwen2", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text"):
        save_text_model(folder / "models" / family, family=family)
    save_text_model(folder / "models" / "llama", family="llama", num_heads=4)
    for family in ("qwen2_5_vl", "qwen3_5"):
        save_vision_model(folder / "models" / family, family=family)
    command = [sys.executable, str(PROGRAMS / "v2_sampler.py"), str(folder / "models"), str(folder / "out.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def logits_of(seed, step):
    return np.random.default_rng([seed, step]).normal(0, 2, VOCABULARY).astype(np.float32).astype(np.float64)


def log_softmax(logits):
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def shaped(logits, seen, temperature, top_k, top_p, min_p, penalty):
    """The logarithms of the distribution that is sampled from, (V,); minus infinity for what has no chance."""
    logits = logits.copy()
    for token in seen:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    logits[FORBIDDEN] = -np.inf
    if temperature == 0:
        return np.where(np.arange(VOCABULARY) == logits.argmax(), log_softmax(logits), -np.inf)
    found = log_softmax(logits / temperature)
    found[np.exp(found) < min_p * np.exp(found.max())] = -np.inf
    if top_k:
        found[found < np.sort(found)[-top_k]] = -np.inf
    found = log_softmax(found)
    order = np.argsort(-found)
    before = np.cumsum(np.exp(found[order])) - np.exp(found[order])
    found[order[before >= top_p]] = -np.inf
    return log_softmax(found)


def test_what_is_sampled_has_the_log_probability_that_was_asked_for(found):
    """From the engine in the ranks and from servers, against a plain computation in numpy."""
    assert len(found["processed"]) == 2 * (7 * 9 + 3)
    for name, response in found["processed"].items():
        _, settings, prompt, _ = name.split("/")
        seen = {*PROMPTS[int(prompt)]}
        for step, (token, logprob) in enumerate(zip(response["tokens"], response["logprobs"], strict=True)):
            expected = shaped(logits_of(found["seeds"][name], step), seen, *SHAPES[settings])
            assert logprob == pytest.approx(expected[token], abs=2e-5), (name, step)
            seen.add(token)


def test_raw_log_probabilities_are_of_the_whole_distribution_at_the_training_s_temperature(found):
    assert len(found["raw"]) == 18
    for name, response in found["raw"].items():
        _, settings, prompt, k = name.split("/")
        seen = {*PROMPTS[int(prompt)]}
        for step, (token, logprob) in enumerate(zip(response["tokens"], response["logprobs"], strict=True)):
            logits = logits_of(1000 * int(prompt) + int(k), step)
            whole = shaped(logits, (), TEMPERATURE, 0, 1.0, 0.0, 1.0)
            assert logprob == pytest.approx(whole[token], abs=2e-5), (name, step)
            # vLLM's penalty meets logits that are divided already: the same, as it multiplies or divides them itself.
            assert shaped(logits, seen, TEMPERATURE, *SHAPES[settings][1:])[token] > -np.inf
            seen.add(token)


def test_each_response_has_its_seed_whatever_is_sampled_beside_it_and_after_a_sleep(found):
    """In another order, in other slots, with memory of unknown content where vLLM's sleep discards it."""
    assert len(found["again"]) == len(found["processed"]) // 2
    assert {name: response["tokens"] for name, response in found["again"].items()} == {
        name: found["processed"][name]["tokens"] for name in found["again"]
    }
    for name, response in found["processed"].items():
        way, settings, prompt, k = name.split("/")
        assert found["seeds"][name] == 1000 * int(prompt) + int(k)
        if settings == "plain" and way == "colocated":  # a server's bias of -100 is a chance of e^-100
            assert response["tokens"] == found["processed"][f"server/{settings}/{prompt}/{k}"]["tokens"]


def test_tokens_come_as_often_as_their_log_probabilities_say(found):
    expected = 401 * np.exp(shaped(logits_of(0, 0), (), *SHAPES["plain"]))
    counts = np.bincount(found["frequencies"], minlength=VOCABULARY)
    likely = expected > 5
    assert counts[FORBIDDEN].sum() == 0 and likely.sum() > 10
    rest = (counts[~likely].sum() - expected[~likely].sum()) ** 2 / expected[~likely].sum()
    chi_squared = ((counts - expected)[likely] ** 2 / expected[likely]).sum() + rest
    assert chi_squared < likely.sum() + 3 * np.sqrt(2 * likely.sum())


def test_vllm_takes_the_v2_runner_for_all_that_we_start_and_v1_where_it_is_told_to(found):
    runners = dict(found["runners"])
    for name in ("experts", "experts of a hybrid"):
        assert "requires Model Runner V2" in runners.pop(f"{name}, 0")  # preflight refuses it
    assert len(runners) == 2 * 10 + 2
    for name, row in runners.items():
        assert isinstance(row, dict), (name, row)
        assert row["v2"] is not name.endswith("0"), name
        assert row["not by v1"] == row["not by v2"] == [], name
        # Else a rank's part of the logits would pass by the mask of forbidden tokens.
        assert row["logits in parts"] is False, name
        assert row["logprobs"] == "processed_logprobs", name


def uses(function, owner):
    """The attributes of `self.OWNER` that a function of vLLM's worker uses."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == f"self.{owner}"
    }


def test_the_v2_runner_has_what_our_calls_of_the_worker_ask_it_for():
    """The worker is the same for both runners; a method that only V1's has would end the run at the first sync."""
    worker = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    runner = importlib.import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    asked = set()
    for name in (
        "load_model", "get_model", "reload_weights", "sleep", "wake_up", "reset_mm_cache", "reset_encoder_cache",
        "initialize_from_config", "execute_model", "sample_tokens", "add_lora", "remove_lora", "update_weights",
        "finish_weight_update", "shutdown",
    ):  # fmt: skip
        asked |= uses(getattr(worker, name), "model_runner")
    assert {"model", "get_model", "reload_weights", "reset_mm_cache", "reset_encoder_cache"} <= asked
    given = {name for part in runner.__mro__ if part is not object for name in vars(part)}
    for part in runner.__mro__[:-1]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        given |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
        }
    optional = {"_init_kv_zero_meta"}  # asked for where it is there
    assert asked - given - optional == set()
    assert "lora_manager" in given  # through which adapters are given


def test_every_token_goes_through_the_one_adapter():
    """lora_sync=adapters: as many adapters in a batch as there is room for, one."""
    state = importlib.import_module("vllm.v1.worker.gpu.lora_utils").LoraState(7)
    for slot, name in ((5, "a"), (0, "b")):
        state.add_request(name, slot, adapter_request())
    found = state.make_lora_inputs(["b", "a"], np.array([0, 5]), np.array([3, 1]))
    assert found == ((1, 1), (1, 1, 1, 1), {adapter_request()})
    state.remove_request("a")
    state.add_request("c", 5, None)  # before the first sync
    assert state.make_lora_inputs(["c"], np.array([5]), np.array([2])) == ((0,), (0, 0), set())
