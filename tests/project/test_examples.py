"""Every example loads, is planned as its README starts it, and has a reward that tells right from wrong."""

import re
import runpy

import pytest
from fixtures.dry_runs import planned
from fixtures.launching import ROOT

EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_dir())
CONFIGS = {"easyr1": "easyr1.yaml"}
ITEM = {"response_length": 9, "prompt": "What is 7 + 5?", "ground_truth": "12"}
RIGHT = {"real_text": " 12."}
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
