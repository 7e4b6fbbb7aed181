"""`mmr1-ds export`: what it writes is the policy, whole or not there, and transformers and vLLM load it."""

import json
import os
import shutil

import pytest
import torch
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model, save_vision_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mmr1_ds.commands import cli

NAME = "global_step_2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{folder}/there", "{folder}"], "exists already"),
        (["{folder}/nowhere", "{folder}/out"], "nowhere does not exist"),
        (["{folder}/there", "{folder}/out"], "config.yaml is missing; name the configuration"),
        (["{folder}/there", "{folder}/there", "{folder}/out"], "name one CHECKPOINT_FOLDER, not 2"),
        (["config={folder}/config.yaml", "{folder}/out"], "no undamaged checkpoint exists in {folder}/run"),
        (["config={folder}/config.yaml", "{folder}/out", "--best"], "{folder}/run/checkpoints has no best checkpoint"),
        (["{folder}/there", "{folder}/out", "--best"], "--best is the best checkpoint of a run, not of"),
        (["config={folder}/config.yaml", "{folder}/there", "{folder}/out"], "is not a checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "there").mkdir()
    (tmp_path / "config.yaml").write_text(f"trainer:\n  run_dir: {tmp_path}/run\n")
    assert cli.main(["export", *(word.format(folder=tmp_path) for word in words)]) == 2
    assert said.format(folder=tmp_path) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "there"]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A run of two ranks on images."""
    folder = tmp_path_factory.mktemp("vision")
    model = save_vision_model(folder / "model")
    run_ranks("saved_policy.py", model, folder / "run", 0, num_ranks=2)
    assert cli.main(["export", str(folder / "run" / "checkpoints" / NAME), str(folder / "out")]) == 0
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run with adapters on a model whose output layer is its embedding."""
    folder = tmp_path_factory.mktemp("adapted")
    model = save_text_model(folder / "model", tied=True)
    run_ranks("saved_policy.py", model, folder / "run", 3)
    return folder


def equal_weights(model, expected, rounded=lambda weight: weight):
    found = dict(model.named_parameters())
    assert sorted(found) == sorted(expected)
    return [name for name, weight in expected.items() if not torch.equal(found[name], rounded(weight))]


def moved(expected, model):
    """Names of the weights that training changed."""
    before = dict(model.named_parameters())
    return [name for name, weight in expected.items() if not torch.equal(before[name], weight)]


@pytest.mark.slow
def test_transformers_loads_exactly_the_policy(vision):
    expected = torch.load(vision / "run" / "policy.pt")["weights"]
    found = AutoModelForImageTextToText.from_pretrained(vision / "out")
    assert found.dtype == torch.float32  # as the model folder
    assert equal_weights(found, expected) == []
    assert len(moved(expected, AutoModelForImageTextToText.from_pretrained(vision / "model"))) > 20
    one, other = (AutoProcessor.from_pretrained(vision / name) for name in ("model", "out"))
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab() and one.chat_template == other.chat_template
    assert one.image_processor.to_dict() == other.image_processor.to_dict()


