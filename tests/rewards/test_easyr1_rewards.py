"""Reward files and prompt templates as EasyR1's users have them, for its present interface and the earlier ones."""

from __future__ import annotations

import math
import re
import textwrap

import pytest

from mmr1_ds.config import RewardConfig
from mmr1_ds.config.loading import dump_config, load_config
from mmr1_ds.data.chat import ChatFormat, load_format_prompt
from mmr1_ds.errors import UserError
from mmr1_ds.preflight.functions import check_reward
from mmr1_ds.rewards.loading import check_reward_config, reward_setup
from mmr1_ds.rewards.pool import RewardItem, RewardPool

RULES = """
    import re
    from typing import Any, Dict, List

    def format_reward(response):
        return 1.0 if re.fullmatch(r"<think>.*</think>.*", response, re.DOTALL) else 0.0

    def accuracy_reward(response, ground_truth):
        return 1.0 if response.rpartition("</think>")[2].strip() == ground_truth else 0.0

    def one(response, ground_truth, format_weight):
        format_score = format_reward(response)
        accuracy = accuracy_reward(response, ground_truth)
        overall = (1 - format_weight) * accuracy + format_weight * format_score
        return {"overall": overall, "format": format_score, "accuracy": accuracy}
"""
PRESENT_BATCH = """
    REWARD_NAME = "count"
    REWARD_TYPE = "batch"

    def compute_score(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
        if not isinstance(reward_inputs, list):
            raise ValueError("want a list")
        return [one(item["response"], item["ground_truth"], format_weight) for item in reward_inputs]
"""
PRESENT_SEQUENTIAL = """
    def compute_score(reward_input: dict[str, Any], format_weight: float = 0.1) -> dict[str, float]:
        if not isinstance(reward_input, dict):
            raise ValueError("want a dictionary")
        return one(reward_input["response"], reward_input["ground_truth"], format_weight)
"""
EARLIER_BATCH = """
    def compute_score(predicts: List[str], ground_truths: List[str], format_weight: float = 0.1) -> List[Dict]:
        return [one(*pair, format_weight) for pair in zip(predicts, ground_truths, strict=True)]
"""
EARLIER_SEQUENTIAL = """
    def compute_score(predict_str: str, ground_truth: str, format_weight: float = 0.1) -> Dict[str, float]:
        return one(predict_str, ground_truth, format_weight)
"""
FILES = {
    "present batch": PRESENT_BATCH,
    "present sequential": PRESENT_SEQUENTIAL,
    "earlier batch": EARLIER_BATCH,
    "earlier sequential": EARLIER_SEQUENTIAL,
}
RIGHT, WRONG = RewardItem("<think>a</think>7", 9, "7"), RewardItem("<think>a</think>8", 9, "7")


def write(folder, *parts):
    path = folder / "my_reward.py"
    path.write_text("".join(textwrap.dedent(part) for part in parts))
    return f"{path}:compute_score"


def run(reference, items, reward_type=None, **kwargs):
    config = RewardConfig(reference, kwargs, num_workers=1, reward_type=reward_type)
    with RewardPool(config) as pool:
        return pool.score(list(items))


@pytest.mark.parametrize("name", FILES)
def test_a_file_runs_as_it_is(tmp_path, name):
    right, wrong = run(write(tmp_path, RULES, FILES[name]), [RIGHT, WRONG], format_weight=0.2)
    assert (right.overall, right.accuracy, right.parts) == (1.0, 1.0, {"format": 1.0}), right.reason
    assert (wrong.overall, wrong.accuracy, wrong.parts) == (0.2, 0.0, {"format": 1.0})


@pytest.mark.parametrize("reward_type", ["batch", "sequential"])
def test_reward_type_says_what_names_do_not(tmp_path, reward_type):
    body = {
        "batch": "def compute_score(reward_input): return [{'overall': len(reward_input)}]",
        "sequential": "def compute_score(rows): return {'overall': len(rows['response'])}",
    }
    (result,) = run(write(tmp_path, body[reward_type]), [RIGHT], reward_type=reward_type)
    assert result.overall == {"batch": 1, "sequential": len(RIGHT.response)}[reward_type]


def test_a_reward_that_is_a_number(tmp_path):
    """EasyR1's first rewards returned the sum alone."""
    source = "def compute_score(predict_str, ground_truth): return 0.5 if predict_str.endswith(ground_truth) else 0.0"
    assert [result.overall for result in run(write(tmp_path, source), [RIGHT, WRONG])] == [0.5, 0.0]


def test_dapos_accuracy_of_minus_one_is_wrong_not_invalid(tmp_path):
    source = """
        def compute_score(reward_inputs, max_response_length, overlong_buffer_length):
            scores = []
            for item in reward_inputs:
                accuracy = 1.0 if item["response"].endswith(item["ground_truth"]) else -1.0
                excess = item["response_length"] - (max_response_length - overlong_buffer_length)
                overlong = -max(excess, 0) / overlong_buffer_length
                normalized = (accuracy + 1) / 2
                scores.append({"overall": accuracy + overlong, "accuracy": accuracy, "accuracy_normalized": normalized})
            return scores
    """
    kwargs = {"max_response_length": 10, "overlong_buffer_length": 4}
    right, wrong = run(write(tmp_path, source), [RIGHT, WRONG], **kwargs)
    assert (right.failure, right.overall, right.accuracy) == (None, 1 - 3 / 4, 1.0)
    assert (wrong.failure, wrong.overall, wrong.accuracy) == (None, -1 - 3 / 4, 0.0)
    assert wrong.parts == {"accuracy_normalized": 0.0}


def test_a_file_that_grades_with_mathruler(tmp_path):
    pytest.importorskip("mathruler")
    source = """
        from mathruler.grader import extract_boxed_content, grade_answer

        def compute_score(reward_inputs):
            answers = [extract_boxed_content(item["response"]) for item in reward_inputs]
            right = [float(grade_answer(a, i["ground_truth"])) for a, i in zip(answers, reward_inputs)]
            return [{"overall": value, "accuracy": value} for value in right]
    """
    items = [RewardItem("\\boxed{\\frac{1}{2}}", 9, "0.5"), RewardItem("\\boxed{2}", 9, "0.5")]
    assert [result.accuracy for result in run(write(tmp_path, source), items)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("source", "reward_type", "message"),
    [
        (PRESENT_BATCH, "function", "reward_type must be batch, sequential, group or null, got 'function'"),
        ('REWARD_TYPE = "stream"\ndef compute_score(items): pass', None, "REWARD_TYPE is 'stream'"),
        ("def compute_score(predicts, ground_truths, weight): pass", None, "missing a required argument"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, source, reward_type, message):
    with pytest.raises(UserError, match=message):
        run(write(tmp_path, RULES, source), [], reward_type=reward_type)


@pytest.mark.parametrize("name", ["math", "r1v", "openr1", "openr1_wo_LMM", "openr1_vllm"])
def test_mmr1s_keys_are_read(name):
    lengths = "{min_value_wrong: -2, max_value_wrong: -1.5, min_value_correct: 0.25, max_value_correct: 0.5}"
    loaded = load_config(
        [
            f"worker.reward.compute_score={name}", f"worker.reward.cos_len_reward_config={lengths}",
            "worker.reward.base_urls=['http://a:1/v1','http://b:2/v1']", "worker.reward.model_name=judge",
            "worker.reward.api_key=SECRET", "worker.reward.provider=vllm", "worker.reward.batch_processing=true",
        ]
    )  # fmt: skip
    reward = loaded.config.worker.reward
    assert reward.reward_function == name
    assert (reward.judge.base_urls, reward.judge.model) == (["http://a:1/v1", "http://b:2/v1"], "judge")
    assert reward_setup(reward, 4096)["cosine_values"] == {
        "min_value_wrong": -2, "max_value_wrong": -1.5, "min_value_correct": 0.25, "max_value_correct": 0.5
    }  # fmt: skip
    assert reward_setup(reward, 4096)["max_length"] == 4096
    assert any("key_variable" in warning for warning in loaded.warnings)
    assert "SECRET" not in " ".join(loaded.warnings) + dump_config(loaded.config)
    check_reward_config(reward)


def test_easyr1s_example_files_have_built_ins_in_their_place():
    for name, kind in (("math", "batch"), ("r1v", "sequential")):
        path = f"./examples/reward_function/{name}.py:compute_score"
        reward = load_config([f"worker.reward.reward_function={path}", f"worker.reward.reward_type={kind}"])
        assert reward.config.worker.reward.reward_function == name
        assert score_once(reward.config.worker.reward).accuracy == 1.0


def score_once(config):
    config.num_workers = 1
    with RewardPool(config) as pool:
        (result,) = pool.score([RewardItem("<think>a</think><answer>\\boxed{7}</answer>", 9, "7")])
    return result


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ content | trim }} Think first, inside <think> </think>. Answer in \\boxed{}.\n",
         "How many? Think first, inside <think> </think>. Answer in \\boxed{}."),
        ("Rules:\n- one digit\n\n---\n\n{{ content }}\n", "Rules:\n- one digit\n\n---\n\n How many? "),
        ("{% if '<image>' in content %}Look. {% endif %}{{ content.strip() | replace('many', 'few') }}", "How few?"),
    ],
)  # fmt: skip
def test_jinja_prompts(tmp_path, template, expected):
    path = tmp_path / "format.jinja"
    path.write_text(template)
    chat = ChatFormat(None, load_format_prompt(str(path)), False, is_multimodal=False)
    assert chat.chat(" How many? ", 0, 0, "row 1").messages == [{"role": "user", "content": expected}]