@pytest.mark.slow
def test_vllm_answers_as_the_actor(vision, tmp_path):
    run_ranks("exported_in_vllm.py", vision / "out", tmp_path / "answers.pt")
    expected, actual = (torch.load(path) for path in (vision / "run" / "policy.pt", tmp_path / "answers.pt"))
    assert actual["tokens"] == expected["tokens"]
    assert sum(len(tokens) for tokens in actual["tokens"]) > 8
    for one, other in zip(expected["logprobs"], actual["logprobs"], strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["qwen3_vl_moe", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("qwen3_moe", "qwen3_5_moe"))],
)
def test_a_mixture_is_written_as_it_was_published(tmp_path, family):
    """Experts one by one, or stacked, with their axes exchanged or not: what transformers and vLLM load."""
    save, kind = {
        "qwen3_moe": (save_text_model, AutoModelForCausalLM),
        "qwen3_vl_moe": (save_vision_model, AutoModelForImageTextToText),
        "qwen3_5_moe": (save_vision_model, AutoModelForImageTextToText),
    }[family]
    model = save(tmp_path / "model", family=family)
    run_ranks("saved_policy.py", model, tmp_path / "run", 0, num_ranks=2)
    assert cli.main(["export", str(tmp_path / "run" / "checkpoints" / NAME), str(tmp_path / "out")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert {name: item.shape for name, item in before.items()} == {name: item.shape for name, item in after.items()}
    expected = torch.load(tmp_path / "run" / "policy.pt")
    found = kind.from_pretrained(tmp_path / "out")
    assert equal_weights(found, expected["weights"]) == []
    assert any(".experts." in name for name in moved(expected["weights"], kind.from_pretrained(model)))
    run_ranks("exported_in_vllm.py", tmp_path / "out", tmp_path / "answers.pt")
    actual = torch.load(tmp_path / "answers.pt")
    assert actual["tokens"] == expected["tokens"]
    for one, other in zip(expected["logprobs"], actual["logprobs"], strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_by_the_run_s_config_in_bf16_and_in_several_files(vision):
    out = vision / "small"
    words = [f"config={vision / 'run' / 'config.yaml'}", str(out), "--dtype", "bf16", "--max-shard-size", "200KB"]
    assert cli.main(["export", *words]) == 0
    assert len(list(out.glob("*.safetensors"))) > 3
    found = AutoModelForImageTextToText.from_pretrained(out)
    expected = torch.load(vision / "run" / "policy.pt")["weights"]
    assert found.dtype == torch.bfloat16
    assert equal_weights(found, expected, lambda weight: weight.bfloat16()) == []


@pytest.mark.slow
def test_nothing_is_written_from_a_damaged_one_or_over_anything(vision, capsys, monkeypatch):
    checkpoint = vision / "damaged" / "checkpoints" / NAME
    shutil.copytree(vision / "run", vision / "damaged")
    file = checkpoint / "actor" / "zero3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert cli.main(["export", str(checkpoint), str(vision / "none")]) == 2
    said = capsys.readouterr().err
    assert "is damaged" in said and file.name in said
    assert cli.main(["export", str(vision / "run" / "checkpoints" / NAME), str(vision / "out")]) == 2
    assert "exists already" in capsys.readouterr().err

    def full(*_arguments, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Qwen2_5_VLProcessor.save_pretrained", full)
    assert cli.main(["export", str(vision / "run" / "checkpoints" / NAME), str(vision / "none")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (vision / "none").exists() and not list(vision.glob(".*"))


@pytest.mark.slow
def test_adapters_are_merged_or_written_alone(adapted, capsys):
    from peft import PeftModel

    checkpoint = str(adapted / "run" / "checkpoints" / NAME)
    assert cli.main(["export", checkpoint, str(adapted / "merged"), "--merge-lora"]) == 0
    assert cli.main(["export", checkpoint, str(adapted / "alone")]) == 0
    expected = torch.load(adapted / "run" / "policy.pt")["weights"]
    found = AutoModelForCausalLM.from_pretrained(adapted / "merged")
    assert equal_weights(found, expected) == []
    base = AutoModelForCausalLM.from_pretrained(adapted / "model")
    assert len(moved(expected, base)) == 14  # seven layers in each of two
    together = PeftModel.from_pretrained(base, adapted / "alone").merge_and_unload()
    for name, weight in together.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(adapted / "merged").chat_template
    assert json.loads((adapted / "merged" / "config.json").read_text())["tie_word_embeddings"] is True

    weights = adapted / "model" / "model.safetensors"
    weights.rename(adapted / "kept")
    save_text_model(adapted / "model", tied=True, seed=4)
    assert cli.main(["export", checkpoint, str(adapted / "other"), "--merge-lora"]) == 2
    assert "adapters for other weights" in capsys.readouterr().err and not (adapted / "other").exists()