@pytest.mark.parametrize("name", ["math.py", "r1v.py", "json.py", "sympy.py", "random.py", "mmr1_ds.py"])
def test_a_file_shadows_no_installed_module(tmp_path, monkeypatch, name):
    """EasyR1's own files are called math.py and r1v.py; helpers beside them still import."""
    (tmp_path / "my_helper.py").write_text("TRUTH = '7'\n")
    (tmp_path / name).write_text(
        "from my_helper import TRUTH\nfrom mathruler.grader import grade_answer\nimport json, math, random, sympy\n"
        "def compute_score(reward_input):\n"
        "    assert sympy.sqrt(4) == 2 == math.sqrt(4) and random.random() < 1 and json.dumps(1)\n"
        "    return {'overall': float(grade_answer(reward_input['response'], TRUTH))}\n"
    )
    monkeypatch.chdir(tmp_path)
    (result,) = run(f"{tmp_path / name}:compute_score", [RewardItem("7", 1, "7")])
    assert (result.overall, result.failure) == (1.0, None), result.reason


FOREIGN = {
    "verl": "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
    "    return {'score': 2.0 * (solution_str == ground_truth), 'acc': solution_str == ground_truth}\n",
    "verl, a number": "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
    "    return 2.0 * (solution_str == ground_truth and extra_info['prompt'] == 'p')\n",
    "trl": "def compute_score(completions, answer, **kwargs):\n"
    "    return [2.0 * (text == truth) for text, truth in zip(completions, answer, strict=True)]\n",
    "trl, with prompts": "def compute_score(prompts, completions, ground_truth, **kwargs):\n"
    "    assert prompts == ['p']\n    return [2.0 * (completions == ground_truth)]\n",
    "trl, by keyword alone": "def compute_score(*, completions, answer, **kwargs):\n"
    "    return [2.0 * (text == truth) for text, truth in zip(completions, answer, strict=True)]\n",
    "trl, the ids alone": "def compute_score(completion_ids, answer, **kwargs):\n"
    "    return [2.0 * (ids == [40 + int(truth)]) for ids, truth in zip(completion_ids, answer, strict=True)]\n",
    "trl, all ids": "def compute_score(completions, prompt_ids, completion_ids, answer, **kwargs):\n"
    "    return [2.0 * (prompt_ids == [[1, 2]] and completion_ids == [[47]])]\n",
    "verl, by keyword alone": "def compute_score(*, data_source, solution_str, ground_truth, extra_info=None):\n"
    "    return 2.0 * (solution_str == ground_truth)\n",
    "verl, a batch": "def compute_score(data_sources, solution_strs, ground_truths, extra_infos):\n"
    "    assert [extra['prompt'] for extra in extra_infos] == ['p'] * len(data_sources)\n"
    "    pairs = zip(solution_strs, ground_truths, strict=True)\n"
    "    return [{'score': 2.0 * (text == truth), 'acc': text == truth} for text, truth in pairs]\n",
    "async": "import asyncio\nasync def compute_score(reward_input):\n    await asyncio.sleep(0)\n"
    "    return {'overall': 2.0 * (reward_input['response'] == reward_input['ground_truth'])}\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_functions_of_other_projects_run_as_they_are(tmp_path, name):
    reference = write(tmp_path, FOREIGN[name])
    check_reward(RewardConfig(reference))
    items = [RewardItem(text, 1, "7", "p", prompt_ids=(1, 2), response_ids=[40 + int(text)]) for text in "78"]
    right, wrong = run(reference, items)
    assert (right.overall, right.accuracy, wrong.overall, wrong.accuracy) == (2.0, 1.0, 0.0, 0.0), right.reason


def test_verls_batch_form_sees_a_group_in_one_call(tmp_path):
    source = "def compute_score(solution_strs, **kwargs):\n    return [len(solution_strs)] * len(solution_strs)"
    results = run(write(tmp_path, source), [RewardItem("7", 1, "7", group=at) for at in (0, 0, 0, 1)], "group")
    assert [result.overall for result in results] == [3, 3, 3, 1]


def test_a_function_that_names_no_argument_is_refused(tmp_path):
    reference = write(tmp_path, "def compute_score(**kwargs): return 1.0")
    for check in (check_reward, lambda config: run(config.reward_function, [])):
        with pytest.raises(UserError, match=r"names no argument.*completions as TRL's, or solution_str as verl's"):
            check(RewardConfig(reference))


def test_a_dictionary_has_no_token_ids(tmp_path):
    """They go to TRL's rewards alone, whatever others stand beside."""
    (tmp_path / "a.py").write_text("def keys(reward_input):\n    return {'overall': 'response_ids' in reward_input}\n")
    (tmp_path / "b.py").write_text("def ids(completion_ids, **kwargs):\n    return [sum(completion_ids[0])]\n")
    functions = [{"function": f"{tmp_path / name}"} for name in ("a.py:keys", "b.py:ids")]
    with RewardPool(RewardConfig(functions=functions, num_workers=1)) as pool:
        (result,) = pool.score([RewardItem("7", 1, "7", response_ids=[5, 6])])
    assert result.parts == {"keys": 0.0, "ids": 11.0}, result.reason


def test_of_several_rewards_those_that_apply_count(tmp_path):
    """As TRL's nansum: a None of one task's reward is no word about the other's."""
    (tmp_path / "a.py").write_text(
        "def sums(completions, task, **kwargs):\n    return [1.0 if name == 'sum' else None for name in task]\n"
        "def code(completions, task, **kwargs):\n    return [0.5 if name == 'code' else None for name in task]\n"
    )
    functions = [{"function": f"{tmp_path / 'a.py'}:{name}", "weight": 2} for name in ("sums", "code")]
    items = [RewardItem("7", 1, "7", columns={"task": task}) for task in ("sum", "code", "art")]
    with RewardPool(RewardConfig(functions=functions, num_workers=1)) as pool:
        sums, code, art = pool.score(items)
    assert (sums.overall, code.overall, art.failure) == (2.0, 1.0, "unscored")
    assert sums.parts == pytest.approx({"sums": 1.0, "code": math.nan}, nan_ok=True)
    assert code.parts == pytest.approx({"sums": math.nan, "code": 0.5}, nan_ok=True)


# The first is in the form of TRL's documentation, the second sees the prompt too.
CONVERSATIONAL = {
    "format": "import re\ndef compute_score(completions, **kwargs):\n"
    "    pattern = r'^<think>.*?</think><answer>.*?</answer>$'\n"
    "    completion_contents = [completion[0]['content'] for completion in completions]\n"
    "    matches = [re.match(pattern, content) for content in completion_contents]\n"
    "    return [2.0 if match else 0.0 for match in matches]\n",
    "prompt": "def compute_score(prompts, completions, answer):\n"
    "    assert [[turn['role'] for turn in prompt] for prompt in prompts] == [['system', 'user']]\n"
    "    assert [turn['role'] for turn in completions[0]] == ['assistant']\n"
    "    return [2.0 * c[0]['content'].endswith(f'<answer>{p[-1][\"content\"]}{a}</answer>')\n"
    "            for p, c, a in zip(prompts, completions, answer)]\n",
}
ASKED = ({"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 5 = "})


@pytest.mark.parametrize("prefill", ["", "<think>"])
@pytest.mark.parametrize("name", CONVERSATIONAL)
def test_trls_conversational_functions_are_given_messages(tmp_path, name, prefill):
    """A prefill is the completion's beginning and no message of the prompt, as in TRL."""
    messages = (*ASKED, {"role": "assistant", "content": prefill}) if prefill else ASKED
    texts = ["<think>a</think><answer>2 + 5 = 7</answer>", "<think>a</think>7"]
    items = [RewardItem(text.removeprefix(prefill), 1, "7", "as text", messages=messages) for text in texts]
    right, wrong = run(write(tmp_path, CONVERSATIONAL[name]), items)
    assert (right.overall, wrong.overall) == (2.0, 0.0), right.reason


@pytest.mark.parametrize(
    ("read", "messages", "message"),
    [
        (
            "c[0]['content']", (),
            r"completions are texts, because the rows' prompts are; use completion instead of "
            r'completion\[0\]\["content"\], or give prompts as lists of messages$',
        ),
        ("c.strip()", ASKED, r'completions are lists of messages.*; use completion\[0\]\["content"\] instead of comp'),
        ("re.search('a', c)", ASKED, "completions are lists of messages"),
        ("kwargs['rubric']", (), "^LookupError: no 'rubric'; where that is a column of the data, name it in data.rew"),
        ("{}['rubric', c]", (), r"^KeyError: \('rubric', 'ab'\)$"),
        ("c.no_such_name", (), "^AttributeError: 'str' object has no attribute 'no_such_name'$"),
    ],
)  # fmt: skip
def test_a_function_that_reads_the_other_form_is_told_so(tmp_path, read, messages, message):
    source = f"import re\ndef compute_score(completions, **kwargs):\n    return [len({read}) for c in completions]\n"
    (result,) = run(write(tmp_path, source), [RewardItem("ab", 1, "7", messages=messages)])
    assert result.failure == "error" and re.search(message, result.reason), result.reason


def test_other_interfaces_see_no_messages(tmp_path):
    source = "def compute_score(reward_input):\n    return {'overall': 'messages' in reward_input}\n"
    (result,) = run(write(tmp_path, source), [RewardItem("7", 1, "7", messages=ASKED)])
    assert result.overall == 0.0


def test_trls_none_leaves_the_response_unscored(tmp_path):
    (result,) = run(write(tmp_path, "def compute_score(completions, **kwargs):\n    return [None]\n"), [RIGHT])
    assert result.failure == "unscored"


def test_several_rewards_are_summed_by_their_weights(tmp_path):
    (tmp_path / "a.py").write_text("def brevity(reward_input, limit):\n    return {'overall': limit - 1.0}\n")
    (tmp_path / "b.py").write_text("def exact(completions, answer, **kwargs):\n    return [3.0]\n")
    functions = [
        {"function": "math", "weight": 0.5},
        {"function": f"{tmp_path / 'a.py'}:brevity", "weight": 2, "kwargs": {"limit": 5}},
        {"function": f"{tmp_path / 'b.py'}:exact"},
    ]
    config = RewardConfig(functions=functions, num_workers=1)
    check_reward(config)
    check_reward_config(config)
    with RewardPool(config) as pool:
        (result,) = pool.score([RewardItem("\\boxed{7}", 1, "7")])
    assert result.overall == pytest.approx(0.5 * 0.9 + 2 * 4.0 + 3.0), result.reason
    assert result.accuracy == 1.0
    assert result.parts == pytest.approx({"math": 0.9, "brevity": 4.0, "exact": 3.0, "format": 0.0})


@pytest.mark.parametrize("name", ["a", "unscored"])
def test_a_part_of_any_name_is_a_part(tmp_path, name):
    (tmp_path / "a.py").write_text(
        f"def {name}(reward_input):\n    return {{'overall': 1.0, 'b': 9.0, 'unscored': 4.0}}\n"
        "def b(reward_input):\n    return {'overall': 2.0, 'note': 'text'}\n"
    )
    functions = [{"function": f"{tmp_path / 'a.py'}:{each}"} for each in (name, "b")]
    with RewardPool(RewardConfig(functions=functions, num_workers=1)) as pool:
        (result,) = pool.score([RewardItem("7", 1, "7")])
    assert (result.overall, result.parts) == (3.0, {"unscored": 4.0} | {name: 1.0, "b": 2.0}), result.reason


@pytest.mark.parametrize("returned", ["{'overall': '2'}", "'2'", "{'score': 2.0}", "None"])
def test_among_several_text_is_no_number(tmp_path, returned):
    (tmp_path / "a.py").write_text(
        f"def a(reward_input):\n    return {{'overall': 1.0}}\ndef b(reward_input):\n    return {returned}\n"
    )
    functions = [{"function": f"{tmp_path / 'a.py'}:{name}"} for name in "ab"]
    with RewardPool(RewardConfig(functions=functions, num_workers=1)) as pool:
        (result,) = pool.score([RewardItem("7", 1, "7")])
    assert result.failure == "error" and "b returned" in result.reason, result


@pytest.mark.parametrize("weight", [2, -1, "0.2", True, math.nan])
@pytest.mark.parametrize("name", ["math", "r1v"])
def test_a_weight_of_the_format_that_would_pay_wrong_answers_is_refused(name, weight):
    kwargs = {"format_weight": weight}
    for config in (RewardConfig(name, kwargs), RewardConfig(functions=[{"function": name, "kwargs": kwargs}])):
        with pytest.raises(UserError, match=rf"format_weight of '{name}' must be a number in \[0, 1\], got"):
            check_reward_config(config)
    check_reward_config(RewardConfig(name, {"format_weight": 0.2}))


@pytest.mark.parametrize(
    "entry",
    [
        "math", {"weight": 1}, {"function": "math", "weight": "x"}, {"function": "nope"},
        {"function": "mine.py:overall"}, {"function": "mine.py:accuracy"},
    ],
)  # fmt: skip
def test_what_is_no_reward_among_several(entry):
    with pytest.raises(UserError, match=r"worker\.reward\.(functions\[0\]|reward_function)"):
        check_reward_config(RewardConfig(functions=[entry]))
